// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection that was passed, for a library that takes connections only from a listener: messages that come over it are handed on,
//! each with its files, to a connection that the library can accept.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen, socket_with,
};

use crate::control::passing::{MOST_FILES, receive_at_most, send_at_most};
use crate::sandbox::{Sandbox, StartError, ThreadKind};

/// What every message of vhost-user begins with: request, flags, and the size of the rest, 32 bits each.
const HEADER: usize = 12;
/// The library takes no more.
const LARGEST_BODY: usize = 0x1000;

/// A connection that is not handed on yet.
#[derive(Debug)]
pub(super) struct Relay {
    to_backend: Direction,
    to_frontend: Direction,
}

/// One direction of it.
#[derive(Debug)]
struct Direction {
    from: UnixStream,
    to: UnixStream,
    /// What is closed of the other side at the end.
    end: Shutdown,
}

impl Relay {
    /// Prepares to hand a connection on; the listener has one connection to be accepted.
    ///
    /// # Errors
    ///
    /// There are no sockets left, or another process was quicker to connect.
    pub fn new(frontend: UnixStream) -> io::Result<(UnixListener, Self)> {
        let (listener, backend) = listener_and_its_connection()?;
        let there = (frontend.try_clone()?, backend.try_clone()?);
        // What the frontend sent before it closed is still answered.
        let to_backend = Direction { from: there.0, to: there.1, end: Shutdown::Write };
        let to_frontend = Direction { from: backend, to: frontend, end: Shutdown::Both };
        Ok((listener, Self { to_backend, to_frontend }))
    }

    /// Hands on what comes, until either side closes the connection.
    ///
    /// # Errors
    ///
    /// There are no threads left, or they cannot be confined.
    pub fn start(self, sandbox: Sandbox) -> Result<(), StartError> {
        let Self { to_backend, to_frontend } = self;
        sandbox.spawn(ThreadKind::Relay, "to-backend", || to_backend.hand_on())?;
        sandbox.spawn(ThreadKind::Relay, "to-frontend", || to_frontend.hand_on())
    }
}

impl Direction {
    fn hand_on(self) {
        let Self { from, to, end } = self;
        // Whatever went wrong, each side sees the end of the connection.
        let _ = copy(&from, &to);
        let _ = to.shutdown(end);
    }
}

/// A listener whose only connection is the one that is returned too.
fn listener_and_its_connection() -> io::Result<(UnixListener, UnixStream)> {
    let socket = || socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let (listener, stream) = (socket()?, socket()?);
    // In the abstract name space, with a name of the kernel's choice. Others can connect there too: so there is room for one
    // connection, and if that is not ours, nothing is served.
    bind(&listener, &SocketAddrUnix::new_unnamed())?;
    listen(&listener, 0)?;
    rustix::io::ioctl_fionbio(&stream, true)?;
    connect(&stream, &getsockname(&listener)?).map_err(|errno| match errno {
        Errno::AGAIN => io::Error::other("another process connected to a socket that was not meant for it"),
        errno => errno.into(),
    })?;
    rustix::io::ioctl_fionbio(&stream, false)?;
    Ok((listener.into(), stream.into()))
}

/// Copies messages until the end. Never reads past the end of one: the kernel joins what was sent apart, and the files of the next
/// message would come with this one.
fn copy(from: &UnixStream, to: &UnixStream) -> io::Result<()> {
    let (mut header, mut body) = ([0; HEADER], [0; LARGEST_BODY]);
    loop {
        let mut files = Vec::new();
        let length = fill(from, &mut header, &mut files)?;
        let [.., a, b, c, d] = header;
        let size = u32::from_ne_bytes([a, b, c, d]) as usize;
        let Some(body) = body.get_mut(..size).filter(|_| length == HEADER) else {
            // The end, or too large: the library says what there is to say.
            return send(to, header.get(..length).unwrap_or_default(), &files);
        };
        let got = fill(from, body, &mut files)?;
        send(to, &[&header, body.get(..got).unwrap_or_default()].concat(), &files)?;
        if got < size {
            return Ok(());
        }
    }
}

/// Fills a buffer, except at the end; how much there was. The files that came with it are added.
fn fill(from: &UnixStream, buffer: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let received = receive_at_most::<MOST_FILES>(from, rest, files)?;
        // A message without its files would be another message.
        if received.files_lost || files.len() > MOST_FILES {
            return Err(io::Error::other("files of the frontend's cannot be taken: there are too many"));
        }
        if received.length == 0 {
            break;
        }
        filled += received.length;
    }
    Ok(filled)
}

/// Sends all of it, the files with the first byte.
fn send(to: &UnixStream, bytes: &[u8], files: &[OwnedFd]) -> io::Result<()> {
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    send_at_most::<MOST_FILES>(to, bytes, &files)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// The frontend's end, and what the library would accept.
    fn relayed() -> (UnixStream, UnixStream) {
        let (frontend, passed) = UnixStream::pair().unwrap();
        let (listener, relay) = Relay::new(passed).unwrap();
        relay.start(Sandbox::off()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        (frontend, accepted)
    }

    /// A message with so many bytes after its header.
    fn message(size: usize) -> Vec<u8> {
        let header = [1, 1, size as u32].map(u32::to_ne_bytes).concat();
        header.into_iter().chain((0..size).map(|index| index as u8)).collect()
    }

    /// What arrives of a message, and its files.
    fn receive_all(from: &UnixStream, length: usize) -> (Vec<u8>, Vec<OwnedFd>) {
        let (mut bytes, mut files) = (vec![0; length], Vec::new());
        let filled = fill(from, &mut bytes, &mut files).unwrap();
        bytes.truncate(filled);
        (bytes, files)
    }

    #[test]
    fn messages_arrive_as_they_were_sent_each_with_its_files() {
        for to_backend in [true, false] {
            let (frontend, accepted) = relayed();
            let (from, to) = if to_backend { (frontend, accepted) } else { (accepted, frontend) };
            let file = tempfile::tempfile().unwrap();
            let inode = file.metadata().unwrap().ino();
            let many: Vec<OwnedFd> = (0..MOST_FILES).map(|_| file.try_clone().unwrap().into()).collect();
            // All of them are there before the first is received.
            let sent = [(0, 0), (8, 1), (LARGEST_BODY, 0), (0, 2), (100, MOST_FILES), (8, 0), (8, 3)];
            for _ in 0..20 {
                for (size, count) in sent {
                    send(&from, &message(size), &many[..count]).unwrap();
                }
                for (size, count) in sent {
                    let (bytes, files) = receive_all(&to, HEADER + size);
                    assert_eq!((bytes, files.len()), (message(size), count));
                    assert!(files.into_iter().all(|file| File::from(file).metadata().unwrap().ino() == inode));
                }
            }
        }
    }

    #[test]
    fn each_side_sees_the_others_end_after_what_it_said() {
        let whole = message(20);
        let too_large = [1, 1, LARGEST_BODY as u32 + 1].map(u32::to_ne_bytes).concat();
        for said in [&whole[..], &whole[..HEADER - 1], &whole[..=HEADER], &too_large] {
            let (mut frontend, mut accepted) = relayed();
            frontend.write_all(said).unwrap();
            frontend.shutdown(Shutdown::Write).unwrap();
            let mut heard = Vec::new();
            accepted.read_to_end(&mut heard).unwrap();
            assert_eq!(heard, said);
            // It is answered all the same.
            accepted.write_all(&whole).unwrap();
            drop(accepted);
            heard.clear();
            frontend.read_to_end(&mut heard).unwrap();
            assert_eq!(heard, whole);
        }
    }

    #[test]
    fn more_files_than_fit_a_message_end_the_connection() {
        let (frontend, mut accepted) = relayed();
        let files: Vec<OwnedFd> = (0..MOST_FILES).map(|_| tempfile::tempfile().unwrap().into()).collect();
        let message = message(8);
        for byte in 0..2 {
            send(&frontend, &message[byte..=byte], &files).unwrap();
        }
        assert_eq!(accepted.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn there_is_room_for_one_connection_only() {
        let (listener, _stream) = listener_and_its_connection().unwrap();
        let other = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        assert_eq!(connect(&other, &getsockname(&listener).unwrap()), Err(Errno::AGAIN));
    }
}
