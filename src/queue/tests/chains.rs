// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Chains and rings, good and bad.

use super::*;

#[test]
fn a_request_split_at_every_byte_is_read_whole() {
    let bytes = attach_bytes(8);
    for at in 1..bytes.len() as u32 {
        for cut in 0..=4 {
            let memory = memory();
            let mut bench = Bench::new(&memory);
            memory.write_slice(&bytes, GuestAddress(REQUESTS)).unwrap();
            let rest = bytes.len() as u32 - at;
            let chain = [
                descriptor(REQUESTS, at, NEXT, 1),
                descriptor(REQUESTS + u64::from(at), rest, NEXT, 2),
                descriptor(REPLIES, cut, NEXT | WRITE, 3),
                descriptor(REPLIES + u64::from(cut), 4 - cut, WRITE, 0),
            ];
            bench.mock.build_desc_chain(&chain).unwrap();
            bench.process().unwrap();
            assert_eq!(bench.used(), [(0, 4)]);
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
        let mut bench = Bench::new(&memory);
        memory.write_slice(&attach_bytes(8), GuestAddress(REQUESTS)).unwrap();
        memory.write_slice(&attach_bytes(8), GuestAddress(REQUESTS + 0x100)).unwrap();
        let mut descriptors = chain.clone();
        let good = descriptors.len() as u16;
        descriptors.push(descriptor(REQUESTS + 0x100, 20, NEXT, good + 1));
        descriptors.push(descriptor(REPLIES + 0x100, 4, WRITE, 0));
        for (index, raw) in descriptors.iter().enumerate() {
            bench.mock.desc_table().store(index as u16, *raw).unwrap();
        }
        bench.make_available(&[0, good]);
        bench.process().unwrap();
        assert_eq!(bench.used(), [(0, 0), (u32::from(good), 4)], "case {case}");
        assert_eq!(reply(&memory, 0, 8), [0xaa; 8], "case {case}");
        assert_eq!(reply(&memory, 1, 4), [0, 0, 0, 0], "case {case}");
    }
}

#[test]
fn an_indirect_table_longer_than_any_request_comes_back_unwritten() {
    for (count, expected) in [(256, [(0, 4)]), (257, [(0, 0)])] {
        let memory = memory();
        let mut bench = Bench::new(&memory);
        memory.write_slice(&attach_bytes(8), GuestAddress(REQUESTS)).unwrap();
        let table = 0x4_0000;
        for index in 0..count {
            let next = index + 1;
            let link = match index {
                0 => descriptor(REQUESTS, 20, NEXT, next),
                _ if next == count => descriptor(REPLIES, 4, WRITE, 0),
                _ => descriptor(REQUESTS, 0, NEXT, next),
            };
            memory.write_obj(link, GuestAddress(table + 16 * u64::from(index))).unwrap();
        }
        bench.mock.desc_table().store(0, descriptor(table, u32::from(count) * 16, INDIRECT, 0)).unwrap();
        bench.make_available(&[0]);
        bench.process().unwrap();
        assert_eq!(bench.used(), expected);
    }
}

#[test]
fn a_chain_that_loops_ends() {
    let memory = memory();
    let mut bench = Bench::new(&memory);
    memory.write_slice(&attach_bytes(8), GuestAddress(REQUESTS)).unwrap();
    bench.mock.desc_table().store(0, descriptor(REQUESTS, 20, NEXT, 1)).unwrap();
    bench.mock.desc_table().store(1, descriptor(REPLIES, 4, NEXT | WRITE, 1)).unwrap();
    bench.make_available(&[0]);
    let batch = bench.process().unwrap();
    assert_eq!((batch.handled, bench.used()), (1, vec![(0, 0)]));
    assert_eq!(reply(&memory, 0, 8), [0xaa; 8]);
}

#[test]
fn a_table_that_refers_to_a_table_comes_back_unwritten() {
    let memory = memory();
    let mut bench = Bench::new(&memory);
    memory.write_slice(&attach_bytes(8), GuestAddress(REQUESTS)).unwrap();
    let table = 0x4_0000;
    let indirect = descriptor(table, 32, INDIRECT, 0);
    memory.write_obj(indirect, GuestAddress(table)).unwrap();
    bench.mock.desc_table().store(0, indirect).unwrap();
    bench.make_available(&[0]);
    bench.process().unwrap();
    assert_eq!(bench.used(), [(0, 0)]);
    // In a table after a descriptor, it is read.
    bench.mock.desc_table().store(0, descriptor(REQUESTS, 20, NEXT, 1)).unwrap();
    bench.mock.desc_table().store(1, descriptor(table, 16, INDIRECT, 0)).unwrap();
    memory.write_obj(descriptor(REPLIES, 4, WRITE, 0), GuestAddress(table)).unwrap();
    bench.make_available(&[0, 0]);
    bench.process().unwrap();
    assert_eq!((bench.used(), reply(&memory, 0, 5)), (vec![(0, 0), (0, 4)], vec![0, 0, 0, 0, 0xaa]));
}

/// The rings and the buffers of a request, with a border of memory regions at every place that a field may start at.
#[test]
fn rings_and_buffers_may_lie_in_two_regions() {
    let place = MockSplitQueue::new(&memory(), SIZE).used_addr().0 + 0x100;
    let (request_at, reply_at) = (place, place + 0x40);
    for border in (0x10..place + 0x80).step_by(2) {
        let regions = [(GuestAddress(0), border as usize), (GuestAddress(border), 0x2000)];
        let memory = Memory::from_ranges(&regions).unwrap();
        let mut bench = Bench::new(&memory);
        memory.write_slice(&attach_bytes(8), GuestAddress(request_at)).unwrap();
        memory.write_slice(&[0xaa; 8], GuestAddress(reply_at)).unwrap();
        let chain = [descriptor(request_at, 20, NEXT, 1), descriptor(reply_at, 4, WRITE, 0)];
        bench.mock.build_desc_chain(&chain).unwrap();
        let batch = bench.process().unwrap();
        assert_eq!((batch.handled, bench.used()), (1, vec![(0, 4)]), "border at {border:#x}");
        let mut reply = [0; 8];
        memory.read_slice(&mut reply, GuestAddress(reply_at)).unwrap();
        assert_eq!(reply, [0, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa], "border at {border:#x}");
    }
}

#[test]
fn wild_indices_break_the_queue_and_nothing_else() {
    for event_idx in [false, true] {
        for index in [u16::from(SIZE as u8) + 1, 1000, u16::MAX] {
            let memory = memory();
            let mut bench = Bench::new(&memory);
            bench.queue.set_event_idx(event_idx);
            bench.mock.avail().idx().store(index.to_le());
            let error = bench.process().unwrap_err();
            assert!(matches!(error, QueueError::TooManyAvailable { .. }), "{error}");
            assert!(bench.used().is_empty());
        }
    }
    let memory = memory();
    let mut bench = Bench::new(&memory);
    bench.make_available(&[SIZE]);
    assert!(bench.process().is_err());
}

#[test]
fn a_ring_outside_of_memory_is_an_error() {
    let memory = memory();
    let mut bench = Bench::new(&memory);
    bench.queue.set_avail_ring_address(Some(0xffff_f000), Some(0xffff));
    assert!(bench.process().is_err());
}
