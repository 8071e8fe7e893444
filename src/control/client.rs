// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The other side: what asks a daemon.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::lines::Lines;
use super::passing::send;
use super::protocol::{Refusal, Reply, Request, read_reply, write_request};

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    lines: Lines,
    /// How long an answer may take.
    patience: Duration,
}

/// How long an answer may take: that each of [`MOST_DEVICES`](super::protocol::MOST_DEVICES) endpoints is removed whose files the watcher
/// is waited for, a few seconds for each, while other clients are answered.
const PATIENCE: Duration = Duration::from_secs(300);
/// The longest line of a daemon's that is taken, in bytes with its end: what the guest is told of all endpoints is a fraction.
const LONGEST_ANSWER: usize = 16 << 20;

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
    /// The daemon says nothing.
    #[error("the daemon has not answered for {} seconds: its log may say why; what it was asked it may do still", .0.as_secs())]
    Late(Duration),
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
        Self::connect_with(path, PATIENCE)
    }

    fn connect_with(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).and_then(|stream| {
            stream.set_write_timeout(Some(patience))?;
            Ok(stream)
        });
        let stream = stream.map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(Self { lines: Lines::new(stream, LONGEST_ANSWER), patience })
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
        let sent = send(self.lines.stream(), &write_request(request), files);
        let deadline = Instant::now() + self.patience;
        match (self.reply_until(deadline), sent) {
            // One that is refused at once may not have been read.
            (Err(ClientError::Ended | ClientError::Broken(_)), Err(error)) => Err(ClientError::Broken(error)),
            (answer, _) => answer,
        }
    }

    /// Waits for the next line that the daemon has to say, however long it has nothing to say.
    ///
    /// # Errors
    ///
    /// [`ClientError`], but not [`ClientError::Late`]
    pub fn next_reply(&mut self) -> Result<Reply, ClientError> {
        loop {
            match self.reply_until(Instant::now() + self.patience) {
                Err(ClientError::Late(_)) => (),
                result => return result,
            }
        }
    }

    fn reply_until(&mut self, deadline: Instant) -> Result<Reply, ClientError> {
        let line = self.lines.next(deadline).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ClientError::Ended,
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => ClientError::Late(self.patience),
            _ => ClientError::Broken(error),
        })?;
        match read_reply(&line).map_err(ClientError::Unknown)? {
            Reply::Refused(refusal) => Err(refusal.into()),
            reply => Ok(reply),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    const SHORT: Duration = Duration::from_millis(200);
    /// Longer than a busy machine takes for anything here.
    const LONG: Duration = Duration::from_secs(60);

    /// A client of a daemon that reads a request, and then does this.
    fn client(answer: impl FnOnce(UnixStream) + Send + 'static) -> (Client, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            answer(stream);
        });
        (Client::connect_with(&path, SHORT).unwrap(), directory)
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_not_waited_for_for_ever() {
        let (mut silent, _directory) = client(|_stream| thread::sleep(LONG));
        assert!(matches!(silent.ask(Request::List), Err(ClientError::Late(_))));
        let (mut slow, _directory) = client(|mut stream| {
            while stream.write_all(b" ").is_ok() {
                thread::sleep(SHORT / 10);
            }
        });
        let start = Instant::now();
        assert!(matches!(slow.ask(Request::List), Err(ClientError::Late(_))));
        assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
    }

    #[test]
    fn a_daemon_that_does_not_read_is_not_waited_for_for_ever() {
        let (mut client, _directory) = client(|_stream| thread::sleep(LONG));
        let endpoints = vec![crate::reserved::facts::Text(crate::id::EndpointId(8)); 1 << 16];
        let start = Instant::now();
        assert!(client.ask(Request::Remove { endpoints }).is_err());
        assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let (client, _directory) = client(|mut stream| while stream.write_all(&[b'x'; 4096]).is_ok() {});
        let mut client = Client { patience: PATIENCE, ..client };
        let error = client.ask(Request::List).unwrap_err();
        assert!(matches!(&error, ClientError::Broken(error) if error.kind() == io::ErrorKind::Other), "{error:?}");
    }

    #[test]
    fn what_is_followed_may_take_its_time() {
        let (mut client, _directory) = client(|mut stream| {
            let answer = b"{\"version\":1,\"reply\":\"settled\"}\n";
            stream.write_all(answer).unwrap();
            thread::sleep(3 * SHORT);
            let (first, rest) = answer.split_at(9);
            stream.write_all(first).unwrap();
            thread::sleep(3 * SHORT);
            stream.write_all(rest).unwrap();
        });
        assert!(matches!(client.ask(Request::Bound), Ok(Reply::Settled)));
        assert!(matches!(client.next_reply(), Ok(Reply::Settled)));
        assert!(matches!(client.next_reply(), Err(ClientError::Ended)));
    }
}
