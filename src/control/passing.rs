// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes and files over a Unix socket (`SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::protocol::MOST_DEVICES;

/// How many files can come at once: include/net/scm.h, `SCM_MAX_FD`.
pub(crate) const MOST_FILES: usize = 253;
/// Room for so many.
const LARGEST_SPACE: usize = cmsg_space!(ScmRights(MOST_FILES));

/// What came.
#[derive(Debug)]
pub(crate) struct Received {
    /// How many bytes; 0 is the end of the stream.
    pub length: usize,
    /// There were more files than were to be taken; the others are closed.
    pub files_lost: bool,
}

/// Receives what is there, and puts files that come with it, at most [`MOST_DEVICES`], to those that came before. They are closed on
/// exec.
///
/// # Errors
///
/// Whatever the kernel says; nothing was received then.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<Received> {
    receive_at_most::<MOST_DEVICES>(socket, buffer, files)
}

/// As [`receive`], with at most so many files; no more than [`MOST_FILES`].
pub(crate) fn receive_at_most<const MOST: usize>(
    socket: impl AsFd,
    buffer: &mut [u8],
    files: &mut Vec<OwnedFd>,
) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); LARGEST_SPACE];
    let mut ancillary = RecvAncillaryBuffer::new(space.get_mut(..cmsg_space!(ScmRights(MOST))).unwrap_or_default());
    let message = loop {
        let mut parts = [IoSliceMut::new(buffer)];
        match recvmsg(&socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => (),
            result => break result?,
        }
    };
    let before = files.len();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            files.extend(passed);
        }
    }
    // The room is rounded up.
    let has_more = files.len() - before > MOST;
    files.truncate(before + MOST);
    let files_lost = has_more || message.flags.contains(ReturnFlags::CTRUNC);
    Ok(Received { length: message.bytes, files_lost })
}

/// Sends bytes, with files beside the first of them; at most [`MOST_DEVICES`]. Waits until all are taken.
///
/// # Errors
///
/// Whatever the kernel says; a part may have been sent.
pub(crate) fn send(socket: impl AsFd, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_at_most::<MOST_DEVICES>(socket, bytes, files)
}

/// As [`send`], with at most so many files; no more than [`MOST_FILES`].
pub(crate) fn send_at_most<const MOST: usize>(
    socket: impl AsFd,
    mut bytes: &[u8],
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); LARGEST_SPACE];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let too_many = || io::Error::other(format!("more than {MOST} files cannot be sent at once"));
    if files.len() > MOST {
        return Err(too_many());
    }
    if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(too_many());
    }
    while !bytes.is_empty() {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(sent) => {
                bytes = bytes.get(sent..).unwrap_or_default();
                ancillary.clear();
            }
            Err(Errno::INTR) => (),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn files_arrive_with_the_bytes() {
        let (here, there) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        send(&here, b"with two", &[null.as_fd(), null.as_fd()]).unwrap();
        let (mut buffer, mut files) = ([0; 64], Vec::new());
        let received = receive(&there, &mut buffer, &mut files).unwrap();
        assert_eq!((received.length, received.files_lost, files.len()), (8, false, 2));
        let flags = rustix::io::fcntl_getfd(&files[0]).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        send(&here, b"bare", &[]).unwrap();
        assert_eq!(receive(&there, &mut buffer, &mut files).unwrap().length, 4);
        assert_eq!(files.len(), 2);
        drop(here);
        assert_eq!(receive(&there, &mut buffer, &mut files).unwrap().length, 0);
    }

    #[test]
    fn more_files_than_are_expected_are_closed() {
        use std::io::IoSlice;

        let (here, there) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        let many = vec![null.as_fd(); MOST_DEVICES + 1];
        assert!(send(&here, b"x", &many).is_err());
        let mut space = vec![MaybeUninit::uninit(); 1024];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(&here, &[IoSlice::new(b"x")], &mut ancillary, SendFlags::empty()).unwrap();
        let (mut buffer, mut files) = ([0; 64], Vec::new());
        let received = receive(&there, &mut buffer, &mut files).unwrap();
        assert!(received.files_lost);
        assert_eq!(files.len(), MOST_DEVICES);
    }
}
