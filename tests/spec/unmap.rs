// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! UNMAP requests.

use virtio_iommu::host::fake::Flavour;

use crate::bench::{BYPASS, Bench, FLAVOURS, INVAL, LEFT, LONE, NOENT, OK, PAGE, RANGE, READ};
use crate::requests::{attach, map, unmap};

/// A device with [`LONE`] in domain 1, [`LEFT`] in bypass domain 2, and these pages of domain 1 mapped: the first, and how many.
fn bench(flavour: Flavour, mappings: &[(u64, u64)]) -> Bench {
    let mut bench = Bench::new(flavour);
    assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
    assert_eq!(bench.status(&attach(2, LEFT, BYPASS)), OK);
    for (page, count) in mappings {
        assert_eq!(bench.status(&map(1, page * PAGE, count * PAGE, page * PAGE, READ)), OK);
    }
    bench
}

/// An UNMAP in domain 1 from one address to another.
fn unmap_to(start: u64, last: u64) -> Vec<u8> {
    let mut request = unmap(1, 0, PAGE);
    request[8..16].copy_from_slice(&start.to_le_bytes());
    request[16..24].copy_from_slice(&last.to_le_bytes());
    request
}

/// Which of the first 16 pages are mapped.
fn mapped(bench: &Bench) -> Vec<u64> {
    (0..16).filter(|page| bench.read(LONE, page * PAGE).is_some()).collect()
}

/// Statement 31 (5.13.6.6.2, MAY): "If the reserved field of an UNMAP request is not zero, the device MAY set the request status to
/// VIRTIO_IOMMU_S_INVAL, in which case the device MAY perform the UNMAP operation."
/// Driver (5.13.6.6.1, SHOULD): "The driver SHOULD set the reserved field to zero."
/// Answer: INVAL, and nothing is removed: what the field will mean is unknown.
#[test]
fn reserved_that_is_not_zero_is_inval() {
    let mut bench = bench(Flavour::Iommufd, &[(5, 1)]);
    for at in 24..28 {
        let mut request = unmap(1, 5 * PAGE, PAGE);
        request[at] = 0x80;
        assert_eq!(bench.status(&request), INVAL, "byte {at}");
    }
    assert_eq!(mapped(&bench), [5]);
}

/// Statement 32 (5.13.6.6.2, SHOULD): "If domain does not exist, the device SHOULD set the request status to VIRTIO_IOMMU_S_NOENT."
/// Answer: NOENT.
#[test]
fn an_unknown_domain_should_be_noent() {
    let mut bench = bench(Flavour::Iommufd, &[(5, 1)]);
    for domain in [0, 3, u32::MAX] {
        assert_eq!(bench.status(&unmap(domain, 5 * PAGE, PAGE)), NOENT);
    }
}

/// Statement 33 (5.13.6.6.2, SHOULD): "If the domain is a bypass domain, the device SHOULD reject the request and set status to
/// VIRTIO_IOMMU_S_INVAL."
/// Driver (5.13.6.6.1, SHOULD NOT): "The driver SHOULD NOT send UNMAP requests on a bypass domain."
/// Answer: INVAL.
#[test]
fn unmap_in_a_bypass_domain_should_be_inval() {
    let mut bench = bench(Flavour::Iommufd, &[]);
    assert_eq!(bench.status(&unmap(2, 5 * PAGE, PAGE)), INVAL);
    assert!(bench.reaches_memory_as_it_is(LEFT));
}

/// Statement 34 (5.13.6.6.2, SHOULD): "If a mapping affected by the range is not covered in its entirety by the range (the UNMAP
/// request would split the mapping), then the device SHOULD set the request status to VIRTIO_IOMMU_S_RANGE, and SHOULD NOT remove
/// any mapping."
/// Driver (5.13.6.6.1, MUST): "The first address of a range MUST either be the first address of a mapping or be outside any mapping.
/// The last address of a range MUST either be the last address of a mapping or be outside any mapping."
/// Answer: RANGE, and nothing is removed, wherever the split would be.
/// Otherwise: QEMU, which has removed the mappings before it by then; crosvm has used length 0 for assigned devices.
#[test]
fn a_split_should_be_range_and_remove_nothing() {
    for flavour in FLAVOURS {
        let mut bench = bench(flavour, &[(1, 1), (3, 1), (5, 4), (10, 1)]);
        let before = mapped(&bench);
        for (start, last) in [(1, 5), (6, 10), (0, 7), (7, 15), (6, 7), (5, 7), (8, 8)] {
            assert_eq!(bench.status(&unmap_to(start * PAGE, last * PAGE + 0xfff)), RANGE, "{start}-{last}");
        }
        assert_eq!(bench.status(&unmap_to(PAGE, PAGE)), RANGE, "a byte");
        assert_eq!(bench.status(&unmap_to(PAGE, 2 * PAGE - 2)), RANGE, "all but a byte");
        assert_eq!(mapped(&bench), before);
    }
}

/// Statement 35 (5.13.6.6.2, SHOULD): "If part of the range or the full range is not covered by an existing mapping, then the device
/// SHOULD remove all mappings affected by the range and set the request status to VIRTIO_IOMMU_S_OK."
/// Driver (5.13.6.6.1, SHOULD): "The range, defined by virt_start and virt_end, SHOULD cover one or more contiguous mappings created
/// with MAP requests. The range MAY spill over unmapped virtual addresses."
/// Answer: OK; all of them are removed, the others stay.
/// Otherwise: cloud-hypervisor and crosvm, for assigned devices: the host unmaps less than they expect.
#[test]
fn a_range_with_holes_should_be_ok() {
    for flavour in FLAVOURS {
        let mut bench = bench(flavour, &[(1, 1), (3, 2), (7, 1), (9, 1)]);
        assert_eq!(bench.status(&unmap_to(11 * PAGE, 14 * PAGE - 1)), OK, "nothing is mapped there");
        assert_eq!(bench.status(&unmap_to(2 * PAGE, 9 * PAGE - 1)), OK);
        assert_eq!(mapped(&bench), [1, 9]);
        assert_eq!(bench.status(&unmap_to(0, u64::MAX)), OK, "past the end of input_range");
        assert!(mapped(&bench).is_empty());
        assert_eq!(bench.status(&unmap_to(0, u64::MAX)), OK);
    }
}

/// Statement (5.13.6.6, text): "All mappings covered by the range [virt_start; virt_end] (inclusive) are removed."
/// Answer: The seven examples of the specification, in granules instead of bytes, come out as they say.
/// Otherwise: cloud-hypervisor and crosvm, in examples 6 and 7 with assigned devices.
#[test]
fn the_examples_of_the_specification_come_out_as_they_say() {
    type Example = (&'static [(u64, u64)], (u64, u64), u8, &'static [u64]);
    // Mappings as first page and count; what is unmapped as first and last page; the status; what is left.
    let examples: [Example; 7] = [
        (&[], (0, 4), OK, &[]),
        (&[(0, 10)], (0, 9), OK, &[]),
        (&[(0, 5), (5, 5)], (0, 9), OK, &[]),
        (&[(0, 10)], (0, 4), RANGE, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (&[(0, 5), (5, 5)], (0, 4), OK, &[5, 6, 7, 8, 9]),
        (&[(0, 5)], (0, 9), OK, &[]),
        (&[(0, 5), (10, 5)], (0, 14), OK, &[]),
    ];
    for flavour in FLAVOURS {
        for (index, (mappings, (start, last), status, left)) in examples.iter().enumerate() {
            let mut bench = bench(flavour, mappings);
            assert_eq!(bench.status(&unmap_to(start * PAGE, last * PAGE + 0xfff)), *status, "({})", index + 1);
            assert_eq!(mapped(&bench), *left, "({})", index + 1);
        }
    }
}

/// Driver (5.13.6.6, text): "Unmap a range of addresses mapped with VIRTIO_IOMMU_T_MAP."
/// Answer: A range that ends before it starts is none: RANGE.
#[test]
fn an_end_before_the_start_is_range() {
    let mut bench = bench(Flavour::Iommufd, &[(5, 1)]);
    for (start, last) in [(0x6000, 0x5fff), (0x5fff, 0x5000), (u64::MAX, 0), (0x5000, 0)] {
        assert_eq!(bench.status(&unmap_to(start, last)), RANGE, "{start:#x}-{last:#x}");
    }
    assert_eq!(mapped(&bench), [5]);
}
