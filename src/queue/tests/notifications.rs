// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! When driver and device notify each other.

use super::*;

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let memory = memory();
    let mut bench = Bench::with_requests(&memory, 1);
    memory.write_obj(AVAIL_F_NO_INTERRUPT.to_le(), bench.mock.avail_addr()).unwrap();
    let batch = bench.process().unwrap();
    assert_eq!(batch, Batch { handled: 1, more: false, notify: false });
}

#[test]
fn kicks_stay_suppressed_for_a_caller_that_goes_on_watching() {
    for event_idx in [false, true] {
        let memory = memory();
        let mut bench = Bench::with_requests(&memory, 2);
        bench.queue.set_event_idx(event_idx);
        bench.queue.set_used_ring_address(Some(0x8000), None);
        let wish = if event_idx { 0x8000 + 4 + 8 * u64::from(SIZE) } else { 0x8000 };
        let wish = || memory.read_obj::<u16>(GuestAddress(wish)).unwrap();
        assert!(has_requests(&bench.queue, &memory));
        let batch = bench.process_quietly().unwrap();
        assert_eq!((batch.handled, batch.more, wish()), (2, false, u16::from(!event_idx)), "{event_idx}");
        assert!(!has_requests(&bench.queue, &memory));
        assert_eq!(bench.process().unwrap(), Batch::default());
        assert_eq!(wish(), if event_idx { 2 } else { 0 }, "{event_idx}");
    }
    let memory = memory();
    let mut bench = Bench::new(&memory);
    bench.queue.set_avail_ring_address(Some(0xffff_f000), Some(0xffff));
    assert!(has_requests(&bench.queue, &memory), "whoever processes it finds what is wrong");
}

/// Linux kicks after it has put its buffers back, if it is asked to.
#[test]
fn events_that_wait_for_buffers_ask_for_a_kick() {
    for event_idx in [false, true] {
        let memory = memory();
        let mut bench = Bench::new(&memory);
        bench.queue.set_event_idx(event_idx);
        bench.queue.set_used_ring_address(Some(0x8000), None);
        let avail_event = || memory.read_obj::<u16>(GuestAddress(0x8000 + 4 + 8 * u64::from(SIZE))).unwrap();
        bench.device.handle(&attach_bytes(8), &mut [0; 4]);
        for _ in 0..2 {
            bench.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
            bench.device.handle(&map_bytes(), &mut [0; 4]);
        }
        bench.mock.desc_table().store(0, descriptor(REPLIES, 24, WRITE, 0)).unwrap();
        bench.make_available(&[0]);
        assert_eq!(bench.deliver_faults(64).unwrap().handled, 1);
        assert_eq!(avail_event(), u16::from(event_idx));
        assert!(bench.device.first_fault().is_some());
    }
}

/// 2.7.7.2: the device notifies when the used index passes the one that the driver asked for, in whatever group it was published.
#[test]
fn a_driver_is_notified_when_the_event_it_asked_for_is_passed() {
    for (asked, expected) in [(0, true), (4, true), (5, false), (40, false), (u16::MAX, false)] {
        let memory = memory();
        let mut bench = Bench::with_requests(&memory, 5);
        bench.queue.set_event_idx(true);
        // The mock's used ring lies over the end of the available one.
        bench.queue.set_used_ring_address(Some(0x8000), None);
        let used_event = bench.mock.avail_addr().0 + 4 + 2 * u64::from(SIZE);
        memory.write_obj(u16::to_le(asked), GuestAddress(used_event)).unwrap();
        let batch = bench.process().unwrap();
        assert_eq!(batch, Batch { handled: 5, more: false, notify: expected }, "asked for {asked}");
        let avail_event: u16 =
            memory.read_obj(GuestAddress(bench.queue.used_ring() + 4 + 8 * u64::from(SIZE))).unwrap();
        assert_eq!(avail_event, 5, "the next buffer is asked for");
        // Three more of the same: what was passed before is not passed again.
        for (asked, expected) in [(4, false), (5, true), (7, true), (8, false)] {
            bench.queue.set_next_avail(5);
            bench.queue.set_next_used(5);
            bench.make_available(&[0, 2, 4, 6, 8, 0, 2, 4]);
            memory.write_obj(u16::to_le(asked), GuestAddress(used_event)).unwrap();
            let batch = bench.process().unwrap();
            assert_eq!(batch, Batch { handled: 3, more: false, notify: expected }, "then for {asked}");
        }
    }
}
