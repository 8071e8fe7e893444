// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon as those meet it who start it: its options, exit codes, sockets, readiness and log, and what is installed.

#![cfg(not(sanitized = "thread"))]
#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod exit_codes;
mod host;
mod install;
mod links;
mod log;
mod messages;
mod metrics;
mod options;
mod pages;
mod readiness;
mod sockets;
mod watcher;

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::processes::{PATIENCE, Process, wait_until};
use common::status::NOENT;
use common::{Machine, attach, guest_memory};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-iommu");

/// What a run that ended by itself left.
#[derive(Debug, PartialEq, Eq)]
struct Ended {
    code: Option<i32>,
    out: String,
    err: String,
}

/// A daemon to be started, with files that it inherits and no others, whatever other tests do at the same time.
#[derive(Default)]
struct Start {
    script: &'static str,
    third: Option<OwnedFd>,
    fourth: Option<OwnedFd>,
    log: Option<OwnedFd>,
    options: Vec<String>,
    environment: Vec<(&'static str, String)>,
}

impl Start {
    fn with(options: &[&str]) -> Self {
        Self { options: options.iter().map(|option| (*option).to_owned()).collect(), ..Self::default() }
    }

    fn option(mut self, name: &str, value: &Path) -> Self {
        self.options.push(format!("--{name}={}", value.display()));
        self
    }

    /// The file that is number 3.
    fn third(mut self, file: impl Into<OwnedFd>) -> Self {
        self.third = Some(file.into());
        self
    }

    /// The file that is number 4. The standard output is nothing then.
    fn fourth(mut self, file: impl Into<OwnedFd>) -> Self {
        self.fourth = Some(file.into());
        self
    }

    /// Where it logs to, of which nothing is read.
    fn log(mut self, file: impl Into<OwnedFd>) -> Self {
        self.log = Some(file.into());
        self
    }

    /// What the shell does before it becomes the daemon, whose process number `$$` is.
    fn script(mut self, script: &'static str) -> Self {
        self.script = script;
        self
    }

    fn environment(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    fn command(self) -> Command {
        let mut files = String::new();
        let mut command = Command::new("sh");
        if let Some(file) = self.third {
            command.stdin(file);
            files.push_str(" 3<&0");
        } else {
            command.stdin(Stdio::null());
        }
        if let Some(file) = self.fourth {
            command.stdout(file);
            files.push_str(" 4>&1 >/dev/null");
        } else {
            command.stdout(Stdio::piped());
        }
        let script = format!("{} exec \"$0\" \"$@\"{files} </dev/null", self.script);
        command.arg("-c").arg(script).arg(DAEMON).args(self.options);
        for name in ["RUST_LOG", "NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
            command.env_remove(name);
        }
        command.envs(self.environment);
        command
    }

    /// Starts one that goes on.
    fn start(mut self) -> Daemon {
        // A file: a daemon that says too much must not wait until it is read.
        let log = tempfile::tempfile().unwrap();
        let to = self.log.take().unwrap_or_else(|| log.try_clone().unwrap().into());
        Daemon { process: Process::spawn(self.command().stderr(to)), log }
    }

    /// Runs one that ends by itself.
    fn run(self) -> Ended {
        self.start().end()
    }
}

/// A daemon that runs.
struct Daemon {
    process: Process,
    log: File,
}

impl Daemon {
    fn terminate(&self) {
        self.process.signal(Signal::SIGTERM);
    }

    /// Waits for its end.
    fn end(mut self) -> Ended {
        let status = self.process.wait_for_end();
        let mut ended = Ended { code: status.code(), out: String::new(), err: String::new() };
        if let Some(mut out) = self.process.stdout.take() {
            out.read_to_string(&mut ended.out).unwrap();
        }
        self.log.rewind().unwrap();
        self.log.read_to_string(&mut ended.err).unwrap();
        ended
    }

    /// Asks it to end, which must be well: what it said.
    fn end_well(self) -> String {
        self.terminate();
        let ended = self.end();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        ended.err
    }
}

/// A place for a socket.
struct Place {
    directory: tempfile::TempDir,
    socket: PathBuf,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        Self { directory, socket }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn listener(&self) -> UnixListener {
        UnixListener::bind(&self.socket).unwrap()
    }

    /// Starts a daemon here, and waits until a frontend can connect.
    fn start(&self, start: Start) -> Daemon {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let daemon =
            start.option("socket-path", &self.socket).fourth(writer).option("ready-fd", Path::new("4")).start();
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        match said.as_str() {
            "\n" => daemon,
            _ => panic!("the daemon is not ready, but wrote {said:?}: {:?}", daemon.end()),
        }
    }
}

/// Has a guest use the device; what its driver reads from the configuration.
fn use_device(stream: UnixStream) -> (Machine, Vec<u8>) {
    let mut machine = Machine::over(stream, guest_memory(0x20_0000));
    machine.start();
    assert_eq!(machine.send(&attach(1, 8, 0)), NOENT);
    let config = machine.config();
    (machine, config)
}

fn null() -> File {
    File::options().read(true).write(true).open("/dev/null").unwrap()
}
