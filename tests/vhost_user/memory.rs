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

/// Whatever the host does: when the frontend is told that the memory is no longer used, no device reaches it.
#[test]
fn memory_is_out_of_reach_before_the_frontend_is_answered() {
    use std::os::fd::AsRawFd;

    use virtio_iommu::host::HostErrorKind;
    use virtio_iommu::host::fake::Failure;

    use super::raw::*;

    // How many calls of the host's fail: none, the unmap, and that of the table which is to take the place of the broken one.
    for failing in 0..3 {
        let (memory, leaving, events) = (memfd(SIZE), memfd(SIZE), event());
        let mut victim = Victim::ready(&memory);
        victim.start_ring(&events, event());
        let (first, second) = ([0, SIZE, USER, 0], [SIZE, SIZE, USER + SIZE, 0]);
        let files = [leaving.as_raw_fd()];
        assert_eq!(victim.frontend.ask(ADD_MEM_REG, &region(&second), &files), Some(true));
        let requests =
            [attach(1, ENDPOINT, 0), map(1, 0x5000, 0x1000, SIZE, 1), map(1, 0x6000, 0x1000, SIZE - 0x1000, 1)];
        for (before, request) in (0..).zip(&requests) {
            put_request(&memory, before, request);
            kick(&events);
            assert_eq!(answer(&memory, before + 1), (OK, 4));
        }
        let reads = |iova| victim.host.dma(ID, iova, Access::READ);
        assert_eq!((reads(0x5000), reads(0x6000)), (Some(SIZE), Some(SIZE - 0x1000)));

        for call in 0..failing {
            victim.host.fail_after(call, Failure::Error(HostErrorKind::Other));
        }
        assert_eq!(victim.frontend.ask(SET_MEM_TABLE, &table(&first), &[memory.as_raw_fd()]), Some(true));
        let stays = (failing < 2).then_some(SIZE - 0x1000);
        assert_eq!((reads(0x5000), reads(0x6000)), (None, stays), "{failing} calls fail");
        victim.end();
    }
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
