// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that comes and goes.

use super::*;

#[test]
fn a_ring_whose_memory_was_away_is_served_when_it_is_back() {
    let mut bench = Bench::started();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    let memory = std::mem::replace(&mut bench.machine().memory, guest_memory(0x1000));
    bench.machine().set_memory();
    bench.machine().config();
    bench.machine().memory = memory;
    // Kicked while the ring is nowhere.
    let base = 1;
    bench.machine().break_ring(base);
    bench.machine().set_memory();
    assert_eq!(bench.send(&detach(1, ENDPOINT)), OK);
    bench.end();
}

#[test]
fn memory_that_the_frontend_takes_away_is_not_reached() {
    let mut bench = Bench::started();
    bench.send(&attach(1, ENDPOINT, 0));
    bench.send(&map(1, 0x5000, 0x1000, 0x30_0000, 1));
    bench.send(&map(1, 0x6000, 0x1000, 0x2000, 1));
    // The same addresses, other memory: whatever was mapped is not the guest's any more.
    let other = guest_memory(0x20_0000);
    bench.machine().memory = other;
    bench.machine().set_memory();
    bench.machine().config();
    assert_eq!(bench.reads(0x5000), None);
    assert_eq!(bench.reads(0x6000), Some(0x2000));
    bench.end();
}

#[test]
fn regions_of_memory_come_and_go_one_by_one() {
    const HIGH: u64 = 0x1_0000_0000;
    let mut bench = Bench::started();
    bench.send(&attach(1, ENDPOINT, 0));
    bench.send(&map(1, 0x5000, 0x1000, 0x2000, 1));
    assert_eq!(bench.send(&map(1, 0x6000, 0x1000, HIGH, 1)), FAULT, "there is no memory yet");

    let region = |file| VhostUserMemoryRegionInfo {
        guest_phys_addr: HIGH,
        memory_size: 0x1_0000,
        userspace_addr: 0x7fff_0000_0000,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(file),
    };
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1_0000).unwrap();
        file
    };
    let (first, second) = (file(), file());
    bench.machine().frontend.add_mem_region(&region(&first)).unwrap();
    bench.machine().config();
    assert_eq!(bench.send(&map(1, 0x6000, 0x1000, HIGH, 1)), OK);
    assert_eq!(bench.reads(0x6000), Some(HIGH));

    let calls = bench.host.calls();
    bench.machine().frontend.remove_mem_region(&region(&first)).unwrap();
    bench.machine().config();
    assert_eq!((bench.reads(0x6000), bench.reads(0x5000)), (None, Some(0x2000)));
    assert_eq!(bench.host.calls() - calls, 1, "nothing but its own mapping is touched");

    bench.machine().frontend.add_mem_region(&region(&second)).unwrap();
    bench.machine().config();
    assert_eq!(bench.reads(0x6000), Some(HIGH), "memory that is there again is reached again");
    assert_eq!(bench.host.calls() - calls, 2);
    bench.end();
}
