// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The whole path on one screen. Lines that start with `demo|` are what `tests/hostvm/demo` shows.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{attach, map, unmap};
use crate::edu::{ENDPOINT, IOVA, PAGE, READ_WRITE, Vmm};
use crate::guest::{DISPLAY, KERNEL, MACHINE, image_md5};
use crate::pci::{EDU, NVME, bind_to_vfio, expect_fault, find};

fn say(text: &str) {
    for line in text.lines() {
        println!("demo| {line}");
    }
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn shows_the_whole_path() {
    println!();
    assigned_disk();
    dma_after_unmap();
}

/// A guest reads its disk.
fn assigned_disk() {
    let nvme = find(NVME);
    bind_to_vfio(nvme);
    let device = nvme.to_string();
    say(&format!("== the host: {}", fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim()));
    say(&output("/bin/viommuctl", &["inspect", &device]));

    say(&format!("== viommuctl run {device} --guest 00:03.0 -- qemu-system-x86_64 -machine q35 -m 256 ..."));
    let mut guest = Command::new("/bin/viommuctl")
        .args(["run", &device, "--guest", "00:03.0", "--directory", "/tmp/demo", "--", "/vmm/run"])
        .args(MACHINE)
        .args(["-m", "256"])
        .args(DISPLAY)
        .args(KERNEL)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut md5 = None;
    for line in BufReader::new(guest.stdout.take().unwrap()).split(b'\n') {
        let line = String::from_utf8_lossy(&line.unwrap()).trim_end().to_owned();
        println!("console: {line}");
        let Some(said) = line.strip_prefix("guest: ") else { continue };
        if !said.starts_with("dmesg") {
            say(&line);
        }
        md5 = said.split(" md5 ").nth(1).map(ToOwned::to_owned).or(md5);
    }
    assert!(guest.wait().unwrap().success());

    let log = wait_for_summary();
    say("== the daemon");
    for line in log.lines().filter(|line| line.contains("reported") || line.contains("is blocked;")) {
        say(line.split("] ").nth(1).unwrap_or(line));
    }
    assert_eq!(md5.as_deref(), Some(image_md5().as_str()));
    say("16 MiB read by the guest through its own mappings are the disk's, byte for byte");
}

/// The daemon ends when QEMU does, and says what it did.
fn wait_for_summary() -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let log = fs::read_to_string("/tmp/demo/daemon.log").unwrap();
        if log.contains("is blocked;") {
            return log;
        }
        assert!(Instant::now() < deadline, "{log}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A device writes after its mapping is gone.
fn dma_after_unmap() {
    bind_to_vfio(find(EDU));
    let vmm = Vmm::new();
    let daemon = vmm.daemon("demo-edu", &["--input-range=0-ffffffffff"]);
    let mut machine = vmm.machine(&daemon);
    say("== a device that goes on writing after UNMAP");
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), 0);
    assert_eq!(machine.send(&map(1, IOVA, PAGE, 0x20_0000, READ_WRITE)), 0);
    vmm.load(IOVA, 0x20_0000, 0x5a);
    assert!(vmm.write_lands(IOVA, 0x20_0000));
    say(&format!("MAP {IOVA:#x}: the device's write lands in the guest's page"));
    assert_eq!(machine.send(&unmap(1, IOVA, PAGE)), 0);
    let fault = expect_fault(IOVA, || assert!(!vmm.write_lands(IOVA, 0x20_0000)));
    say(&format!("UNMAP {IOVA:#x}: the page stays as it is, and the host's IOMMU reports:"));
    say(&fault);
}
