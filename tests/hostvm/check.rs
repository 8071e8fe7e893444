// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `viommuctl check` and `run`, and what the daemon refuses, on the host VM's own devices.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use virtio_iommu::id::PciAddress;

use crate::daemon::{Daemon, inheritable};
use crate::pci::{EDU, NVME, bind_to_vfio, find, open, open_vfio};

/// Two devices of one group on QEMU's q35 machine: its disk controller and its bus for sensors.
const SATA: &str = "0000:00:1f.2";
const SMBUS: &str = "0000:00:1f.3";

fn check(devices: &[&str]) -> (Option<i32>, Value) {
    let mut command = Command::new("/bin/viommuctl");
    command.arg("check").args(devices).args(["--json", "--qemu", "/vmm/run", "--memory", "256M"]);
    let output = command.output().unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap();
    (output.status.code(), report)
}

/// The remedies for whatever is not as it must be.
fn remedies(report: &Value) -> Vec<String> {
    let devices = report["devices"].as_array().unwrap().iter().map(|device| &device["findings"]);
    let findings = devices.chain([&report["host"]]).flat_map(|findings| findings.as_array().unwrap());
    findings
        .filter(|finding| finding["verdict"] == "no")
        .map(|finding| finding["remedy"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_host_that_is_ready_is_told_so_and_one_that_is_not_what_to_do() {
    let (edu, nvme) = (find(EDU), find(NVME));
    bind_to_vfio(edu);
    let (code, report) = check(&[&edu.to_string()]);
    assert_eq!((code, &report["ready"]), (Some(0), &Value::Bool(true)), "{report:#}");
    assert_eq!(remedies(&report), Vec::<String>::new());

    let (code, report) = check(&[&nvme.to_string(), &edu.to_string()]);
    assert_eq!(code, Some(3), "{report:#}");
    assert_eq!(report["devices"][1]["ready"], true);
    assert!(remedies(&report)[0].contains("vfio-pci"), "{report:#}");

    // In use: somebody else has bound it.
    let vmm = crate::edu::Vmm::new();
    let (code, report) = check(&[&edu.to_string()]);
    assert_eq!(code, Some(3), "{report:#}");
    assert!(remedies(&report)[0].contains("end whatever uses the device"), "{report:#}");
    drop(vmm);
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_group_that_is_not_whole_is_refused() {
    for device in [SATA, SMBUS] {
        bind_to_vfio(device.parse().unwrap());
    }
    let (code, report) = check(&[SATA]);
    assert_eq!(code, Some(3), "{report:#}");
    assert!(remedies(&report)[0].contains(&format!("assign {SMBUS} too")), "{report:#}");
    assert_eq!(check(&[SATA, SMBUS]).0, Some(0));

    let sata: PciAddress = SATA.parse().unwrap();
    let (iommufd, device) = (open("/dev/iommu"), open_vfio(sata));
    let mut daemon = Daemon::start("half", &iommufd, &device, "id=00:03.0", &["--input-range=0-ffffffff"]);
    assert_eq!(daemon.wait().code(), Some(3));
    daemon.expect_log(&format!("{SMBUS} is in IOMMU group"));
    assert!(!daemon.socket.exists());
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_file_for_another_device_is_refused() {
    let edu = find(EDU);
    bind_to_vfio(edu);
    let (iommufd, device) = (open("/dev/iommu"), open_vfio(edu));
    let endpoint = format!("id=00:03.0,host={}", find(NVME));
    let mut daemon = Daemon::start("other", &iommufd, &device, &endpoint, &["--input-range=0-ffffffff"]);
    assert_eq!(daemon.wait().code(), Some(2));
    daemon.expect_log(&format!("is for the host device {edu}"));
    // The same file twice.
    let again = format!("--endpoint=id=00:04.0,cdev-fd={}", device.as_raw_fd());
    let mut daemon = Daemon::start("twice", &iommufd, &device, "id=00:03.0", &["--input-range=0-ffffffff", &again]);
    assert_eq!(daemon.wait().code(), Some(2));
    daemon.expect_log("is given twice");
    // The same device by another file.
    let other = device.try_clone().unwrap();
    inheritable(&other, true);
    let again = format!("--endpoint=id=00:04.0,cdev-fd={}", other.as_raw_fd());
    let mut daemon = Daemon::start("same", &iommufd, &device, "id=00:03.0", &["--input-range=0-ffffffff", &again]);
    assert_eq!(daemon.wait().code(), Some(2));
    daemon.expect_log(&format!("are both the host device {edu}"));
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn facts_of_another_time_are_refused() {
    let edu = find(EDU);
    bind_to_vfio(edu);
    crate::inspect::facts_of(edu, "/tmp/stale.json");
    let facts = std::fs::read_to_string("/tmp/stale.json").unwrap().replace("fee00000", "fed00000");
    std::fs::write("/tmp/stale.json", facts).unwrap();
    let (iommufd, device) = (open("/dev/iommu"), open_vfio(edu));
    let mut daemon = Daemon::start("stale", &iommufd, &device, "id=00:03.0", &["--facts", "/tmp/stale.json"]);
    assert_eq!(daemon.wait().code(), Some(3));
    daemon.expect_log("gather the facts anew");
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_qemu_that_fails_takes_the_daemon_with_it() {
    let edu = find(EDU);
    bind_to_vfio(edu);
    let run = ["run", &edu.to_string(), "--directory", "/tmp/failing", "--", "/vmm/run", "-m", "64", "-no-such-option"];
    let status = Command::new("/bin/viommuctl").args(run).status().unwrap();
    assert!(!status.success());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while Path::new("/tmp/failing/iommu.sock").exists() {
        assert!(std::time::Instant::now() < deadline, "the daemon is still there");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn the_printed_lines_are_those_that_work() {
    let nvme = find(NVME);
    bind_to_vfio(nvme);
    let run = ["run", &nvme.to_string(), "--print", "--directory", "/tmp/printed", "--", "/vmm/run", "-m", "64"];
    let output = Command::new("/bin/viommuctl").args(run).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    // A guest without a kernel: QEMU's own option makes it stop before it starts.
    let lines = format!("{lines} -nodefaults -display none -S & sleep 3; kill $!; wait; cat /tmp/printed/facts.json");
    let output = Command::new("sh").args(["-c", &lines]).output().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(shown.contains(&nvme.to_string()), "{lines}\n{shown}\n{said}");
    assert!(said.contains("a frontend connected") && said.contains("every endpoint is blocked"), "{lines}\n{said}");
}
