// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon that is killed, and the device that the host wants back; and what daemon and watcher have given up.

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use crate::common::confined::{assert_calls, assert_confined, threads};
use crate::common::processes::{child_of, wait_until};
use crate::common::status::NOENT;
use crate::common::{RINGS, attach, map};
use crate::edu::Vmm;
use crate::pci::{EDU, find};
use nix::unistd::Pid;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

const ENDPOINT: u32 = 0x18;
const READ_WRITE: u32 = 3;
const OPTIONS: [&str; 1] = ["--input-range=0-ffffffff"];

/// The processes that run the daemon's program.
fn processes() -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let command = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("cmdline")).ok();
    let commands = entries.filter_map(command).map(|command| command.replace('\0', " "));
    commands.filter(|command| command.contains("vhost-device-iommu") || command.contains("--watch-devices")).collect()
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_daemon_that_is_killed_leaves_no_device_on_its_mappings() {
    let vmm = Vmm::new();
    let mut daemon = vmm.daemon("killed", &OPTIONS);
    let mut machine = vmm.machine(&daemon);
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), 0);
    assert_eq!(machine.send(&map(1, 0x400_0000, 0x1000, 0x1_0000, READ_WRITE)), 0);
    vmm.load(0x400_0000, 0x1_0000, 0x5a);
    assert!(vmm.write_lands(0x400_0000, 0x1_0000));
    assert_eq!(processes().len(), 2, "{:?}", processes());
    daemon.kill();
    wait_until("DMA goes on", || !vmm.write_lands(0x400_0000, 0x1_0000));
    wait_until("the watcher stays", || processes().is_empty());
    // One that is started again does not know what the guest thinks: nothing is reached until the guest says anew.
    let daemon = vmm.daemon("again", &OPTIONS);
    let mut machine = vmm.machine(&daemon);
    assert!(!vmm.write_lands(0x400_0000, 0x1_0000));
    assert!(!vmm.write_lands(0x1_0000, 0x1_0000), "that would be bypass");
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), 0);
    assert!(!vmm.write_lands(0x400_0000, 0x1_0000));
    assert_eq!(machine.send(&map(1, 0x400_0000, 0x1000, 0x1_0000, READ_WRITE)), 0);
    assert!(vmm.write_lands(0x400_0000, 0x1_0000));
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_daemon_whose_guest_memory_is_cut_off_leaves_no_device_on_its_mappings() {
    let vmm = Vmm::new();
    let mut daemon = vmm.daemon("cut-off", &OPTIONS);
    let mut machine = vmm.machine(&daemon);
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), 0);
    assert_eq!(machine.send(&map(1, 0x400_0000, 0x1000, 0x1_0000, READ_WRITE)), 0);
    vmm.load(0x400_0000, 0x1_0000, 0x5a);
    assert!(vmm.write_lands(0x400_0000, 0x1_0000));
    // The rings are gone, and not the page that the device writes to.
    machine.memory.iter().next().unwrap().file_offset().unwrap().file().set_len(RINGS).unwrap();
    machine.kick();
    assert_eq!(daemon.wait().code(), Some(3));
    daemon.expect_log("SIGBUS: guest memory was cut off");
    daemon.expect_log("the daemon ended without a word: the devices were detached, their DMA is refused");
    assert!(!vmm.write_lands(0x400_0000, 0x1_0000), "DMA goes on");
    wait_until("the watcher stays", || processes().is_empty());
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_daemon_that_is_killed_before_a_frontend_came_leaves_its_devices_nothing() {
    let vmm = Vmm::new();
    let mut daemon = vmm.daemon("unasked", &OPTIONS);
    daemon.expect_log("confined: files and network are out of reach");
    wait_until("the daemon is not ready", || threads(daemon.id()).len() == 4);
    vmm.load(0x1_0000, 0x1_0000, 0x5a);
    assert!(vmm.write_lands(0x1_0000, 0x1_0000), "the VMM's own mapping is in force");
    daemon.kill();
    wait_until("DMA goes on", || !vmm.write_lands(0x1_0000, 0x1_0000));
    wait_until("the watcher stays", || processes().is_empty());
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_daemon_with_devices_and_its_watcher_have_given_up_what_they_do_not_need() {
    let vmm = Vmm::new();
    let mut daemon = vmm.daemon("confined", &[OPTIONS[0], "--seccomp=trap"]);
    let mut machine = vmm.machine(&daemon);
    let watcher = child_of(daemon.id());
    assert_confined(daemon.id(), true);
    assert_confined(watcher, false);
    let main = Pid::from_raw(daemon.id().cast_signed());
    let mut names = Vec::new();
    for (name, thread) in threads(daemon.id()) {
        let name = if thread == main { "main".to_owned() } else { name };
        assert_calls(&name, thread);
        names.push(name);
    }
    names.sort();
    assert_eq!(names, ["frontend", "log", "main", "nodes", "vhost-user", "vring_worker"]);
    assert_calls("watcher", Pid::from_raw(watcher.cast_signed()));
    // And have what they need.
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), 0);
    assert_eq!(machine.send(&map(1, 0x400_0000, 0x1000, 0x1_0000, READ_WRITE)), 0);
    vmm.load(0x400_0000, 0x1_0000, 0x5a);
    assert!(vmm.write_lands(0x400_0000, 0x1_0000));
    drop(machine);
    assert_eq!(daemon.wait().code(), Some(0));
    wait_until("the watcher stays", || processes().is_empty());
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_daemon_that_refuses_to_start_leaves_devices_alone() {
    let vmm = Vmm::new();
    let mut daemon = vmm.daemon("refused", &["--facts=/nowhere"]);
    assert_eq!(daemon.wait().code(), Some(2));
    wait_until("the watcher stays", || processes().is_empty());
    vmm.load(0x1_0000, 0x1_0000, 0x5a);
    assert!(vmm.write_lands(0x1_0000, 0x1_0000), "the VMM's own mapping is in force");
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_device_that_the_host_wants_back_is_let_go() {
    let vmm = Vmm::new();
    let daemon = vmm.daemon("unbound", &OPTIONS);
    let mut machine = vmm.machine(&daemon);
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), 0);
    assert_eq!(machine.send(&map(1, 0x400_0000, 0x1000, 0x1_0000, READ_WRITE)), 0);
    let address = find(EDU).to_string();
    let unbind = Path::new("/sys/bus/pci/devices").join(&address).join("driver/unbind");
    let (done, unbound) = mpsc::channel();
    std::thread::spawn(move || done.send(fs::write(unbind, address).is_ok()));
    daemon.expect_log("the host takes its device back");
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), NOENT);
    assert_eq!(machine.send(&map(1, 0x500_0000, 0x1000, 0x1_0000, READ_WRITE)), NOENT, "its domain is gone with it");
    assert!(unbound.try_recv().is_err(), "the VMM has the device still");
    drop(vmm);
    assert_eq!(unbound.recv_timeout(Duration::from_secs(30)), Ok(true), "somebody keeps the device");
    assert_eq!(processes().len(), 2, "daemon and watcher go on");
    drop(machine);
}
