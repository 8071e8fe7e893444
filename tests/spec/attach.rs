// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! ATTACH requests.

use virtio_iommu::device::Settings;
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::{Attachment, Failure, Flavour};

use crate::bench::{
    BYPASS, Bench, DEVERR, FLAVOURS, HOLE, INVAL, LEFT, LONE, NOBODY, NOENT, NOMEM, OK, PAGE, READ, RIGHT, UNSUPP,
    WRITE, settings,
};
use crate::requests::{attach, detach, map, unmap};

const F_BYPASS_CONFIG: u64 = 1 << 6;

/// Statement 13 (5.13.6.3.2, MUST): "If the reserved field of an ATTACH request is not zero, the device MUST reject the request and
/// set status to VIRTIO_IOMMU_S_INVAL."
/// Driver (5.13.6.3.1, SHOULD): "The driver SHOULD set reserved to zero."
/// Answer: INVAL, for each of its bytes.
/// Otherwise: QEMU, which does not look.
#[test]
fn reserved_must_be_zero() {
    let mut bench = Bench::new(Flavour::Iommufd);
    for at in 16..20 {
        for value in [1, 0x80] {
            let mut request = attach(1, LONE, 0);
            request[at] = value;
            assert_eq!(bench.status(&request), INVAL, "byte {at}");
        }
    }
    assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
}

/// Statement 14 (5.13.6.3.2, MUST): "If the device does not recognize a flags bit, it MUST reject the request and set status to
/// VIRTIO_IOMMU_S_INVAL."
/// Answer: INVAL, for each bit but the one for bypass.
/// Otherwise: crosvm, which does not look.
#[test]
fn an_unknown_flag_must_be_inval() {
    let mut bench = Bench::new(Flavour::Iommufd);
    for bit in 1..32 {
        assert_eq!(bench.status(&attach(1, LONE, 1 << bit)), INVAL, "bit {bit}");
        assert_eq!(bench.status(&attach(1, LONE, BYPASS | 1 << bit)), INVAL, "bit {bit}");
    }
    assert_eq!(bench.status(&attach(1, LONE, BYPASS)), OK);
}

/// Statement 15 (5.13.6.3.2, MUST): "If the endpoint identified by endpoint doesn't exist, the device MUST reject the request and
/// set status to VIRTIO_IOMMU_S_NOENT."
/// Answer: NOENT; there is no domain then.
/// Otherwise: cloud-hypervisor, which accepts any endpoint.
#[test]
fn an_unknown_endpoint_must_be_noent() {
    let mut bench = Bench::new(Flavour::Iommufd);
    for endpoint in [0, NOBODY, LONE | 1 << 16, u32::MAX] {
        assert_eq!(bench.status(&attach(1, endpoint, 0)), NOENT);
        assert_eq!(bench.status(&attach(1, endpoint, BYPASS)), NOENT);
    }
}

/// Statement 16 (5.13.6.3.2, MUST): "If another endpoint is already attached to the domain identified by domain, then the device MAY
/// attach the endpoint identified by endpoint to the domain. If it cannot do so, the device MUST reject the request and set status
/// to VIRTIO_IOMMU_S_UNSUPP."
/// Answer: It is attached, and all reach the same. UNSUPP if the host can never do that; a failure that may pass is not taken for
/// "cannot": NOMEM if the host is out of memory, DEVERR if the device is busy.
/// Otherwise: crosvm, which accepts an endpoint of another host group and goes on mapping for the last one only.
#[test]
fn a_second_endpoint_joins_or_must_be_unsupp() {
    for flavour in FLAVOURS {
        // A type1 host leaves a group that it cannot attach with nothing: there it has nothing before, either.
        let mut bench = Bench::with(flavour, Settings { boot_bypass: false, ..settings() });
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        let refusals = [
            (HostErrorKind::Incompatible, UNSUPP),
            (HostErrorKind::ReservedConflict, UNSUPP),
            (HostErrorKind::NoMemory, NOMEM),
            (HostErrorKind::Busy, DEVERR),
        ];
        for (error, status) in refusals {
            bench.host.fail_after(0, Failure::Error(error));
            assert_eq!(bench.status(&attach(1, LEFT, 0)), status, "{error:?}");
        }
        assert_eq!(bench.status(&attach(1, LEFT, 0)), OK);
        assert_eq!(bench.read(LEFT, 0x5000), Some(0x1000));
        assert_eq!(bench.status(&map(1, 0x6000, PAGE, 0x2000, WRITE)), OK);
        assert_eq!((bench.write(LONE, 0x6000), bench.write(LEFT, 0x6000)), (Some(0x2000), Some(0x2000)));
    }
}

/// Statement 17 (5.13.6.3.2, SHOULD): "If the domain already exists and the VIRTIO_IOMMU_ATTACH_F_BYPASS flag is not consistent with
/// that domain, the device SHOULD reject the request and set status to VIRTIO_IOMMU_S_INVAL."
/// Driver (5.13.6.3.1, SHOULD): "If the domain already exists and is a bypass domain, the driver SHOULD set the
/// VIRTIO_IOMMU_ATTACH_F_BYPASS flag. If the domain exists and is not a bypass domain, the driver SHOULD NOT set the
/// VIRTIO_IOMMU_ATTACH_F_BYPASS flag."
/// Answer: INVAL; the endpoint stays in the domain that it is in.
/// Otherwise: QEMU, which says INVAL after detaching the endpoint.
#[test]
fn an_inconsistent_bypass_flag_should_be_inval() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        assert_eq!(bench.status(&attach(2, LEFT, BYPASS)), OK);
        assert_eq!(bench.status(&attach(2, LONE, 0)), INVAL);
        assert_eq!(bench.status(&attach(1, LONE, BYPASS)), INVAL, "its own domain");
        assert_eq!(bench.status(&attach(1, LEFT, BYPASS)), INVAL);
        assert_eq!(bench.read(LONE, 0x5000), Some(0x1000));
        assert!(bench.reaches_memory_as_it_is(LEFT));
    }
}

/// Statement 18 (5.13.6.3.2, SHOULD): "If the endpoint identified by endpoint is already attached to another domain, then the device
/// SHOULD first detach it from that domain and attach it to the one identified by domain. In that case the device SHOULD behave as
/// if the driver issued a DETACH request with this endpoint, followed by the ATTACH request. If the device cannot do so, it MUST
/// reject the request and set status to VIRTIO_IOMMU_S_UNSUPP."
/// Answer: It moves in one step. UNSUPP if the host can never do that, NOMEM or DEVERR if it may later; then it stays where it is.
/// Otherwise: crosvm answers UNSUPP for assigned devices, which the specification allows.
#[test]
fn an_endpoint_that_is_attached_elsewhere_should_move() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        assert_eq!(bench.status(&attach(2, LEFT, 0)), OK);
        assert_eq!(bench.status(&map(2, 0x7000, PAGE, 0x2000, READ)), OK);
        assert_eq!(bench.status(&attach(2, LONE, 0)), OK);
        assert_eq!((bench.read(LONE, 0x5000), bench.read(LONE, 0x7000)), (None, Some(0x2000)));
        assert_eq!(bench.status(&map(1, 0x6000, PAGE, 0x1000, READ)), NOENT, "its domain had no other endpoint");
        assert_eq!(bench.status(&attach(3, LONE, BYPASS)), OK);
        assert!(bench.reaches_memory_as_it_is(LONE));
        assert_eq!(bench.read(LEFT, 0x7000), Some(0x2000));
        for (error, status) in [(HostErrorKind::Incompatible, UNSUPP), (HostErrorKind::NoMemory, NOMEM)] {
            bench.host.fail_after(0, Failure::Error(error));
            assert_eq!(bench.status(&attach(4, LONE, 0)), status);
        }
    }
}

/// Statement 19 (5.13.6.3.2, SHOULD): "If properties of the endpoint (obtained with a PROBE request) are compatible with properties
/// of other endpoints already attached to the requested domain, then the device SHOULD attach the endpoint. Otherwise the device
/// SHOULD reject the request and set status to VIRTIO_IOMMU_S_UNSUPP."
/// Answer: UNSUPP if the domain maps what the endpoint has reserved. Other differences are compatible: from then on what any of
/// them has reserved is refused.
/// Otherwise: All that were read; none compares.
#[test]
fn an_endpoint_that_does_not_fit_the_domain_should_be_unsupp() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        assert_eq!(bench.status(&attach(1, LEFT, 0)), OK);
        assert_eq!(bench.status(&map(1, HOLE.1 - 0xfff, PAGE, 0x1000, READ)), OK);
        assert_eq!(bench.status(&attach(1, LONE, 0)), UNSUPP);
        assert_eq!(bench.status(&unmap(1, HOLE.1 - 0xfff, PAGE)), OK);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.status(&map(1, HOLE.1 - 0xfff, PAGE, 0x1000, READ)), INVAL);
        assert_eq!(bench.status(&detach(1, LONE)), OK);
        assert_eq!(bench.status(&map(1, HOLE.1 - 0xfff, PAGE, 0x1000, READ)), OK);
    }
}

/// Statement 20 (5.13.6.3.2, MUST): "A device that does not reject the request MUST attach the endpoint."
/// Answer: OK means that the host has attached the group, and that all mappings of the domain are in its table.
/// Otherwise: crosvm, which says OK for an endpoint that none of the mappings reach.
#[test]
fn an_endpoint_that_is_not_rejected_must_be_attached() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        for page in 0..4 {
            assert_eq!(bench.status(&map(1, 0x5000 + page * 2 * PAGE, PAGE, page * PAGE, READ)), OK);
        }
        for endpoint in [LEFT, RIGHT] {
            assert_eq!(bench.status(&attach(1, endpoint, 0)), OK);
        }
        for page in 0..4 {
            let reached = [LONE, LEFT, RIGHT].map(|id| bench.read(id, 0x5000 + page * 2 * PAGE));
            assert_eq!(reached, [Some(page * PAGE); 3]);
        }
        assert_eq!(bench.status(&detach(1, RIGHT)), OK, "it was attached");
    }
}

/// Statement (5.13.6.3, text): "Endpoints attached to different domains are isolated from each other."
/// Answer: Each reaches its own domain's mappings, at the same addresses too.
#[test]
fn endpoints_of_different_domains_are_isolated() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        for (domain, endpoint, physical) in [(1, LONE, 0x1000), (2, LEFT, 0x2000)] {
            assert_eq!(bench.status(&attach(domain, endpoint, 0)), OK);
            assert_eq!(bench.status(&map(domain, 0x5000, PAGE, physical, READ)), OK);
        }
        assert_eq!((bench.read(LONE, 0x5000), bench.read(LEFT, 0x5000)), (Some(0x1000), Some(0x2000)));
        assert_eq!(bench.status(&unmap(1, 0x5000, PAGE)), OK);
        assert_eq!((bench.read(LONE, 0x5000), bench.read(LEFT, 0x5000)), (None, Some(0x2000)));
    }
}

/// Driver (5.13.6.3.1, SHOULD): "The driver SHOULD ensure that endpoints that cannot be isolated from each other are attached to the
/// same domain."
/// Answer: An endpoint whose host group is in another domain: UNSUPP. One that leaves the domain that it shares with its group may
/// go, as drivers move a group one by one; until the others follow, the group is blocked.
#[test]
fn a_host_group_is_in_one_domain_or_blocked() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        assert_eq!(bench.status(&attach(1, LEFT, 0)), OK);
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        assert_eq!(bench.status(&attach(2, RIGHT, 0)), UNSUPP);
        assert_eq!(bench.status(&attach(2, RIGHT, BYPASS)), UNSUPP);
        assert_eq!(bench.status(&attach(1, RIGHT, 0)), OK);
        assert_eq!(bench.status(&attach(2, LEFT, 0)), OK);
        assert_eq!(bench.attachment(LEFT), Attachment::Blocked);
        assert_eq!(bench.status(&attach(2, RIGHT, 0)), OK);
        assert!(matches!(bench.attachment(RIGHT), Attachment::Table(_)));
        assert_eq!(bench.read(RIGHT, 0x5000), None);
    }
}

/// Driver (5.13.6.3, text): "When the VIRTIO_IOMMU_F_BYPASS_CONFIG is negotiated, the driver can set the
/// VIRTIO_IOMMU_ATTACH_F_BYPASS flag to create a bypass domain."
/// Answer: Without the feature the flag is INVAL.
#[test]
fn the_bypass_flag_without_the_feature_is_inval() {
    let mut bench = Bench::with(Flavour::Iommufd, Settings { boot_bypass: false, ..settings() });
    bench.device.set_driver_features(bench.device.features() & !F_BYPASS_CONFIG);
    assert_eq!(bench.status(&attach(1, LONE, BYPASS)), INVAL);
    assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
}
