// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices of the host VM.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use virtio_iommu::id::PciAddress;

/// Vendor and device number of QEMU's `edu` device, as sysfs writes them.
pub const EDU: (&str, &str) = ("0x1234", "0x11e8");
/// Of its disk.
pub const NVME: (&str, &str) = ("0x1b36", "0x0010");

/// Which of its IOMMUs the host VM was booted with, as `tests/hostvm/vm` names them.
pub fn host_iommu() -> String {
    boot_word("hostvm.iommu").unwrap()
}

/// The value of a word on the host VM's command line.
pub fn boot_word(name: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").unwrap();
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).map(ToOwned::to_owned)
}

/// The first device of a kind.
pub fn find(kind: (&str, &str)) -> PciAddress {
    *find_all(kind).first().expect("the host VM has the device")
}

/// The devices of a kind, by address.
pub fn find_all((vendor, device): (&str, &str)) -> Vec<PciAddress> {
    let paths = fs::read_dir("/sys/bus/pci/devices").unwrap().map(|entry| entry.unwrap().path());
    let is = |path: &Path, file: &str, value: &str| fs::read_to_string(path.join(file)).unwrap().trim() == value;
    let found = paths.filter(|path| is(path, "vendor", vendor) && is(path, "device", device));
    let mut found: Vec<_> = found.map(|path| path.file_name().unwrap().to_str().unwrap().parse().unwrap()).collect();
    found.sort_unstable();
    found
}

/// Binds a device to vfio-pci, from whatever driver it has.
pub fn bind_to_vfio(address: PciAddress) {
    let device = Path::new("/sys/bus/pci/devices").join(address.to_string());
    fs::write(device.join("driver_override"), "vfio-pci").unwrap();
    let driver = fs::read_link(device.join("driver")).ok();
    if driver.as_ref().and_then(|driver| driver.file_name()).is_some_and(|name| name == "vfio-pci") {
        return;
    }
    if driver.is_some() {
        fs::write(device.join("driver/unbind"), address.to_string()).unwrap();
    }
    fs::write("/sys/bus/pci/drivers_probe", address.to_string()).unwrap();
}

/// Opens a file for reading and writing.
pub fn open(path: impl AsRef<Path>) -> File {
    let path = path.as_ref();
    File::options().read(true).write(true).open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Opens the VFIO device file of a device.
pub fn open_vfio(address: PciAddress) -> File {
    let directory = Path::new("/sys/bus/pci/devices").join(address.to_string()).join("vfio-dev");
    let name = fs::read_dir(directory).unwrap().next().unwrap().unwrap().file_name();
    open(Path::new("/dev/vfio/devices").join(name))
}

/// The DMA faults that the host's IOMMU has reported.
pub fn dma_faults() -> Vec<String> {
    let output = Command::new("dmesg").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // As VT-d, AMD-Vi and virtio-iommu say it.
    let is_fault = |line: &str| {
        line.contains("DMAR: [DMA")
            || line.contains("IO_PAGE_FAULT")
            || line.contains("virtio_iommu") && line.contains("fault")
    };
    text.lines().filter(|line| is_fault(line)).map(ToOwned::to_owned).collect()
}

/// The group's reserved regions, as the host's kernel says them.
pub fn reserved_regions(address: PciAddress) -> Vec<String> {
    let path = Path::new("/sys/bus/pci/devices").join(address.to_string()).join("iommu_group/reserved_regions");
    fs::read_to_string(path).unwrap().lines().map(ToOwned::to_owned).collect()
}

/// Runs something that causes a DMA fault at an address, and waits until the host's IOMMU has reported it: that is an
/// interrupt and a line in the kernel's log after the access. The line.
pub fn expect_fault(address: u64, act: impl FnOnce()) -> String {
    let before = dma_faults().len();
    if before > 0 {
        // Linux shows no more than three faults in five seconds (dmar_fault() asks its rate limit three times for each).
        std::thread::sleep(Duration::from_secs(6));
    }
    act();
    let text = format!("fault addr {address:#x} ");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(line) = dma_faults().into_iter().skip(before).find(|line| line.contains(&text)) {
            return line;
        }
        assert!(Instant::now() < deadline, "no `{text}` in {:?}", dma_faults());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// QEMU's `edu` device, driven through its VFIO file.
pub struct Edu<'a> {
    file: &'a File,
}

// Regions of a VFIO PCI device follow each other in its file, each at its index times this (Linux,
// include/linux/vfio_pci_core.h, VFIO_PCI_OFFSET_SHIFT).
const REGION: u64 = 1 << 40;
const BAR0: u64 = 0;
const CONFIG: u64 = 7 * REGION;

// QEMU, docs/specs/edu.rst.
const DMA_SOURCE: u64 = BAR0 + 0x80;
const DMA_TARGET: u64 = BAR0 + 0x88;
const DMA_COUNT: u64 = BAR0 + 0x90;
const DMA_COMMAND: u64 = BAR0 + 0x98;
const DMA_BUFFER: u64 = 0x4_0000;
const DMA_START: u64 = 1;
const DMA_FROM_DEVICE: u64 = 2;

impl<'a> Edu<'a> {
    /// The device must be bound to an iommufd.
    pub fn new(file: &'a File) -> Self {
        let mut command = [0; 2];
        file.read_exact_at(&mut command, CONFIG + 4).unwrap();
        // Memory space and bus mastering.
        command[0] |= 6;
        file.write_all_at(&command, CONFIG + 4).unwrap();
        Self { file }
    }

    fn set(&self, register: u64, value: u64) {
        self.file.write_all_at(&value.to_le_bytes(), register).unwrap();
    }

    fn run(&self, source: u64, target: u64, count: u64, command: u64) {
        self.set(DMA_SOURCE, source);
        self.set(DMA_TARGET, target);
        self.set(DMA_COUNT, count);
        self.set(DMA_COMMAND, command | DMA_START);
        for _ in 0..3000 {
            let mut bytes = [0; 8];
            self.file.read_exact_at(&mut bytes, DMA_COMMAND).unwrap();
            if u64::from_le_bytes(bytes) & DMA_START == 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("the device's DMA does not end");
    }

    /// The device reads memory into its own buffer.
    pub fn read(&self, iova: u64, count: u64) {
        self.run(iova, DMA_BUFFER, count, 0);
    }

    /// The device writes its own buffer to memory.
    pub fn write(&self, iova: u64, count: u64) {
        self.run(DMA_BUFFER, iova, count, DMA_FROM_DEVICE);
    }
}
