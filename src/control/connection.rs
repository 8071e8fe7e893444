// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One client: what it has said so far, and what it has not read yet. Nothing here waits.

use std::io::{self, ErrorKind, Write};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::passing::receive;
use super::protocol::{LONGEST_LINE, MOST_DEVICES, Refusal, RefusalKind, Reply, write_reply};

/// How much is read at once.
const READ_AT_ONCE: usize = 16 << 10;

/// A client.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// What came and is not handled yet.
    input: Vec<u8>,
    /// Up to where the input was searched for the end of a line.
    searched: usize,
    /// Files that came with it.
    files: Vec<OwnedFd>,
    /// What the client has not taken yet.
    output: Vec<u8>,
    /// Since when the client is waited for: to go on with a line, or to read.
    waiting_since: Option<Instant>,
    /// The number of the last fault that the client was told of, if it follows them.
    pub following: Option<u64>,
    /// It is closed when it has read what there is.
    is_ending: bool,
}

/// What became of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It stays.
    Stays,
    /// It is gone, or to be closed.
    Ends,
}

/// A line, and the files that came with it.
pub(super) type Line = (Vec<u8>, Vec<OwnedFd>);

impl Connection {
    /// A client that has just come.
    ///
    /// # Errors
    ///
    /// Whatever the kernel says.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            searched: 0,
            files: Vec::new(),
            output: Vec::new(),
            waiting_since: None,
            following: None,
            is_ending: false,
        })
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether there is something that the client has not read. Until it has, nothing more of its is read.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether a line is there already that came with the one before.
    pub fn has_line(&self) -> bool {
        self.input.iter().skip(self.searched).any(|byte| *byte == b'\n')
    }

    /// When it is waited for no longer, with so much patience.
    pub fn deadline(&self, patience: Duration) -> Option<Instant> {
        self.waiting_since.map(|since| since + patience)
    }

    /// Reads what is there, once.
    pub fn read(&mut self, now: Instant) -> Outcome {
        let mut buffer = [0; READ_AT_ONCE];
        match receive(&self.stream, &mut buffer, &mut self.files) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Outcome::Stays,
            Err(_) => Outcome::Ends,
            Ok(received) if received.length == 0 => Outcome::Ends,
            Ok(received) => {
                self.input.extend(buffer.iter().take(received.length));
                self.waiting_since.get_or_insert(now);
                if received.files_lost || self.files.len() > MOST_DEVICES {
                    let text = format!("more than {MOST_DEVICES} files came with a request: none takes so many");
                    self.refuse(RefusalKind::Files, text, now);
                }
                Outcome::Stays
            }
        }
    }

    /// The next line, if all of it is there.
    pub fn next_line(&mut self, now: Instant) -> Option<Line> {
        if self.is_ending || self.has_output() {
            return None;
        }
        let end = self.input.iter().skip(self.searched).position(|byte| *byte == b'\n').map(|at| at + self.searched);
        let longest = end.unwrap_or(self.input.len());
        if longest > LONGEST_LINE {
            let text = format!("a line has at most {LONGEST_LINE} bytes: this one has more");
            self.refuse(RefusalKind::Malformed, text, now);
            return None;
        }
        let Some(end) = end else {
            self.searched = self.input.len();
            self.waiting_since = self.waiting_since.filter(|_| !self.input.is_empty());
            return None;
        };
        let rest = self.input.split_off(end + 1);
        let mut line = mem::replace(&mut self.input, rest);
        line.truncate(end);
        self.searched = 0;
        self.waiting_since = Some(now).filter(|_| !self.input.is_empty());
        Some((line, mem::take(&mut self.files)))
    }

    /// Has a reply written.
    pub fn reply(&mut self, reply: Reply, now: Instant) {
        self.output.extend(write_reply(reply));
        self.waiting_since = Some(now);
    }

    /// Has a refusal written, after which the client is closed.
    pub fn refuse(&mut self, kind: RefusalKind, message: String, now: Instant) {
        self.is_ending = true;
        self.input = Vec::new();
        self.files.clear();
        self.reply(Reply::Refused(Refusal::new(kind, message)), now);
    }

    /// Writes as much as the client takes.
    pub fn write(&mut self) -> Outcome {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return Outcome::Ends,
                Ok(written) => _ = self.output.drain(..written),
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Outcome::Stays,
                Err(_) => return Outcome::Ends,
            }
        }
        self.output = Vec::new();
        self.waiting_since = self.waiting_since.filter(|_| !self.input.is_empty());
        if self.is_ending { Outcome::Ends } else { Outcome::Stays }
    }
}
