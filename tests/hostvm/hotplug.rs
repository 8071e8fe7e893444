// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk that is plugged into a running guest behind the daemon, and taken away again: the host can have it back, and it can come
//! back.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use serde_json::Value;
use virtio_iommu::id::PciAddress;

use crate::guest::{DISPLAY, KERNEL, MACHINE, image_md5, read_console};
use crate::pci::{NVME, bind_to_vfio, dma_faults, find_all};

const DIRECTORY: &str = "/tmp/hotplug";
/// Where the guest has the disk that comes later.
const PLACE: &str = "0000:01:00.0";

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
    fn boot(disk: PciAddress) -> Self {
        let mut vmm = Command::new("/bin/viommuctl")
            .args(["run", &disk.to_string(), "--hotplug=2", "--directory", DIRECTORY, "--", "/vmm/run"])
            .args(MACHINE)
            // The guest's kernel has the hot-plug of PCI Express, and not that of ACPI.
            .args(["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"])
            .args(["-m", "256"])
            .args(DISPLAY)
            .args(KERNEL)
            .args(["-append", "console=ttyS0 quiet panic=-1 guest.plugs=2"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let console = read_console(vmm.stdout.take().unwrap());
        Self { vmm, console }
    }

    /// Waits for a line of the guest that has this text in it.
    fn wait_for(&self, text: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(300);
        while let Ok(line) = self.console.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            println!("console: {line}");
            if line.contains(text) {
                return line;
            }
        }
        panic!("the guest does not say `{text}`; the daemon says:\n{}", log());
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

/// The host takes the device from VFIO, which ends when nobody has its file open any more.
fn unbind(address: PciAddress) {
    let address = address.to_string();
    let unbind = Path::new("/sys/bus/pci/devices").join(&address).join("driver/unbind");
    let (done, unbound) = mpsc::channel();
    std::thread::spawn(move || done.send(fs::write(unbind, address).is_ok()));
    assert_eq!(unbound.recv_timeout(Duration::from_secs(30)), Ok(true), "somebody keeps the device");
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_disk_comes_and_goes_and_comes_again() {
    let [first, second] = find_all(NVME)[..] else { panic!("the host VM has two disks") };
    bind_to_vfio(first);
    bind_to_vfio(second);
    let guest = Guest::boot(first);
    assert!(guest.wait_for(" md5 ").ends_with(&image_md5()));
    let monitor = format!("{DIRECTORY}/qmp.sock");
    for turn in 1..=2 {
        guest.wait_for("waits for a disk");
        assert_eq!(endpoints().len(), 1);
        viommuctl(&["add", &second.to_string(), "--guest", PLACE, "--qmp", &monitor]);
        let line = guest.wait_for("guest: plugged 0000");
        assert!(line.contains(&format!("{PLACE} in group ")), "it is behind the IOMMU: {line}");
        assert!(guest.wait_for("plugged md5").ends_with(&image_md5()), "turn {turn}");
        let there = endpoints();
        assert_eq!((&there[1]["id"], &there[1]["translation"]), (&PLACE.into(), &"domain".into()), "{there:?}");
        let domain = there[1]["domain"].to_string();
        assert!(!viommuctl(&["mappings", &domain]).is_empty(), "its queues are mapped");
        viommuctl(&["remove", PLACE, "--qmp", &monitor]);
        guest.wait_for("guest: unplugged");
        unbind(second);
        bind_to_vfio(second);
    }
    guest.wait_for("guest: done");
    let log = log();
    assert_eq!(log.matches(&format!("endpoint {PLACE} was added")).count(), 2, "{log}");
    assert!(!log.contains("the host takes its device back"), "it was let go before: {log}");
    assert_eq!(dma_faults(), Vec::<String>::new());
}
