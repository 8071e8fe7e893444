// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Groups on a model of the kernel.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::device::{Settings, VirtioIommu};
use crate::host::fake::kernel::{FakeKernel, KernelFailure};
use crate::range::{IovaRange, RangeSet};
use crate::reserved::EndpointView;

const ONE: EndpointId = EndpointId(1);
const OTHER: EndpointId = EndpointId(2);

/// Memory of these regions of 16 pages each, every one with a file of its own or with none.
fn ram(regions: &[(u64, bool)]) -> GuestRam {
    let region = |(start, with_file): &(u64, bool)| {
        let file = with_file.then(|| {
            let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, 0x1_0000).unwrap();
            FileOffset::new(std::fs::File::from(file), 0)
        });
        (GuestAddress(*start), 0x1_0000, file)
    };
    let regions: Vec<_> = regions.iter().map(region).collect();
    GuestRam::from_mmap(&GuestMemoryMmap::<()>::from_ranges_with_files(regions).unwrap()).unwrap()
}

fn usable() -> RangeSet {
    RangeSet::from("0-ffffffff".parse::<IovaRange>().unwrap())
}

fn map(table: &Arc<dyn IoPageTable>, iova: &str, ram: &GuestRam, physical: u64) {
    let iova: IovaRange = iova.parse().unwrap();
    let segments = ram.segments(GuestAddress(physical), iova.length().unwrap()).unwrap();
    table.map(iova, &segments, Access::READ_WRITE).unwrap();
}

#[test]
fn memory_that_is_pinned_is_copied_and_what_left_is_not() {
    let kernel = FakeKernel::new();
    let devices = kernel.devices(&[ONE], &usable());
    let group = IommufdGroup::bound(kernel.iommufd(), devices).unwrap().with_pinned_source().unwrap();
    let both = ram(&[(0, true), (0x10_0000, true), (0x20_0000, false)]);
    group.memory_changed(&both);
    assert_eq!(kernel.mappings(), (2, 0), "what has no file is left out");
    let table = group.new_table().unwrap();
    map(&table, "5000-5fff", &both, 0x1000);
    map(&table, "6000-6fff", &both, 0x20_1000);
    assert_eq!(kernel.mappings(), (4, 1));
    // The first region gets other memory, the second leaves.
    let other = ram(&[(0, true)]);
    group.memory_changed(&other);
    assert_eq!(kernel.mappings(), (3, 1));
    map(&table, "7000-7fff", &both, 0x10_0000);
    map(&table, "8000-8fff", &other, 0x2000);
    assert_eq!(kernel.mappings(), (5, 2));
    drop((table, group));
    assert_eq!((kernel.mappings(), kernel.objects()), ((0, 0), 0));
}

#[test]
fn what_cannot_be_pinned_or_copied_is_mapped_all_the_same() {
    let kernel = FakeKernel::new();
    let devices = kernel.devices(&[ONE], &usable());
    let group = IommufdGroup::bound(kernel.iommufd(), devices).unwrap().with_pinned_source().unwrap();
    let memory = ram(&[(0, true)]);
    kernel.fail_after(0, KernelFailure::Errno(Errno::NOMEM));
    group.memory_changed(&memory);
    let table = group.new_table().unwrap();
    map(&table, "5000-5fff", &memory, 0);
    assert_eq!(kernel.mappings(), (1, 0));
    group.memory_changed(&memory);
    kernel.fail_after(0, KernelFailure::Errno(Errno::NOENT));
    map(&table, "6000-6fff", &memory, 0);
    assert_eq!(kernel.mappings(), (3, 0));
}

#[test]
fn only_what_was_bound_here_can_be_pinned_for() {
    let kernel = FakeKernel::new();
    let (iommufd, devices) = (kernel.iommufd(), kernel.devices(&[ONE], &usable()));
    let error = IommufdGroup::shared(iommufd, devices).with_pinned_source().unwrap_err();
    assert_eq!(error.kind, HostErrorKind::Misuse);
    assert_eq!(IommufdGroup::bound(kernel.iommufd(), Vec::new()).unwrap_err().kind, HostErrorKind::Misuse);
}

/// A group of two that a VMM, which has files of its own, has bound and attached to memory of its own at 0x9000.
struct Beside {
    kernel: FakeKernel,
    group: IommufdGroup,
    memory: GuestRam,
    _vmms_files: Vec<VfioDevice>,
    _vmms_ioas: Ioas,
}

impl Beside {
    fn new() -> Self {
        let kernel = FakeKernel::new();
        let iommufd = kernel.iommufd();
        let devices = kernel.devices(&[ONE, OTHER], &usable());
        let vmms_files = vec![kernel.device_file(ONE), kernel.device_file(OTHER)];
        let vmms_ioas = iommufd.new_ioas().unwrap();
        for file in &vmms_files {
            file.bind(&iommufd).unwrap();
            file.attach(&vmms_ioas).unwrap();
        }
        let memory = ram(&[(0, true)]);
        let segments = memory.segments(GuestAddress(0), 0x1000).unwrap();
        vmms_ioas.map("9000-9fff".parse().unwrap(), &segments, Access::READ_WRITE).unwrap();
        let group = IommufdGroup::shared(iommufd, devices);
        Self { kernel, group, memory, _vmms_files: vmms_files, _vmms_ioas: vmms_ioas }
    }

    fn reaches(&self, iova: u64) -> bool {
        self.kernel.dma(ONE, iova, Access::READ).is_some()
    }
}

#[test]
fn a_device_of_the_host_is_translated_by_it_and_cannot_be_taken_to_another() {
    let beside = Beside::new();
    assert!(!beside.group.can_migrate());
    assert!(!beside.group.new_table().unwrap().in_software());
}

#[test]
fn a_member_that_is_released_does_not_keep_the_group_attached() {
    let beside = Beside::new();
    let table = beside.group.new_table().unwrap();
    map(&table, "5000-5fff", &beside.memory, 0x1000);
    beside.group.attach(&table).unwrap();
    beside.group.release(OTHER);
    assert!(beside.reaches(0x5000), "its sibling stays where it is");
    beside.group.block();
    assert!(!beside.reaches(0x5000));
}

#[test]
fn a_first_attach_that_fails_leaves_nothing_of_what_there_was() {
    let beside = Beside::new();
    assert!(beside.reaches(0x9000));
    let table = beside.group.new_table().unwrap();
    // An address space, an attach and a question for each device; then the attach.
    beside.kernel.fail_after(6, KernelFailure::Errno(Errno::NOMEM));
    let error = beside.group.attach(&table).unwrap_err();
    assert_eq!((error.error.kind, error.after), (HostErrorKind::NoMemory, AfterFailure::Blocked));
    assert!(!beside.reaches(0x9000));
    // A later one leaves the group where it was.
    beside.group.attach(&table).unwrap();
    map(&table, "5000-5fff", &beside.memory, 0x1000);
    let other = beside.group.new_table().unwrap();
    beside.kernel.fail_after(0, KernelFailure::Errno(Errno::NOMEM));
    let error = beside.group.attach(&other).unwrap_err();
    assert_eq!((error.error.kind, error.after), (HostErrorKind::NoMemory, AfterFailure::PreviousTable));
    assert!(beside.reaches(0x5000));
}

#[test]
fn an_address_space_of_another_iommufd_is_refused() {
    let beside = Beside::new();
    // The same number may be there in both.
    let other: Arc<dyn IoPageTable> = Arc::new(beside.kernel.iommufd().new_ioas().unwrap());
    let error = beside.group.attach(&other).unwrap_err();
    assert_eq!((error.error.kind, error.after), (HostErrorKind::Incompatible, AfterFailure::PreviousTable));
    assert!(beside.reaches(0x9000));
}

#[test]
fn looking_at_a_binding_leaves_no_address_space_behind() {
    let beside = Beside::new();
    let table = beside.group.new_table().unwrap();
    assert_eq!(beside.kernel.objects(), 2);
    beside.group.attach(&table).unwrap();
    assert_eq!(beside.kernel.objects(), 2);
}

#[test]
fn a_group_goes_on_when_its_first_device_is_gone() {
    let kernel = FakeKernel::new();
    let devices = kernel.devices(&[ONE, OTHER], &usable());
    let group = IommufdGroup::bound(kernel.iommufd(), devices).unwrap();
    let table = group.new_table().unwrap();
    group.attach(&table).unwrap();
    group.release(ONE);
    let other = group.new_table().unwrap();
    group.attach(&other).unwrap();
    let memory = ram(&[(0, true)]);
    map(&other, "5000-5fff", &memory, 0x1000);
    assert!(kernel.dma(OTHER, 0x5000, Access::READ).is_some());
    group.release(OTHER);
    let error = group.attach(&table).unwrap_err();
    assert_eq!((error.error.kind, error.after), (HostErrorKind::Gone, AfterFailure::Blocked));
}

#[test]
fn a_second_group_joins_many_mappings_by_one_call() {
    const MAPPINGS: u64 = 0x1_0000;
    let kernel = FakeKernel::new();
    let iommufd = kernel.iommufd();
    let group = |id| -> Arc<dyn HostGroup> {
        Arc::new(IommufdGroup::bound(Arc::clone(&iommufd), kernel.devices(&[id], &usable())).unwrap())
    };
    let groups = vec![group(ONE), group(OTHER)];
    let settings = Settings::new("0-ffffffff".parse().unwrap(), 0x1000);
    let views = [ONE, OTHER].map(|id| (id, EndpointView::default())).to_vec();
    let mut device = VirtioIommu::new(settings, views, groups).unwrap();
    device.set_memory(ram(&[(0, true)]));
    device.set_driver_features(device.features());
    let mut send = |words: &[u64], kind: u8, domain: u32| {
        let mut bytes = vec![kind, 0, 0, 0];
        bytes.extend(domain.to_le_bytes());
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes.truncate(if kind == 1 { 20 } else { 36 });
        bytes.resize(if kind == 1 { 20 } else { 36 }, 0);
        let mut reply = [0xff; 4];
        assert_eq!((device.handle(&bytes, &mut reply), reply), (4, [0; 4]));
    };
    send(&[u64::from(ONE.0)], 1, 7);
    for page in 0..MAPPINGS {
        let start = page * 0x1000;
        send(&[start, start + 0xfff, page % 16 * 0x1000, 3], 3, 7);
    }
    assert_eq!(kernel.mappings().0 as u64, MAPPINGS);
    let before = kernel.calls();
    send(&[u64::from(OTHER.0)], 1, 7);
    // A hardware page table, which the kernel fills; the attach; and the question whether the promise holds.
    assert_eq!(kernel.calls() - before, 3);
    assert!(kernel.dma(OTHER, (MAPPINGS - 1) * 0x1000, Access::WRITE).is_some());
}

/// A VMM that is given a device after the guest's IOMMU has it binds it then, and attaches it to all of the guest's memory.
#[test]
fn devices_that_are_bound_after_they_were_added_are_blocked_then() {
    for boot_bypass in [false, true] {
        let kernel = FakeKernel::new();
        let iommufd = kernel.iommufd();
        let settings = Settings { boot_bypass, ..Settings::new("0-ffffffff".parse().unwrap(), 0x1000) };
        let mut device = VirtioIommu::new(settings, Vec::new(), Vec::new()).unwrap();
        let memory = ram(&[(0, true)]);
        device.set_memory(memory.clone());
        let group = IommufdGroup::shared(Arc::clone(&iommufd), kernel.devices(&[ONE], &usable()));
        device.add_group(Arc::new(group), vec![(ONE, EndpointView::default())]).unwrap();
        let (vmms_file, vmms_ioas) = (kernel.device_file(ONE), iommufd.new_ioas().unwrap());
        let segments = memory.segments(GuestAddress(0), 0x1_0000).unwrap();
        vmms_ioas.map("0-ffff".parse().unwrap(), &segments, Access::READ_WRITE).unwrap();
        vmms_file.bind(&iommufd).unwrap();
        vmms_file.attach(&vmms_ioas).unwrap();
        device.devices_were_bound();
        assert_eq!(kernel.dma(ONE, 0x1000, Access::READ).is_some(), boot_bypass, "nobody is in a domain");
    }
}
