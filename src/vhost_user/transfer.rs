// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device's state on its way through a file of the frontend's.
//!
//! vhost-user, "Migrating back-end state": who sends writes it and closes the file, who receives reads to the end. A thread of its own
//! does so, with nothing of the backend's but the state: a pipe that nobody reads holds up nobody else, and no longer than
//! [`TIME`].

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::Errno;
use serde::Deserialize;
use vhost::vhost_user::message::VhostTransferStateDirection;

use super::migration::Migrated;

/// How long a state may take from one end of the file to the other. Guests are stopped meanwhile.
const TIME: Duration = Duration::from_secs(60);
/// How long the frontend's question after it is waited with: all that can be left to do then is to take what the pipe holds.
const PATIENCE: Duration = Duration::from_secs(3);
/// What a pipe that takes or has anything takes or has at least, so that nothing waits after `poll`. (Unless somebody else is at the same
/// end of it: then this thread waits, and no other.)
const PIECE: usize = 4096;

/// A state that did not get to the other end.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransferError {
    /// The file cannot be looked at.
    #[error("the file for it cannot be examined")]
    Examine(#[source] io::Error),
    /// It is no file that has an end when the other side closes it.
    #[error("the file for it is neither a pipe nor a socket")]
    Kind,
    /// It is the other end of the pipe.
    #[error("the file for it cannot be {0}: it is the other end of the pipe")]
    Direction(&'static str),
    /// There is no thread to be had.
    #[error("a thread for it cannot be started")]
    Thread(#[source] io::Error),
    /// It cannot be written.
    #[error("it cannot be written")]
    Write(#[source] io::Error),
    /// It cannot be read, or is none.
    #[error("it cannot be read")]
    Read(#[source] serde_json::Error),
    /// It is longer than any state of this device.
    #[error("it is longer than {0} bytes, which no state of this device is (--max-mappings-in-all, --max-domains)")]
    TooLong(u64),
    /// The thread panicked, which is a bug.
    #[error("it was lost, which is a bug of this backend")]
    Lost,
}

/// What came of a transfer: a state, if one was received.
type Outcome = Result<Option<Box<Migrated>>, TransferError>;

/// A transfer that was started.
#[derive(Debug)]
pub(super) struct Transfer(Receiver<Outcome>);

impl Transfer {
    /// Sends a state.
    ///
    /// # Errors
    ///
    /// The file is not for that, or there is no thread left.
    pub fn save(file: File, state: Migrated) -> Result<Self, TransferError> {
        examine(&file, VhostTransferStateDirection::SAVE)?;
        Self::start(move || write(file, &state, Instant::now() + TIME).map(|()| None))
    }

    /// Receives a state of no more than `limit` bytes.
    ///
    /// # Errors
    ///
    /// The file is not for that, or there is no thread left.
    pub fn load(file: File, limit: u64) -> Result<Self, TransferError> {
        examine(&file, VhostTransferStateDirection::LOAD)?;
        Self::start(move || read(file, limit, Instant::now() + TIME).map(|state| Some(Box::new(state))))
    }

    fn start(work: impl FnOnce() -> Outcome + Send + 'static) -> Result<Self, TransferError> {
        let (sender, receiver): (SyncSender<Outcome>, _) = sync_channel(1);
        let work = move || {
            // Nobody asks any more: the connection ended.
            let _ = sender.send(work());
        };
        thread::Builder::new().name("state".to_owned()).spawn(work).map_err(TransferError::Thread)?;
        Ok(Self(receiver))
    }

    /// Whether its thread is still at it. If not, what came of it is forgotten.
    pub fn is_under_way(&self) -> bool {
        matches!(self.0.try_recv(), Err(TryRecvError::Empty))
    }

    /// What came of it; `None` if it is under way for longer than it should be.
    pub fn wait(&self) -> Option<Outcome> {
        match self.0.recv_timeout(PATIENCE) {
            Ok(outcome) => Some(outcome),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(TransferError::Lost)),
        }
    }
}

/// Checks that a file is one to write to, or to read from, and has an end.
fn examine(file: &File, direction: VhostTransferStateDirection) -> Result<(), TransferError> {
    let failed = |errno: Errno| TransferError::Examine(errno.into());
    match FileType::from_raw_mode(fstat(file).map_err(failed)?.st_mode) {
        FileType::Fifo | FileType::Socket => (),
        _ => return Err(TransferError::Kind),
    }
    let access = fcntl_getfl(file).map_err(failed)? & OFlags::RWMODE;
    match direction {
        VhostTransferStateDirection::SAVE if access == OFlags::RDONLY => Err(TransferError::Direction("written")),
        VhostTransferStateDirection::LOAD if access == OFlags::WRONLY => Err(TransferError::Direction("read")),
        VhostTransferStateDirection::SAVE | VhostTransferStateDirection::LOAD => Ok(()),
    }
}

fn write(file: File, state: &Migrated, deadline: Instant) -> Result<(), TransferError> {
    let mut writer = BufWriter::with_capacity(PIECE, Channel { file, deadline });
    serde_json::to_writer(&mut writer, state).map_err(|error| TransferError::Write(error.into()))?;
    writer.flush().map_err(TransferError::Write)
}

fn read(file: File, limit: u64, deadline: Instant) -> Result<Migrated, TransferError> {
    // A byte more than there may be tells a state that is too long from one that was cut off.
    let mut reader = BufReader::with_capacity(PIECE, Channel { file, deadline }.take(limit.saturating_add(1)));
    let mut document = serde_json::Deserializer::from_reader(&mut reader);
    let result = Migrated::deserialize(&mut document).and_then(|state| document.end().map(|()| state));
    if reader.get_ref().limit() == 0 {
        return Err(TransferError::TooLong(limit));
    }
    result.map_err(TransferError::Read)
}

/// A file that is waited for until a deadline.
struct Channel {
    file: File,
    deadline: Instant,
}

impl Channel {
    fn wait_for(&self, events: PollFlags) -> io::Result<()> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.file, events)], Some(&timeout)) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the frontend took too long")),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => (),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Write for Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::OUT)?;
        self.file.write(bytes.get(..PIECE).unwrap_or(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Channel {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::IN)?;
        self.file.read(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::pipe;
    use std::os::fd::OwnedFd;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);

    fn channel(end: impl Into<OwnedFd>) -> Channel {
        Channel { file: File::from(end.into()), deadline: Instant::now() + SOON }
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_written_to_until_the_deadline() {
        let (_reader, writer) = pipe().unwrap();
        let mut writer = channel(writer);
        let error = io::copy(&mut io::repeat(0), &mut writer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let now = Instant::now();
        assert!(now >= writer.deadline && now < writer.deadline + 40 * SOON, "{:?}", now - writer.deadline);
    }

    #[test]
    fn a_pipe_that_nobody_closes_is_read_until_the_deadline() {
        let (reader, mut writer) = pipe().unwrap();
        writer.write_all(b"{").unwrap();
        let started = Instant::now();
        let error = read(File::from(OwnedFd::from(reader)), 100, started + SOON).unwrap_err();
        assert!(matches!(&error, TransferError::Read(cause) if cause.is_io()), "{error}");
        assert!(started.elapsed() >= SOON && started.elapsed() < 40 * SOON, "{:?}", started.elapsed());
    }

    #[test]
    fn no_more_than_the_limit_is_read() {
        for (length, is_too_long) in [(99, false), (100, false), (101, true), (10_000, true)] {
            let (reader, mut writer) = pipe().unwrap();
            writer.write_all(&vec![b' '; length]).unwrap();
            drop(writer);
            let error = read(File::from(OwnedFd::from(reader)), 100, Instant::now() + TIME).unwrap_err();
            assert_eq!(matches!(error, TransferError::TooLong(100)), is_too_long, "{length}: {error}");
        }
    }
}
