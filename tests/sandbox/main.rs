// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the daemon gives up before it listens to a frontend: seen from outside, and tried by threads of the daemon's itself.

#![cfg(all(target_arch = "x86_64", not(sanitized)))]
#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::confined::{assert_calls, assert_confined, threads};
use common::inject::{Outcome, Stopped};
use common::left_out::left_out;
use common::processes::{Process, wait_until};
use common::status::NOENT;
use common::{Machine, attach, guest_memory};
use nix::libc;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use seccompiler::{SeccompAction, SeccompFilter};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostTransferStateDirection::{LOAD, SAVE};
use vhost::vhost_user::message::VhostTransferStatePhase::STOPPED;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-iommu");
/// The daemon's threads, with a frontend that has not said anything yet; `vhost-user` is the connection's.
const THREADS: [&str; 9] =
    ["control", "frontend", "log", "main", "metrics", "to-backend", "to-frontend", "vhost-user", "vring_worker"];

fn may_trace() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        left_out("root, to trace a process that cannot be dumped");
    }
    is_root
}

/// A daemon with a control socket and a metrics file, and the frontend's end of its connection.
struct Daemon {
    process: Process,
    directory: tempfile::TempDir,
    frontend: Option<UnixStream>,
}

impl Daemon {
    /// Returns when it is ready, so that whatever was to be given up is, and all threads are there.
    fn start(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (frontend, passed) = UnixStream::pair().unwrap();
        let (ready, told) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 <&- >&-", DAEMON, "--fd=3", "--ready-fd=4"]);
        command.arg("--control-path").arg(directory.path().join("control/socket"));
        fs::create_dir(directory.path().join("metrics")).unwrap();
        command.arg("--metrics-file").arg(directory.path().join("metrics/file"));
        command.arg("--input-range=0-ffffffff").args(options);
        let process = Process::spawn(command.stdin(OwnedFd::from(passed)).stdout(told).stderr(Stdio::piped()));
        drop(command);
        let mut line = String::new();
        fs::File::from(ready).read_to_string(&mut line).unwrap();
        assert_eq!(line, "\n", "it is ready");
        let daemon = Self { process, directory, frontend: Some(frontend) };
        wait_until("not all threads are there, or others", || daemon.threads().keys().eq(THREADS.iter()));
        daemon
    }

    fn machine(&mut self) -> Machine {
        Machine::over(self.frontend.take().unwrap(), guest_memory(0x20_0000))
    }

    /// The threads by what they are called in the lists.
    fn threads(&self) -> BTreeMap<String, Pid> {
        let main = Pid::from_raw(self.process.id().cast_signed());
        let name = |(name, thread)| (if thread == main { "main".to_owned() } else { name }, thread);
        threads(self.process.id()).into_iter().map(name).collect()
    }

    /// What it says on its control socket.
    fn ask(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.directory.path().join("control/socket")).unwrap();
        writeln!(stream, "{{\"version\":1,\"request\":{request}}}").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    }

    fn terminate(&self) {
        self.process.signal(Signal::SIGTERM);
    }

    fn end(self) -> (Option<i32>, String) {
        self.terminate();
        let ended = self.process.end();
        assert!(!self.directory.path().join("control/socket").exists(), "the socket is removed");
        ended
    }
}

#[test]
fn a_daemon_that_is_ready_has_given_up_privileges_in_every_thread() {
    let mut daemon = Daemon::start(&[]);
    assert_confined(daemon.process.id(), true);
    let mut machine = daemon.machine();
    machine.start();
    assert_confined(daemon.process.id(), true);
    let (code, log) = daemon.end();
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn each_thread_can_do_what_it_is_for_and_nothing_else() {
    if !may_trace() {
        return;
    }
    let mut daemon = Daemon::start(&["--seccomp=trap"]);
    let mut machine = daemon.machine();
    machine.start();
    for (name, thread) in daemon.threads() {
        assert_calls(&name, thread);
    }
    assert_eq!(machine.send(&attach(1, 8, 0)), NOENT, "it goes on");
    let (code, log) = daemon.end();
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn the_watcher_of_devices_can_detach_them_and_nothing_else() {
    if !may_trace() {
        return;
    }
    let (mut socket, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(DAEMON);
    command.args(["--watch-devices", "trap"]).stdin(OwnedFd::from(theirs));
    let mut watcher = command.spawn().unwrap();
    drop(command);
    let mut word = [0];
    socket.read_exact(&mut word).unwrap();
    assert_eq!(word, [1], "it is confined");
    assert_confined(watcher.id(), false);
    assert_calls("watcher", Pid::from_raw(watcher.id().cast_signed()));
    drop(socket);
    assert_eq!(watcher.wait().unwrap().code(), Some(0));
}

#[test]
fn a_call_that_no_thread_has_a_use_for_ends_the_process() {
    if !may_trace() {
        return;
    }
    for (options, dies) in [
        (&[][..], true),
        (&["--seccomp=kill"], true),
        (&["--seccomp=log"], false),
        (&["--seccomp=off"], false),
        (&["--sandbox=off"], false),
    ] {
        let mut daemon = Daemon::start(options);
        let thread = daemon.threads()["vring_worker"];
        let outcome = Stopped::new(thread).call(libc::SYS_getppid, [0; 6]);
        if dies {
            assert_eq!(outcome, Outcome::Killed(Signal::SIGSYS), "{options:?}");
            assert_eq!(daemon.process.wait().unwrap().signal(), Some(Signal::SIGSYS as i32), "{options:?}");
        } else {
            assert_eq!(outcome, Outcome::Returned(i64::from(std::process::id())), "{options:?}");
            assert_eq!(daemon.end().0, Some(0));
        }
    }
}

/// Everything that a frontend and an operator do, in a process that dies of anything else.
#[test]
fn a_whole_life_needs_nothing_that_was_given_up() {
    let mut daemon = Daemon::start(&["--seccomp=kill", "--log-level=trace"]);
    let mut machine = daemon.machine();
    machine.start();
    machine.start_event_ring();
    assert_eq!(machine.send(&attach(1, 8, 0)), NOENT);
    assert_eq!(machine.config()[16..24], 0xffff_ffffu64.to_le_bytes());
    for request in [
        "\"list\"",
        "\"plan\"",
        "\"stats\"",
        "{\"faults\":{}}",
        "{\"domain\":{\"domain\":1}}",
        "{\"mappings\":{\"domain\":1}}",
        "{\"remove\":{\"endpoints\":[\"0000:00:03.0\"]}}",
        "{\"add\":{\"group\":1,\"vfio_members\":[],\"devices\":[]}}",
        "{\"log-level\":{\"level\":\"debug\"}}",
        "nonsense",
    ] {
        assert!(daemon.ask(request).contains("\"version\":1"), "{request}");
    }
    let base = machine.stop_ring();
    machine.start_ring(base);
    assert_eq!(machine.send(&attach(1, 8, 0)), NOENT);
    machine.frontend.reset_device().unwrap();
    machine.forget_ring();
    machine.start();
    assert_eq!(machine.send(&attach(1, 8, 0)), NOENT);
    let (code, log) = daemon.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("every endpoint is blocked"), "{log}");
}

#[test]
fn a_guest_can_move_from_one_confined_daemon_to_another() {
    let mut source = Daemon::start(&["--seccomp=kill"]);
    let mut machine = source.machine();
    machine.start();
    assert_eq!(machine.send(&attach(1, 8, 0)), NOENT);
    machine.stop_ring();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut state = String::new();
    machine.frontend.set_device_state_fd(SAVE, STOPPED, writer.into()).unwrap();
    reader.read_to_string(&mut state).unwrap();
    machine.frontend.check_device_state().unwrap();
    assert_eq!(source.end().0, Some(0));

    let mut target = Daemon::start(&["--seccomp=kill"]);
    let machine = target.machine();
    let (reader, mut writer) = std::io::pipe().unwrap();
    machine.frontend.set_device_state_fd(LOAD, STOPPED, reader.into()).unwrap();
    writer.write_all(state.as_bytes()).unwrap();
    drop(writer);
    machine.frontend.check_device_state().unwrap();
    let (code, log) = target.end();
    assert_eq!(code, Some(0), "{log}");
}

/// Files of the frontend's can hold up the thread that reads its messages, and nothing else waits for that.
#[test]
fn a_connection_that_is_held_up_does_not_keep_the_daemon() {
    if !may_trace() {
        return;
    }
    let daemon = Daemon::start(&[]);
    let connection = Stopped::new(daemon.threads()["vhost-user"]);
    daemon.terminate();
    assert!(connection.dies(), "it ends with the process");
    let (code, log) = daemon.process.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(!daemon.directory.path().join("control/socket").exists(), "the socket is removed");
    let [.., blocked, held_up] = &log.lines().collect::<Vec<_>>()[..] else { panic!("{log}") };
    assert!(blocked.contains("every endpoint is blocked"), "{log}");
    assert!(held_up.contains("the frontend holds up the connection's thread: ending without it"), "{log}");
}

#[test]
fn what_landlock_gives_up_stays_given_up_without_seccomp() {
    if !may_trace() {
        return;
    }
    let daemon = Daemon::start(&["--seccomp=off"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_be_bytes();
    // struct sockaddr_in: AF_INET, the port, 127.0.0.1.
    let address = [&[2, 0][..], &port, &[127, 0, 0, 1], &[0; 8]].concat();
    let precious = tempfile::NamedTempFile::new().unwrap();
    let name_of = |path: &Path| path.as_os_str().as_bytes().to_vec();
    let new = name_of(&daemon.directory.path().join("control/new"));
    let ours = u64::from(std::process::id());
    for (name, thread) in daemon.threads() {
        let mut thread = Stopped::new(thread);
        let mut refused = |what: &str, number, arguments: &dyn Fn(u64) -> [u64; 6], bytes: &[u8], errno: i32| {
            let arguments = arguments(thread.put(bytes));
            assert_eq!(thread.call(number, arguments), Outcome::Returned(-i64::from(errno)), "{name}: {what}");
        };
        let here = i64::from(libc::AT_FDCWD).cast_unsigned();
        refused("read", libc::SYS_openat, &|path| [here, path, 0, 0, 0, 0], b"/etc/passwd", libc::EACCES);
        refused("list", libc::SYS_openat, &|path| [here, path, 0o200_000, 0, 0, 0], b"/", libc::EACCES);
        refused("create", libc::SYS_openat, &|path| [here, path, 0o102, 0, 0, 0], &new, libc::EACCES);
        refused("remove", libc::SYS_unlink, &|path| [path, 0, 0, 0, 0, 0], &name_of(precious.path()), libc::EACCES);
        refused("execute", libc::SYS_execve, &|path| [path, 0, 0, 0, 0, 0], b"/bin/sh", libc::EACCES);
        refused("mount", libc::SYS_mount, &|path| [path, path, path, 0, 0, 0], b"/", libc::EPERM);
        refused("trace", libc::SYS_ptrace, &|_| [16, ours, 0, 0, 0, 0], b"", libc::EPERM);
        refused("signal", libc::SYS_kill, &|_| [ours, 0, 0, 0, 0, 0], b"", libc::EPERM);
        let Outcome::Returned(socket) = thread.call(libc::SYS_socket, [2, 1, 0, 0, 0, 0]) else { panic!("no socket") };
        let socket = socket.cast_unsigned();
        let connect = [socket, thread.put(&address), address.len() as u64, 0, 0, 0];
        assert_eq!(thread.call(libc::SYS_connect, connect), Outcome::Returned(-i64::from(libc::EACCES)), "{name}: TCP");
        assert_eq!(thread.call(libc::SYS_close, [socket, 0, 0, 0, 0, 0]), Outcome::Returned(0));
    }
    assert!(precious.path().exists());
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn nobody_else_can_look_into_the_process() {
    if !may_trace() {
        return;
    }
    let daemon = Daemon::start(&["--seccomp=off"]);
    let dumpable = Stopped::new(daemon.threads()["vring_worker"]).call(libc::SYS_prctl, [3, 0, 0, 0, 0, 0]);
    assert_eq!(dumpable, Outcome::Returned(0), "PR_GET_DUMPABLE");
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn without_a_sandbox_nothing_is_given_up_and_the_log_says_so() {
    let daemon = Daemon::start(&["--sandbox=off"]);
    for (name, thread) in daemon.threads() {
        let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap();
        assert!(status.contains("Seccomp:\t0\n") && status.contains("NoNewPrivs:\t0\n"), "{name}: {status}");
    }
    let (code, log) = daemon.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("WARN") && log.contains("--sandbox off: a frontend that finds a mistake"), "{log}");
    let (code, log) = Daemon::start(&["--seccomp=off"]).end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("WARN") && log.contains("--seccomp off: every call"), "{log}");
}

/// What a daemon says on a kernel that answers these calls with this error.
fn run_refused(calls: &[i64], errno: i32, options: &[&str]) -> (Option<i32>, String) {
    let filter = SeccompFilter::new(
        calls.iter().map(|call| (*call, Vec::new())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let filter: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(DAEMON);
    command.arg("--socket-path").arg(directory.path().join("socket")).args(["--input-range=0-ffffffff"]).args(options);
    // The thread's filter is its child's too, and nobody else's.
    let run = move || {
        seccompiler::apply_filter(&filter).unwrap();
        let mut process = Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::piped()));
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains("Landlock") && !said.contains("confined") && log.read_line(&mut said).unwrap() > 0 {}
        // One that serves is to end.
        if said.contains("no Landlock") {
            process.signal(Signal::SIGHUP);
        }
        log.read_to_string(&mut said).unwrap();
        let status = process.wait_for_end();
        (status.code(), format!("{status}: {said}"))
    };
    let result = std::thread::spawn(run).join().unwrap();
    assert!(!directory.path().join("socket").exists(), "the socket is removed");
    result
}

#[test]
fn a_process_that_cannot_be_confined_does_not_start() {
    for (call, errno, text) in [
        (libc::SYS_seccomp, libc::EINVAL, "the list of calls of the log's thread does not hold"),
        (libc::SYS_landlock_restrict_self, libc::E2BIG, "Landlock does not take the rules"),
        (libc::SYS_capset, libc::EPERM, "capabilities cannot be given up"),
    ] {
        let (code, log) = run_refused(&[call], errno, &[]);
        assert_eq!(code, Some(5), "{log}");
        assert!(log.contains("this process cannot be confined (--sandbox off does without)"), "{log}");
        assert!(log.contains(text), "{log}");
        let (code, log) = run_refused(&[call], errno, &["--check"]);
        assert_eq!(code, Some(5), "as a start would: {log}");
    }
}

#[test]
fn a_kernel_without_landlock_is_named() {
    for errno in [libc::ENOSYS, libc::EOPNOTSUPP] {
        let (code, log) = run_refused(&[libc::SYS_landlock_create_ruleset], errno, &[]);
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("WARN") && log.contains("the kernel has no Landlock"), "{log}");
    }
}

#[test]
fn a_watcher_that_cannot_be_confined_says_so() {
    let (mut socket, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(DAEMON);
    command.args(["--watch-devices", "nonsense"]).stdin(OwnedFd::from(theirs)).stderr(Stdio::piped());
    let watcher = command.spawn().unwrap();
    drop(command);
    assert_eq!(socket.read(&mut [0]).unwrap(), 0, "it does not say that it is confined");
    let output = watcher.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    assert!(String::from_utf8(output.stderr).unwrap().contains("the watcher of devices cannot be confined"));
}
