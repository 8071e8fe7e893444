// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Regions of guest memory that a hostile front end adds and removes.

use std::os::fd::AsRawFd;

use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::raw::*;
use super::*;
use crate::common::alone::{alone, open_files};

/// What the backend takes for guest memory, region by region.
fn regions(backend: &IommuBackend) -> Vec<(u64, u64)> {
    use vm_memory::GuestMemoryRegion;
    backend.memory().memory().iter().map(|region| (region.start_addr().0, region.len())).collect()
}

/// A region that must not be: its message is refused and the connection ends; guest memory is what it was.
fn is_refused(code: u32, body: &[u8], file: &std::fs::File) {
    let mut victim = Victim::ready(&memfd(SIZE));
    let file = [file.as_raw_fd()];
    let files = if code == REM_MEM_REG { &[][..] } else { &file };
    assert_ne!(victim.frontend.ask(code, body, files), Some(true), "message {code}: {body:x?}");
    assert!(!victim.frontend.is_heard(), "message {code}: {body:x?}");
    assert_eq!(regions(&victim.backend), [(0, SIZE)], "message {code}: {body:x?}");
    victim.end();
}

#[test]
fn regions_that_overlap_wrap_are_empty_or_not_there_are_refused() {
    let file = memfd(4 * SIZE);
    for added in [
        [0, SIZE, USER + SIZE, 0],
        [SIZE - 0x1000, SIZE, USER + SIZE, 0],
        [SIZE, 0, USER + SIZE, 0],
        [0u64.wrapping_sub(SIZE), 2 * SIZE, USER + SIZE, 0],
        [SIZE, SIZE, USER + SIZE, 0u64.wrapping_sub(SIZE) + 1],
        [SIZE, SIZE, USER + SIZE, 0x800],
        // More than can be mapped.
        [SIZE, 1 << 62, USER + SIZE, 0],
    ] {
        is_refused(ADD_MEM_REG, &region(&added), &file);
    }
    for removed in [[SIZE, SIZE, USER, 0], [0, SIZE - 0x1000, USER, 0], [0x1000, SIZE, USER, 0], [0, 0, USER, 0]] {
        is_refused(REM_MEM_REG, &region(&removed), &file);
    }
}

#[test]
fn a_file_that_ends_before_its_region_is_refused() {
    let short = memfd(SIZE - 1);
    is_refused(SET_MEM_TABLE, &table(&[SIZE, SIZE, USER, 0]), &short);
    is_refused(ADD_MEM_REG, &region(&[SIZE, SIZE, USER + SIZE, 0]), &short);
    let exact = memfd(SIZE);
    is_refused(ADD_MEM_REG, &region(&[SIZE, SIZE, USER + SIZE, 0x1000]), &exact);

    let mut victim = Victim::ready(&exact);
    let file = [exact.as_raw_fd()];
    let last_page = region(&[SIZE, 0x1000, USER + SIZE, SIZE - 0x1000]);
    assert_eq!(victim.frontend.ask(ADD_MEM_REG, &last_page, &file), Some(true));
    assert_eq!(regions(&victim.backend), [(0, SIZE), (SIZE, 0x1000)]);
    victim.end();
}

/// As many as the front end was told, and no more.
#[test]
fn there_are_only_so_many_regions() {
    alone("regions::there_are_only_so_many_regions", || {
        let (memory, before) = (memfd(SIZE), open_files());
        let mut victim = Victim::ready(&memory);
        let most = victim.frontend.call(GET_MAX_MEM_SLOTS, &[], &[]).unwrap();
        let most = u64::from_ne_bytes(most.try_into().unwrap());
        let at = |index: u64| region(&[SIZE + index * 0x2000, 0x1000, USER + SIZE + index * 0x1000, 0]);
        let file = [memory.as_raw_fd()];
        for index in 1..most {
            assert_eq!(victim.frontend.ask(ADD_MEM_REG, &at(index), &file), Some(true), "region {index}");
        }
        assert_eq!(regions(&victim.backend).len() as u64, most);
        assert_eq!(victim.frontend.ask(ADD_MEM_REG, &at(most), &file), Some(false));
        assert!(!victim.frontend.is_heard());
        assert_eq!(regions(&victim.backend).len() as u64, most);
        victim.end();
        assert_eq!(open_files(), before);
    });
}

#[test]
fn a_region_that_comes_and_goes_thousands_of_times_leaves_no_file_open() {
    alone("regions::a_region_that_comes_and_goes_thousands_of_times_leaves_no_file_open", || {
        let memory = memfd(SIZE);
        let outside = open_files();
        let mut victim = Victim::ready(&memory);
        let before = open_files();
        let added = region(&[SIZE, SIZE, USER + SIZE, 0]);
        for round in 0..3000 {
            assert_eq!(victim.frontend.ask(ADD_MEM_REG, &added, &[memory.as_raw_fd()]), Some(true), "round {round}");
            // One that comes with the file, as some front ends send it.
            let files = [memory.as_raw_fd()];
            assert_eq!(victim.frontend.ask(REM_MEM_REG, &added, &files[..round % 2]), Some(true), "round {round}");
            // Those of the last message may be closed after its answer, and those of a region after the ring was looked at.
            assert!(open_files() < before + 10, "round {round}");
        }
        victim.end();
        assert_eq!(open_files(), outside);
    });
}

/// The user address only says where rings are: a region is what its guest addresses say.
#[test]
fn a_region_is_removed_by_its_guest_addresses() {
    let mut victim = Victim::ready(&memfd(SIZE));
    assert_eq!(victim.frontend.ask(REM_MEM_REG, &region(&[0, SIZE, USER + 1, 0x1000]), &[]), Some(true));
    assert_eq!(regions(&victim.backend), []);
    // And no ring can be where it was.
    let addresses = words(&[0, USER, USER + 0x2000, USER + 0x1000, 0]);
    assert_eq!(victim.frontend.ask(SET_VRING_ADDR, &addresses, &[]), Some(false));
    assert!(!victim.frontend.is_heard());
    victim.end();
}
