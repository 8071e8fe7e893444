// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Translation below the device: what emulated devices reach after each request.

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Iommu, IommuMemory, Permissions};

use super::entry::Entry;
use super::*;
use crate::access::Access;
use crate::device::{Fault, FaultReason, Settings, VirtioIommu};
use crate::host::refused::RefusalReason;
use crate::host::{AfterFailure, Constraints, HostErrorKind, HostGroup};
use crate::memory::GuestRam;
use crate::reserved::EndpointView;

mod random;
mod stress;
#[cfg(feature = "vhost")]
mod vhost;

const DISK: EndpointId = EndpointId(8);
const NET: EndpointId = EndpointId(16);
const OK: u8 = 0;
const READ: u32 = 1;
const WRITE: u32 = 2;
const PAGE: u64 = 0x1000;

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Two emulated devices behind a device, and guest memory in two regions that touch.
struct Machine {
    device: VirtioIommu,
    memory: Memory,
    translation: Arc<Translation>,
    disk: Translator,
    net: Translator,
    #[cfg_attr(not(feature = "vhost"), expect(dead_code, reason = "only caches are added to it"))]
    groups: [Arc<EmulatedGroup>; 2],
}

impl Machine {
    fn new(limits: Limits, boot_bypass: bool) -> Self {
        let translation = Translation::new(limits);
        let groups = [DISK, NET].map(|id| Arc::new(translation.group(vec![id])));
        let [disk, net] = [0, 1].map(|index| groups[index].translator([DISK, NET][index]).unwrap());
        let settings = Settings { boot_bypass, ..Settings::new("0-ffffffffffff".parse().unwrap(), PAGE) };
        let endpoints = [DISK, NET].map(|id| (id, EndpointView::default())).to_vec();
        let seen = groups.iter().map(|group| Arc::clone(group) as Arc<dyn HostGroup>).collect();
        let mut device = VirtioIommu::new(settings, endpoints, seen).unwrap();
        let memory =
            Memory::from_ranges(&[(GuestAddress(0), 0x10_0000), (GuestAddress(0x10_0000), 0x10_0000)]).unwrap();
        assert_eq!(device.first_fault(), None);
        device.set_memory(ram(&memory));
        device.set_driver_features(device.features());
        Self { device, memory, translation, disk, net, groups }
    }

    fn send(&mut self, words: &[u32]) -> u8 {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut reply = [0xaa; 4];
        assert_eq!(self.device.handle(&bytes, &mut reply), 4);
        reply[0]
    }

    fn attach(&mut self, domain: u32, endpoint: EndpointId) -> u8 {
        self.send(&[1, domain, endpoint.0, 0, 0])
    }

    fn detach(&mut self, domain: u32, endpoint: EndpointId) -> u8 {
        self.send(&[2, domain, endpoint.0, 0, 0])
    }

    fn map(&mut self, domain: u32, iova: u64, length: u64, physical: u64, flags: u32) -> u8 {
        let last = iova + (length - 1);
        let words = [iova, last, physical].map(|address| [address as u32, (address >> 32) as u32]);
        self.send(&[&[3, domain], words.as_flattened(), &[flags]].concat())
    }

    fn unmap(&mut self, domain: u32, iova: u64, length: u64) -> u8 {
        let words = [iova, iova + (length - 1)].map(|address| [address as u32, (address >> 32) as u32]);
        self.send(&[&[4, domain], words.as_flattened(), &[0]].concat())
    }
}

fn ram(memory: &Memory) -> GuestRam {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    let regions: Vec<_> = memory.iter().map(|region| (region.start_addr(), region.len())).collect();
    GuestRam::in_software(&regions).unwrap()
}

/// Where a byte is for an endpoint.
fn physical(translator: &Translator, iova: u64, access: Access) -> Result<u64, RefusalReason> {
    translator.pin().translate(iova, 1, access).map(|segment| segment.start.0).map_err(|fault| fault.0.reason)
}

fn pieces(translator: &Translator, iova: u64, length: usize, access: Access) -> Vec<Result<(u64, usize), u64>> {
    translator.with_translation(iova, length, access, |segments| {
        segments
            .map(|segment| segment.map(|found| (found.start.0, found.length)).map_err(|fault| fault.0.address))
            .collect()
    })
}

#[test]
fn an_endpoint_reaches_what_its_domain_maps_and_nothing_else() {
    let mut machine = Machine::new(Limits::default(), false);
    assert_eq!(physical(&machine.disk, 0, Access::READ), Err(RefusalReason::NoTable));
    assert_eq!(machine.attach(1, DISK), OK);
    assert_eq!(physical(&machine.disk, 0x5000, Access::READ), Err(RefusalReason::NotMapped));
    assert_eq!(machine.map(1, 0x5000, PAGE, 0x2000, READ), OK);
    for _ in 0..2 {
        assert_eq!(physical(&machine.disk, 0x5008, Access::READ), Ok(0x2008));
        assert_eq!(physical(&machine.disk, 0x5008, Access::WRITE), Err(RefusalReason::NotAllowed));
        assert_eq!(physical(&machine.disk, 0x6000, Access::READ), Err(RefusalReason::NotMapped));
        assert_eq!(physical(&machine.disk, 0x4fff, Access::READ), Err(RefusalReason::NotMapped));
        assert_eq!(physical(&machine.disk, 0x1_0000_0000_5008, Access::READ), Err(RefusalReason::NotMapped));
    }
    assert_eq!(physical(&machine.net, 0x5000, Access::READ), Err(RefusalReason::NoTable));
    assert_eq!(machine.attach(1, NET), OK);
    assert_eq!(physical(&machine.net, 0x5000, Access::READ), Ok(0x2000), "what was mapped before counts");
    assert_eq!(machine.attach(2, NET), OK);
    assert_eq!(physical(&machine.net, 0x5000, Access::READ), Err(RefusalReason::NotMapped));
    assert_eq!(machine.unmap(1, 0, 0x1_0000), OK);
    assert_eq!(physical(&machine.disk, 0x5008, Access::READ), Err(RefusalReason::NotMapped));
    assert_eq!(machine.detach(1, DISK), OK);
    assert_eq!(physical(&machine.disk, 0x5008, Access::READ), Err(RefusalReason::NoTable));
}

#[test]
fn an_address_is_filled_in_once_until_it_is_unmapped() {
    let mut machine = Machine::new(Limits::default(), false);
    assert_eq!(machine.attach(1, DISK), OK);
    assert_eq!(machine.map(1, 0x5000, 2 * PAGE, 0x2000, READ), OK);
    assert_eq!(machine.translation.usage(), Usage { fills: 0, nodes: 0 }, "mapping looks nothing up");
    for (iova, fills) in [(0x5008, 1), (0x5ff8, 1), (0x9000, 1), (0x6000, 2), (0x5000, 2)] {
        let _ = physical(&machine.disk, iova, Access::READ);
        assert_eq!(machine.translation.usage().fills, fills, "{iova:#x}");
    }
    assert!(machine.translation.usage().nodes > 0);
    assert_eq!(machine.unmap(1, 0x5000, 2 * PAGE), OK);
    assert_eq!(machine.map(1, 0x5000, PAGE, 0x2000, READ), OK);
    let _ = physical(&machine.disk, 0x5000, Access::READ);
    assert_eq!(machine.translation.usage().fills, 3);
    assert_eq!(machine.detach(1, DISK), OK);
    assert_eq!(machine.translation.usage(), Usage { fills: 3, nodes: 0 });
}

#[test]
fn nothing_is_written_behind_a_piece_that_is_not_there() {
    let mut machine = Machine::new(Limits::default(), false);
    assert_eq!(machine.attach(1, DISK), OK);
    // The second region is on its way out: the VMM has taken it away, and the IOMMU has not heard of it.
    let first = Memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    for (page, physical) in [0x2000, 0x10_0000, 0x4000].into_iter().enumerate() {
        assert_eq!(machine.map(1, 0x5000 + page as u64 * PAGE, PAGE, physical, READ | WRITE), OK);
    }
    let bytes: Vec<u8> = (1..=3).flat_map(|page| [page; PAGE as usize]).collect();
    let seen = machine.disk.memory(&first);
    assert!(seen.write_slice(&bytes, GuestAddress(0x5000)).is_err());
    let mut read = bytes.clone();
    assert!(seen.read_slice(&mut read, GuestAddress(0x5000)).is_err());
    assert_eq!(first.read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 1);
    assert_eq!(first.read_obj::<u8>(GuestAddress(0x4000)).unwrap(), 0);
    let mut slices = seen.get_slices(GuestAddress(0x5000), 3 * PAGE as usize, Permissions::Write).unwrap();
    assert!(slices.next().unwrap().is_ok() && slices.next().unwrap().is_err() && slices.next().is_none());
}

#[test]
fn nobody_elses_pins_are_waited_for() {
    let mut machine = Machine::new(Limits::default(), false);
    assert_eq!(machine.attach(1, DISK), OK);
    assert_eq!(machine.map(1, 0x5000, PAGE, 0x2000, READ), OK);
    let _pinned = crossbeam_epoch::pin();
    assert_eq!(machine.unmap(1, 0x5000, PAGE), OK);
}

#[test]
fn a_table_of_another_translation_is_refused() {
    let [one, other] = [0, 1].map(|_| Translation::new(Limits::default()).group(vec![DISK]));
    let table = one.new_table().unwrap();
    let error = other.attach(&table).unwrap_err();
    assert_eq!((error.error.kind, error.after), (HostErrorKind::Incompatible, AfterFailure::PreviousTable));
    one.attach(&table).unwrap();
}

#[test]
fn a_table_maps_whole_pages_below_its_last_address() {
    let translation = Translation::new(Limits::default());
    let (group, other) = (translation.group(vec![DISK]), Translation::new(Limits::default()).group(vec![NET]));
    let table = group.new_table().unwrap();
    assert!(group.can_share(&*table) && !other.can_share(&*table));
    let Constraints { usable, granule } = table.constraints().unwrap();
    assert_eq!((usable.ranges(), granule), (&["0-ffffffffffff".parse().unwrap()][..], PAGE));
    let memory = GuestRam::in_software(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let map = |iova: &str, physical| {
        let iova: IovaRange = iova.parse().unwrap();
        let segments = memory.segments(GuestAddress(physical), iova.length().unwrap()).unwrap();
        table.map(iova, &segments, Access::READ).is_ok()
    };
    assert!(!map("1000000000000-1000000000fff", 0), "behind the last address");
    assert!(!map("1000-1fff", 0x800) && !map("1800-27ff", 0), "not whole pages");
    assert!(map("fffffffff000-ffffffffffff", 0) && map("1000-1fff", 0x1000));
}

#[test]
fn a_block_has_all_bits_of_its_address() {
    let high = 0xfff0_0000_0000_1000;
    assert_eq!(Entry::block(high, Access::READ).physical(), high);
    assert_eq!(Entry::page(high, Access::READ, 1), None);
}

#[test]
fn bypass_reaches_guest_memory_as_it_is() {
    let machine = Machine::new(Limits::default(), true);
    assert_eq!(pieces(&machine.disk, 0xf_f000, 0x2000, Access::READ_WRITE), [Ok((0xf_f000, 0x2000))]);
    assert_eq!(physical(&machine.disk, 0x20_0000, Access::READ), Err(RefusalReason::NotMapped), "there is no memory");
    let mut machine = machine;
    machine.device.write_config(36, &[0]);
    assert_eq!(physical(&machine.disk, 0x1000, Access::READ), Err(RefusalReason::NoTable));
}

#[test]
fn a_range_comes_in_as_few_pieces_as_guest_memory_is_in() {
    let mut machine = Machine::new(Limits::default(), false);
    machine.attach(1, DISK);
    machine.map(1, 0x1_0000, 4 * PAGE, 0x2000, READ);
    machine.map(1, 0x1_4000, PAGE, 0x6000, READ | WRITE);
    machine.map(1, 0x1_5000, PAGE, 0x1000, READ);
    for _ in 0..2 {
        assert_eq!(pieces(&machine.disk, 0x1_0100, 0x5000, Access::READ), [Ok((0x2100, 0x4f00)), Ok((0x1000, 0x100))]);
    }
    assert_eq!(pieces(&machine.disk, 0x1_3000, 0x2000, Access::WRITE), [Err(0x1_3000)]);
    assert_eq!(pieces(&machine.disk, 0x1_4800, 0x2000, Access::WRITE), [Ok((0x6800, 0x800)), Err(0x1_5000)]);
    assert_eq!(pieces(&machine.disk, 0x1_5fff, 2, Access::READ), [Ok((0x1fff, 1)), Err(0x1_6000)]);
    assert_eq!(pieces(&machine.disk, 0x1_0000, 0, Access::READ), []);
}

#[test]
fn a_range_that_passes_the_end_of_the_address_space_is_refused() {
    let translation = Translation::new(Limits { address_bits: 64, ..Limits::default() });
    let group = translation.group(vec![DISK]);
    let disk = group.translator(DISK).unwrap();
    let table = group.new_table().unwrap();
    group.attach(&table).unwrap();
    let ram = GuestRam::in_software(&[(GuestAddress(0), PAGE)]).unwrap();
    let top = IovaRange::from_length(u64::MAX - 0xfff, PAGE).unwrap();
    table.map(top, &ram.segments(GuestAddress(0), PAGE).unwrap(), Access::READ).unwrap();
    for _ in 0..2 {
        assert_eq!(pieces(&disk, u64::MAX - 1, 2, Access::READ), [Ok((0xffe, 2))]);
        assert_eq!(pieces(&disk, u64::MAX - 1, 3, Access::READ), [Err(u64::MAX - 1)]);
    }
    group.block();
}

#[test]
fn refused_accesses_are_events_for_the_guest() {
    let mut machine = Machine::new(Limits::default(), false);
    machine.attach(1, DISK);
    machine.map(1, 0x5000, PAGE, 0x2000, READ);
    pieces(&machine.disk, 0x5ff0, 0x20, Access::READ);
    pieces(&machine.disk, 0x5ff0, 4, Access::WRITE);
    pieces(&machine.net, 0x77, 4, Access::READ_WRITE);
    let fault = |reason, endpoint, address, access| Fault { reason, endpoint, address: Some(address), access };
    let expected = [
        fault(FaultReason::Mapping, DISK, 0x6000, Access::READ),
        fault(FaultReason::Mapping, DISK, 0x5ff0, Access::WRITE),
        fault(FaultReason::Domain, NET, 0x77, Access::READ_WRITE),
    ];
    assert_eq!(machine.device.first_fault(), Some(&expected[0]));
    assert_eq!(expected.map(|_| machine.device.take_fault().unwrap()), expected);
    assert_eq!(machine.device.take_fault(), None);
    pieces(&machine.net, 0x77, 4, Access::READ);
    machine.device.reset();
    assert_eq!(machine.device.take_fault(), None, "a reset forgets those that nobody asked for, too");
    for _ in 0..40 {
        pieces(&machine.net, 0x77, 4, Access::READ);
    }
    assert_eq!(machine.device.statistics().faults_dropped, 8, "the oldest are kept");
    assert_eq!(std::iter::from_fn(|| machine.device.take_fault()).count(), 32);
}

#[test]
fn the_first_refused_access_that_waits_wakes_whoever_delivers_events() {
    let translation = Translation::new(Limits::default());
    let group = translation.group(vec![DISK]);
    let (sender, receiver) = std::sync::mpsc::channel();
    group.on_refused(move || sender.send(()).unwrap());
    let disk = group.translator(DISK).unwrap();
    pieces(&disk, 0, 1, Access::READ);
    pieces(&disk, 0, 1, Access::READ);
    assert_eq!(receiver.try_iter().count(), 1);
    group.refused_accesses().unwrap().pop();
    pieces(&disk, 0, 1, Access::READ);
    assert_eq!(receiver.try_iter().count(), 0, "one is waiting still");
    while group.refused_accesses().unwrap().pop().is_some() {}
    pieces(&disk, 0, 1, Access::READ);
    assert_eq!(receiver.try_iter().count(), 1);
}

#[test]
fn guest_memory_by_virtual_addresses_reads_writes_and_marks_what_is_dirty() {
    let mut machine = Machine::new(Limits::default(), false);
    machine.attach(1, DISK);
    // Over the border of two regions, and back.
    machine.map(1, 0x1_0000, 2 * PAGE, 0xf_f000, READ | WRITE);
    machine.map(1, 0x1_2000, PAGE, 0x3000, READ);
    let physical = machine.memory.clone();
    let memory = machine.disk.memory(&physical);
    let pattern: Vec<u8> = (0..0x2000u32).map(|index| ((index * 7) >> 3) as u8).collect();
    memory.write_slice(&pattern, GuestAddress(0x1_0000)).unwrap();
    let mut read = vec![0; 0x2000];
    physical.read_slice(&mut read, GuestAddress(0xf_f000)).unwrap();
    assert_eq!(read, pattern);
    physical.write_obj(0x1122_3344_5566_7788u64, GuestAddress(0x3000)).unwrap();
    // It begins in one mapping and ends in the other.
    physical.write_slice(&[0xee; 4], GuestAddress(0x10_0ffc)).unwrap();
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1_1ffc)).unwrap(), 0x5566_7788_eeee_eeee);
    let error = memory.write_obj(1u8, GuestAddress(0x1_2000)).unwrap_err();
    let text = "write-only access to 0x12000 refused: the mapping does not allow it";
    assert!(error.to_string().ends_with(text), "{error}");
    let error = memory.read_obj::<u8>(GuestAddress(0x1_3000)).unwrap_err();
    assert!(error.to_string().ends_with("read-only access to 0x13000 refused: nothing is mapped there"), "{error}");

    assert!(memory.check_range(GuestAddress(0x1_0000), 0x3000, Permissions::Read));
    assert!(!memory.check_range(GuestAddress(0x1_0000), 0x3000, Permissions::Write));
    assert!(!memory.check_range(GuestAddress(0x1_0000), 0x3001, Permissions::Read));
    assert!(memory.check_range(GuestAddress(0x9_0000), 0, Permissions::Read));

    let region = |address| vm_memory::GuestMemoryBackend::find_region(&physical, GuestAddress(address)).unwrap();
    let is_dirty = |address: u64| {
        use vm_memory::bitmap::Bitmap;
        use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};
        let region = region(address);
        let MemoryRegionAddress(offset) = region.to_region_addr(GuestAddress(address)).unwrap();
        GuestMemoryRegion::bitmap(region).dirty_at(offset as usize)
    };
    assert_eq!([0xf_e000, 0xf_f000, 0x10_0000, 0x10_1000].map(is_dirty), [false, true, true, false]);
}

#[test]
fn vm_memorys_own_iommu_memory_translates_through_the_adapter() {
    let mut machine = Machine::new(Limits::default(), false);
    machine.attach(1, DISK);
    machine.map(1, 0x1_0000, PAGE, 0x4000, READ | WRITE);
    machine.map(1, 0x1_1000, PAGE, 0x2000, READ);
    let adapter = IommuAdapter::new(machine.disk.clone());
    let memory = IommuMemory::new(machine.memory.clone(), adapter, true, AtomicBitmap::default());
    memory.write_obj(0xabcd_u16, GuestAddress(0x1_0ffe)).unwrap();
    assert_eq!(machine.memory.read_obj::<u16>(GuestAddress(0x4ffe)).unwrap(), 0xabcd);
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1_0ffe)).unwrap(), 0xabcd);
    assert!(memory.write_obj(1u32, GuestAddress(0x1_0ffe)).is_err(), "the second half may only be read");
    assert!(!memory.check_range(GuestAddress(u64::MAX - 3), 4, Permissions::Read));
    assert!(!memory.check_range(GuestAddress(u64::MAX - 3), 40, Permissions::Read));
    assert_eq!(machine.unmap(1, 0x1_0000, PAGE), OK);
    assert!(memory.read_obj::<u16>(GuestAddress(0x1_0ffe)).is_err(), "nothing is cached");
    let adapter = IommuAdapter::new(machine.disk.clone());
    for (iova, length) in [(0x1_1000, 0), (u64::MAX, 1), (u64::MAX, 2)] {
        let error = adapter.translate(GuestAddress(iova), length, Permissions::Read).map(drop).unwrap_err();
        assert!(error.to_string().contains("it is empty, or reaches the end"), "{iova:#x}, {length}: {error}");
    }
}

#[test]
fn memory_that_leaves_is_not_translated_to() {
    let mut machine = Machine::new(Limits::default(), false);
    machine.attach(1, DISK);
    machine.map(1, 0x5000, PAGE, 0x10_0000, READ);
    machine.map(1, 0x6000, PAGE, 0x2000, READ);
    assert_eq!(physical(&machine.disk, 0x5000, Access::READ), Ok(0x10_0000));
    let less = GuestRam::in_software(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    machine.device.set_memory(less);
    assert_eq!(physical(&machine.disk, 0x5000, Access::READ), Err(RefusalReason::NotMapped));
    assert_eq!(physical(&machine.disk, 0x6000, Access::READ), Ok(0x2000));
    machine.device.set_memory(ram(&machine.memory));
    assert_eq!(physical(&machine.disk, 0x5000, Access::READ), Ok(0x10_0000));
}

#[test]
fn the_device_called_by_a_thread_that_is_pinned_does_not_wait_for_itself() {
    let mut machine = Machine::new(Limits::default(), false);
    machine.attach(1, DISK);
    machine.map(1, 0x5000, PAGE, 0x2000, READ);
    let disk = machine.disk.clone();
    let pinned = disk.pin();
    // The promise cannot be kept: the mapping is gone, and so is the domain's table.
    machine.unmap(1, 0x5000, PAGE);
    drop(pinned);
    assert_eq!(physical(&machine.disk, 0x5000, Access::READ), Err(RefusalReason::NotMapped));
}
