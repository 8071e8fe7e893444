// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a batch of requests does, and what comes of a large MAP in it.

use super::*;

#[test]
fn a_batch_is_answered_in_order_with_one_notification() {
    let memory = memory();
    let mut bench = Bench::new(&memory);
    let mut descriptors = Vec::new();
    for (index, bytes) in [attach_bytes(8), attach_bytes(9), map_bytes()].iter().enumerate() {
        descriptors.extend(request(&memory, index as u16, bytes, 4));
    }
    bench.mock.build_multiple_desc_chains(&descriptors).unwrap();
    let batch = bench.process().unwrap();
    assert_eq!(batch, Batch { handled: 3, more: false, notify: true });
    assert_eq!(bench.used(), [(0, 4), (2, 4), (4, 4)]);
    let statuses: Vec<u8> = (0..3).map(|index| reply(&memory, index, 4)[0]).collect();
    assert_eq!(statuses, [0, 6, 0]);
    let again = bench.process().unwrap();
    assert_eq!(again, Batch::default(), "nothing is left, and nobody is notified");
}

/// A device with an endpoint in domain 1 and a MAP of two steps in the request queue, followed by another request.
fn large_map(memory: &Memory) -> Bench<'_> {
    let mut bench = Bench::new(memory);
    bench.device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 0x8000_0000)]).unwrap());
    bench.device.handle(&attach_bytes(8), &mut [0; 4]);
    assert_eq!(bench.host.mappings(EndpointId(8)), []);
    let mut map: Vec<u8> = [3u32, 1].iter().flat_map(|field| field.to_le_bytes()).collect();
    map.extend([0u64, 0x7fff_ffff, 0].iter().flat_map(|field| field.to_le_bytes()));
    map.extend(1u32.to_le_bytes());
    let mut descriptors = request(memory, 0, &map, 4).to_vec();
    descriptors.extend(request(memory, 1, &attach_bytes(9), 4));
    bench.mock.build_multiple_desc_chains(&descriptors).unwrap();
    bench
}

#[test]
fn a_large_map_lets_others_at_the_device_between_its_steps() {
    let memory = memory();
    let mut bench = large_map(&memory);
    let first = bench.process().unwrap();
    assert_eq!(first, Batch { handled: 0, more: true, notify: false });
    assert_eq!(bench.host.mappings(EndpointId(8)).len(), 1);
    assert_eq!((bench.used(), reply(&memory, 0, 4)), (vec![], vec![0xaa; 4]), "it is not answered yet");
    // A request is read once: what the driver writes now is not seen.
    memory.write_slice(&[0xff; 36], GuestAddress(REQUESTS)).unwrap();
    let second = bench.process().unwrap();
    assert_eq!(second, Batch { handled: 2, more: false, notify: true });
    assert_eq!(bench.host.mappings(EndpointId(8)).len(), 2);
    assert_eq!(bench.used(), [(0, 4), (2, 4)]);
    assert_eq!((reply(&memory, 0, 4), reply(&memory, 1, 4)), (vec![0; 4], vec![6, 0, 0, 0]));
}

#[test]
fn a_large_map_is_completed_before_the_queue_stops() {
    let memory = memory();
    let mut bench = large_map(&memory);
    assert!(!bench.complete().unwrap(), "nothing is under way");
    assert!(!bench.requests.is_under_way());
    assert!(bench.process().unwrap().more);
    assert!(bench.requests.is_under_way());
    // vhost-user has the queue stopped before the device is asked.
    bench.queue.set_ready(false);
    assert!(matches!(bench.process(), Err(QueueError::NotReady)));
    assert!(bench.complete().unwrap());
    assert!(!bench.requests.is_under_way());
    assert_eq!((bench.used(), bench.queue.next_avail()), (vec![(0, 4)], 1), "the next request stays in the queue");
    assert_eq!(reply(&memory, 0, 4), [0; 4]);
}

#[test]
fn a_large_map_is_not_answered_after_a_reset() {
    let memory = memory();
    let mut bench = large_map(&memory);
    assert!(bench.process().unwrap().more);
    bench.device.reset();
    bench.requests.forget();
    assert!(!bench.complete().unwrap());
    assert_eq!((bench.used(), reply(&memory, 0, 4)), (vec![], vec![0xaa; 4]));
}

#[test]
fn the_budget_bounds_a_batch() {
    let memory = memory();
    let mut bench = Bench::with_requests(&memory, 5);
    for (handled, more) in [(2, true), (2, true), (1, false)] {
        let batch = bench.process_up_to(2).unwrap();
        assert_eq!((batch.handled, batch.more), (handled, more));
    }
}

#[test]
fn the_driver_sees_what_was_answered_before_a_long_batch_ends() {
    let memory = memory();
    let mut bench = Bench::of_size(&memory, 64);
    bench.put_requests(32);
    // The same ones once more.
    let heads: Vec<u16> = (0..64).map(|slot| slot % 32 * 2).collect();
    bench.make_available(&heads);
    bench.queue.set_used_ring_address(Some(0x8000), None);
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (sees, guest) = (Arc::clone(&seen), memory.clone());
    bench.device.on_exchange(move |_| sees.lock().unwrap().push(guest.read_obj::<u16>(GuestAddress(0x8002)).unwrap()));
    let batch = bench.process().unwrap();
    assert_eq!((batch.handled, memory.read_obj::<u16>(GuestAddress(0x8002)).unwrap()), (64, 64));
    let seen = seen.lock().unwrap();
    assert!((0..64).zip(&*seen).all(|(before, shown)| *shown <= before && before - *shown < 32), "{seen:?}");
}

#[test]
fn what_was_answered_before_the_driver_broke_the_queue_is_returned() {
    let memory = memory();
    let mut bench = Bench::with_requests(&memory, 1);
    bench.make_available(&[0, SIZE + 3]);
    let error = bench.process().unwrap_err();
    assert!(matches!(error, QueueError::OutsideTable { head: 19, size: SIZE }), "{error}");
    assert_eq!((bench.used(), reply(&memory, 0, 4)), (vec![(0, 4)], vec![0; 4]));
    assert_eq!((bench.queue.next_avail(), bench.queue.next_used()), (1, 1));
}

#[test]
fn faults_go_to_the_first_buffer_that_is_large_enough() {
    let memory = memory();
    let mut bench = Bench::new(&memory);
    bench.device.handle(&attach_bytes(8), &mut [0; 4]);
    bench.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    let mut tail = [0; 4];
    bench.device.handle(&map_bytes(), &mut tail);
    assert_eq!(tail[0], 8);

    assert_eq!(bench.deliver_faults(64).unwrap(), Batch::default(), "there is no buffer");
    let buffers = [
        descriptor(REPLIES, 23, WRITE, 0),
        descriptor(REPLIES + 0x100, 24, 0, 0),
        descriptor(0xf_fff0, 24, WRITE, 0),
        descriptor(REPLIES + 0x200, 32, WRITE, 0),
        descriptor(REPLIES + 0x300, 24, WRITE, 0),
    ];
    for (index, raw) in buffers.iter().enumerate() {
        bench.mock.desc_table().store(index as u16, *raw).unwrap();
    }
    bench.make_available(&[0, 1, 2, 3, 4]);
    let first = bench.deliver_faults(2).unwrap();
    assert_eq!(first, Batch { handled: 2, more: true, notify: true }, "the budget holds");
    bench.deliver_faults(64).unwrap();
    assert_eq!(bench.used(), [(0, 0), (1, 0), (2, 0), (3, 24)], "the fifth is kept for the next event");
    let mut expected = [0xaa; 32];
    expected[..24].fill(0);
    expected[..12].copy_from_slice(&[2, 0, 0, 0, 1, 1, 0, 0, 8, 0, 0, 0]);
    expected[16..18].copy_from_slice(&[0, 0x50]);
    assert_eq!(reply(&memory, 2, 32), expected);
    assert_eq!(bench.device.first_fault(), None);
}
