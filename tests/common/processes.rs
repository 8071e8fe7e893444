// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Other processes, and waiting for what they and other threads do.

#![allow(dead_code, reason = "not every test uses everything")]

use std::fs;
use std::io::Read;
use std::ops::{Deref, DerefMut};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What should happen is waited for so long, on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until something is so, and panics with what is wrong if it does not come to be.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A process that does not outlive its test. One that did would keep the output of a test that failed open, and whoever reads that
/// would wait for ever.
pub struct Process(Child);

impl Process {
    pub fn spawn(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }

    /// Waits for its end, which it comes to by itself.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("a process does not end", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Waits for its end: the exit code, and what it said on a standard error that is a pipe.
    pub fn end(mut self) -> (Option<i32>, String) {
        let code = self.wait_for_end().code();
        let mut said = String::new();
        if let Some(mut stderr) = self.0.stderr.take() {
            stderr.read_to_string(&mut said).unwrap();
        }
        (code, said)
    }
}

impl Deref for Process {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The one process that was started by another.
pub fn child_of(parent: u32) -> u32 {
    let is_child = |process: &u32| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        line.is_some_and(|value| value.trim() == parent.to_string())
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let mut children = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child);
    let child = children.next().expect("a process has started another");
    assert_eq!(children.next(), None, "a process has started one other");
    child
}
