// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Feature bits.

use virtio_iommu::device::Settings;
use virtio_iommu::host::fake::Flavour;

use crate::bench::{Bench, DOORBELL, HOLE, INVAL, LAST, LONE, OK, PAGE, PROBE_SIZE, RANGE, READ, settings};
use crate::requests::{attach, map, probe, unmap};

const F_MAP_UNMAP: u64 = 1 << 2;
const F_BYPASS: u64 = 1 << 3;
const F_PROBE: u64 = 1 << 4;
const F_BYPASS_CONFIG: u64 = 1 << 6;
const F_VERSION_1: u64 = 1 << 32;

/// What a device offers, whatever it is told to be.
fn offered() -> [u64; 2] {
    [false, true].map(|access_platform| {
        Bench::with(Flavour::Iommufd, Settings { access_platform, ..settings() }).device.features()
    })
}

/// Statement 1 (5.13.3.2, SHOULD): "The device SHOULD offer feature bit VIRTIO_IOMMU_F_MAP_UNMAP."
/// Answer: Always offered.
#[test]
fn map_unmap_should_be_offered() {
    for features in offered() {
        assert_eq!(features & F_MAP_UNMAP, F_MAP_UNMAP);
    }
}

/// Statement 2 (5.13.3.2, SHOULD NOT): "New devices SHOULD NOT offer VIRTIO_IOMMU_F_BYPASS."
/// Answer: Never offered.
#[test]
fn bypass_should_not_be_offered() {
    for features in offered() {
        assert_eq!(features & F_BYPASS, 0);
    }
}

/// Statement 3 (5.13.3.2, SHOULD NOT): "Devices SHOULD NOT offer both VIRTIO_IOMMU_F_BYPASS and VIRTIO_IOMMU_F_BYPASS_CONFIG."
/// Answer: BYPASS_CONFIG is offered, and BYPASS is not.
#[test]
fn bypass_and_bypass_config_should_not_both_be_offered() {
    for features in offered() {
        assert_eq!(features & (F_BYPASS | F_BYPASS_CONFIG), F_BYPASS_CONFIG);
    }
}

/// Driver (5.13.3.1, SHOULD): "The driver SHOULD accept any of the VIRTIO_IOMMU_F_INPUT_RANGE, VIRTIO_IOMMU_F_DOMAIN_RANGE and
/// VIRTIO_IOMMU_F_PROBE feature bits if offered by the device."
/// Answer: The limits are the same for one that does not, and PROBE is answered.
#[test]
fn a_driver_that_accepts_no_feature_is_held_to_the_same_limits() {
    let mut bench = Bench::with(Flavour::Iommufd, Settings { domain_range: 1..=9, ..settings() });
    bench.device.set_driver_features(F_VERSION_1);
    assert_eq!(bench.status(&attach(10, LONE, 0)), INVAL);
    assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
    assert_eq!(bench.status(&map(1, LAST + 1, PAGE, 0, READ)), RANGE);
    assert_eq!(bench.status(&map(1, DOORBELL.0, PAGE, 0, READ)), INVAL);
    let reply = bench.inquire(&probe(LONE), PROBE_SIZE + 4);
    assert_eq!((reply.used, reply.bytes[PROBE_SIZE]), (PROBE_SIZE + 4, OK));
    assert_eq!(reply.bytes[0], 1, "a property");
}

/// Driver (5.13.5.1, MUST NOT): "The driver MUST NOT negotiate VIRTIO_IOMMU_F_MAP_UNMAP if it is incapable of sending
/// VIRTIO_IOMMU_T_MAP and VIRTIO_IOMMU_T_UNMAP requests."
/// Driver (5.13.6.5, text): "This request is only available when VIRTIO_IOMMU_F_MAP_UNMAP has been negotiated."
/// Answer: Whether a driver accepted the feature changes nothing: one that sends no MAP has domains in which nothing is mapped,
/// and one that does is answered.
#[test]
fn map_and_unmap_are_answered_whether_or_not_the_feature_was_accepted() {
    for accepted in [0, F_MAP_UNMAP] {
        let mut bench = Bench::new(Flavour::Iommufd);
        bench.device.set_driver_features(F_VERSION_1 | accepted);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.read(LONE, 0x5000), None);
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        assert_eq!(bench.read(LONE, 0x5000), Some(0x1000));
        assert_eq!(bench.status(&unmap(1, 0x5000, PAGE)), OK);
        assert_eq!(bench.read(LONE, 0x5000), None);
    }
}

/// Driver (5.13.5.1, SHOULD): "If the VIRTIO_IOMMU_F_PROBE feature is negotiated, the driver SHOULD send a VIRTIO_IOMMU_T_PROBE
/// request for each endpoint before attaching the endpoint to a domain."
/// Answer: ATTACH does not ask for it, and what the driver did not ask for is reserved all the same.
#[test]
fn attach_without_a_probe_is_ok_and_the_regions_are_reserved() {
    let mut bench = Bench::new(Flavour::Iommufd);
    assert_eq!(bench.device.features() & F_PROBE, F_PROBE);
    assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
    assert_eq!(bench.status(&map(1, HOLE.0, PAGE, 0, READ)), INVAL);
    assert_eq!(bench.read(LONE, HOLE.0), None);
}
