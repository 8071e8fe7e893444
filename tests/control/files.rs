// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices of the model of a host, each with a pipe for a file: when the last copy of it is closed, the other end says so.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use virtio_iommu::control::{DeviceFile, DeviceFiles, FileError, Keeper, KeeperError};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::fake::FakeHost;
use virtio_iommu::range::RangeSet;

/// How long other processes may take to let files go.
const PATIENCE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// The other end of a device's file.
pub struct Closed(OwnedFd);

/// A device's file, and its other end.
pub fn pipe() -> (OwnedFd, Closed) {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    (writer, Closed(reader))
}

impl Closed {
    /// Whether every copy of the file is closed. A process that another test starts has a copy of every file for a moment, even
    /// when it runs its program already: so long it is waited for. The fuzz target of the socket, which starts none, does not wait.
    pub fn is_closed(&self) -> bool {
        self.has_hung_up(&PATIENCE)
    }

    /// Whether a copy of the file is open, this instant.
    pub fn is_open(&self) -> bool {
        !self.has_hung_up(&Timespec::default())
    }

    fn has_hung_up(&self, patience: &Timespec) -> bool {
        let mut waiting = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut waiting, Some(patience)).unwrap();
        waiting[0].revents().contains(PollFlags::HUP)
    }
}

/// Sends bytes with files.
pub fn send(stream: &UnixStream, bytes: &[u8], files: &[BorrowedFd<'_>]) {
    let mut space = vec![MaybeUninit::uninit(); 2048];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(files)));
    }
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}

/// Makes groups of pipes.
#[derive(Debug)]
pub struct PipeFiles {
    host: FakeHost,
    usable: RangeSet,
}

impl PipeFiles {
    pub fn new(host: FakeHost, usable: RangeSet) -> Self {
        Self { host, usable }
    }
}

impl DeviceFiles for PipeFiles {
    fn identify(&self, file: BorrowedFd<'_>) -> Result<u64, FileError> {
        let stat = fstat(file).unwrap();
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => Ok(stat.st_ino),
            other => Err(FileError::Unknown(io::Error::other(format!("{other:?} is no pipe")))),
        }
    }

    fn is_node(&self, node: &std::fs::Metadata, _number: u64) -> bool {
        // No node is a pipe's: those of the test are plain files.
        node.is_file()
    }

    fn group(&self, devices: Vec<DeviceFile>) -> Result<Arc<dyn HostGroup>, FileError> {
        Ok(self
            .host
            .regroup_by_files(devices.into_iter().map(|(id, file, _)| (id, file)).collect(), self.usable.clone()))
    }
}

/// A watcher that can be told to refuse.
#[derive(Clone, Debug, Default)]
pub struct Kept(Arc<Mutex<KeptState>>);

#[derive(Debug, Default)]
struct KeptState {
    files: Vec<Option<OwnedFd>>,
    refuses_from: Option<usize>,
}

impl Kept {
    /// How many files are held.
    pub fn count(&self) -> usize {
        self.0.lock().unwrap().files.iter().flatten().count()
    }

    /// No more than so many files are taken, and none is released.
    pub fn refuse_from(&self, count: usize) {
        self.0.lock().unwrap().refuses_from = Some(count);
    }
}

impl Keeper for Kept {
    fn hold(&mut self, file: BorrowedFd<'_>) -> Result<u8, KeeperError> {
        let mut state = self.0.lock().unwrap();
        if state.refuses_from.is_some_and(|most| state.files.iter().flatten().count() >= most) {
            return Err(KeeperError::Refused);
        }
        // The place of the endpoint that is there from the start is not free.
        let place = state.files.iter().position(Option::is_none).unwrap_or(state.files.len());
        let file = Some(file.try_clone_to_owned().unwrap());
        if place == state.files.len() {
            state.files.push(file);
        } else {
            state.files[place] = file;
        }
        Ok(place as u8 + 1)
    }

    fn release(&mut self, place: u8) -> Result<(), KeeperError> {
        let mut state = self.0.lock().unwrap();
        if state.refuses_from == Some(0) {
            return Err(KeeperError::Late);
        }
        if let Some(place) = usize::from(place).checked_sub(1) {
            state.files[place] = None;
        }
        Ok(())
    }
}

/// A file that is no device's.
pub fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

/// Several copies of a file.
pub fn copies(file: &OwnedFd, count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| file.as_fd().try_clone_to_owned().unwrap()).collect()
}
