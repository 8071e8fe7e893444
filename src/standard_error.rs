// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lines for the standard error, past the lock of Rust's library: a thread may hold that which waits because nobody reads.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, write, writev};

/// Writes a line, and waits until that can be done. Nobody can be told if it cannot.
pub(crate) fn write_line(line: &[u8]) {
    write_line_to(io::stderr().as_fd(), line);
}

/// Writes a line of less than a page, unless that would have to wait: for a process that must end. A signal handler may do this.
pub(crate) fn write_line_now(line: &str) {
    let stderr = io::stderr();
    // A pipe or socket that can be written to has room for a page.
    let mut room = [PollFd::new(&stderr, PollFlags::OUT)];
    if poll(&mut room, Some(&Timespec::default())).is_ok_and(|ready| ready > 0) {
        let _ = writev(&stderr, &[IoSlice::new(line.as_bytes()), IoSlice::new(b"\n")]);
    }
}

pub(crate) fn write_line_to(to: BorrowedFd<'_>, mut line: &[u8]) {
    while !line.is_empty() {
        match write(to, line) {
            Ok(written) => line = line.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => (),
            // Another process that has the same file may have made it so.
            Err(Errno::AGAIN) => _ = poll(&mut [PollFd::new(&to, PollFlags::OUT)], None),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    #[test]
    fn a_line_waits_for_a_file_that_does_not_block() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let line = vec![b'x'; 1 << 20];
        let (expected, written) = (line.len(), std::thread::spawn(move || write_line_to(writer.as_fd(), &line)));
        let mut read = Vec::new();
        File::from(reader).read_to_end(&mut read).unwrap();
        written.join().unwrap();
        assert_eq!(read.len(), expected);
    }
}
