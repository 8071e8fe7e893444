// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lines from a socket, each until a deadline, however little of it comes at a time.

use std::io::{self, BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// A socket that is read by lines.
#[derive(Debug)]
pub(crate) struct Lines {
    stream: BufReader<UnixStream>,
    /// The part of a line that came before a deadline.
    line: Vec<u8>,
    /// How long one may be, in bytes with its end.
    longest: usize,
}

impl Lines {
    /// The lines that come, of so many bytes at most.
    pub fn new(stream: UnixStream, longest: usize) -> Self {
        Self { stream: BufReader::new(stream), line: Vec::new(), longest }
    }

    /// The socket, to write to.
    pub fn stream(&self) -> &UnixStream {
        self.stream.get_ref()
    }

    /// The next line, with its end.
    ///
    /// # Errors
    ///
    /// `TimedOut` or `WouldBlock` if it has not all come before the deadline: it can be waited for again. `UnexpectedEof` at the end, or
    /// whatever the kernel says.
    pub fn next(&mut self, deadline: Instant) -> io::Result<Vec<u8>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // For a socket, zero would be no limit.
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            let come = match self.stream.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            if come.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let end = come.iter().position(|byte| *byte == b'\n');
            let length = end.map_or(come.len(), |end| end + 1);
            if self.line.len() + length > self.longest {
                return Err(io::Error::other(format!("it sends a line of more than {} bytes", self.longest)));
            }
            self.line.extend(come.iter().take(length));
            self.stream.consume(length);
            if end.is_some() {
                return Ok(std::mem::take(&mut self.line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    const LONGEST_LINE: usize = 1 << 20;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(100)
    }

    #[test]
    fn a_line_that_is_late_is_not_lost() {
        let (mut there, here) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(here, LONGEST_LINE);
        there.write_all(b"one\ntw").unwrap();
        assert_eq!(lines.next(soon()).unwrap(), b"one\n");
        assert_eq!(lines.next(soon()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        there.write_all(b"o\nthree").unwrap();
        assert_eq!(lines.next(soon()).unwrap(), b"two\n");
        drop(there);
        assert_eq!(lines.next(soon()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(lines.next(Instant::now()).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_line_that_comes_byte_by_byte_has_no_more_time() {
        let (mut there, here) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            for _ in 0..200 {
                let _ = there.write_all(b"x");
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let start = Instant::now();
        assert!(Lines::new(here, LONGEST_LINE).next(soon()).is_err());
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let (mut there, here) = UnixStream::pair().unwrap();
        std::thread::spawn(move || while there.write_all(&[b'x'; 4096]).is_ok() {});
        let mut lines = Lines::new(here, LONGEST_LINE);
        let error = lines.next(Instant::now() + Duration::from_secs(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Other);
        assert!(lines.line.len() <= LONGEST_LINE);
    }
}
