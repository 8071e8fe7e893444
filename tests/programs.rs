// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two programs from outside: exit codes, messages, signals, what they leave behind.

#![cfg(all(feature = "daemon", not(sanitized = "thread")))]
#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::alone::close;
use common::left_out::left_out;
use common::processes::{Process, child_of, wait_until};
use common::{Machine, attach, guest_memory};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::io::{FdFlags, fcntl_setfd};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::EventFd;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-iommu");
const CONTROL: &str = env!("CARGO_BIN_EXE_viommuctl");

struct Daemon {
    process: Process,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Daemon {
    /// A daemon without endpoints, which listens.
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        Self::run(daemon_at(&socket), socket, directory)
    }

    /// Waits until it listens.
    fn run(mut command: Command, socket: PathBuf, directory: tempfile::TempDir) -> Self {
        let process = Process::spawn(command.stderr(Stdio::piped()));
        wait_until("the daemon does not listen", || is_listened_on(&socket));
        Self { process, socket, _directory: directory }
    }

    /// A daemon with a frontend.
    fn start_and_connect() -> (Self, Machine) {
        let daemon = Self::start();
        let mut machine = Machine::connect(&daemon.socket, guest_memory(0x20_0000));
        machine.start();
        assert_eq!(machine.config()[16..24], 0xffff_ffffu64.to_le_bytes());
        (daemon, machine)
    }

    fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for its end: the exit code and what it said.
    fn end(self) -> (i32, String) {
        let (code, said) = self.process.end();
        assert!(!self.socket.exists(), "the socket is removed");
        (code.unwrap(), said)
    }
}

fn daemon_at(socket: &Path) -> Command {
    daemon(socket, &["--input-range=0-ffffffff"])
}

fn daemon(socket: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(DAEMON);
    command.arg("--socket-path").arg(socket).args(options);
    command
}

/// Whether a process listens there, by the kernel's list of sockets: to connect would take the place of the frontend.
fn is_listened_on(socket: &Path) -> bool {
    let list = fs::read_to_string("/proc/net/unix").unwrap();
    // Flag __SO_ACCEPTCON.
    list.lines().any(|line| line.contains(" 00010000 ") && line.ends_with(socket.to_str().unwrap()))
}

fn run(command: &mut Command) -> (i32, String) {
    let Output { status, stderr, .. } = command.stderr(Stdio::piped()).output().unwrap();
    (status.code().unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn a_signal_ends_a_daemon_that_waits() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let daemon = Daemon::start();
        daemon.signal(signal);
        let (code, log) = daemon.end();
        assert_eq!(code, 0, "{log}");
    }
}

#[test]
fn a_signal_ends_a_daemon_at_every_point_of_a_session() {
    type Step = fn(&mut Machine);
    let steps: [Step; 6] = [
        |machine| {
            let features = machine.frontend.get_features().unwrap();
            machine.frontend.set_features(features & !(1 << 29)).unwrap();
        },
        Machine::set_memory,
        |machine| machine.start_ring(0),
        |machine| assert_eq!(machine.send(&attach(1, 8, 0)), 6),
        |machine| _ = machine.stop_ring(),
        |machine| machine.start_ring(1),
    ];
    for count in 0..=steps.len() {
        let daemon = Daemon::start();
        let mut machine = Machine::connect(&daemon.socket, guest_memory(0x20_0000));
        for step in &steps[..count] {
            step(&mut machine);
        }
        daemon.signal(Signal::SIGTERM);
        let (code, log) = daemon.end();
        assert_eq!(code, 0, "after {count} steps: {log}");
        assert!(log.contains("every endpoint is blocked"), "after {count} steps: {log}");
    }
    let daemon = Daemon::start();
    let _silent = UnixStream::connect(&daemon.socket).unwrap();
    daemon.signal(Signal::SIGTERM);
    let (code, log) = daemon.end();
    assert_eq!(code, 0, "{log}");
}

#[test]
fn a_second_signal_ends_a_daemon_at_once() {
    // One that is obeyed before the second comes ends well.
    let ended_at_once = (0..50).find_map(|_| {
        let (mut daemon, _machine) = Daemon::start_and_connect();
        daemon.signal(Signal::SIGTERM);
        daemon.signal(Signal::SIGINT);
        let code = daemon.process.wait_for_end().code();
        assert!(matches!(code, Some(0 | 1)), "{code:?}");
        (code == Some(1)).then_some(daemon)
    });
    let daemon = ended_at_once.unwrap();
    // What it left behind does not keep the next one from starting.
    assert!(daemon.socket.exists());
    let Daemon { socket, _directory: directory, .. } = daemon;
    let next = Daemon::run(daemon_at(&socket), socket, directory);
    next.signal(Signal::SIGTERM);
    assert_eq!(next.end().0, 0);
}

#[test]
fn as_many_hangups_as_there_are_end_a_daemon_well() {
    let (daemon, _machine) = Daemon::start_and_connect();
    // As by a parent that ends thread by thread; until the daemon is gone: a zombie takes signals too.
    for _ in 0..100 {
        daemon.signal(Signal::SIGHUP);
        std::thread::sleep(Duration::from_micros(100));
    }
    let (code, log) = daemon.end();
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("every endpoint is blocked"), "{log}");
}

/// A process that is not to outlive the test.
struct Killed(u32);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.cast_signed()), Signal::SIGKILL);
    }
}

#[test]
fn a_daemon_that_is_told_to_ends_with_its_parent() {
    for has_frontend in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut parent = Command::new("sh");
        parent.args(["-c", "\"$@\" & wait", "sh", DAEMON, "--exit-with-parent", "--input-range=0-ffffffff"]);
        parent.arg("--socket-path").arg(&socket);
        let Daemon { process: mut parent, _directory, .. } = Daemon::run(parent, socket.clone(), directory);
        let _daemon = Killed(child_of(parent.id()));
        let machine = has_frontend.then(|| {
            let mut machine = Machine::connect(&socket, guest_memory(0x20_0000));
            machine.start();
            machine
        });
        parent.kill().unwrap();
        wait_until("the daemon does not end", || !socket.exists());
        let (_, log) = parent.end();
        assert!(!log.contains("ERROR"), "{log}");
        assert_eq!(log.contains("every endpoint is blocked"), has_frontend, "{log}");
        drop(machine);
    }
}

#[test]
fn a_frontend_that_goes_ends_the_daemon_well() {
    let (daemon, machine) = Daemon::start_and_connect();
    drop(machine);
    let (code, log) = daemon.end();
    assert_eq!(code, 0, "{log}");
}

#[test]
fn a_frontend_whose_files_block_does_not_keep_the_daemon() {
    for signal in [None, Some(Signal::SIGTERM)] {
        let (daemon, mut machine) = Daemon::start_and_connect();
        // One more count, and whoever notifies waits for ever.
        let full = EventFd::new(0).unwrap();
        full.write(u64::MAX - 1).unwrap();
        machine.frontend.set_vring_call(0, &full).unwrap();
        assert_eq!(machine.send(&attach(1, 8, 0)), 6);
        // Needs the ring's lock.
        machine.frontend.set_vring_num(0, 16).unwrap();
        match signal {
            None => drop(machine),
            Some(signal) => daemon.signal(signal),
        }
        let (code, log) = daemon.end();
        assert_eq!(code, 0, "{log}");
        assert!(log.contains("every endpoint is blocked"), "{log}");
    }
}

#[test]
fn there_is_one_frontend() {
    let (daemon, mut machine) = Daemon::start_and_connect();
    for _ in 0..10 {
        let refused = UnixStream::connect(&daemon.socket).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(machine.send(&attach(1, 8, 0)), 6, "the first is served");
    drop(machine);
    let (code, log) = daemon.end();
    assert_eq!(code, 0, "{log}");
}

/// With so many threads there is one for the rings, but none that waits for the frontend; or that one, but none for the connection. The
/// limit is not for root, and counts all that a user runs.
#[test]
fn a_daemon_without_threads_says_so_and_blocks_every_endpoint_that_a_guest_had() {
    if !rustix::process::geteuid().is_root() {
        left_out("root, to be a user with nothing else running");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (socket, program) = (directory.path().join("socket"), directory.path().join("daemon"));
    fs::copy(DAEMON, &program).unwrap();
    let limited = |threads: u32| {
        let mut command = Command::new("bash");
        let script = format!("ulimit -u {threads}; exec \"$@\"");
        command.args(["-c", &script, "bash"]).arg(&program).arg("--socket-path").arg(&socket);
        command.arg("--input-range=0-ffffffff").uid(54_321);
        command
    };
    let (code, log) = run(&mut limited(3));
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("cannot set up events and signals"), "{log}");
    assert!(!socket.exists(), "the socket is removed");

    let daemon = Daemon::run(limited(4), socket.clone(), directory);
    let _connection = UnixStream::connect(&daemon.socket).unwrap();
    let (code, log) = daemon.end();
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("every endpoint is blocked"), "{log}");
    assert!(log.contains("vhost-user: failed to start"), "{log}");
}

/// Nothing sensible can be done without the memory that is missing; the watcher detaches the devices.
#[test]
fn guest_memory_that_is_cut_off_ends_the_daemon_with_3() {
    use vhost::VhostUserMemoryRegionInfo;
    use vhost::vhost_user::VhostUserFrontend;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    let (mut daemon, mut machine) = Daemon::start_and_connect();
    // Memory that goes and comes back is looked at no more.
    let region = VhostUserMemoryRegionInfo::from_guest_region(machine.memory.iter().next().unwrap()).unwrap();
    machine.frontend.remove_mem_region(&region).unwrap();
    machine.frontend.add_mem_region(&region).unwrap();
    machine.config();
    machine.memory.iter().next().unwrap().file_offset().unwrap().file().set_len(0).unwrap();
    machine.kick();
    assert_eq!(daemon.process.wait_for_end().code(), Some(3));
    let mut log = String::new();
    std::io::Read::read_to_string(&mut daemon.process.stderr.take().unwrap(), &mut log).unwrap();
    assert_eq!(log.matches("is not sealed with F_SEAL_SHRINK: if whoever has its file").count(), 1, "{log}");
    assert!(log.contains("SIGBUS: guest memory was cut off"), "{log}");
}

#[test]
fn a_log_that_nobody_reads_does_not_keep_a_daemon_without_its_memory() {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    let (mut daemon, machine) = Daemon::start_and_connect();
    let log = File::from(std::os::fd::OwnedFd::from(daemon.process.stderr.take().unwrap()));
    let path = format!("/proc/self/fd/{}", log.as_raw_fd());
    let mut filled = File::options().write(true).custom_flags(nix::libc::O_NONBLOCK).open(path).unwrap();
    while filled.write(b".").is_ok() {}
    machine.memory.iter().next().unwrap().file_offset().unwrap().file().set_len(0).unwrap();
    machine.kick();
    assert_eq!(daemon.process.wait_for_end().code(), Some(3));
}

#[test]
fn a_bus_error_of_another_kind_is_not_said_to_be_missing_memory() {
    let (mut daemon, _machine) = Daemon::start_and_connect();
    daemon.signal(Signal::SIGBUS);
    assert_eq!(daemon.process.wait_for_end().code(), Some(3));
    let mut log = String::new();
    std::io::Read::read_to_string(&mut daemon.process.stderr.take().unwrap(), &mut log).unwrap();
    assert!(log.contains("SIGBUS, and not for memory that is missing"), "{log}");
}

#[test]
fn what_cannot_be_served_is_said_before_there_is_a_socket() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let null = File::open("/dev/null").unwrap();
    fcntl_setfd(&null, FdFlags::empty()).unwrap();
    let fd = null.as_raw_fd();
    let facts = directory.path().join("facts.json");
    fs::write(&facts, "{ \"endpoints\": [\n{} ] }").unwrap();
    let facts = format!("--facts={}", facts.display());
    let iommufd = format!("--iommufd-fd={fd}");
    let endpoint = format!("--endpoint=id=00:03.0,cdev-fd={fd}");
    let many: Vec<String> =
        (0..255).map(|slot| format!("--endpoint=id=01:{:02x}.{},cdev-fd={fd}", slot / 8, slot % 8)).collect();
    let many: Vec<&str> = [&iommufd].into_iter().chain(&many).map(String::as_str).collect();
    for (options, code, text) in [
        (&many[..], 2, "255 endpoints are given, and there can be 254"),
        (&many[..255], 2, "/dev/null is not /dev/iommu"),
        (&[iommufd.as_str()][..], 2, "/dev/null is not /dev/iommu"),
        (&["--iommufd-fd=999"][..], 2, "fd 999 is not open"),
        (&["--iommufd-fd=1"][..], 2, "standard input"),
        (&[endpoint.as_str()][..], 2, "--iommufd-fd"),
        (&["--endpoint=id=3"][..], 2, "`3` is not a PCI address"),
        (&[facts.as_str()][..], 2, "missing field `id` at line 2"),
        (&["--facts=/nowhere"][..], 2, "cannot access /nowhere"),
        (&["--input-range=1-0"][..], 2, "ends before it starts"),
        (&["--input-range=0-fff0"][..], 2, "does not fit the input range"),
    ] {
        let (found, said) = run(&mut daemon(&socket, options));
        assert_eq!(found, code, "{options:?}: {said}");
        assert!(said.contains(text), "{options:?}: {said}");
        assert!(!socket.exists());
    }
}

#[test]
fn a_socket_path_that_is_taken_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    let (code, said) = run(&mut daemon(&file, &["--input-range=0-ffffffff"]));
    assert_eq!(code, 2);
    assert!(said.contains("is not a socket"), "{said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");

    let live = directory.path().join("live");
    let _listener = UnixListener::bind(&live).unwrap();
    let (code, said) = run(&mut daemon(&live, &["--input-range=0-ffffffff"]));
    assert_eq!(code, 2);
    assert!(said.contains("in use by another process"), "{said}");
}

#[test]
fn whatever_is_no_socket_is_left_alone_and_a_dead_socket_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::create_dir(path("directory")).unwrap();
    close(UnixListener::bind(path("dead")).unwrap(), &path("dead"));
    std::os::unix::fs::symlink(path("dead"), path("link")).unwrap();
    std::os::unix::fs::symlink(path("nowhere"), path("dangling")).unwrap();
    let list = || {
        let entries = fs::read_dir(directory.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap()).map(|e| (e.file_name(), e.file_type().unwrap())).collect();
        names.sort_by(|a, b| a.0.cmp(&b.0));
        format!("{names:?}")
    };
    let before = list();
    for name in ["directory", "link", "dangling"] {
        // One that listens there would do so for ever.
        let mut command = Command::new("timeout");
        command.args(["20", DAEMON, "--input-range=0-ffffffff", "--socket-path"]).arg(path(name));
        let (code, said) = run(&mut command);
        assert_eq!(code, 2, "{name}: {said}");
        assert!(said.contains("is not a socket"), "{name}: {said}");
        assert_eq!(list(), before);
    }
    // Whatever the mask of whoever starts it, nobody else can connect.
    let dead = path("dead");
    let mut command = Command::new("sh");
    command.args(["-c", "umask 0; exec \"$@\"", "sh", DAEMON, "--input-range=0-ffffffff", "--socket-path"]).arg(&dead);
    let daemon = Daemon::run(command, dead.clone(), directory);
    let mode = fs::metadata(dead).unwrap().permissions().mode();
    daemon.signal(Signal::SIGTERM);
    assert_eq!((daemon.end().0, mode & 0o777), (0, 0o600));
}

#[test]
fn viot_is_written_or_refused() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("viot.bin");
    let viot = |endpoints: &str| {
        let mut command = Command::new(CONTROL);
        command.args(["viot", "--iommu", "00:01.0", "--endpoints", endpoints, "-o"]).arg(&output);
        run(&mut command)
    };
    assert_eq!(viot("00:01.0").0, 2);
    assert!(!output.exists());
    assert_eq!(viot("00:03.0,00:04.0"), (0, String::new()));
    assert_eq!(fs::read(&output).unwrap().len(), 112);
}

#[test]
fn a_guest_begins_without_a_device_if_one_can_come_later() {
    let run_with = |option: Option<&str>| {
        let mut command = Command::new(CONTROL);
        command.arg("run").args(option).args(["--print", "--directory=/nowhere", "--", "qemu", "-m", "1G"]);
        let Output { status, stdout, stderr } = command.output().unwrap();
        (status.code(), String::from_utf8([stdout, stderr].concat()).unwrap())
    };
    for (option, said) in [(None, "<BDF>"), (Some("--hotplug=0"), "give a device, or --hotplug")] {
        let (code, shown) = run_with(option);
        assert!(code == Some(2) && shown.contains(said), "{code:?}: {shown}");
    }
    let (code, shown) = run_with(Some("--hotplug"));
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("--endpoints 0000:01:00.0-0000:04:1f.7"), "{shown}");
}

#[test]
fn inspecting_what_is_not_there_is_a_matter_of_the_host() {
    let (code, said) = run(Command::new(CONTROL).args(["inspect", "ffff:ff:1f.7"]));
    assert_eq!(code, 3);
    assert!(said.contains("there is no PCI device ffff:ff:1f.7"), "{said}");
}

/// Facts of two devices, of which the second can be reached at more addresses.
fn narrow_and_wide(directory: &Path) -> PathBuf {
    let text = fs::read_to_string("tests/plans/narrow-and-wide.json").unwrap();
    let plan: serde_json::Value = serde_json::from_str(&text).unwrap();
    let facts = directory.join("facts.json");
    fs::write(&facts, plan["input"].to_string()).unwrap();
    facts
}

#[test]
fn the_picture_is_of_the_plan_that_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    let picture = directory.path().join("picture.svg");
    let mut command = Command::new(CONTROL);
    command.args(["plan", "--json", "--facts"]).arg(narrow_and_wide(directory.path()));
    let output = command.arg("--svg").arg(&picture).output().unwrap();
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let picture = fs::read_to_string(picture).unwrap();
    let regions = plan["endpoints"][0]["resv"].as_array().unwrap();
    assert!(regions.len() > 1, "{plan}");
    for region in regions {
        let [start, end, subtype] = ["start", "end", "subtype"].map(|key| region[key].as_str().unwrap());
        assert!(picture.contains(&format!("{start}-{end}: {subtype}")), "{region} is not in the picture");
    }
}

#[test]
fn whoever_reads_no_further_hears_of_no_failure() {
    let directory = tempfile::tempdir().unwrap();
    let facts = narrow_and_wide(directory.path());
    let facts = facts.to_str().unwrap();
    let host = ["--sysfs", "tests/hosts/vtd/sys", "--proc", "tests/hosts/vtd/proc"];
    let inspect = [&["inspect", "01:00.0", "--input-range=0-ffffffff"][..], &host].concat();
    for (arguments, expected) in [
        (&["plan", "--facts", facts][..], 0),
        (&["plan", "--facts", facts, "--json"], 0),
        (&inspect, 0),
        (&[&inspect[..], &["--json"]].concat(), 0),
        (&["memlock", "--memory=4K", "--page=4K"], 0),
        (&["check", "ffff:ff:1f.7"], 3),
        (&["check", "ffff:ff:1f.7", "--json"], 3),
    ] {
        // Nobody reads either of them.
        let pipe = || Stdio::from(std::io::pipe().unwrap().1);
        let mut command = Command::new(CONTROL);
        let status = command.args(arguments).stdout(pipe()).stderr(pipe()).status().unwrap();
        assert_eq!(status.code(), Some(expected), "{arguments:?}");
    }
}
