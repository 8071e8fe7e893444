// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon as its own process, with files passed to it.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::io::{FdFlags, fcntl_setfd};

/// Lets a file pass through exec while a child is started.
pub fn inheritable(file: &impl AsFd, pass: bool) {
    fcntl_setfd(file, if pass { FdFlags::empty() } else { FdFlags::CLOEXEC }).unwrap();
}

pub struct Daemon {
    child: Child,
    pub socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts a daemon for one device.
    pub fn start(name: &str, iommufd: &File, device: &File, endpoint: &str, options: &[&str]) -> Self {
        let socket = PathBuf::from(format!("/tmp/{name}.sock"));
        let log = PathBuf::from(format!("/tmp/{name}.log"));
        for file in [iommufd, device] {
            inheritable(file, true);
        }
        let child = Command::new("/bin/vhost-device-iommu")
            .arg("--socket-path")
            .arg(&socket)
            .arg(format!("--iommufd-fd={}", iommufd.as_raw_fd()))
            .arg(format!("--endpoint={endpoint},cdev-fd={}", device.as_raw_fd()))
            .arg("--log-level=debug")
            .args(options)
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        for file in [iommufd, device] {
            inheritable(file, false);
        }
        Self { child, socket, log }
    }

    /// Ends the daemon without a chance to do anything about it.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until the log has a text in it.
    pub fn expect_log(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "no `{text}` in:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The number of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// How much memory the kernel has pinned for the daemon.
    pub fn pinned(&self) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
        line.trim().to_owned()
    }

    /// The numbers of the address spaces that the daemon made.
    pub fn address_spaces(&self) -> Vec<u32> {
        let log = self.log();
        let ids = log.lines().filter_map(|line| line.split("IOAS ").nth(1)?.strip_suffix(" allocated"));
        ids.map(|id| id.parse().unwrap()).collect()
    }

    /// Asks to be told when the daemon ends, with its memory still there to look at.
    pub fn watch_exit(&self) {
        ptrace::seize(self.pid(), ptrace::Options::PTRACE_O_TRACEEXIT).unwrap();
    }

    /// Waits for a daemon that is watched to end; what was pinned then.
    pub fn pinned_at_exit(&mut self) -> String {
        let pid = self.pid();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            assert!(Instant::now() < deadline, "the daemon does not end:\n{}", self.log());
            match waitpid(pid, Some(WaitPidFlag::WNOHANG)).unwrap() {
                WaitStatus::PtraceEvent(_, _, event) if event == ptrace::Event::PTRACE_EVENT_EXIT as i32 => break,
                WaitStatus::Stopped(_, signal) => ptrace::cont(pid, signal).unwrap(),
                WaitStatus::PtraceEvent(..) => ptrace::cont(pid, None).unwrap(),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        let pinned = self.pinned();
        ptrace::cont(pid, None).unwrap();
        pinned
    }

    /// Waits for the daemon to end.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The log must not have an error or a warning in it.
    pub fn assert_clean(&self) {
        let log = self.log();
        let bad = log.lines().any(|line| line.contains("ERROR") || line.contains("WARN"));
        assert!(!bad, "{log}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A path that must exist for a test to be worth running.
pub fn must_exist(path: &str) -> &Path {
    let path = Path::new(path);
    assert!(path.exists(), "{} is not in the host VM", path.display());
    path
}
