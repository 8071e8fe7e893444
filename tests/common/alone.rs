// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What tests need that look at their process, or have threads.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Set in the process that runs one test alone.
const ALONE: &str = "TEST_ALONE";

/// Runs a test in a process of its own, so that memory and files are those of this test only. `name` is the test's own.
pub fn alone(name: &str, test: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program)
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(ALONE, "")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("1 passed"), "there is no test {name}: {said}");
}

/// Tells another thread to end, even if this one panics.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The most memory that this process ever had, in bytes.
pub fn peak_memory() -> u64 {
    status("VmHWM:")
}

/// The memory that this process has now, in bytes.
pub fn resident_memory() -> u64 {
    status("VmRSS:")
}

/// A sanitizer keeps what was freed for a while, and has memory of its own: with one, nothing is told.
fn status(field: &str) -> u64 {
    if cfg!(sanitized) {
        return 0;
    }
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    value.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// How many files this process has open.
pub fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Closes a socket and waits until nobody listens: a process that another test starts has a copy of every file for a moment.
pub fn close(listener: UnixListener, path: &Path) {
    drop(listener);
    while UnixStream::connect(path).is_ok() {
        std::thread::sleep(Duration::from_millis(1));
    }
}
