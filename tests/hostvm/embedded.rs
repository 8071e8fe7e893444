// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device embedded in a VMM that owns its devices: over VFIO type1, over an iommufd that it binds them to, and that with
//! guest memory pinned beforehand. This process is VMM, guest and driver of `edu`.

use std::fs::{self, File};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use virtio_iommu::device::{Notice, Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::iommufd::{Iommufd, IommufdGroup, VfioDevice};
use virtio_iommu::host::type1::{Container, VfioGroup};
use virtio_iommu::id::{EndpointId, PciAddress};
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::reserved::sysfs::Sysfs;
use virtio_iommu::reserved::{ReservedKind, ReservedRegion};
use vm_memory::{Bytes, GuestAddress};

use crate::common::status::{NOMEM, OK, UNSUPP};
use crate::common::{Memory, attach, detach, guest_memory, map, unmap};
use crate::pci::{EDU, Edu, bind_to_vfio, find, open, open_vfio};

const PAGE: u64 = 0x1000;
const MEMORY_SIZE: usize = 0x40_0000;
const READ: u32 = 1;
const WRITE: u32 = 2;

/// How the VMM reaches the host's IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Type1,
    Bound,
    Pinned,
}

pub const BACKENDS: [Backend; 3] = [Backend::Type1, Backend::Bound, Backend::Pinned];

struct Vmm {
    device: VirtioIommu,
    memory: Memory,
    /// The files by which each endpoint's device is driven.
    files: Vec<(EndpointId, File)>,
    /// What keeps the group in its container.
    _group: Option<VfioGroup>,
}

/// The group of these devices, what it can use, and the files to drive them by.
pub fn group_of(
    addresses: &[PciAddress],
    backend: Backend,
) -> (Arc<dyn HostGroup>, RangeSet, Vec<File>, Option<VfioGroup>) {
    let endpoints: Vec<EndpointId> = addresses.iter().map(|address| EndpointId::from(*address)).collect();
    for address in addresses {
        bind_to_vfio(*address);
    }
    if backend == Backend::Type1 {
        let number = Sysfs::new("/sys").group(addresses[0]).unwrap().number;
        let container = Container::new(open("/dev/vfio/vfio").into()).unwrap();
        let group = VfioGroup::new(open(format!("/dev/vfio/{number}")).into()).unwrap();
        group.join(&container).unwrap();
        container.set_iommu().unwrap();
        let files = addresses.iter().map(|address| group.device(&address.to_string()).unwrap().into()).collect();
        assert!(group.device("0000:00:1f.7").is_err(), "there is no such device in the group");
        let usable = container.info().unwrap().usable.unwrap();
        return (Arc::new(container.into_group(endpoints).unwrap()), usable, files, Some(group));
    }
    let iommufd = Arc::new(Iommufd::new(open("/dev/iommu").into()).unwrap());
    let files: Vec<File> = addresses.iter().map(|address| open_vfio(*address)).collect();
    let device = |(file, address): (&File, &PciAddress)| {
        VfioDevice::new(file.try_clone().unwrap().into(), address.to_string()).unwrap()
    };
    let devices = files.iter().zip(addresses).map(device).collect::<Vec<_>>();
    let mut group =
        IommufdGroup::bound(Arc::clone(&iommufd), endpoints.iter().copied().zip(devices).collect()).unwrap();
    if backend == Backend::Pinned {
        group = group.with_pinned_source().unwrap();
    }
    let table = group.new_table().unwrap();
    group.attach(&table).unwrap();
    let usable = table.constraints().unwrap().usable;
    group.block();
    (Arc::new(group), usable, files, None)
}

impl Vmm {
    fn new(addresses: &[PciAddress], backend: Backend) -> Self {
        let (group, usable, files, kept) = group_of(addresses, backend);
        let input_range = IovaRange::new(0, usable.last().unwrap().last()).unwrap();
        let region = |range: &IovaRange| ReservedRegion { range: *range, kind: ReservedKind::Reserved };
        let holes = RangeSet::from(input_range).subtract(&usable);
        let view = EndpointView::new(holes.ranges().iter().map(region).collect()).unwrap();
        let endpoints: Vec<EndpointId> = addresses.iter().map(|address| EndpointId::from(*address)).collect();
        let views = endpoints.iter().map(|id| (*id, view.clone())).collect();
        let settings = Settings { boot_bypass: false, ..Settings::new(input_range, PAGE) };
        let mut device = VirtioIommu::new(settings, views, vec![group]).unwrap();
        let memory = guest_memory(MEMORY_SIZE);
        device.set_memory(GuestRam::from_mmap(&memory).unwrap());
        device.set_driver_features(device.features());
        Self { device, memory, files: endpoints.into_iter().zip(files).collect(), _group: kept }
    }

    fn send(&mut self, request: &[u8]) -> u8 {
        let mut reply = [0xff; 4];
        assert_eq!(self.device.handle(request, &mut reply), 4);
        reply[0]
    }

    fn endpoint(&self, index: usize) -> u32 {
        self.files[index].0.0
    }

    /// Whether a write of an endpoint's device to an address changes a page of guest memory.
    fn write_lands(&self, index: usize, iova: u64, physical: u64) -> bool {
        let edu = Edu::new(&self.files[index].1);
        self.memory.write_slice(&[0x11; PAGE as usize], GuestAddress(physical)).unwrap();
        edu.write(iova, PAGE);
        let mut bytes = [0; PAGE as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(physical)).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "the page is written in part");
        bytes[0] != 0x11
    }

    /// Loads an endpoint's device with zeroes, through a mapping for reading.
    fn load(&self, index: usize, iova: u64, physical: u64) {
        self.memory.write_slice(&[0; PAGE as usize], GuestAddress(physical)).unwrap();
        Edu::new(&self.files[index].1).read(iova, PAGE);
    }

    fn map_page(&mut self, domain: u32, iova: u64, physical: u64, flags: u32) -> u8 {
        self.send(&map(domain, iova, PAGE, physical, flags))
    }

    fn notices(&mut self) -> Vec<Notice> {
        std::iter::from_fn(|| self.device.next_notice()).collect()
    }
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn dma_follows_the_guest_over_every_backend() {
    for backend in BACKENDS {
        println!("{backend:?}");
        let mut vmm = Vmm::new(&[find(EDU)], backend);
        let edu = vmm.endpoint(0);
        assert!(!vmm.write_lands(0, 0x10_0000, 0x10_0000), "bypass is off");
        assert_eq!(vmm.send(&attach(1, edu, 0)), OK);
        assert_eq!(vmm.map_page(1, 0x400_0000, 0x1_0000, READ | WRITE), OK);
        assert_eq!(vmm.map_page(1, 0x400_1000, 0x2_0000, READ), OK);
        vmm.load(0, 0x400_0000, 0x1_0000);
        assert!(vmm.write_lands(0, 0x400_0000, 0x1_0000));
        assert!(!vmm.write_lands(0, 0x400_1000, 0x2_0000), "it may only read there");
        // To a second domain with other mappings, which are replayed, and back.
        assert_eq!(vmm.send(&attach(2, edu, 0)), OK);
        assert!(!vmm.write_lands(0, 0x400_0000, 0x1_0000));
        for page in 0..64 {
            assert_eq!(vmm.map_page(2, 0x500_0000 + page * PAGE, page * PAGE, WRITE), OK);
        }
        assert!(vmm.write_lands(0, 0x503_f000, 0x3_f000));
        assert_eq!(vmm.send(&unmap(2, 0x500_0000, 0x4_0000)), OK);
        assert!(!vmm.write_lands(0, 0x503_f000, 0x3_f000));
        // Bypass, by domain.
        assert_eq!(vmm.send(&attach(3, edu, 1)), OK);
        assert!(vmm.write_lands(0, 0x10_0000, 0x10_0000));
        assert_eq!(vmm.send(&detach(3, edu)), OK);
        assert!(!vmm.write_lands(0, 0x10_0000, 0x10_0000));
        assert!(vmm.notices().is_empty());
        // Memory that leaves is not reached when the device has been told.
        assert_eq!(vmm.send(&attach(4, edu, 0)), OK);
        assert_eq!(vmm.map_page(4, 0x400_0000, 0x1_0000, WRITE), OK);
        vmm.device.set_memory(GuestRam::default());
        assert!(!vmm.write_lands(0, 0x400_0000, 0x1_0000));
        vmm.device.set_memory(GuestRam::from_mmap(&vmm.memory).unwrap());
        assert!(vmm.write_lands(0, 0x400_0000, 0x1_0000), "it is back");
        vmm.device.shut_down();
        assert!(!vmm.write_lands(0, 0x400_0000, 0x1_0000));
    }
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn more_mappings_than_the_container_may_have_are_refused() {
    let parameter = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    fs::write(parameter, "666").unwrap();
    let mut vmm = Vmm::new(&[find(EDU)], Backend::Type1);
    fs::write(parameter, "65535").unwrap();
    let edu = vmm.endpoint(0);
    assert_eq!(vmm.send(&attach(1, edu, 0)), OK);
    for page in 0..666 {
        assert_eq!(vmm.map_page(1, 0x400_0000 + page * PAGE, 0, WRITE), OK);
    }
    assert_eq!(vmm.map_page(1, 0x500_0000, 0, WRITE), NOMEM);
    let [Notice::MapFailed { error, .. }] = &vmm.notices()[..] else { panic!("a notice") };
    assert!(error.contains("dma_entry_limit"), "{error}");
    assert!(vmm.write_lands(0, 0x400_0000, 0), "what was there is");
    assert_eq!(vmm.send(&unmap(1, 0x400_0000, PAGE)), OK);
    assert_eq!(vmm.map_page(1, 0x500_0000, 0, WRITE), OK);
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn memory_over_the_limit_is_refused() {
    for backend in [Backend::Type1, Backend::Bound] {
        println!("{backend:?}");
        let mut vmm = Vmm::new(&[find(EDU)], backend);
        let edu = vmm.endpoint(0);
        assert_eq!(vmm.send(&attach(1, edu, 0)), OK);
        let (limit, privileged) = (getrlimit(Resource::Memlock), capabilities(None).unwrap());
        let ordinary = privileged.effective.difference(CapabilitySet::IPC_LOCK);
        setrlimit(Resource::Memlock, Rlimit { current: Some(0x10_0000), maximum: limit.maximum }).unwrap();
        set_capabilities(None, CapabilitySets { effective: ordinary, ..privileged }).unwrap();
        let over = vmm.send(&map(1, 0x400_0000, 0x20_0000, 0, WRITE));
        let within = vmm.map_page(1, 0x500_0000, 0, WRITE);
        set_capabilities(None, privileged).unwrap();
        setrlimit(Resource::Memlock, limit).unwrap();
        assert_eq!((over, within), (NOMEM, OK));
        let [Notice::MapFailed { error, .. }] = &vmm.notices()[..] else { panic!("a notice") };
        assert!(error.contains("0x200000 bytes") && error.contains("RLIMIT_MEMLOCK"), "{error}");
        assert!(vmm.write_lands(0, 0x500_0000, 0));
        assert!(!vmm.write_lands(0, 0x400_0000, 0));
    }
}

/// In a host with two functions of one device, which nothing keeps apart.
mod two {
    use super::*;

    const TWO: [&str; 2] = ["0000:00:0a.0", "0000:00:0a.1"];

    fn addresses() -> [PciAddress; 2] {
        TWO.map(|address| address.parse().unwrap())
    }

    #[test]
    #[ignore = "runs in the host VM: make test"]
    fn the_host_group_is_what_is_attached() {
        let group = Sysfs::new("/sys").group(addresses()[0]).unwrap();
        assert_eq!(group.members, addresses());
        assert!(!Sysfs::new("/sys").is_isolated(&group).unwrap());
        for backend in BACKENDS {
            println!("{backend:?}");
            let mut vmm = Vmm::new(&addresses(), backend);
            let (first, second) = (vmm.endpoint(0), vmm.endpoint(1));
            assert_eq!(vmm.send(&attach(1, first, 0)), OK);
            assert_eq!(vmm.map_page(1, 0x400_0000, 0x1_0000, READ | WRITE), OK);
            vmm.load(0, 0x400_0000, 0x1_0000);
            vmm.load(1, 0x400_0000, 0x1_0000);
            assert!(vmm.write_lands(0, 0x400_0000, 0x1_0000));
            assert!(vmm.write_lands(1, 0x400_0000, 0x1_0000), "the host moves both");
            // One that is unattached cannot go elsewhere than its sibling.
            assert_eq!(vmm.send(&attach(2, second, 0)), UNSUPP);
            assert_eq!(vmm.send(&attach(1, second, 0)), OK);
            // Two ATTACHes move the group, which is blocked in between.
            assert_eq!(vmm.send(&attach(2, first, 0)), OK);
            assert!(!vmm.write_lands(0, 0x400_0000, 0x1_0000));
            assert!(!vmm.write_lands(1, 0x400_0000, 0x1_0000));
            assert_eq!(vmm.send(&attach(2, second, 0)), OK);
            assert_eq!(vmm.map_page(2, 0x500_0000, 0x2_0000, WRITE), OK);
            assert!(!vmm.write_lands(0, 0x400_0000, 0x1_0000));
            assert!(vmm.write_lands(0, 0x500_0000, 0x2_0000));
            assert!(vmm.write_lands(1, 0x500_0000, 0x2_0000));
            // One is detached: it reaches what its sibling does, until that is detached too.
            assert_eq!(vmm.send(&detach(2, first)), OK);
            assert!(vmm.write_lands(0, 0x500_0000, 0x2_0000));
            assert!(vmm.write_lands(1, 0x500_0000, 0x2_0000));
            assert_eq!(vmm.send(&detach(2, second)), OK);
            assert!(!vmm.write_lands(0, 0x500_0000, 0x2_0000));
            assert!(!vmm.write_lands(1, 0x500_0000, 0x2_0000));
        }
    }
}

/// A device that writes to one address over and over until this is dropped.
struct Hammer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Hammer {
    fn new(file: &File, iova: u64) -> Self {
        let (file, stop) = (file.try_clone().unwrap(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let hammer = move || {
            let edu = Edu::new(&file);
            while !stopped.load(Ordering::Relaxed) {
                edu.write(iova, PAGE);
            }
        };
        Self { stop, thread: Some(std::thread::spawn(hammer)) }
    }
}

impl Drop for Hammer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let result = self.thread.take().unwrap().join();
        assert!(result.is_ok() || std::thread::panicking());
    }
}

impl Vmm {
    /// Fills a page and looks whether a device that writes all the time changes it within some of its writes.
    fn is_hit(&self, physical: u64) -> bool {
        self.memory.write_slice(&[0x11; PAGE as usize], GuestAddress(physical)).unwrap();
        let end = Instant::now() + Duration::from_millis(300);
        while Instant::now() < end {
            let mut bytes = [0; PAGE as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(physical)).unwrap();
            if bytes != [0x11; PAGE as usize] {
                return true;
            }
        }
        false
    }
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn stress_dma_ends_with_the_answer_and_lands_nowhere_else() {
    const IOVA: u64 = 0x400_0000;
    // What domains 1 and 2 map the address to, and bypass.
    const PAGES: [u64; 3] = [0x1_0000, 0x2_0000, 0x3_0000];
    for backend in BACKENDS {
        println!("{backend:?}");
        let mut vmm = Vmm::new(&[find(EDU)], backend);
        let edu = vmm.endpoint(0);
        for (domain, physical) in [(1, PAGES[0]), (2, PAGES[1])] {
            assert_eq!(vmm.send(&attach(domain, edu, 0)), OK);
            assert_eq!(vmm.map_page(domain, IOVA, physical, READ | WRITE), OK);
            if domain == 1 {
                vmm.load(0, IOVA, physical);
            }
        }
        let hammer = Hammer::new(&vmm.files[0].1, IOVA);
        // Domain 1 ceased to exist when its endpoint left: each turn makes one anew, while the device writes.
        for turn in 0..2 {
            let domain = 1 + turn % 2;
            let physical = PAGES[usize::try_from(domain - 1).unwrap()];
            assert_eq!(vmm.send(&attach(domain, edu, 0)), OK);
            if turn > 0 {
                assert!(!vmm.is_hit(PAGES[usize::try_from(2 - domain).unwrap()]), "the domain before is still reached");
            }
            assert_eq!(vmm.send(&unmap(domain, 0, 1 << 32)), OK);
            assert_eq!(vmm.map_page(domain, IOVA, physical, READ | WRITE), OK);
            assert!(vmm.is_hit(physical), "the device writes");
            assert_eq!(vmm.send(&unmap(domain, IOVA, PAGE)), OK);
            assert!(!vmm.is_hit(physical), "a byte changed after UNMAP was answered");
            assert_eq!(vmm.map_page(domain, IOVA, physical, READ | WRITE), OK);
            assert!(vmm.is_hit(physical));
            assert!(!vmm.is_hit(PAGES[2]));
            // In bypass the address is no memory; back out of it, nothing is reached.
            assert_eq!(vmm.send(&attach(9, edu, 1)), OK);
            assert!(!vmm.is_hit(physical), "a byte changed after ATTACH was answered");
            assert_eq!(vmm.send(&detach(9, edu)), OK);
            assert_eq!(vmm.send(&attach(domain, edu, 0)), OK);
            assert_eq!(vmm.map_page(domain, IOVA, physical, READ | WRITE), OK);
            assert!(vmm.is_hit(physical));
            assert_eq!(vmm.send(&detach(domain, edu)), OK);
            assert!(!vmm.is_hit(physical), "a byte changed after DETACH was answered");
        }
        drop(hammer);
        vmm.device.shut_down();
    }
}
