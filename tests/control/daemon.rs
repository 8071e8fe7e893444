// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's own control socket, and viommuctl.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;

use super::common::processes::{Process, wait_until};
use super::*;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-iommu");

struct Daemon {
    process: Process,
    directory: tempfile::TempDir,
}

fn control(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("control/socket")
}

impl Daemon {
    /// A daemon without endpoints that listens on both sockets.
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(DAEMON);
        command.arg("--control-path").arg(control(&directory));
        Self::run(command, directory)
    }

    fn run(mut command: Command, directory: tempfile::TempDir) -> Self {
        command.arg("--input-range=0-ffffffff").arg("--socket-path").arg(directory.path().join("socket"));
        let process = Process::spawn(command.stderr(Stdio::piped()));
        wait_until("the daemon does not listen", || directory.path().join("socket").exists());
        Self { process, directory }
    }

    fn control(&self) -> PathBuf {
        control(&self.directory)
    }

    fn client(&self) -> Client {
        Client::new(UnixStream::connect(self.control()).unwrap())
    }

    fn end(self) -> String {
        let control = self.control();
        self.process.signal(Signal::SIGTERM);
        let (code, log) = self.process.end();
        assert_eq!(code, Some(0), "{log}");
        assert!(!control.exists(), "the socket is removed");
        log
    }
}

fn run(command: &mut Command) -> (i32, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    (status.code().unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn the_daemon_answers_and_takes_its_socket_with_it() {
    let daemon = Daemon::start();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&daemon.control()), mode(daemon.control().parent().unwrap())), (0o600, 0o700));
    let mut client = daemon.client();
    assert_eq!(client.ask(&json!("list")), json!({ "endpoints": [] }));
    assert_eq!(client.ask(&json!("plan"))["plan"]["input_range"], json!(["0x0", "0xffffffff"]));
    let reply = client.ask_with(&json!({ "add": addition() }), &[files::pipe().0]);
    let (kind, message) = refusal(&reply);
    assert!(kind == "host" && message.contains("without --iommufd-fd"), "{message}");
    daemon.end();
}

#[test]
fn how_much_is_logged_can_be_changed() {
    for (level, is_logged) in [("error", false), ("info", true)] {
        let daemon = Daemon::start();
        let mut machine = Machine::connect(&daemon.directory.path().join("socket"), guest_memory(MEMORY_SIZE));
        machine.start();
        let request = json!({ "log-level": { "level": level } });
        assert_eq!(daemon.client().ask(&request), json!({ "log-level": level }));
        let log = daemon.end();
        assert_eq!(log.contains("every endpoint is blocked"), is_logged, "{log}");
    }
}

#[test]
fn whoever_follows_faults_sees_the_daemon_end() {
    let daemon = Daemon::start();
    let mut follower = daemon.client();
    assert_eq!(follower.ask(&json!({ "faults": { "follow": true } }))["faults"]["recorded"], 0);
    daemon.end();
    assert!(follower.next().is_none());
}

#[test]
fn a_guest_and_an_operator_are_served_together() {
    let daemon = Daemon::start();
    let mut machine = Machine::connect(&daemon.directory.path().join("socket"), guest_memory(MEMORY_SIZE));
    machine.start();
    assert_eq!(machine.send(&common::attach(1, FIRST.0, 0)), NOENT);
    assert_eq!(daemon.client().ask(&json!("stats"))["stats"]["attach"]["failed"], 1);
    let log = daemon.end();
    assert!(log.contains("every endpoint is blocked"), "{log}");
}

#[test]
fn how_long_requests_took_is_shown_to_people_and_programs() {
    let daemon = Daemon::start();
    let mut machine = Machine::connect(&daemon.directory.path().join("socket"), guest_memory(MEMORY_SIZE));
    machine.start();
    for _ in 0..3 {
        assert_eq!(machine.send(&common::attach(1, FIRST.0, 0)), NOENT);
    }
    let status = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_viommuctl"));
        let output = command.arg("status").args(options).arg("--control").arg(daemon.control()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let json: Value = serde_json::from_str(&status(&["--json"])).unwrap();
    let attach = &json["stats"]["attach"];
    assert_eq!((&attach["failed"], &attach["statuses"]), (&json!(3), &json!({ "NOENT": 3 })));
    for part in ["waiting", "own", "host"] {
        let durations = &attach["times"][part];
        assert_eq!(durations["count"], 3, "{attach}");
        let buckets = durations["buckets"].as_array().unwrap();
        assert_eq!(buckets.iter().map(|bucket| bucket["count"].as_u64().unwrap()).sum::<u64>(), 3, "{attach}");
        let ends: u64 =
            buckets.iter().map(|bucket| bucket["up_to_ns"].as_u64().unwrap() * bucket["count"].as_u64().unwrap()).sum();
        assert!(durations["sum_ns"].as_u64().unwrap() <= ends, "{attach}");
    }
    assert!(attach["times"]["own"]["sum_ns"].as_u64().unwrap() > 0, "{attach}");
    assert_eq!(json["stats"]["map"]["times"]["own"], json!({ "count": 0, "sum_ns": 0, "buckets": [] }));

    let table = status(&[]);
    let row = table.lines().find(|line| line.trim_start().starts_with("ATTACH")).unwrap_or_else(|| panic!("{table}"));
    assert!(row.contains("s, ") && row.contains("3 NOENT") && !row.contains("not measured"), "{table}");
    daemon.end();
}

#[test]
fn a_socket_that_is_passed_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("passed")).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let mut command = Command::new(DAEMON);
    command.arg(format!("--control-fd={}", std::os::fd::AsRawFd::as_raw_fd(&listener)));
    let daemon = Daemon::run(command, directory);
    drop(listener);
    let mut client = Client::new(UnixStream::connect(daemon.directory.path().join("passed")).unwrap());
    assert_eq!(client.ask(&json!("list")), json!({ "endpoints": [] }));
    daemon.end();
}

#[test]
fn a_control_socket_that_cannot_be_had_is_said_before_anything_is_done() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("file"), "precious").unwrap();
    fs::create_dir(path("open")).unwrap();
    fs::set_permissions(path("open"), fs::Permissions::from_mode(0o777)).unwrap();
    let _live = UnixListener::bind(path("live")).unwrap();
    let option = |name: &str| format!("--control-path={}", path(name).display());
    for (options, code, text) in [
        (vec![option("file")], 2, "is not a socket"),
        (vec![option("open/socket")], 2, "can be written by others"),
        (vec![option("live")], 2, "in use by another process"),
        (vec![option("not/there/socket")], 1, "it is made where its parent is there"),
        (vec!["--control-fd=999".to_owned()], 2, "fd 999 is not open"),
        (vec!["--control-fd=1".to_owned()], 2, "standard input"),
        (vec!["--control-fd=5".to_owned(), option("socket")], 2, "cannot be used with"),
    ] {
        for check in [&[][..], &["--check"]] {
            let mut command = Command::new(DAEMON);
            command.arg("--input-range=0-ffffffff").arg("--socket-path").arg(path("socket")).args(&options).args(check);
            let (found, said) = run(&mut command);
            assert_eq!(found, code, "{options:?}: {said}");
            assert!(said.contains(text), "{options:?}: {said}");
            assert!(!path("socket").exists());
        }
    }
    // One that can be had is not made by a check.
    let mut command = Command::new(DAEMON);
    command
        .arg("--input-range=0-ffffffff")
        .arg("--socket-path")
        .arg(path("socket"))
        .arg(option("new/control"))
        .arg("--check");
    assert_eq!(run(&mut command).0, 0);
    assert!(!path("new").exists());
    assert_eq!(fs::read_to_string(path("file")).unwrap(), "precious");
    assert!(path("live").exists(), "a socket of somebody else's is left alone");
}
