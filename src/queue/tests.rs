// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Queues of a driver, good and bad.

use std::sync::Arc;

use virtio_queue::Queue;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::ring::AVAIL_F_NO_INTERRUPT;
use super::*;
use crate::device::Settings;
use crate::host::fake::{Failure, FakeHost, Flavour};
use crate::host::{HostErrorKind, HostGroup};
use crate::id::EndpointId;
use crate::memory::GuestRam;
use crate::range::{IovaRange, RangeSet};
use crate::reserved::EndpointView;

const SIZE: u16 = 16;
const REQUESTS: u64 = 0x1_0000;
const REPLIES: u64 = 0x2_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

type Memory = GuestMemoryMmap<()>;

fn memory() -> Memory {
    let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    memory.write_slice(&[0xaa; 0x1000], GuestAddress(REPLIES)).unwrap();
    memory
}

fn device() -> (FakeHost, VirtioIommu) {
    let host = FakeHost::new(Flavour::Iommufd);
    let input_range = IovaRange::new(0, 0xffff_ffff).unwrap();
    let group: Arc<dyn HostGroup> = host.group(&[EndpointId(8)], RangeSet::from(IovaRange::ALL));
    let endpoints = vec![(EndpointId(8), EndpointView::default())];
    let mut device = VirtioIommu::new(Settings::new(input_range, 0x1000), endpoints, vec![group]).unwrap();
    device.set_driver_features(device.features());
    device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 0x10_0000)]).unwrap());
    (host, device)
}

fn attach_bytes(endpoint: u32) -> Vec<u8> {
    [1u32, 1, endpoint, 0, 0].iter().flat_map(|field| field.to_le_bytes()).collect()
}

fn map_bytes() -> Vec<u8> {
    let mut bytes: Vec<u8> = [3u32, 1].iter().flat_map(|field| field.to_le_bytes()).collect();
    bytes.extend([0x5000u64, 0x5fff, 0x1000].iter().flat_map(|field| field.to_le_bytes()));
    bytes.extend(1u32.to_le_bytes());
    bytes
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> RawDescriptor {
    RawDescriptor::from(Descriptor::new(address, length, flags, next))
}

/// Request `index` in two descriptors, at its own place in memory.
fn request(memory: &Memory, index: u16, bytes: &[u8], writable: u32) -> [RawDescriptor; 2] {
    let offset = u64::from(index) * 0x100;
    memory.write_slice(bytes, GuestAddress(REQUESTS + offset)).unwrap();
    [
        descriptor(REQUESTS + offset, bytes.len() as u32, NEXT, index * 2 + 1),
        descriptor(REPLIES + offset, writable, WRITE, 0),
    ]
}

fn reply(memory: &Memory, index: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(REPLIES + index * 0x100)).unwrap();
    bytes
}

fn used(mock: &MockSplitQueue<'_, Memory>) -> Vec<(u32, u32)> {
    let count = mock.used().idx().load();
    (0..count).map(|at| mock.used().ring().ref_at(usize::from(at)).unwrap().load()).map(|e| (e.id(), e.len())).collect()
}

#[test]
fn a_batch_is_answered_in_order_with_one_notification() {
    let memory = memory();
    let (_host, mut device) = device();
    let mock = MockSplitQueue::new(&memory, SIZE);
    let mut descriptors = Vec::new();
    for (index, bytes) in [attach_bytes(8), attach_bytes(9), map_bytes()].iter().enumerate() {
        descriptors.extend(request(&memory, index as u16, bytes, 4));
    }
    mock.build_multiple_desc_chains(&descriptors).unwrap();
    let mut queue: Queue = mock.create_queue().unwrap();
    let batch = Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
    assert_eq!(batch, Batch { handled: 3, more: false, notify: true });
    assert_eq!(used(&mock), [(0, 4), (2, 4), (4, 4)]);
    let statuses: Vec<u8> = (0..3).map(|index| reply(&memory, index, 4)[0]).collect();
    assert_eq!(statuses, [0, 6, 0]);
    let again = Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
    assert_eq!(again, Batch::default(), "nothing is left, and nobody is notified");
}

/// A device with an endpoint in domain 1 and a MAP of two steps in the request queue, followed by another request.
fn large_map<'a>(memory: &'a Memory, host: &FakeHost, device: &mut VirtioIommu) -> MockSplitQueue<'a, Memory> {
    device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 0x8000_0000)]).unwrap());
    device.handle(&attach_bytes(8), &mut [0; 4]);
    assert_eq!(host.mappings(EndpointId(8)), []);
    let mut map: Vec<u8> = [3u32, 1].iter().flat_map(|field| field.to_le_bytes()).collect();
    map.extend([0u64, 0x7fff_ffff, 0].iter().flat_map(|field| field.to_le_bytes()));
    map.extend(1u32.to_le_bytes());
    let mock = MockSplitQueue::new(memory, SIZE);
    let mut descriptors = request(memory, 0, &map, 4).to_vec();
    descriptors.extend(request(memory, 1, &attach_bytes(9), 4));
    mock.build_multiple_desc_chains(&descriptors).unwrap();
    mock
}

#[test]
fn a_large_map_lets_others_at_the_device_between_its_steps() {
    let memory = memory();
    let (host, mut device) = device();
    let mock = large_map(&memory, &host, &mut device);
    let mut queue: Queue = mock.create_queue().unwrap();
    let mut requests = Requests::default();
    let first = requests.process(&mut device, &mut queue, &memory, 64).unwrap();
    assert_eq!(first, Batch { handled: 0, more: true, notify: false });
    assert_eq!(host.mappings(EndpointId(8)).len(), 1);
    assert_eq!((used(&mock), reply(&memory, 0, 4)), (vec![], vec![0xaa; 4]), "it is not answered yet");
    // A request is read once: what the driver writes now is not seen.
    memory.write_slice(&[0xff; 36], GuestAddress(REQUESTS)).unwrap();
    let second = requests.process(&mut device, &mut queue, &memory, 64).unwrap();
    assert_eq!(second, Batch { handled: 2, more: false, notify: true });
    assert_eq!(host.mappings(EndpointId(8)).len(), 2);
    assert_eq!(used(&mock), [(0, 4), (2, 4)]);
    assert_eq!((reply(&memory, 0, 4), reply(&memory, 1, 4)), (vec![0; 4], vec![6, 0, 0, 0]));
}

#[test]
fn a_large_map_is_completed_before_the_queue_stops() {
    let memory = memory();
    let (host, mut device) = device();
    let mock = large_map(&memory, &host, &mut device);
    let mut queue: Queue = mock.create_queue().unwrap();
    let mut requests = Requests::default();
    assert!(!requests.complete(&mut device, &mut queue, &memory).unwrap(), "nothing is under way");
    assert!(requests.process(&mut device, &mut queue, &memory, 64).unwrap().more);
    assert!(requests.complete(&mut device, &mut queue, &memory).unwrap());
    assert_eq!((used(&mock), queue.next_avail()), (vec![(0, 4)], 1), "the next request stays in the queue");
    assert_eq!(reply(&memory, 0, 4), [0; 4]);
}

#[test]
fn a_large_map_is_not_answered_after_a_reset() {
    let memory = memory();
    let (host, mut device) = device();
    let mock = large_map(&memory, &host, &mut device);
    let mut queue: Queue = mock.create_queue().unwrap();
    let mut requests = Requests::default();
    assert!(requests.process(&mut device, &mut queue, &memory, 64).unwrap().more);
    device.reset();
    requests.forget();
    assert!(!requests.complete(&mut device, &mut queue, &memory).unwrap());
    assert_eq!((used(&mock), reply(&memory, 0, 4)), (vec![], vec![0xaa; 4]));
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let memory = memory();
    let (_host, mut device) = device();
    let mock = MockSplitQueue::new(&memory, SIZE);
    mock.build_multiple_desc_chains(&request(&memory, 0, &attach_bytes(8), 4)).unwrap();
    let mut queue: Queue = mock.create_queue().unwrap();
    memory.write_obj(AVAIL_F_NO_INTERRUPT.to_le(), mock.avail_addr()).unwrap();
    let batch = Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
    assert_eq!(batch, Batch { handled: 1, more: false, notify: false });
}

#[test]
fn kicks_stay_suppressed_for_a_caller_that_goes_on_watching() {
    for event_idx in [false, true] {
        let memory = memory();
        let (_host, mut device) = device();
        let mock = MockSplitQueue::new(&memory, SIZE);
        let descriptors: Vec<_> = (0..2).flat_map(|index| request(&memory, index, &attach_bytes(8), 4)).collect();
        mock.build_multiple_desc_chains(&descriptors).unwrap();
        let mut queue: Queue = mock.create_queue().unwrap();
        queue.set_event_idx(event_idx);
        queue.set_used_ring_address(Some(0x8000), None);
        let wish = if event_idx { 0x8000 + 4 + 8 * u64::from(SIZE) } else { 0x8000 };
        let wish = || memory.read_obj::<u16>(GuestAddress(wish)).unwrap();
        let mut requests = Requests::default();
        assert!(has_requests(&queue, &memory));
        let batch = requests.process_quietly(&mut device, &mut queue, &memory, 64).unwrap();
        assert_eq!((batch.handled, batch.more, wish()), (2, false, u16::from(!event_idx)), "{event_idx}");
        assert!(!has_requests(&queue, &memory));
        assert_eq!(requests.process(&mut device, &mut queue, &memory, 64).unwrap(), Batch::default());
        assert_eq!(wish(), if event_idx { 2 } else { 0 }, "{event_idx}");
    }
    let memory = memory();
    let mut queue: Queue = MockSplitQueue::new(&memory, SIZE).create_queue().unwrap();
    queue.set_avail_ring_address(Some(0xffff_f000), Some(0xffff));
    assert!(has_requests(&queue, &memory), "whoever processes it finds what is wrong");
}

#[test]
fn the_budget_bounds_a_batch() {
    let memory = memory();
    let (_host, mut device) = device();
    let mock = MockSplitQueue::new(&memory, SIZE);
    let descriptors: Vec<_> = (0..5).flat_map(|index| request(&memory, index, &attach_bytes(8), 4)).collect();
    mock.build_multiple_desc_chains(&descriptors).unwrap();
    let mut queue: Queue = mock.create_queue().unwrap();
    for (handled, more) in [(2, true), (2, true), (1, false)] {
        let batch = Requests::default().process(&mut device, &mut queue, &memory, 2).unwrap();
        assert_eq!((batch.handled, batch.more), (handled, more));
    }
}

#[test]
fn a_request_split_at_every_byte_is_read_whole() {
    let bytes = attach_bytes(8);
    for at in 1..bytes.len() as u32 {
        for cut in 0..=4 {
            let memory = memory();
            let (_host, mut device) = device();
            let mock = MockSplitQueue::new(&memory, SIZE);
            memory.write_slice(&bytes, GuestAddress(REQUESTS)).unwrap();
            let rest = bytes.len() as u32 - at;
            let chain = [
                descriptor(REQUESTS, at, NEXT, 1),
                descriptor(REQUESTS + u64::from(at), rest, NEXT, 2),
                descriptor(REPLIES, cut, NEXT | WRITE, 3),
                descriptor(REPLIES + u64::from(cut), 4 - cut, WRITE, 0),
            ];
            mock.build_desc_chain(&chain).unwrap();
            let mut queue: Queue = mock.create_queue().unwrap();
            Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
            assert_eq!(used(&mock), [(0, 4)]);
            assert_eq!(reply(&memory, 0, 8), [0, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa]);
        }
    }
}

/// Chains that carry no request: each comes back unwritten, once, and the next one is answered.
#[test]
fn bad_chains_come_back_unwritten_and_the_next_one_is_answered() {
    let bad: [Vec<RawDescriptor>; 8] = [
        // Nothing writable; nothing readable; no room for a status; outside of memory, either way.
        vec![descriptor(REQUESTS, 20, 0, 0)],
        vec![descriptor(REPLIES, 4, WRITE, 0)],
        vec![descriptor(REQUESTS, 20, NEXT, 1), descriptor(REPLIES, 3, WRITE, 0)],
        vec![descriptor(u64::MAX - 8, 20, NEXT, 1), descriptor(REPLIES, 4, WRITE, 0)],
        vec![descriptor(REQUESTS, 20, NEXT, 1), descriptor(0xf_fffe, 4, WRITE, 0)],
        // Larger than any reply; an index out of the table; an indirect table that is none.
        vec![descriptor(REQUESTS, 20, NEXT, 1), descriptor(REPLIES, 0x1_0001, WRITE, 0)],
        vec![descriptor(REQUESTS, 20, NEXT, 900)],
        vec![descriptor(REQUESTS, 17, INDIRECT, 0)],
    ];
    for (case, chain) in bad.iter().enumerate() {
        let memory = memory();
        let (_host, mut device) = device();
        let mock = MockSplitQueue::new(&memory, SIZE);
        memory.write_slice(&attach_bytes(8), GuestAddress(REQUESTS)).unwrap();
        memory.write_slice(&attach_bytes(8), GuestAddress(REQUESTS + 0x100)).unwrap();
        let mut descriptors = chain.clone();
        let good = descriptors.len() as u16;
        descriptors.push(descriptor(REQUESTS + 0x100, 20, NEXT, good + 1));
        descriptors.push(descriptor(REPLIES + 0x100, 4, WRITE, 0));
        for (index, raw) in descriptors.iter().enumerate() {
            mock.desc_table().store(index as u16, *raw).unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0u16.to_le());
        mock.avail().ring().ref_at(1).unwrap().store(good.to_le());
        mock.avail().idx().store(2u16.to_le());
        let mut queue: Queue = mock.create_queue().unwrap();
        Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
        assert_eq!(used(&mock), [(0, 0), (u32::from(good), 4)], "case {case}");
        assert_eq!(reply(&memory, 0, 8), [0xaa; 8], "case {case}");
        assert_eq!(reply(&memory, 1, 4), [0, 0, 0, 0], "case {case}");
    }
}

#[test]
fn an_indirect_table_longer_than_any_request_comes_back_unwritten() {
    let memory = memory();
    let (_host, mut device) = device();
    let mock = MockSplitQueue::new(&memory, SIZE);
    memory.write_slice(&attach_bytes(8), GuestAddress(REQUESTS)).unwrap();
    let run = |device: &mut VirtioIommu, count: u16| {
        let table = 0x4_0000;
        for index in 0..count {
            let (address, length, flags) = match index {
                0 => (REQUESTS, 20, NEXT),
                _ if index + 1 == count => (REPLIES, 4, WRITE),
                _ => (REQUESTS, 0, NEXT),
            };
            let raw: [u8; 16] = {
                let mut raw = [0; 16];
                raw[..8].copy_from_slice(&address.to_le_bytes());
                raw[8..12].copy_from_slice(&u32::to_le_bytes(length));
                raw[12..14].copy_from_slice(&flags.to_le_bytes());
                raw[14..].copy_from_slice(&(index + 1).to_le_bytes());
                raw
            };
            memory.write_slice(&raw, GuestAddress(table + 16 * u64::from(index))).unwrap();
        }
        mock.desc_table().store(0, descriptor(table, u32::from(count) * 16, INDIRECT, 0)).unwrap();
        mock.avail().ring().ref_at(0).unwrap().store(0u16.to_le());
        mock.avail().idx().store(1u16.to_le());
        mock.used().idx().store(0);
        let mut queue: Queue = mock.create_queue().unwrap();
        Requests::default().process(device, &mut queue, &memory, 64).unwrap();
        used(&mock)
    };
    assert_eq!(run(&mut device, 256), [(0, 4)]);
    assert_eq!(run(&mut device, 257), [(0, 0)]);
}

#[test]
fn a_chain_that_loops_ends() {
    let memory = memory();
    let (_host, mut device) = device();
    let mock = MockSplitQueue::new(&memory, SIZE);
    memory.write_slice(&attach_bytes(8), GuestAddress(REQUESTS)).unwrap();
    mock.desc_table().store(0, descriptor(REQUESTS, 20, NEXT, 1)).unwrap();
    mock.desc_table().store(1, descriptor(REPLIES, 4, NEXT | WRITE, 1)).unwrap();
    mock.avail().ring().ref_at(0).unwrap().store(0u16.to_le());
    mock.avail().idx().store(1u16.to_le());
    let mut queue: Queue = mock.create_queue().unwrap();
    let batch = Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
    assert_eq!((batch.handled, used(&mock)), (1, vec![(0, 0)]));
    assert_eq!(reply(&memory, 0, 8), [0xaa; 8]);
}

#[test]
fn a_table_that_refers_to_a_table_comes_back_unwritten() {
    let memory = memory();
    let (_host, mut device) = device();
    let mock = MockSplitQueue::new(&memory, SIZE);
    memory.write_slice(&attach_bytes(8), GuestAddress(REQUESTS)).unwrap();
    let table = 0x4_0000;
    let indirect = descriptor(table, 32, INDIRECT, 0);
    memory.write_obj(indirect, GuestAddress(table)).unwrap();
    mock.desc_table().store(0, indirect).unwrap();
    mock.avail().ring().ref_at(0).unwrap().store(0u16.to_le());
    mock.avail().idx().store(1u16.to_le());
    let mut queue: Queue = mock.create_queue().unwrap();
    Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
    assert_eq!(used(&mock), [(0, 0)]);
    // In a table after a descriptor, it is read.
    mock.desc_table().store(0, descriptor(REQUESTS, 20, NEXT, 1)).unwrap();
    mock.desc_table().store(1, descriptor(table, 16, INDIRECT, 0)).unwrap();
    memory.write_obj(descriptor(REPLIES, 4, WRITE, 0), GuestAddress(table)).unwrap();
    mock.avail().ring().ref_at(1).unwrap().store(0u16.to_le());
    mock.avail().idx().store(2u16.to_le());
    Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
    assert_eq!((used(&mock), reply(&memory, 0, 5)), (vec![(0, 0), (0, 4)], vec![0, 0, 0, 0, 0xaa]));
}

/// The rings and the buffers of a request, with a border of memory regions at every place that a field may start at.
#[test]
fn rings_and_buffers_may_lie_in_two_regions() {
    let place = MockSplitQueue::new(&memory(), SIZE).used_addr().0 + 0x100;
    let (request_at, reply_at) = (place, place + 0x40);
    for border in (0x10..place + 0x80).step_by(2) {
        let regions = [(GuestAddress(0), border as usize), (GuestAddress(border), 0x2000)];
        let memory = Memory::from_ranges(&regions).unwrap();
        let (_host, mut device) = device();
        let mock = MockSplitQueue::new(&memory, SIZE);
        memory.write_slice(&attach_bytes(8), GuestAddress(request_at)).unwrap();
        memory.write_slice(&[0xaa; 8], GuestAddress(reply_at)).unwrap();
        let chain = [descriptor(request_at, 20, NEXT, 1), descriptor(reply_at, 4, WRITE, 0)];
        mock.build_desc_chain(&chain).unwrap();
        let mut queue: Queue = mock.create_queue().unwrap();
        let batch = Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
        assert_eq!((batch.handled, used(&mock)), (1, vec![(0, 4)]), "border at {border:#x}");
        let mut reply = [0; 8];
        memory.read_slice(&mut reply, GuestAddress(reply_at)).unwrap();
        assert_eq!(reply, [0, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa], "border at {border:#x}");
    }
}

#[test]
fn the_driver_sees_what_was_answered_before_a_long_batch_ends() {
    let memory = memory();
    let (_host, mut device) = device();
    let mock = MockSplitQueue::new(&memory, 64);
    let descriptors: Vec<_> = (0..32).flat_map(|index| request(&memory, index, &attach_bytes(8), 4)).collect();
    mock.build_multiple_desc_chains(&descriptors).unwrap();
    // The same ones once more.
    for slot in 0..64 {
        mock.avail().ring().ref_at(slot).unwrap().store((slot as u16 % 32 * 2).to_le());
    }
    mock.avail().idx().store(64u16.to_le());
    let mut queue: Queue = mock.create_queue().unwrap();
    queue.set_used_ring_address(Some(0x8000), None);
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (sees, guest) = (Arc::clone(&seen), memory.clone());
    device.on_exchange(move |_| sees.lock().unwrap().push(guest.read_obj::<u16>(GuestAddress(0x8002)).unwrap()));
    let batch = Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
    assert_eq!((batch.handled, memory.read_obj::<u16>(GuestAddress(0x8002)).unwrap()), (64, 64));
    let seen = seen.lock().unwrap();
    assert!((0..64).zip(&*seen).all(|(before, shown)| *shown <= before && before - *shown < 32), "{seen:?}");
}

#[test]
fn what_was_answered_before_the_driver_broke_the_queue_is_returned() {
    let memory = memory();
    let (_host, mut device) = device();
    let mock = MockSplitQueue::new(&memory, SIZE);
    mock.build_multiple_desc_chains(&request(&memory, 0, &attach_bytes(8), 4)).unwrap();
    mock.avail().ring().ref_at(1).unwrap().store((SIZE + 3).to_le());
    mock.avail().idx().store(2u16.to_le());
    let mut queue: Queue = mock.create_queue().unwrap();
    let error = Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap_err();
    assert!(matches!(error, QueueError::OutsideTable { head: 19, size: SIZE }), "{error}");
    assert_eq!((used(&mock), reply(&memory, 0, 4)), (vec![(0, 4)], vec![0; 4]));
    assert_eq!((queue.next_avail(), queue.next_used()), (1, 1));
}

/// 2.7.7.2: the device notifies when the used index passes the one that the driver asked for, in whatever group it was published.
#[test]
fn a_driver_is_notified_when_the_event_it_asked_for_is_passed() {
    for (asked, expected) in [(0, true), (4, true), (5, false), (40, false), (u16::MAX, false)] {
        let memory = memory();
        let (_host, mut device) = device();
        let mock = MockSplitQueue::new(&memory, SIZE);
        let descriptors: Vec<_> = (0..5).flat_map(|index| request(&memory, index, &attach_bytes(8), 4)).collect();
        mock.build_multiple_desc_chains(&descriptors).unwrap();
        let mut queue: Queue = mock.create_queue().unwrap();
        queue.set_event_idx(true);
        // The mock's used ring lies over the end of the available one.
        queue.set_used_ring_address(Some(0x8000), None);
        let used_event = mock.avail_addr().0 + 4 + 2 * u64::from(SIZE);
        memory.write_obj(u16::to_le(asked), GuestAddress(used_event)).unwrap();
        let batch = Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap();
        assert_eq!(batch, Batch { handled: 5, more: false, notify: expected }, "asked for {asked}");
        let avail_event: u16 = memory.read_obj(GuestAddress(queue.used_ring() + 4 + 8 * u64::from(SIZE))).unwrap();
        assert_eq!(avail_event, 5, "the next buffer is asked for");
    }
}

#[test]
fn wild_indices_break_the_queue_and_nothing_else() {
    for event_idx in [false, true] {
        for index in [u16::from(SIZE as u8) + 1, 1000, u16::MAX] {
            let memory = memory();
            let (_host, mut device) = device();
            let mock = MockSplitQueue::new(&memory, SIZE);
            let mut queue: Queue = mock.create_queue().unwrap();
            queue.set_event_idx(event_idx);
            mock.avail().idx().store(index.to_le());
            let error = Requests::default().process(&mut device, &mut queue, &memory, 64).unwrap_err();
            assert!(matches!(error, QueueError::TooManyAvailable { .. }), "{error}");
            assert!(used(&mock).is_empty());
        }
    }
    let memory = memory();
    let (_host, mut device) = device();
    let mock = MockSplitQueue::new(&memory, SIZE);
    mock.avail().ring().ref_at(0).unwrap().store(SIZE.to_le());
    mock.avail().idx().store(1u16.to_le());
    let mut queue: Queue = mock.create_queue().unwrap();
    assert!(Requests::default().process(&mut device, &mut queue, &memory, 64).is_err());
}

#[test]
fn a_ring_outside_of_memory_is_an_error() {
    let memory = memory();
    let (_host, mut device) = device();
    let mock = MockSplitQueue::new(&memory, SIZE);
    let mut queue: Queue = mock.create_queue().unwrap();
    queue.set_avail_ring_address(Some(0xffff_f000), Some(0xffff));
    assert!(Requests::default().process(&mut device, &mut queue, &memory, 64).is_err());
}

#[test]
fn faults_go_to_the_first_buffer_that_is_large_enough() {
    let memory = memory();
    let (host, mut device) = device();
    device.handle(&attach_bytes(8), &mut [0; 4]);
    host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    let mut tail = [0; 4];
    device.handle(&map_bytes(), &mut tail);
    assert_eq!(tail[0], 8);

    let mock = MockSplitQueue::new(&memory, SIZE);
    let mut queue: Queue = mock.create_queue().unwrap();
    assert_eq!(deliver_faults(&mut device, &mut queue, &memory, 64).unwrap(), Batch::default(), "there is no buffer");
    let buffers = [
        descriptor(REPLIES, 23, WRITE, 0),
        descriptor(REPLIES + 0x100, 24, 0, 0),
        descriptor(0xf_fff0, 24, WRITE, 0),
        descriptor(REPLIES + 0x200, 32, WRITE, 0),
        descriptor(REPLIES + 0x300, 24, WRITE, 0),
    ];
    for (index, raw) in buffers.iter().enumerate() {
        mock.desc_table().store(index as u16, *raw).unwrap();
        mock.avail().ring().ref_at(index).unwrap().store((index as u16).to_le());
    }
    mock.avail().idx().store(5u16.to_le());
    let first = deliver_faults(&mut device, &mut queue, &memory, 2).unwrap();
    assert_eq!(first, Batch { handled: 2, more: true, notify: true }, "the budget holds");
    deliver_faults(&mut device, &mut queue, &memory, 64).unwrap();
    assert_eq!(used(&mock), [(0, 0), (1, 0), (2, 0), (3, 24)], "the fifth is kept for the next event");
    let mut expected = [0xaa; 32];
    expected[..24].fill(0);
    expected[..12].copy_from_slice(&[2, 0, 0, 0, 1, 1, 0, 0, 8, 0, 0, 0]);
    expected[16..18].copy_from_slice(&[0, 0x50]);
    assert_eq!(reply(&memory, 2, 32), expected);
    assert_eq!(device.first_fault(), None);
}
