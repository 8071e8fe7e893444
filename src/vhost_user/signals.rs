// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Signals that ask the process to end.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// SIGTERM and SIGINT: the first asks for an orderly end, the second ends the process at once. SIGHUP asks for an orderly end, however
/// often it comes.
#[derive(Debug)]
pub(super) struct Signals {
    pipe: UnixStream,
}

impl Signals {
    /// Hears signals from here on.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn new() -> io::Result<Self> {
        let (pipe, write_end) = UnixStream::pair()?;
        let seen = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&seen))?;
            signal_hook::flag::register(signal, Arc::clone(&seen))?;
            signal_hook::low_level::pipe::register(signal, write_end.try_clone()?)?;
        }
        signal_hook::low_level::pipe::register(SIGHUP, write_end)?;
        Ok(Self { pipe })
    }

    /// Waits until a file has something to read or is closed at its other end; whether it is so, rather than that a signal came.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn wait_for(&self, file: impl AsFd) -> io::Result<bool> {
        loop {
            let mut waiting = [PollFd::new(&self.pipe, PollFlags::IN), PollFd::new(&file, PollFlags::IN)];
            match poll(&mut waiting, None) {
                Ok(_) if !waiting[0].revents().is_empty() => return Ok(false),
                Ok(_) if !waiting[1].revents().is_empty() => return Ok(true),
                Ok(_) | Err(Errno::INTR) => (),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
