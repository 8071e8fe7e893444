// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests to be measured: each with a disk assigned to it, behind the daemon or behind QEMU's own virtio-iommu.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use virtio_iommu::id::PciAddress;

use crate::calls::threads_of;
use crate::common::processes::child_of;
use crate::daemon::must_exist;
use crate::guest::{DISPLAY, MACHINE, read_console};
use crate::pci::bind_to_vfio;

/// Whose virtio-iommu a guest has.
#[derive(Clone, Copy, Debug)]
pub enum Iommu<'a> {
    /// The daemon's, with further options.
    Daemon(&'a [String]),
    /// QEMU's own.
    Qemu,
}

/// When the guest's kernel takes back what it has unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// At once.
    Strict,
    /// Later, with others.
    Lazy,
}

/// A guest, which does what it is told.
pub struct Guest {
    vmm: Child,
    daemon: Option<u32>,
    directory: PathBuf,
    keyboard: ChildStdin,
    console: Receiver<String>,
}

impl Guest {
    /// Starts a guest with this disk.
    pub fn start(name: &str, disk: PciAddress, iommu: Iommu, invalidation: Invalidation) -> Self {
        bind_to_vfio(disk);
        let directory = Path::new("/tmp").join(name);
        let disk = disk.to_string();
        let mut command = match iommu {
            Iommu::Daemon(options) => {
                let mut command = Command::new(must_exist("/bin/viommuctl"));
                command.args(["run", &disk, "--guest", "00:03.0", "--directory"]).arg(&directory);
                command.args(options.iter().map(|option| format!("--daemon-option={option}"))).args(["--", "/vmm/run"]);
                command
            }
            Iommu::Qemu => Command::new(must_exist("/vmm/run")),
        };
        command.args(MACHINE).args(["-m", "256", "-machine", "memory-backend=ram"]);
        command.args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"]).args(DISPLAY);
        let strict = u8::from(invalidation == Invalidation::Strict);
        command
            .args(["-kernel", "/guest/kernel", "-initrd", "/guest/load-initrd"])
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 iommu.strict={strict}")]);
        if matches!(iommu, Iommu::Qemu) {
            command
                .args(["-device", "virtio-iommu-pci,addr=1", "-object", "iommufd,id=iommufd0"])
                .args(["-device", &format!("vfio-pci,host={disk},iommufd=iommufd0,addr=3")]);
        }
        let mut vmm = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(directory.with_extension("vmm.log")).unwrap())
            .spawn()
            .unwrap();
        let console = read_console(vmm.stdout.take().unwrap());
        let keyboard = vmm.stdin.take().unwrap();
        Self { vmm, daemon: None, directory, keyboard, console }
    }

    /// Waits until the guest can be told something; what kind of domain its kernel has made.
    pub fn wait_until_up(&mut self) -> String {
        let kind = self.expect("guest: group type ");
        if self.directory.exists() {
            self.daemon = Some(child_of(self.vmm.id()));
        }
        kind
    }

    /// Has the guest do something; what it says of it.
    pub fn run(&mut self, work: &str) -> String {
        writeln!(self.keyboard, "{work}").unwrap();
        self.expect("load: ")
    }

    /// The next line of the guest's that has this text in it, from there on.
    fn expect(&mut self, text: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(120);
        while let Ok(line) = self.console.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            println!("console: {line}");
            if let Some((_, rest)) = line.split_once(text) {
                return rest.to_owned();
            }
        }
        let log = fs::read_to_string(self.directory.with_extension("vmm.log")).unwrap();
        panic!("the guest does not say `{text}`; its VMM and the daemon say:\n{log}{}", self.log());
    }

    /// The process whose virtio-iommu the guest has.
    pub fn device(&self) -> u32 {
        self.daemon.unwrap_or(self.vmm.id())
    }

    /// How often the daemon's thread that serves the rings has gone to sleep, and so was woken; `None` without a daemon.
    pub fn wake_ups(&self) -> Option<u64> {
        let daemon = self.daemon?;
        let mut directories = threads_of(daemon).into_iter().map(|thread| format!("/proc/{daemon}/task/{thread}"));
        // As the library for vhost-user names it.
        let is_worker =
            |directory: &String| fs::read_to_string(format!("{directory}/comm")).unwrap() == "vring_worker\n";
        let worker = directories.find(is_worker).expect("a thread that serves the rings");
        let status = fs::read_to_string(format!("{worker}/status")).unwrap();
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        Some(count.trim().parse().unwrap())
    }

    /// How often the guest has been left for its VMM because of an access to a register of a device.
    pub fn mmio_exits(&self) -> u64 {
        let start = format!("{}-", self.vmm.id());
        let mut machines = fs::read_dir("/sys/kernel/debug/kvm").unwrap().map(|entry| entry.unwrap());
        let machine = machines.find(|entry| entry.file_name().to_str().unwrap().starts_with(&start));
        let text = fs::read_to_string(machine.expect("the guest's VMM uses KVM").path().join("mmio_exits")).unwrap();
        text.trim().parse().unwrap()
    }

    /// What the daemon has logged; nothing without a daemon.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("daemon.log")).unwrap_or_default()
    }

    /// Turns the guest off.
    pub fn end(&mut self) {
        writeln!(self.keyboard, "off").unwrap();
        assert!(self.vmm.wait().unwrap().success());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}
