// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A stock Linux guest under examples/microvm, its disk behind the IOMMU that is emulated in the same process.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::daemon::must_exist;

const DISK: &str = "/tmp/microvm-disk";
const DISK_SIZE: usize = 4 << 20;
/// What the guest writes to the end of the disk.
static WRITTEN: [u8; 64 << 10] = [b'V'; 64 << 10];
/// What is typed: more than the serial port has room for.
const TYPED: &str =
    "0123456789abcdefghijklmnopqrstuvwxyz-0123456789abcdefghijklmnopqrstuvwxyz-0123456789abcdefghijklmnopqrstuvwxyz";
/// Where a stray write goes.
const STRAY_TARGET: &str = "0x9f000";

/// What a guest and its VMM said, until both were at their end.
struct Ended {
    console: String,
    vmm: String,
}

/// Boots a guest with a fresh disk and waits for its end.
fn run(arguments: &[&str], command_line: &str) -> Ended {
    let start = Instant::now();
    fs::write(DISK, fresh_disk()).unwrap();
    let errors = "/tmp/microvm-errors";
    let mut process = Command::new("timeout")
        .arg("120")
        .arg(must_exist("/bin/microvm"))
        .args(["--kernel", "/guest/kernel", "--initrd", "/guest/microvm-initrd", "--disk", DISK])
        .args(["--cmdline", &format!("quiet {command_line}")])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(File::create(errors).unwrap())
        .spawn()
        .unwrap();
    let mut keyboard = process.stdin.take().unwrap();
    let mut console = String::new();
    for line in BufReader::new(process.stdout.take().unwrap()).split(b'\n') {
        let line = String::from_utf8_lossy(&line.unwrap()).replace('\r', "");
        println!("console: {line}");
        if line.contains("guest: waits for a line") {
            writeln!(keyboard, "{TYPED}").unwrap();
        }
        console += &line;
        console.push('\n');
    }
    let status = process.wait().unwrap();
    let vmm = fs::read_to_string(errors).unwrap();
    println!("microvm {arguments:?}: {} ms, {status}", start.elapsed().as_millis());
    assert!(status.success(), "{status}:\n{vmm}");
    assert!(console.lines().any(|line| line == format!("guest: reads {TYPED}")), "what is typed reaches the guest");
    Ended { console, vmm }
}

/// The bytes of a disk that no guest has written to.
fn fresh_disk() -> Vec<u8> {
    let mut bytes = vec![0; DISK_SIZE];
    File::open("/dev/nvme0n1").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

/// The sum of the disk as it is before a guest has written to it.
fn md5_of_disk() -> String {
    let command = format!("dd if=/dev/nvme0n1 bs={DISK_SIZE} count=1 2>/dev/null | md5sum");
    let output = Command::new("sh").args(["-c", &command]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

impl Ended {
    fn says(&self, text: &str) -> bool {
        self.console.lines().any(|line| line.contains(text))
    }

    /// What was read is the disk, byte for byte, and what was written is on it.
    fn assert_disk_was_read_and_written(&self) {
        assert!(self.says("guest: serial microvm"));
        assert!(self.says(&format!("guest: read md5 {}", md5_of_disk())));
        let (before, after) = (fresh_disk(), fs::read(DISK).unwrap());
        let (rest, end) = after.split_at(DISK_SIZE - WRITTEN.len());
        assert!(end == WRITTEN, "what the guest wrote is not on the disk");
        assert!(before.starts_with(rest), "something else was written");
    }

    /// The guest's driver mapped what its disk accessed, took it away again, and nothing was refused.
    fn assert_iommu_was_used(&self) {
        let summary = self.vmm.lines().rfind(|line| line.contains(" PROBE, ")).expect("a summary");
        println!("{summary}");
        let count = |kind: &str| -> u64 {
            let words: Vec<&str> = summary.split([' ', ';', ',']).filter(|word| !word.is_empty()).collect();
            let at = words.iter().position(|word| *word == kind).unwrap();
            words[at - 1].parse().unwrap()
        };
        assert_eq!((count("PROBE"), count("ATTACH"), count("failed"), count("unreadable")), (1, 1, 0, 0));
        // 64 KiB at a time, each in one piece or more.
        assert!(count("MAP") > 128 && count("UNMAP") > 128, "{summary}");
    }
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_strict_guest_is_told_of_stray_dma_that_hit_nothing() {
    let guest = run(&["--iommu", "strict", "--trace", "--stray-dma", "64"], "");
    assert!(guest.says("type DMA devices LNRO0005:01"), "the disk is behind the IOMMU");
    assert!(guest.says("guest: reserved 0x00000000fee00000 0x00000000feefffff msi"));
    guest.assert_disk_was_read_and_written();
    guest.assert_iommu_was_used();
    assert!(guest.says(&format!("page fault from EP 1 at {STRAY_TARGET}")), "Linux says so");
    assert!(guest.vmm.contains(&format!("memory at {STRAY_TARGET} is unharmed")), "{}", guest.vmm);
    let traced = |start: &str, rest: &str| guest.vmm.lines().any(|line| line.starts_with(start) && line.contains(rest));
    assert!(traced("iommu: ATTACH domain ", "endpoint 0000:00:00.1: OK"));
    assert!(traced("iommu: MAP domain ", "write-only: OK") && traced("iommu: UNMAP domain ", ": OK"));
    assert!(traced("iommu: fault: endpoint 0000:00:00.1: write-only access ", STRAY_TARGET));
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_lazy_guest_reads_and_writes_its_disk() {
    let guest = run(&["--iommu", "on"], "guest.reboots");
    assert!(guest.says("type DMA-FQ devices LNRO0005:01"), "the disk is behind the IOMMU");
    guest.assert_disk_was_read_and_written();
    guest.assert_iommu_was_used();
    assert!(!guest.says("fault from EP"));
}

/// The control: the same stray write hits memory.
#[test]
#[ignore = "runs in the host VM: make test"]
fn a_guest_without_an_iommu_is_hit_by_stray_dma() {
    let guest = run(&["--iommu", "off", "--stray-dma", "64"], "");
    assert!(!guest.says("guest: group"));
    guest.assert_disk_was_read_and_written();
    assert!(guest.vmm.contains(&format!("memory at {STRAY_TARGET} was overwritten")), "{}", guest.vmm);
}
