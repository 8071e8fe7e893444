// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MAP requests.

use virtio_iommu::device::Settings;
use virtio_iommu::host::fake::Flavour;

use crate::bench::{
    BYPASS, Bench, FAULT, FLAVOURS, INVAL, LEFT, LONE, MMIO, NOENT, OK, PAGE, RAM_SIZE, RANGE, READ, WRITE, range,
    settings,
};
use crate::requests::{attach, map};

/// A device with [`LONE`] in domain 1, where a page is mapped, and [`LEFT`] in bypass domain 2.
fn bench(flavour: Flavour) -> Bench {
    let mut bench = Bench::new(flavour);
    assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
    assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
    assert_eq!(bench.status(&attach(2, LEFT, BYPASS)), OK);
    bench
}

/// A MAP in domain 1 from one address to another.
fn map_to(start: u64, last: u64, physical: u64, flags: u32) -> Vec<u8> {
    let mut request = map(1, 0, PAGE, physical, flags);
    request[8..16].copy_from_slice(&start.to_le_bytes());
    request[16..24].copy_from_slice(&last.to_le_bytes());
    request
}

/// Statement (5.13.6.5, text): "if an endpoint accesses address VA ∈ [virt_start; virt_end], the device (or the physical IOMMU)
/// translates the address: PA = VA - virt_start + phys_start."
/// Answer: For every endpoint of the domain, from the first byte to the last and no further.
/// Otherwise: crosvm, for all but the last host group of a domain.
#[test]
fn a_mapping_translates_from_its_first_byte_to_its_last() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        for endpoint in [LONE, LEFT] {
            assert_eq!(bench.status(&attach(1, endpoint, 0)), OK);
        }
        // Over the border of two regions of guest memory.
        let (iova, physical) = (0x12_3000, RAM_SIZE / 2 - PAGE);
        assert_eq!(bench.status(&map(1, iova, 3 * PAGE, physical, READ)), OK);
        for endpoint in [LONE, LEFT] {
            for offset in [0, 1, PAGE - 1, PAGE, 3 * PAGE - 1] {
                assert_eq!(bench.read(endpoint, iova + offset), Some(physical + offset));
            }
            assert_eq!((bench.read(endpoint, iova - 1), bench.read(endpoint, iova + 3 * PAGE)), (None, None));
        }
    }
}

/// Statement 25 (5.13.6.5.2, SHOULD): "If virt_start, phys_start or (virt_end + 1) is not aligned on the page granularity, the
/// device SHOULD reject the request and set status to VIRTIO_IOMMU_S_RANGE."
/// Answer: RANGE.
/// Otherwise: QEMU, which maps it, and kvmtool.
#[test]
fn misaligned_should_be_range() {
    for granule in [PAGE, 0x1_0000] {
        let mut bench = Bench::with(Flavour::Iommufd, Settings { granule, ..settings() });
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        for part in [1, granule / 2, granule - 1] {
            let (start, last) = (4 * granule, 6 * granule - 1);
            assert_eq!(bench.status(&map_to(start + part, last, 0, READ)), RANGE);
            assert_eq!(bench.status(&map_to(start, last - part, 0, READ)), RANGE);
            assert_eq!(bench.status(&map_to(start, last, part, READ)), RANGE);
            assert_eq!(bench.status(&map_to(start + part, last + part, part, READ)), RANGE);
        }
        assert_eq!(bench.status(&map_to(4 * granule, 6 * granule - 1, 0, READ)), OK);
    }
}

/// Statement 26 (5.13.6.5.2, SHOULD): "If a mapping already exists in the requested range, the device SHOULD reject the request and
/// set status to VIRTIO_IOMMU_S_INVAL."
/// Answer: INVAL, however they overlap, and what is mapped stays; a mapping without access counts.
#[test]
fn an_overlap_should_be_inval() {
    for flavour in FLAVOURS {
        for flags in [READ, 0] {
            let mut bench = Bench::new(flavour);
            assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
            assert_eq!(bench.status(&map_to(0x5000, 0x7fff, 0x1000, flags)), OK);
            let overlapping =
                [(0x5000, 0x7fff), (0x6000, 0x6fff), (0x4000, 0x8fff), (0x4000, 0x5fff), (0x7000, 0x8fff)];
            for (start, last) in overlapping {
                assert_eq!(bench.status(&map_to(start, last, 0x8000, READ)), INVAL, "{start:#x}-{last:#x}");
            }
            assert_eq!(bench.read(LONE, 0x6000), (flags == READ).then_some(0x2000));
            assert_eq!(bench.status(&map_to(0x4000, 0x4fff, 0x8000, READ)), OK);
            assert_eq!(bench.status(&map_to(0x8000, 0x8fff, 0x8000, READ)), OK);
        }
    }
}

/// Statement 27 (5.13.6.5.2, MUST): "If the device doesn't recognize a flags bit, it MUST reject the request and set status to
/// VIRTIO_IOMMU_S_INVAL."
/// Driver (5.13.6.5.1, SHOULD): "The driver SHOULD set undefined flags bits to zero."
/// Answer: INVAL, for each bit but READ and WRITE.
#[test]
fn an_unknown_flag_must_be_inval() {
    let mut bench = bench(Flavour::Iommufd);
    for bit in 2..32 {
        assert_eq!(bench.status(&map(1, 0x8000, PAGE, 0x1000, READ | WRITE | 1 << bit)), INVAL, "bit {bit}");
    }
}

/// Statement 28 (5.13.6.5.2, SHOULD): "If domain does not exist, the device SHOULD reject the request and set status to
/// VIRTIO_IOMMU_S_NOENT."
/// Answer: NOENT.
#[test]
fn an_unknown_domain_should_be_noent() {
    let mut bench = bench(Flavour::Iommufd);
    for domain in [0, 3, u32::MAX] {
        assert_eq!(bench.status(&map(domain, 0x8000, PAGE, 0x1000, READ)), NOENT);
    }
}

/// Statement 29 (5.13.6.5.2, SHOULD): "If the domain is a bypass domain, the device SHOULD reject the request and set status to
/// VIRTIO_IOMMU_S_INVAL."
/// Driver (5.13.6.5.1, SHOULD NOT): "The driver SHOULD NOT send MAP requests on a bypass domain."
/// Answer: INVAL.
#[test]
fn map_in_a_bypass_domain_should_be_inval() {
    let mut bench = bench(Flavour::Iommufd);
    assert_eq!(bench.status(&map(2, 0x8000, PAGE, 0x1000, READ)), INVAL);
    assert!(bench.reaches_memory_as_it_is(LEFT));
}

/// Statement 30 (5.13.6.5.2, MUST NOT): "The device MUST NOT allow writes to a range mapped without the VIRTIO_IOMMU_MAP_F_WRITE
/// flag."
/// Answer: The host is told the permissions as they are, by MAP and by an ATTACH that brings mappings along.
/// Otherwise: cloud-hypervisor, which maps everything to be read and written.
#[test]
fn writes_must_be_refused_without_the_flag() {
    for flavour in FLAVOURS {
        let mut bench = bench(flavour);
        assert_eq!(bench.status(&map(1, 0x8000, PAGE, 0x2000, 0)), OK);
        assert_eq!(bench.status(&map(1, 0x9000, PAGE, 0x3000, READ | WRITE)), OK);
        assert_eq!(bench.status(&attach(1, LEFT, 0)), OK);
        for endpoint in [LONE, LEFT] {
            assert_eq!((bench.read(endpoint, 0x5000), bench.write(endpoint, 0x5000)), (Some(0x1000), None));
            assert_eq!((bench.read(endpoint, 0x8000), bench.write(endpoint, 0x8000)), (None, None));
            assert_eq!((bench.read(endpoint, 0x9000), bench.write(endpoint, 0x9000)), (Some(0x3000), Some(0x3000)));
        }
    }
}

/// Driver (5.13.6.5.1, MUST): "If it intends to allow read accesses from endpoints attached to the domain, the driver MUST set the
/// VIRTIO_IOMMU_MAP_F_READ flag."
/// Answer: Without it reads are refused, unless the host's format has no write-only mappings.
#[test]
fn reads_are_refused_without_the_flag() {
    for flavour in FLAVOURS {
        let mut bench = bench(flavour);
        assert_eq!(bench.status(&map(1, 0x8000, PAGE, 0x2000, WRITE)), OK);
        assert_eq!((bench.read(LONE, 0x8000), bench.write(LONE, 0x8000)), (None, Some(0x2000)));
    }
}

/// Driver (5.13.6.1, MUST NOT): "If the VIRTIO_IOMMU_F_INPUT_RANGE feature is negotiated, the driver MUST NOT send requests with
/// virt_start less than input_range.start or virt_end greater than input_range.end."
/// Statement (5.13.6, text): "Any mapping request to virtual addresses outside of this range fails."
/// Answer: RANGE. An UNMAP may reach out of the range: there is nothing to remove there.
/// Otherwise: QEMU and crosvm, which do not compare.
#[test]
fn outside_of_input_range_fails() {
    for flavour in FLAVOURS {
        let limits = (0x10_0000, 0x1f_ffff);
        let mut bench = Bench::with(flavour, Settings { input_range: range(limits), ..settings() });
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        for (start, last) in [(0xf_f000, 0x10_0fff), (0, 0xfff), (0x1f_f000, 0x20_0fff), (0x20_0000, 0x20_0fff)] {
            assert_eq!(bench.status(&map_to(start, last, 0x1000, READ)), RANGE, "{start:#x}-{last:#x}");
            assert_eq!(bench.read(LONE, start), None);
        }
        assert_eq!(bench.status(&map_to(u64::MAX - 0xfff, u64::MAX, 0x1000, READ)), RANGE);
        assert_eq!(bench.status(&map_to(0, u64::MAX, 0, READ)), RANGE);
        assert_eq!(bench.status(&map_to(0x10_0000, 0x10_0fff, 0x1000, READ)), OK);
        assert_eq!(bench.status(&map_to(0x1f_f000, 0x1f_ffff, 0x1000, READ)), OK);
    }
}

/// Driver (5.13.6.5.1, MUST): "virt_end MUST be strictly greater than virt_start."
/// Answer: RANGE. Equal ends are no multiple of the granule.
/// Otherwise: QEMU, which does not compare.
#[test]
fn an_end_that_is_not_behind_the_start_is_range() {
    let mut bench = bench(Flavour::Iommufd);
    for (start, last) in [(0x8000, 0x7fff), (0x8000, 0x8000), (0x8000, 0), (u64::MAX, 0), (0xffff_f000, 0xfff)] {
        assert_eq!(bench.status(&map_to(start, last, 0x1000, READ)), RANGE, "{start:#x}-{last:#x}");
    }
}

/// Driver (5.13.6.5, text): "Given phys_end = phys_start + virt_end - virt_start, the range defined by phys_start and phys_end should
/// be within the guest-physical address space."
/// Driver (5.13.6.5.1, SHOULD): "The driver SHOULD set the VIRTIO_IOMMU_MAP_F_MMIO flag when the physical range corresponds to
/// memory-mapped device registers. The physical range SHOULD have a single memory type: either normal memory or memory-mapped I/O."
/// Answer: FAULT, unless every byte of it is guest memory; RANGE if it passes the end of all addresses.
#[test]
fn what_is_not_guest_memory_is_fault() {
    for flavour in FLAVOURS {
        let mut bench = bench(flavour);
        for physical in [RAM_SIZE, RAM_SIZE - PAGE, 1 << 40, u64::MAX - 2 * PAGE + 1] {
            assert_eq!(bench.status(&map(1, 0x8000, 2 * PAGE, physical, READ)), FAULT, "{physical:#x}");
        }
        assert_eq!(bench.status(&map(1, 0x8000, 2 * PAGE, u64::MAX - PAGE + 1, READ)), RANGE);
        assert_eq!(bench.status(&map(1, 0x8000, 2 * PAGE, RAM_SIZE - 2 * PAGE, READ)), OK);
    }
}

/// Driver (5.13.6.5.1, MUST NOT): "If the VIRTIO_IOMMU_F_MMIO feature isn't negotiated, the driver MUST NOT use the
/// VIRTIO_IOMMU_MAP_F_MMIO flag."
/// Answer: INVAL. The feature is not offered: nothing but guest memory can be mapped.
/// Otherwise: cloud-hypervisor, which accepts the flag.
#[test]
fn the_mmio_flag_is_inval() {
    let mut bench = bench(Flavour::Iommufd);
    assert_eq!(bench.device.features() & 1 << 5, 0);
    for flags in [MMIO, MMIO | READ, MMIO | READ | WRITE] {
        assert_eq!(bench.status(&map(1, 0x8000, PAGE, 0x1000, flags)), INVAL);
    }
}
