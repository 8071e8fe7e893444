// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Real DMA of a device whose guest and VMM are this program: it binds the device, attaches guest memory to it as a VMM
//! does, then speaks vhost-user and virtio to the daemon.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use virtio_iommu::access::Access;
use virtio_iommu::host::IoPageTable;
use virtio_iommu::host::iommufd::{Ioas, Iommufd, VfioDevice};
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::facts::FactsFile;
use vm_memory::{Bytes, GuestAddress};

use crate::common::status::{FAULT, INVAL, OK};
use crate::common::{Machine, Memory, attach, detach, guest_memory, map, unmap};
use crate::daemon::Daemon;
use crate::inspect::facts_of;
use crate::pci::{EDU, Edu, bind_to_vfio, expect_fault, find, open, open_vfio};

pub const ENDPOINT: u32 = 0x18;
const MEMORY_SIZE: usize = 0x200_0000;
/// Below 256 MiB: that is as far as the device's addresses go.
pub const IOVA: u64 = 0x400_0000;
pub const PAGE: u64 = 0x1000;

const READ: u32 = 1;
const WRITE: u32 = 2;
pub const READ_WRITE: u32 = READ | WRITE;

/// What a VMM holds: the files, and the guest's memory where the device sees it until a daemon says otherwise.
pub struct Vmm {
    iommufd_file: File,
    device_file: File,
    iommufd: Arc<Iommufd>,
    device: VfioDevice,
    identity: Ioas,
    memory: Memory,
}

impl Vmm {
    pub fn new() -> Self {
        let address = find(EDU);
        bind_to_vfio(address);
        let (iommufd_file, device_file) = (open("/dev/iommu"), open_vfio(address));
        let iommufd = Arc::new(Iommufd::new(iommufd_file.try_clone().unwrap().into()).unwrap());
        let device = VfioDevice::new(device_file.try_clone().unwrap().into(), address.to_string()).unwrap();
        device.bind(&iommufd).unwrap();
        let memory = guest_memory(MEMORY_SIZE);
        let identity = iommufd.new_ioas().unwrap();
        for region in GuestRam::from_mmap(&memory).unwrap().regions() {
            identity.map(region.addresses(), &[region.whole()], Access::READ_WRITE).unwrap();
        }
        device.attach(&identity).unwrap();
        Self { iommufd_file, device_file, iommufd, device, identity, memory }
    }

    pub fn daemon(&self, name: &str, options: &[&str]) -> Daemon {
        Daemon::start(name, &self.iommufd_file, &self.device_file, "id=0000:00:03.0", options)
    }

    pub fn machine(&self, daemon: &Daemon) -> Machine {
        let mut machine = Machine::connect(&daemon.socket, self.memory.clone());
        machine.forget_ring();
        machine.start();
        machine
    }

    fn edu(&self) -> Edu<'_> {
        Edu::new(&self.device_file)
    }

    /// Fills a page of guest memory.
    fn fill(&self, address: u64, byte: u8) {
        self.memory.write_slice(&[byte; PAGE as usize], GuestAddress(address)).unwrap();
    }

    /// The byte that a page of guest memory is filled with.
    fn filled_with(&self, address: u64) -> u8 {
        let mut bytes = [0; PAGE as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "the page is written in part");
        bytes[0]
    }

    /// Whether a device's write to an address changes this page of guest memory.
    pub fn write_lands(&self, iova: u64, physical: u64) -> bool {
        self.fill(physical, 0x11);
        self.edu().write(iova, PAGE);
        self.filled_with(physical) != 0x11
    }

    /// Loads the device's buffer through a mapping of a page that is filled with a byte.
    pub fn load(&self, iova: u64, physical: u64, byte: u8) {
        self.fill(physical, byte);
        self.edu().read(iova, PAGE);
    }
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn dma_goes_where_the_guest_said_and_stops_when_it_said() {
    // Facts are gathered before a VMM holds the device.
    let facts = "/tmp/edu-facts.json";
    bind_to_vfio(find(EDU));
    facts_of(find(EDU), facts);
    let vmm = Vmm::new();
    vmm.load(0x10_0000, 0x10_0000, 0x77);
    assert!(vmm.write_lands(0x10_1000, 0x10_1000), "guest memory is reached as it is before a driver takes over");

    let daemon = vmm.daemon("edu", &["--facts", facts]);
    let mut machine = vmm.machine(&daemon);
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), OK);
    assert!(!vmm.write_lands(0x10_1000, 0x10_1000), "and not any more from ATTACH on");

    assert_eq!(machine.send(&map(1, IOVA, PAGE, 0x20_0000, READ_WRITE)), OK);
    assert_eq!(machine.send(&map(1, IOVA + PAGE, PAGE, 0x20_5000, READ)), OK);
    assert_eq!(machine.send(&map(1, IOVA + 2 * PAGE, PAGE, 0x20_9000, WRITE)), OK);
    assert_eq!(machine.send(&map(1, IOVA + 3 * PAGE, PAGE, 0x20_c000, 0)), OK);
    vmm.load(IOVA, 0x20_0000, 0x5a);
    assert!(vmm.write_lands(IOVA + 2 * PAGE, 0x20_9000));
    assert_eq!(vmm.filled_with(0x20_9000), 0x5a, "what was read through one mapping was written through the other");

    // Permissions. A read-only page can be read and not written.
    vmm.load(IOVA + PAGE, 0x20_5000, 0x6b);
    assert!(!vmm.write_lands(IOVA + PAGE, 0x20_5000));
    // The emulated IOMMU reports no fault for a page that it has in its cache: this one was never read.
    assert_eq!(machine.send(&map(1, IOVA + 4 * PAGE, PAGE, 0x20_e000, READ)), OK);
    let _ = expect_fault(IOVA + 4 * PAGE, || assert!(!vmm.write_lands(IOVA + 4 * PAGE, 0x20_e000)));
    assert!(vmm.write_lands(IOVA, 0x20_0000));
    assert_eq!(vmm.filled_with(0x20_0000), 0x6b);
    assert!(!vmm.write_lands(IOVA + 3 * PAGE, 0x20_c000), "a mapping that allows nothing");

    // The regions of the host are refused, and its windows are not.
    assert_eq!(machine.send(&map(1, 0xfee0_0000, PAGE, 0x20_0000, READ)), INVAL);
    assert_eq!(machine.send(&map(1, 0xc000_0000, PAGE, 0x20_0000, READ)), OK);

    // UNMAP.
    assert_eq!(machine.send(&unmap(1, IOVA, PAGE)), OK);
    let _ = expect_fault(IOVA, || assert!(!vmm.write_lands(IOVA, 0x20_0000)));
    assert!(vmm.write_lands(IOVA + 2 * PAGE, 0x20_9000), "the others stay");

    // Mapped to other memory.
    assert_eq!(machine.send(&map(1, IOVA, PAGE, 0x30_0000, READ_WRITE)), OK);
    assert!(vmm.write_lands(IOVA, 0x30_0000));
    assert!(!vmm.write_lands(IOVA, 0x20_0000));

    // DETACH: back to guest memory as it is, and nothing of the domain.
    assert_eq!(machine.send(&detach(1, ENDPOINT)), OK);
    assert!(vmm.write_lands(0x10_1000, 0x10_1000));
    assert!(!vmm.write_lands(IOVA, 0x30_0000));
    daemon.assert_clean();
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn bypass_is_what_the_guest_and_the_operator_say() {
    let vmm = Vmm::new();
    let options = ["--input-range=0-ffffffffff", "--boot-bypass=off"];
    let daemon = vmm.daemon("bypass", &options);
    let mut machine = Machine::connect(&daemon.socket, vmm.memory.clone());
    machine.config();
    assert!(vmm.write_lands(0x10_1000, 0x10_1000), "until the driver is there, the VMM decides");
    machine.start();
    assert_eq!(machine.config()[36], 0);
    assert!(!vmm.write_lands(0x10_1000, 0x10_1000), "from the features on");
    assert_eq!(machine.send(&attach(1, ENDPOINT, 1)), OK);
    assert!(vmm.write_lands(0x10_1000, 0x10_1000), "a bypass domain");
    assert_eq!(machine.send(&detach(1, ENDPOINT)), OK);
    assert!(!vmm.write_lands(0x10_1000, 0x10_1000));
    daemon.assert_clean();
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn when_the_frontend_is_gone_everything_is_blocked_and_nothing_is_left() {
    let vmm = Vmm::new();
    let mut daemon = vmm.daemon("gone", &["--input-range=0-ffffffffff"]);
    let mut machine = vmm.machine(&daemon);
    daemon.watch_exit();
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(machine.send(&map(1, IOVA, 0x10 * PAGE, 0x20_0000, READ_WRITE)), OK);
    assert!(vmm.write_lands(IOVA, 0x20_0000));
    assert_eq!(daemon.pinned(), "64 kB");
    let spaces = daemon.address_spaces();
    assert!(spaces.iter().any(|id| vmm.iommufd.has_ioas(*id)), "{spaces:?}");

    drop(machine);
    assert_eq!(daemon.pinned_at_exit(), "0 kB");
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(!spaces.iter().any(|id| vmm.iommufd.has_ioas(*id)), "{spaces:?}");
    assert!(!vmm.write_lands(IOVA, 0x20_0000));
    assert!(!vmm.write_lands(0x10_1000, 0x10_1000), "not even guest memory as it is");
    assert!(!Path::new(&daemon.socket).exists());
    daemon.assert_clean();
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_device_that_nobody_bound_cannot_be_attached() {
    let address = find(EDU);
    bind_to_vfio(address);
    let (iommufd_file, device_file) = (open("/dev/iommu"), open_vfio(address));
    let daemon = Daemon::start("unbound", &iommufd_file, &device_file, "id=00:03.0", &["--input-range=0-ffffffff"]);
    let mut machine = Machine::connect(&daemon.socket, guest_memory(MEMORY_SIZE));
    machine.start();
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), 3);
    daemon.expect_log("the device is not bound to this iommufd");
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_device_that_is_bound_elsewhere_cannot_be_attached() {
    let vmm = Vmm::new();
    let other = open("/dev/iommu");
    // Address spaces go by numbers: one of this file's must not be taken for the VMM's own table of the same number.
    let iommufd = Arc::new(Iommufd::new(other.try_clone().unwrap().into()).unwrap());
    let mut spaces: Vec<Ioas> = (0..8).map(|_| iommufd.new_ioas().unwrap()).collect();
    spaces.retain(|space| space.id() != vmm.identity.id());
    assert_eq!(spaces.len(), 7, "the daemon's first one will have the number that is free now");
    let daemon = Daemon::start("elsewhere", &other, &vmm.device_file, "id=00:03.0", &["--input-range=0-ffffffff"]);
    let mut machine = vmm.machine(&daemon);
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), 3);
    daemon.expect_log("the device is not bound to this iommufd");
    assert!(!vmm.write_lands(0x10_1000, 0x10_1000), "what the device is attached to is not known: it is blocked");
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_promise_that_the_host_cannot_keep_ends_in_a_refusal() {
    let path = "/tmp/promise-facts.json";
    bind_to_vfio(find(EDU));
    facts_of(find(EDU), path);
    let mut file = FactsFile::read(path.as_ref()).unwrap();
    let facts = &mut file.devices[0].1;
    (facts.usable, facts.aperture) = (Some(RangeSet::from(IovaRange::new(0, (1 << 56) - 1).unwrap())), None);
    file.write(path.as_ref()).unwrap();
    let vmm = Vmm::new();
    let daemon = vmm.daemon("promise", &["--facts", path]);
    let mut machine = vmm.machine(&daemon);
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), 2);
    daemon.expect_log("0x1000000000000-0xffffffffffffff");
    assert!(!vmm.write_lands(0x10_1000, 0x10_1000));
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn memory_without_a_file_is_mapped_by_address() {
    let vmm = Vmm::new();
    let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    memory.write_slice(&[0x3c; PAGE as usize], GuestAddress(0x2000)).unwrap();
    let ram = GuestRam::from_mmap(&memory).unwrap();
    drop(memory);
    let space = vmm.iommufd.new_ioas().unwrap();
    let (from, to) = (IovaRange::from_length(IOVA, PAGE).unwrap(), IovaRange::from_length(IOVA + PAGE, PAGE).unwrap());
    space.map(from, &ram.segments(GuestAddress(0x2000), PAGE).unwrap(), Access::READ).unwrap();
    drop(ram);
    let target = GuestRam::from_mmap(&vmm.memory).unwrap().segments(GuestAddress(0x20_0000), PAGE).unwrap();
    space.map(to, &target, Access::WRITE).unwrap();
    vmm.device.attach(&space).unwrap();
    // Nobody but the address space has the memory any more.
    vmm.edu().read(IOVA, PAGE);
    assert!(vmm.write_lands(IOVA + PAGE, 0x20_0000));
    assert_eq!(vmm.filled_with(0x20_0000), 0x3c);
    assert_eq!(space.unmap(IovaRange::from_length(IOVA, 2 * PAGE).unwrap()).unwrap(), 2 * PAGE);
    assert!(space.unmap(from).is_err(), "there is nothing left to unmap");
    assert!(!vmm.write_lands(IOVA + PAGE, 0x20_0000));
    vmm.device.detach();
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn memory_that_the_host_cannot_pin_is_refused() {
    let mut vmm = Vmm::new();
    // The pages of a ramfs cannot be pinned for long: it is a file system to be written back, if to nowhere.
    let path = "/ram/memory";
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    file.set_len(MEMORY_SIZE as u64).unwrap();
    let offset = vm_memory::FileOffset::new(file, 0);
    vmm.memory = Memory::from_ranges_with_files([(GuestAddress(0), MEMORY_SIZE, Some(offset))]).unwrap();
    let daemon = vmm.daemon("address", &["--input-range=0-ffffffffff"]);
    let mut machine = vmm.machine(&daemon);
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(machine.send(&map(1, IOVA, PAGE, 0x20_0000, READ_WRITE)), FAULT);
    daemon.expect_log("guest memory cannot be reached");
    assert_eq!(machine.send(&unmap(1, IOVA, PAGE)), OK);
    std::fs::remove_file(path).unwrap();
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // The address space is freed before the files are closed.
        self.device.detach();
    }
}
