// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's part of a vhost device, as far as IOTLBs go: questions by a socket, and an IOTLB of which whole entries go.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::vhost::{Error, VhostIotlbBackend, VhostIotlbMsg, VhostIotlbType};
use rustix::io::Errno;

#[derive(Clone, Debug)]
pub(crate) struct Kernel(Arc<State>);

#[derive(Debug)]
struct State {
    questions: UnixStream,
    entries: Mutex<Vec<Entry>>,
    /// What every write is answered with.
    failure: Mutex<Option<Errno>>,
    /// There is nothing to forget anything in before the first update: vhost-vdpa.
    needs_update_first: AtomicBool,
    /// The last address that messages may be about.
    last: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub iova: u64,
    pub size: u64,
    pub host_address: u64,
    /// Reading is 1, writing is 2.
    pub access: u8,
}

impl Kernel {
    /// A device with nothing in its IOTLB, and where its questions are written.
    pub fn new() -> (Self, UnixStream) {
        let (questions, kernel) = UnixStream::pair().unwrap();
        questions.set_nonblocking(true).unwrap();
        let needs_update_first = AtomicBool::new(false);
        let last = AtomicU64::new(u64::MAX);
        let state = State { questions, entries: Mutex::default(), failure: Mutex::default(), needs_update_first, last };
        (Self(Arc::new(state)), kernel)
    }

    /// A device whose file blocks who reads from it when there is no question.
    pub fn blocking() -> (Self, UnixStream) {
        let (device, kernel) = Self::new();
        device.0.questions.set_nonblocking(false).unwrap();
        (device, kernel)
    }

    /// A vhost-vdpa device with 32 bits of address: `vhost_vdpa_process_iotlb_msg`, drivers/vhost/vdpa.c, finds no address space
    /// before an update. Some kernels take no range that begins past the last address.
    pub fn vdpa() -> Self {
        let (kernel, _) = Self::new();
        kernel.0.last.store(u32::MAX.into(), Ordering::SeqCst);
        kernel.0.needs_update_first.store(true, Ordering::SeqCst);
        kernel
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.0.entries.lock().unwrap().clone()
    }

    pub fn fail(&self, errno: Errno) {
        *self.0.failure.lock().unwrap() = Some(errno);
    }
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.questions.as_raw_fd()
    }
}

impl VhostIotlbBackend for Kernel {
    fn send_iotlb_msg(&self, message: &VhostIotlbMsg) -> Result<(), Error> {
        if let Some(errno) = *self.0.failure.lock().unwrap() {
            return Err(Error::IOError(io::Error::from(errno)));
        }
        // Whoever does not wait for it comes first.
        if message.msg_type == VhostIotlbType::Update {
            std::thread::sleep(Duration::from_micros(100));
        }
        let last = message.iova.checked_add(message.size - 1).expect("no range wraps");
        if last > self.0.last.load(Ordering::SeqCst) {
            return Err(Error::IOError(io::Error::from(Errno::INVAL)));
        }
        let mut entries = self.0.entries.lock().unwrap();
        match message.msg_type {
            VhostIotlbType::Update => {
                self.0.needs_update_first.store(false, Ordering::SeqCst);
                entries.push(Entry {
                    iova: message.iova,
                    size: message.size,
                    host_address: message.userspace_addr,
                    access: message.perm as u8,
                });
            }
            VhostIotlbType::Invalidate if self.0.needs_update_first.load(Ordering::SeqCst) => {
                return Err(Error::IOError(io::Error::from(Errno::INVAL)));
            }
            VhostIotlbType::Invalidate => {
                entries.retain(|entry| entry.iova > last || entry.iova + (entry.size - 1) < message.iova);
            }
            _ => panic!("the kernel does not know this"),
        }
        Ok(())
    }
}
