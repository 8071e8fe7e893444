// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that are plugged into a running guest behind the daemon, which has none at its start, and taken away again: by the operator,
//! and by a host that wants them back. Between two of them nothing is bound to VFIO, so that the directory of its nodes is not there.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::Value;
use virtio_iommu::id::PciAddress;

use crate::edu::PAGE;
use crate::guest::{DISPLAY, KERNEL, MACHINE, Qmp, image_md5, read_console, wait_for_line};
use crate::pci::{Edu, NVME, bind_to_vfio, dma_faults, expect_fault, find_all};

const DIRECTORY: &str = "/tmp/hotplug";
const MONITOR: &str = "/tmp/hotplug/qmp.sock";
/// There as long as a device is bound to VFIO.
const NODES: &str = "/dev/vfio/devices";
/// Where the guest has the disk.
const PLACE: &str = "0000:01:00.0";
/// Two functions of the host, in one group, and where the guest has them.
const FUNCTIONS: [&str; 2] = ["0000:00:0a.0", "0000:00:0a.1"];
const PLACES: [&str; 2] = ["0000:02:00.0", "0000:02:00.1"];
/// An address of the guest's memory.
const MEMORY: u64 = 0x100_0000;

struct Guest {
    vmm: Child,
    console: Receiver<String>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

impl Guest {
    fn boot() -> Self {
        let mut vmm = Command::new("/bin/viommuctl")
            .args([
                "run",
                "--hotplug=2",
                "--daemon-option=--boot-bypass=off",
                "--directory",
                DIRECTORY,
                "--",
                "/vmm/run",
            ])
            .args(MACHINE)
            // The guest's kernel has the hot-plug of PCI Express, and not that of ACPI.
            .args(["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"])
            .args(["-m", "256"])
            .args(DISPLAY)
            .args(KERNEL)
            // Its driver waits a minute for a disk whose DMA is refused, if it is not told to wait less.
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 nvme_core.admin_timeout=10 guest.functions=2 guest.reads=0 guest.plugs=2 guest.stay",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let console = read_console(vmm.stdout.take().unwrap());
        Self { vmm, console }
    }

    /// Waits for a line of the guest that has this text in it.
    fn wait_for(&self, text: &str) -> String {
        wait_for_line(&self.console, text, log)
    }

    /// QEMU's open file of a device.
    fn file_of(&self, device: &str) -> File {
        let nodes = fs::read_dir(format!("/sys/bus/pci/devices/{device}/vfio-dev")).unwrap();
        let node = Path::new(NODES).join(nodes.map(|entry| entry.unwrap().file_name()).next().unwrap());
        let mut files = fs::read_dir(format!("/proc/{}/fd", self.vmm.id())).unwrap().map(|entry| entry.unwrap().path());
        let found = files.find(|file| fs::read_link(file).is_ok_and(|target| target == node)).unwrap();
        let number = found.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let vmm = pidfd_open(Pid::from_child(&self.vmm), PidfdFlags::empty()).unwrap();
        pidfd_getfd(vmm, number, PidfdGetfdFlags::empty()).unwrap().into()
    }

    /// Plugs the disk, which the guest then reads.
    fn plug(&self, disk: PciAddress) {
        self.wait_for("waits for a disk");
        bind_to_vfio(disk);
        add_to_paused(&[&disk.to_string()], &[PLACE]);
        go_on();
        let line = self.wait_for("guest: plugged 0000");
        assert!(line.contains(&format!("{PLACE} in group ")), "it is behind the IOMMU: {line}");
        assert!(self.wait_for("plugged md5").ends_with(&image_md5()));
        let there = endpoints();
        assert_eq!(places(&there), [(PLACE, "domain")]);
        assert!(!viommuctl(&["mappings", &there[0]["domain"].to_string()]).is_empty(), "its queues are mapped");
    }
}

fn log() -> String {
    fs::read_to_string(Path::new(DIRECTORY).join("daemon.log")).unwrap_or_default()
}

/// Asks the daemon by its control socket.
fn viommuctl(arguments: &[&str]) -> String {
    let control = format!("{DIRECTORY}/control/socket");
    let output = Command::new("/bin/viommuctl").args(arguments).args(["--control", &control]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}\n{}", log());
    String::from_utf8(output.stdout).unwrap()
}

fn endpoints() -> Vec<Value> {
    let status: Value = serde_json::from_str(&viommuctl(&["status", "--json"])).unwrap();
    status["endpoints"].as_array().unwrap().clone()
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key)?.as_str()
}

/// Where the guest has each, and what its DMA goes through.
fn places(endpoints: &[Value]) -> Vec<(&str, &str)> {
    let place = |endpoint| Some((text(endpoint, "id")?, text(endpoint, "translation")?));
    endpoints.iter().map(|endpoint| place(endpoint).unwrap()).collect()
}

/// Adds devices while the guest cannot run, so that it cannot attach them. They are blocked.
fn add_to_paused(devices: &[&str], at: &[&str]) {
    assert_eq!(endpoints(), Vec::<Value>::new());
    Qmp::connect(MONITOR).run("stop");
    viommuctl(&[&["add"], devices, &["--guest", &at.join(","), "--qmp", MONITOR]].concat());
    let blocked: Vec<_> = at.iter().map(|place| (*place, "blocked")).collect();
    assert_eq!(places(&endpoints()), blocked);
}

/// Takes devices from the guest, which is slow where its host's processors have other work.
fn take(places: &[&str]) {
    viommuctl(&[&["remove"], places, &["--qmp", MONITOR, "--wait=150"]].concat());
}

fn go_on() {
    Qmp::connect(MONITOR).run("cont");
}

/// The host takes a device from VFIO, which ends when nobody has its file open any more.
struct Unbinding(Receiver<bool>);

impl Unbinding {
    fn start(address: PciAddress) -> Self {
        let address = address.to_string();
        let unbind = Path::new("/sys/bus/pci/devices").join(&address).join("driver/unbind");
        let (done, unbound) = mpsc::channel();
        std::thread::spawn(move || done.send(fs::write(unbind, address).is_ok()));
        Self(unbound)
    }

    fn wait(&self) {
        let is_done = self.0.recv_timeout(Duration::from_secs(60));
        assert_eq!(is_done, Ok(true), "somebody keeps the device; the daemon says:\n{}", log());
    }
}

fn assert_nothing_is_bound() {
    assert!(!Path::new(NODES).exists(), "the directory goes with its last node");
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn devices_come_and_go_where_there_was_none() {
    let disk = find_all(NVME)[1];
    assert_nothing_is_bound();
    let guest = Guest::boot();

    // Functions of one slot.
    guest.wait_for("waits for functions");
    let functions = FUNCTIONS.map(|address| address.parse().unwrap());
    functions.iter().copied().for_each(bind_to_vfio);
    add_to_paused(&FUNCTIONS, &PLACES);
    // QEMU attached them to the guest's memory as it is. They do not reach it.
    expect_fault(MEMORY, || Edu::new(&guest.file_of(FUNCTIONS[0])).write(MEMORY, PAGE));
    let faults = dma_faults();
    go_on();
    for place in PLACES {
        guest.wait_for(&format!("guest: function {place} in group "));
    }
    assert_eq!(places(&endpoints()), PLACES.map(|place| (place, "domain")));
    take(&PLACES);
    guest.wait_for("guest: functions are gone");
    functions.map(Unbinding::start).iter().for_each(Unbinding::wait);
    assert_nothing_is_bound();

    // A disk, which the operator takes away.
    guest.plug(disk);
    take(&[PLACE]);
    guest.wait_for("guest: unplugged");
    Unbinding::start(disk).wait();
    assert_nothing_is_bound();
    assert!(!log().contains("the host takes its device back"), "it was let go before: {}", log());

    // And the host, while the guest has it: QEMU asks the guest.
    guest.plug(disk);
    assert_eq!(dma_faults(), faults);
    let unbinding = Unbinding::start(disk);
    guest.wait_for("guest: unplugged");
    unbinding.wait();
    assert_nothing_is_bound();
    assert!(log().contains(&format!("endpoint {PLACE}: the host takes its device back")), "{}", log());
    assert_eq!(endpoints(), Vec::<Value>::new());
    guest.wait_for("guest: done");
}
