// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The other side: what asks a daemon.

use std::io::{self, BufRead, BufReader};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::passing::send;
use super::protocol::{Refusal, Reply, Request, read_reply, write_request};

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

/// A daemon that does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot reach a daemon at {}: {}", .path.display(), way_out(.source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the daemon broke")]
    Broken(#[source] io::Error),
    /// The daemon ended, or closed the connection.
    #[error("the daemon ended, or this is not its control socket")]
    Ended,
    /// The daemon said something that is not known here.
    #[error("the daemon's answer is not known here: use programs of the same version")]
    Unknown(#[source] serde_json::Error),
    /// The daemon refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// What to do about a daemon that cannot be reached.
fn way_out(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "it has ended, or was started without --control-path",
        io::ErrorKind::ConnectionRefused => "it was killed, and left its socket behind; its log says more",
        io::ErrorKind::PermissionDenied => "run this as root, or as the daemon's user",
        _ => "start it with --control-path, and give that path here",
    }
}

impl Client {
    /// Connects to a daemon's control socket.
    ///
    /// # Errors
    ///
    /// [`ClientError::Connect`]
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path);
        let stream = stream.map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    ///
    /// [`ClientError`]
    pub fn ask(&mut self, request: Request) -> Result<Reply, ClientError> {
        self.ask_with_files(request, &[])
    }

    /// Asks, with files beside the question, and waits for the answer.
    ///
    /// # Errors
    ///
    /// [`ClientError`]
    pub fn ask_with_files(&mut self, request: Request, files: &[BorrowedFd<'_>]) -> Result<Reply, ClientError> {
        let sent = send(self.stream.get_ref(), &write_request(request), files);
        match (self.next_reply(), sent) {
            // One that is refused at once may not have been read.
            (Err(ClientError::Ended | ClientError::Broken(_)), Err(error)) => Err(ClientError::Broken(error)),
            (answer, _) => answer,
        }
    }

    /// Waits for the next line that the daemon has to say.
    ///
    /// # Errors
    ///
    /// [`ClientError`]
    pub fn next_reply(&mut self) -> Result<Reply, ClientError> {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line).map_err(ClientError::Broken)?;
        let Some(line) = line.strip_suffix(b"\n") else {
            return Err(ClientError::Ended);
        };
        match read_reply(line).map_err(ClientError::Unknown)? {
            Reply::Refused(refusal) => Err(refusal.into()),
            reply => Ok(reply),
        }
    }
}
