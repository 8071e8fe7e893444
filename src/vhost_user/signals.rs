// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Signals that ask the process to end.

use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use log::error;
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

    /// Waits for a connection; whether there is one, rather than a signal.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn wait_for_frontend(&self, listener: &UnixListener) -> io::Result<bool> {
        loop {
            let mut waiting = [PollFd::new(&self.pipe, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            match poll(&mut waiting, None) {
                Ok(_) if !waiting[0].revents().is_empty() => return Ok(false),
                Ok(_) if !waiting[1].revents().is_empty() => return Ok(true),
                Ok(_) | Err(Errno::INTR) => (),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits for a signal, then acts.
    pub fn then(mut self, act: impl FnOnce()) {
        loop {
            match self.pipe.read(&mut [0]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Ok(_) => return act(),
                Err(error) => return error!("signals are not heard any more: {error}"),
            }
        }
    }
}
