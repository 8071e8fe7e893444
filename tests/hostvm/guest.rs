// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A stock Linux guest under a stock QEMU, with a disk assigned to it, behind the daemon.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virtio_iommu::host::iommufd::Iommufd;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::HostFacts;
use virtio_iommu::reserved::bridge::{self, HostBridge};
use virtio_iommu::reserved::facts::FactsFile;

use crate::daemon::{Daemon, inheritable, must_exist};
use crate::inspect::facts_of;
use crate::pci::{NVME, bind_to_vfio, boot_word, dma_faults, find, open, open_vfio, reserved_regions};

const QMP: &str = "/tmp/qmp.sock";

/// The host's side of a guest: the files, the daemon, the VMM, the guest's console.
struct Guest {
    iommufd: Arc<Iommufd>,
    daemon: Daemon,
    vmm: Child,
    console: Receiver<String>,
    seen: Vec<String>,
}

impl Guest {
    fn boot(name: &str, append: &str) -> Self {
        Self::boot_with(name, 256, append, "--boot-bypass=on", |_| ())
    }

    /// Boots a guest with so many MiB of memory, an option of the daemon's, and facts that were changed.
    fn boot_with(name: &str, memory: u32, append: &str, option: &str, change: impl FnOnce(&mut HostFacts)) -> Self {
        let nvme = find(NVME);
        bind_to_vfio(nvme);
        let facts = "/tmp/nvme-facts.json";
        facts_of(nvme, facts);
        let mut file = FactsFile::read(facts.as_ref()).unwrap();
        change(&mut file.devices[0].1);
        file.write(facts.as_ref()).unwrap();
        let (iommufd_file, device_file) = (open("/dev/iommu"), open_vfio(nvme));
        let daemon = Daemon::start(
            name,
            &iommufd_file,
            &device_file,
            &format!("id=0000:00:03.0,host={nvme}"),
            &["--facts", facts, option],
        );
        daemon.watch_exit();
        while !daemon.socket.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let viot = ["viot", "--iommu", "00:01.0", "--endpoints", "00:03.0", "-o", "/tmp/viot.bin"];
        assert!(Command::new("/bin/viommuctl").args(viot).status().unwrap().success());

        for file in [&iommufd_file, &device_file] {
            inheritable(file, true);
        }
        let mut process = qemu(&daemon, &iommufd_file, &device_file, memory, append).spawn().unwrap();
        for file in [&iommufd_file, &device_file] {
            inheritable(file, false);
        }
        let console = read_console(process.stdout.take().unwrap());
        let iommufd = Arc::new(Iommufd::new(iommufd_file.into()).unwrap());
        Self { iommufd, daemon, vmm: process, console, seen: Vec::new() }
    }

    /// Waits for a line of the guest that has this text in it.
    fn wait_for(&mut self, text: &str) -> String {
        let began = Instant::now();
        // A guest that stalls does so before its first line, and is started anew.
        let patience = |seen: &[String]| {
            Duration::from_secs(if seen.iter().any(|line| line.contains("guest: ")) { 300 } else { 150 })
        };
        while let Ok(line) = self.console.recv_timeout(patience(&self.seen).saturating_sub(began.elapsed())) {
            println!("console: {line}");
            self.seen.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
        panic!("the guest does not say `{text}`; the daemon says:\n{}", self.daemon.log());
    }

    /// Waits for the next read of the disk to end, and checks what was read.
    fn wait_for_read(&mut self) {
        let line = self.wait_for(" md5 ");
        let md5 = line.rsplit(' ').next().unwrap();
        assert_eq!(md5, image_md5(), "{line}");
    }

    /// What the guest's kernel says are reserved regions, without repetition.
    fn reserved_regions(&self) -> Vec<&str> {
        let mut lines: Vec<_> = self.seen.iter().filter_map(|line| line.split("guest: reserved ").nth(1)).collect();
        lines.dedup();
        lines
    }

    fn wait_for_end(&mut self) {
        while let Ok(line) = self.console.recv_timeout(Duration::from_secs(120)) {
            println!("console: {line}");
            self.seen.push(line);
        }
        self.vmm.wait().unwrap();
    }

    /// The guest and its VMM are gone: so is everything of the daemon's.
    fn assert_nothing_is_left(&mut self) {
        assert!(!self.daemon.address_spaces().is_empty());
        assert_eq!(self.daemon.pinned_at_exit(), "0 kB");
        assert_eq!(self.daemon.wait().code(), Some(0), "{}", self.daemon.log());
        assert_eq!(self.live_address_spaces(), Vec::<u32>::new());
    }

    /// The numbers of the daemon's address spaces that are there.
    fn live_address_spaces(&self) -> Vec<u32> {
        let mut live: Vec<u32> = self.daemon.address_spaces();
        live.retain(|id| self.iommufd.has_ioas(*id));
        live.sort_unstable();
        live.dedup();
        live
    }

    /// How many requests of a kind the daemon counted at its end.
    fn count(&self, kind: &str) -> u64 {
        let log = self.daemon.log();
        let summary = log.lines().rev().find_map(|line| line.split("is blocked; ").nth(1)).expect("a summary");
        let words: Vec<_> = summary.split([' ', ',', ';']).filter(|word| !word.is_empty()).collect();
        let at = words.iter().position(|word| *word == kind).unwrap_or_else(|| panic!("no {kind} in {summary}"));
        words[at - 1].parse().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

/// The guest's machine.
pub const MACHINE: [&str; 7] = ["-nodefaults", "-machine", "q35", "-accel", "kvm", "-cpu", "host"];
/// Its console.
pub const DISPLAY: [&str; 4] = ["-nographic", "-serial", "stdio", "-no-reboot"];
/// Its kernel.
pub const KERNEL: [&str; 4] = ["-kernel", "/guest/kernel", "-initrd", "/guest/initrd"];

fn qemu(daemon: &Daemon, iommufd: &File, device: &File, memory: u32, append: &str) -> Command {
    let mut command = Command::new(must_exist("/vmm/run"));
    command
        .args(MACHINE)
        .args(["-m", &memory.to_string(), "-machine", "memory-backend=ram"])
        .args(["-object", &format!("memory-backend-memfd,id=ram,size={memory}M,share=on")])
        .args(["-nographic", "-serial", "stdio"])
        .args(KERNEL)
        .args(["-append", &format!("console=ttyS0 quiet panic=-1 {append}")])
        .args(["-acpitable", "file=/tmp/viot.bin", "-qmp", &format!("unix:{QMP},server=on,wait=off")])
        .args(["-chardev", &format!("socket,id=iommu,path={}", daemon.socket.display())])
        .args([
            "-device",
            "vhost-user-test-device-pci,addr=1,chardev=iommu,virtio-id=23,num_vqs=2,vq_size=256,config_size=40",
        ])
        .args(["-object", &format!("iommufd,id=iommufd0,fd={}", iommufd.as_raw_fd())])
        .args(["-device", &format!("vfio-pci,id=disk,fd={},iommufd=iommufd0,addr=3", device.as_raw_fd())])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create("/tmp/vmm.log").unwrap());
    command
}

/// The lines of a console, as they come.
pub fn read_console(console: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut lines = BufReader::new(console);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
            line.clear();
        }
    });
    receiver
}

/// Waits for a line of a console that has a text in it. If none comes, the daemon's log is shown.
pub fn wait_for_line(console: &Receiver<String>, text: &str, log: impl FnOnce() -> String) -> String {
    let deadline = Instant::now() + Duration::from_secs(300);
    while let Ok(line) = console.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        println!("console: {line}");
        if line.contains(text) {
            return line;
        }
    }
    panic!("the guest does not say `{text}`; the daemon says:\n{}", log());
}

/// The sum of the first 16 MiB of the disk's image, as it was taken outside of the host VM.
pub fn image_md5() -> String {
    boot_word("hostvm.md5").unwrap()
}

/// QEMU's control connection.
pub struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    pub fn connect(path: impl AsRef<Path>) -> Self {
        let mut qmp = Self { lines: BufReader::new(UnixStream::connect(path).unwrap()) };
        qmp.read();
        qmp.run("qmp_capabilities");
        qmp
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn run(&mut self, command: &str) {
        let text = json!({ "execute": command }).to_string();
        self.lines.get_mut().write_all(text.as_bytes()).unwrap();
        loop {
            let answer = self.read();
            assert_eq!(answer.get("error"), None, "{command}: {answer}");
            if answer.get("return").is_some() {
                return;
            }
        }
    }
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn reads_its_assigned_disk_through_the_iommu() {
    let mut guest = Guest::boot("reads", "");
    guest.wait_for_read();
    guest.wait_for_end();
    assert_eq!(guest.reserved_regions(), reserved_regions(find(NVME)), "the host's own, and no window");
    assert!(guest.seen.iter().any(|line| line.contains("devices 0000:00:03.0")), "the disk is behind the IOMMU");
    guest.assert_nothing_is_left();
    guest.daemon.assert_clean();
    println!("{}", guest.daemon.log());
    assert!(guest.count("PROBE") >= 1 && guest.count("ATTACH") >= 1);
    assert!(guest.count("MAP") > 200 && guest.count("UNMAP") > 200);
    assert_eq!(guest.count("failed"), 0);
    assert_eq!(dma_faults(), Vec::<String>::new());
}

/// As QEMU's q35 machine has it below 2816 MiB: in one piece from 0 on, and so under the window at 2 GiB of a host that is a
/// q35 machine too.
const MEMORY_UNDER_A_WINDOW: u32 = 2560;

/// Without it, a guest whose ATTACH is refused goes on without an IOMMU, through the VMM's own mapping of its memory.
const NO_WAY_AROUND: &str = "--boot-bypass=off";

/// The host's window that the guest's memory lies under.
fn window() -> IovaRange {
    let bridge = HostBridge { segment: 0, bus: 0 };
    let windows = bridge::windows("/proc".as_ref(), bridge).unwrap().unwrap();
    let memory = IovaRange::new(0x8000_0000, 0x9fff_ffff).unwrap();
    windows.into_iter().find(|window| window.overlaps(memory)).expect("a window lies there")
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn large_memory_under_a_host_window_is_reached_in_bypass() {
    window();
    let mut guest = Guest::boot_with("large", MEMORY_UNDER_A_WINDOW, "iommu.passthrough=1", NO_WAY_AROUND, |_| ());
    guest.wait_for_read();
    guest.wait_for_end();
    assert!(guest.seen.iter().any(|line| line.contains("type identity")), "the guest's devices are in bypass");
    assert_eq!(guest.reserved_regions(), reserved_regions(find(NVME)));
    guest.assert_nothing_is_left();
    guest.daemon.assert_clean();
    assert_eq!(guest.count("MAP"), 0);
    assert_eq!(dma_faults(), Vec::<String>::new());
}

/// The negative control: what happens to the same guest if a host's windows are taken for what its devices cannot reach.
#[test]
#[ignore = "runs in the host VM: make test"]
fn large_memory_is_lost_when_windows_are_reported() {
    let window = window();
    let report = |facts: &mut HostFacts| {
        facts.usable = facts.usable.take().map(|usable| usable.subtract(&RangeSet::from(window)));
    };
    // Its driver gives up after a minute otherwise, in which an emulated processor that has nothing to do may not wake up any more.
    let options = "iommu.passthrough=1 nvme_core.admin_timeout=10";
    let mut guest = Guest::boot_with("lost", MEMORY_UNDER_A_WINDOW, options, NO_WAY_AROUND, report);
    let line = guest.wait_for(" md5 ");
    assert!(!line.ends_with(&image_md5()), "{line}");
    let said = format!("guest memory at 0x80000000-0x9fffffff lies in {window}, which is reserved for the group");
    guest.daemon.expect_log(&said);
    guest.wait_for_end();
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn pauses_under_load_and_boots_again() {
    let mut guest = Guest::boot("pauses", "guest.reads=6 guest.stay");
    guest.wait_for_read();
    let mut qmp = Qmp::connect(QMP);
    for _ in 0..2 {
        guest.wait_for(" starts");
        qmp.run("stop");
        std::thread::sleep(Duration::from_secs(5));
        qmp.run("cont");
        guest.wait_for_read();
    }
    guest.wait_for("guest: done");
    let log = guest.daemon.log();
    assert_eq!(log.matches("the guest goes on").count(), 2, "{log}");
    assert_eq!(log.matches("reset the device").count(), 0, "{log}");
    assert_eq!(dma_faults(), Vec::<String>::new());

    assert_eq!(guest.live_address_spaces().len(), 1);
    guest.seen.clear();
    qmp.run("system_reset");
    guest.wait_for_read();
    guest.wait_for("guest: done");
    let log = guest.daemon.log();
    assert_eq!(log.matches("the guest reset the device").count(), 1, "{log}");
    // The kernel uses numbers again: the one that there is, is that of the guest's new domain.
    assert_eq!(guest.live_address_spaces().len(), 1, "something of the boot before is left");
    assert_eq!(guest.reserved_regions(), reserved_regions(find(NVME)));
    qmp.run("quit");
    guest.assert_nothing_is_left();
    guest.daemon.assert_clean();
    assert_eq!(guest.count("failed"), 0);
}
