// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The log's way to the standard error: past a thread of its own once there is a guest, because whoever reads the other end may stop
//! reading, and neither a request nor the end of the process is to wait for that.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use log::warn;
use parking_lot::{Condvar, Mutex};

use crate::sandbox::{Sandbox, StartError, ThreadKind};
use crate::standard_error::{write_line, write_line_to};

/// How many lines wait at most.
const MOST_LINES: usize = 1024;
/// How long the end of the process waits for its last lines.
const PATIENCE: Duration = Duration::from_secs(1);

static LINES: Lines = Lines::new();

/// What the log's lines are written to. A line is one write.
pub(super) struct LogOutput;

impl Write for LogOutput {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !LINES.put(line) {
            write_line(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Has a thread write the lines from here on, and whoever logs wait for nothing.
///
/// # Errors
///
/// [`StartError`]
pub(super) fn write_in_background(sandbox: Sandbox) -> Result<(), StartError> {
    sandbox.spawn(ThreadKind::Log, "log", || LINES.write_all(io::stderr().as_fd()))?;
    LINES.0.lock().is_written = true;
    Ok(())
}

/// Waits until all lines are written, but not for ever: to be called before the process ends.
pub fn finish_log() {
    LINES.finish(PATIENCE);
}

/// Lines that wait, and whoever writes them and waits for that.
struct Lines(Mutex<Waiting>, Condvar);

struct Waiting {
    /// Somebody writes them.
    is_written: bool,
    /// One of them was taken out and is not written yet.
    is_writing: bool,
    lines: VecDeque<Box<[u8]>>,
    /// How many there was no room for.
    lost: u64,
}

impl Lines {
    const fn new() -> Self {
        let waiting = Waiting { is_written: false, is_writing: false, lines: VecDeque::new(), lost: 0 };
        Self(Mutex::new(waiting), Condvar::new())
    }

    /// Puts a line behind those that wait, or forgets it if too many do; whether that is what lines are to be done with.
    fn put(&self, line: &[u8]) -> bool {
        let mut waiting = self.0.lock();
        if !waiting.is_written {
            return false;
        }
        // Once one is lost, so are all until that was said where they are missing.
        if waiting.lost == 0 && waiting.lines.len() < MOST_LINES {
            waiting.lines.push_back(line.into());
            self.1.notify_all();
        } else {
            waiting.lost += 1;
        }
        true
    }

    /// Writes whatever comes, for ever.
    fn write_all(&self, to: BorrowedFd<'_>) {
        loop {
            match self.next() {
                Next::Line(line) => write_line_to(to, &line),
                Next::Lost(lines) => {
                    warn!("{lines} lines of this log are missing here: the standard error was not read");
                }
            }
        }
    }

    /// Waits for the next line. How many are missing is said behind those that came before them.
    fn next(&self) -> Next {
        let mut waiting = self.0.lock();
        loop {
            if let Some(line) = waiting.lines.pop_front() {
                waiting.is_writing = true;
                return Next::Line(line);
            }
            if waiting.lost > 0 {
                return Next::Lost(std::mem::take(&mut waiting.lost));
            }
            waiting.is_writing = false;
            self.1.notify_all();
            self.1.wait(&mut waiting);
        }
    }

    fn finish(&self, patience: Duration) {
        let mut waiting = self.0.lock();
        let is_unfinished = |waiting: &mut Waiting| waiting.is_writing || !waiting.lines.is_empty();
        self.1.wait_while_for(&mut waiting, is_unfinished, patience);
    }
}

enum Next {
    Line(Box<[u8]>),
    Lost(u64),
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    #[test]
    fn a_line_that_nobody_reads_holds_nobody_up() {
        let lines: &'static Lines = Box::leak(Box::new(Lines::new()));
        assert!(!lines.put(b"at the start\n"), "nobody writes it later");
        lines.0.lock().is_written = true;
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        std::thread::spawn(move || lines.write_all(writer.as_fd()));
        // More than a pipe and the list take.
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        for _ in 0..2 * MOST_LINES {
            assert!(lines.put(&line));
        }
        lines.finish(Duration::from_millis(1));
        let lost = usize::try_from(lines.0.lock().lost).unwrap();
        assert!(lost > 0 && lost < 2 * MOST_LINES);
        // Read again, whatever was not lost is there.
        let mut read = vec![0; 1024 * (2 * MOST_LINES - lost)];
        File::from(reader).read_exact(&mut read).unwrap();
        assert!(read.chunks(1024).all(|part| part == line));
        lines.finish(Duration::from_secs(60));
        let waiting = lines.0.lock();
        assert!(waiting.lines.is_empty() && !waiting.is_writing);
        assert_eq!(waiting.lost, 0, "it was said");
    }
}
