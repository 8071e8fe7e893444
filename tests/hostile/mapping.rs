// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MAP and UNMAP of ranges at edges.

use virtio_iommu::device::Settings;
use virtio_iommu::host::fake::Flavour;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::IovaRange;
use vm_memory::GuestAddress;

use crate::common::{attach, map, unmap};
use crate::machine::{
    FAULT, INVAL, LONE, Machine, OK, RAM_SIZE, RANGE, READ, REPLY, REQUEST, WRITE, map_to, settings, unmap_to,
};

fn attached(settings: Settings) -> Machine {
    let mut machine = Machine::with(Flavour::Iommufd, settings);
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    machine
}

#[test]
fn an_overlap_is_refused_down_to_a_byte() {
    let mut machine = attached(settings());
    assert_eq!(machine.request(&map(1, 0x1_0000, 0x4000, 0x8000, READ)), OK);
    let calls = machine.host.calls();
    for (first, last, status) in [
        (0x1_0000, 0x1_3fff, INVAL),
        (0x1_1000, 0x1_1fff, INVAL),
        (0xf000, 0x1_4fff, INVAL),
        (0xf000, 0x1_0fff, INVAL),
        (0x1_3000, 0x1_4fff, INVAL),
        // By one byte, which is less than a page.
        (0xf000, 0x1_0000, RANGE),
        (0x1_3fff, 0x1_4ffe, RANGE),
    ] {
        assert_eq!(machine.request(&map_to(1, first, last, 0x8000, READ)), status, "{first:#x} to {last:#x}");
    }
    assert_eq!(machine.host.calls(), calls, "the host is not asked");
    assert_eq!(machine.request(&map(1, 0xf000, 0x1000, 0x8000, READ)), OK);
    assert_eq!(machine.request(&map(1, 0x1_4000, 0x1000, 0x8000, READ)), OK);
}

#[test]
fn ranges_at_the_ends_of_the_address_space_neither_wrap_nor_panic() {
    const TOP: u64 = u64::MAX - 0xfff;
    for input_range in [IovaRange::ALL, "0-ffffffffffff".parse().unwrap()] {
        let mut machine = attached(Settings { input_range, ..settings() });
        for (first, last) in [
            // They end before they start, or are a byte long, or empty if one adds a byte.
            (0x1000, 0),
            (0x2000, 0x1fff),
            (0x1000, 0x1000),
            (u64::MAX, 0),
            (u64::MAX, u64::MAX),
            (u64::MAX, TOP),
            (0, u64::MAX - 1),
            (1, u64::MAX),
        ] {
            let status = machine.request(&map_to(1, first, last, 0, READ));
            assert_eq!(status, RANGE, "{first:#x} to {last:#x} in {input_range}");
        }
        // All of it: more bytes than a number can say, and the doorbell is among them.
        let all = machine.request(&map_to(1, 0, u64::MAX, 0, READ));
        assert_eq!(all, if input_range == IovaRange::ALL { INVAL } else { RANGE });
        let is_inside = input_range.covers(IovaRange::new(TOP, u64::MAX).unwrap());
        let status = machine.request(&map_to(1, TOP, u64::MAX, 0x8000, READ));
        assert_eq!(status, if is_inside { OK } else { RANGE });
        assert_eq!(machine.reads(LONE, u64::MAX), is_inside.then_some(0x8fff));
        // What is unmapped may be anywhere, and still no range wraps.
        for (first, last) in [(0x1000, 0), (u64::MAX, 0)] {
            assert_eq!(machine.request(&unmap_to(1, first, last)), RANGE, "{first:#x} to {last:#x}");
        }
        let in_part = machine.request(&unmap_to(1, u64::MAX, u64::MAX));
        assert_eq!(in_part, if is_inside { RANGE } else { OK });
        assert_eq!(machine.request(&unmap_to(1, 0, u64::MAX)), OK);
        assert_eq!(machine.reads(LONE, u64::MAX), None);
    }
}

#[test]
fn guest_physical_addresses_never_wrap() {
    let mut machine = attached(settings());
    for (length, physical, status) in [
        (0x2000, u64::MAX - 0xfff, RANGE),
        (0x1000, u64::MAX, RANGE),
        (0x1_0000_0000, 0xffff_ffff_0000_1000, RANGE),
        // It ends where addresses end, and no memory is there.
        (0x1000, u64::MAX - 0xfff, FAULT),
    ] {
        assert_eq!(machine.request(&map(1, 0x1000, length, physical, READ)), status, "{length:#x} at {physical:#x}");
    }
}

#[test]
fn memory_with_a_hole_is_mapped_whole_or_not_at_all() {
    let mut machine = attached(settings());
    // Two regions side by side, a hole, and a third.
    let regions = [(0, 0x1_0000), (0x1_0000, 0x1_0000), (0x3_0000, 0x1_0000)];
    machine
        .device
        .set_memory(GuestRam::in_software(&regions.map(|(start, size)| (GuestAddress(start), size))).unwrap());
    let calls = machine.host.calls();
    for (physical, length) in [
        (0x2_0000, 0x1000),
        (0x1_f000, 0x2000),
        (0x2_f000, 0x2000),
        (0x1_f000, 0x1_2000),
        (0, 0x4_0000),
        (0x3_f000, 0x2000),
        (0x4_0000, 0x1000),
        (0xffff_f000, 0x1000),
    ] {
        let status = machine.request(&map(1, 0x10_0000, length, physical, READ));
        assert_eq!(status, FAULT, "{length:#x} at {physical:#x}");
        // One that allows nothing reaches nothing, and still names memory.
        assert_eq!(machine.request(&map(1, 0x10_0000, length, physical, 0)), FAULT);
    }
    assert_eq!(machine.host.calls(), calls, "the host is not asked");
    assert_eq!(machine.send(&map(1, 0x10_0000, 0x2_0000, 0, READ), 4).status, OK);
    let mappings = machine.host.mappings(LONE);
    let pieces: Vec<_> = mappings.iter().flat_map(|mapping| mapping.to.clone()).collect();
    assert_eq!(pieces, regions[..2], "each region's part, and nothing else");
    assert_eq!(machine.reads(LONE, 0x11_ffff), Some(0x1_ffff));
}

#[test]
fn the_rings_own_pages_are_memory_like_any_other() {
    let mut machine = attached(settings());
    // All of the driver's: rings, requests and replies. And a byte more than there is.
    assert_eq!(machine.request(&map(1, 0x10_0000, 0x2_0000, 0, READ | WRITE)), OK);
    for address in [0, REQUEST, REPLY] {
        assert_eq!(machine.writes(LONE, 0x10_0000 + address), Some(address));
    }
    assert_eq!(machine.request(&map(1, 0x20_0000, RAM_SIZE + 0x1000, 0, READ)), FAULT);
    assert_eq!(machine.request(&unmap(1, 0x10_0000, 0x2_0000)), OK);
    assert_eq!(machine.reads(LONE, 0x10_0000), None);
}

#[test]
fn every_end_is_on_the_granule_whatever_its_size() {
    for granule in [0x1000, 0x1_0000, 0x20_0000] {
        let mut machine = attached(Settings { granule, ..settings() });
        let (first, last, physical) = (4 * granule, 5 * granule - 1, 2 * granule);
        for off in [1, granule / 2] {
            for (first, last, physical) in [
                (first + off, last, physical),
                (first - off, last, physical),
                (first, last + off, physical),
                (first, last - off, physical),
                (first + off, last + off, physical),
                (first, last, physical + off),
                (first, last, physical - off),
                (first + off, last + off, physical + off),
            ] {
                let status = machine.request(&map_to(1, first, last, physical, READ));
                assert_eq!(status, RANGE, "{first:#x} to {last:#x} at {physical:#x}");
            }
        }
        assert_eq!(machine.request(&map_to(1, first, last, physical, READ)), OK);
        assert_eq!(machine.reads(LONE, last), Some(physical + granule - 1));
    }
}
