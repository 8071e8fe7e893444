// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waiting for what other threads and processes do.

#![allow(dead_code, reason = "not every test uses everything")]

use std::fs;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

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

/// Waits for the end of a process that ends by itself. One that does not is killed.
pub fn wait_for_end(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("process {} does not end", child.id());
        }
        std::thread::sleep(Duration::from_millis(1));
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
