// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! RESV_MEM properties.

use virtio_iommu::device::Settings;
use virtio_iommu::host::fake::{Attachment, Flavour};
use virtio_iommu::reserved::{EndpointView, ReservedKind, ViewError};

use crate::bench::{
    BYPASS, Bench, DOORBELL, FLAVOURS, HOLE, INVAL, LEFT, LONE, OK, PAGE, PROBE_SIZE, READ, RIGHT, UNSUPP, WRITE,
    region, settings,
};
use crate::requests::{attach, detach, map, probe};

const MSI: u8 = 1;
const SIZE: usize = 24;

/// The RESV_MEM properties of an endpoint, as PROBE tells them.
fn properties(bench: &mut Bench, endpoint: u32) -> Vec<[u8; SIZE]> {
    let reply = bench.inquire(&probe(endpoint), PROBE_SIZE + 4);
    assert_eq!((reply.used, reply.bytes[PROBE_SIZE]), (PROBE_SIZE + 4, OK));
    let list = reply.bytes[..PROBE_SIZE].chunks_exact(SIZE).map(|bytes| bytes.try_into().unwrap());
    list.filter(|property: &[u8; SIZE]| property[0] != 0).collect()
}

/// Statement 44 (5.13.6.8.1.2, SHOULD): "The device SHOULD set reserved to zero."
/// Answer: Zero.
#[test]
fn reserved_should_be_zero() {
    let mut bench = Bench::new(Flavour::Iommufd);
    for (endpoint, subtypes) in [(LONE, &[MSI, 0][..]), (LEFT, &[MSI])] {
        let fields: Vec<_> = properties(&mut bench, endpoint).iter().map(|bytes| bytes[4..8].to_vec()).collect();
        let expected: Vec<_> = subtypes.iter().map(|subtype| vec![*subtype, 0, 0, 0]).collect();
        assert_eq!(fields, expected);
    }
}

/// Statement 45 (5.13.6.8.1.2, SHOULD NOT): "The device SHOULD NOT present more than one VIRTIO_IOMMU_RESV_MEM_T_MSI property per
/// endpoint."
/// Answer: A device with an endpoint that has two cannot be made.
#[test]
fn there_should_not_be_a_second_doorbell() {
    let doorbells = [(0xfee0_0000, 0xfee0_0fff), (0xfef0_0000, 0xfef0_0fff)].map(|at| region(at, ReservedKind::Msi));
    assert_eq!(EndpointView::new(doorbells.to_vec()), Err(ViewError::SecondMsi));
    let mut bench = Bench::new(Flavour::Iommufd);
    for endpoint in [LONE, LEFT, RIGHT] {
        let doorbells = properties(&mut bench, endpoint).iter().filter(|bytes| bytes[4] == MSI).count();
        assert_eq!(doorbells, 1);
    }
}

/// Statement 46 (5.13.6.8.1.2, SHOULD NOT): "The device SHOULD NOT present multiple RESV_MEM properties that overlap each other for
/// the same endpoint."
/// Answer: A device with an endpoint whose regions overlap cannot be made.
#[test]
fn regions_should_not_overlap() {
    let first = region((0x1_0000, 0x1_ffff), ReservedKind::Reserved);
    for (start, last) in [(0x1_0000, 0x1_ffff), (0x1_ffff, 0x2_ffff), (0x1_1000, 0x1_1fff), (0, u64::MAX)] {
        let second = region((start, last), ReservedKind::Msi);
        assert!(matches!(EndpointView::new(vec![first, second]), Err(ViewError::Overlap(..))), "{start:#x}-{last:#x}");
    }
    let next = region((0x2_0000, 0x2_ffff), ReservedKind::Msi);
    let view = EndpointView::new(vec![next, first]).unwrap();
    let mut bench = Bench::with_view_of_lone(Flavour::Iommufd, settings(), view);
    let starts: Vec<_> = properties(&mut bench, LONE).iter().map(|bytes| bytes[8..16].to_vec()).collect();
    assert_eq!(starts, [0x1_0000u64.to_le_bytes(), 0x2_0000u64.to_le_bytes()]);
}

/// Statement 47 (5.13.6.8.1.2, SHOULD): "The device SHOULD reject a MAP request that overlaps a RESV_MEM region."
/// Driver (5.13.6.8.1.1, SHOULD NOT): "The driver SHOULD NOT map any virtual address described by a
/// VIRTIO_IOMMU_RESV_MEM_T_RESERVED or VIRTIO_IOMMU_RESV_MEM_T_MSI property."
/// Answer: INVAL, for a region of any endpoint of the domain, even if the host would map it.
/// Otherwise: All that were read; none looks.
#[test]
fn map_over_a_region_should_be_rejected() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.status(&attach(1, LEFT, 0)), OK);
        for (start, last) in [DOORBELL, HOLE] {
            for iova in [start - PAGE, start, start + 4 * PAGE, last - 0xfff] {
                assert_eq!(bench.status(&map(1, iova, 2 * PAGE, 0x1000, READ)), INVAL, "{iova:#x}");
            }
            assert_eq!(bench.status(&map(1, start - PAGE, PAGE, 0x1000, READ)), OK);
            assert_eq!(bench.status(&map(1, last + 1, PAGE, 0x1000, READ)), OK);
        }
    }
}

/// Statement 48 (5.13.6.8.1.2, SHOULD NOT): "The device SHOULD NOT allow accesses from the endpoint to RESV_MEM regions to affect any
/// other component than the endpoint and the driver."
/// Answer: Neither a mapping nor bypass takes them anywhere. Where guest memory lies in such a region, bypass is refused: UNSUPP for
/// a bypass domain, and an endpoint that is in none is blocked.
#[test]
fn accesses_to_a_region_should_affect_nobody() {
    for flavour in FLAVOURS {
        let hole = (0x8000, 0x8fff);
        let view = EndpointView::new(vec![region(hole, ReservedKind::Reserved)]).unwrap();
        let settings = Settings { boot_bypass: true, ..settings() };
        let mut bench = Bench::with_view_of_lone(flavour, settings, view);
        let reaches = |bench: &Bench| bench.read(LONE, hole.0).or(bench.write(LONE, hole.1));
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.status(&map(1, hole.0, PAGE, 0x1000, READ | WRITE)), INVAL);
        assert_eq!(reaches(&bench), None);
        assert_eq!(bench.status(&attach(2, LONE, BYPASS)), UNSUPP);
        assert_eq!(bench.status(&detach(1, LONE)), OK);
        assert_eq!(bench.attachment(LONE), Attachment::Blocked);
        assert_eq!(bench.status(&attach(2, LEFT, BYPASS)), OK, "another has no such region");
        assert_eq!(reaches(&bench), None);
    }
}
