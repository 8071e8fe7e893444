// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! DETACH requests.

use virtio_iommu::device::Settings;
use virtio_iommu::host::fake::{Attachment, Flavour};

use crate::bench::{
    BYPASS, Bench, FLAVOURS, INVAL, LEFT, LONE, NOBODY, NOENT, OK, PAGE, RAM_SIZE, READ, RIGHT, WRITE, settings,
};
use crate::requests::{attach, detach, map};

/// Statement 21 (5.13.6.4.2, MUST): "The device MUST ignore reserved."
/// Driver (5.13.6.4.1, SHOULD): "The driver SHOULD set reserved to zero."
/// Answer: Not looked at.
/// Otherwise: kvmtool.
#[test]
fn reserved_must_be_ignored() {
    let mut bench = Bench::new(Flavour::Iommufd);
    for at in 12..20 {
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        let mut request = detach(1, LONE);
        request[at] = 0xff;
        assert_eq!(bench.status(&request), OK, "byte {at}");
        assert!(bench.reaches_memory_as_it_is(LONE));
    }
}

/// Statement 22 (5.13.6.4.2, MUST): "If the endpoint identified by endpoint doesn't exist, then the device MUST reject the request
/// and set status to VIRTIO_IOMMU_S_NOENT."
/// Answer: NOENT.
/// Otherwise: cloud-hypervisor.
#[test]
fn an_unknown_endpoint_must_be_noent() {
    let mut bench = Bench::new(Flavour::Iommufd);
    assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
    for endpoint in [0, NOBODY, LONE | 1 << 16, u32::MAX] {
        assert_eq!(bench.status(&detach(1, endpoint)), NOENT);
        assert_eq!(bench.status(&detach(7, endpoint)), NOENT);
    }
}

/// Statement 23 (5.13.6.4.2, MAY): "If the domain identified by domain doesn't exist, or if the endpoint identified by endpoint isn't
/// attached to this domain, then the device MAY set the request status to VIRTIO_IOMMU_S_INVAL."
/// Answer: INVAL, and the endpoint stays where it is.
/// Otherwise: cloud-hypervisor forgot the endpoint and left its mappings in the hardware; crosvm detaches it from whatever it is in.
#[test]
fn detach_from_another_domain_is_inval() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        assert_eq!(bench.status(&detach(1, LONE)), INVAL, "it is in none");
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        assert_eq!(bench.status(&attach(2, LEFT, 0)), OK);
        assert_eq!(bench.status(&detach(2, LONE)), INVAL);
        assert_eq!(bench.status(&detach(3, LONE)), INVAL);
        assert_eq!(bench.read(LONE, 0x5000), Some(0x1000));
        assert_eq!(bench.status(&detach(1, LONE)), OK);
    }
}

/// Statement 24 (5.13.6.4.2, MUST): "The device MUST ensure that after being detached from a domain, the endpoint cannot access any
/// mapping from that domain."
/// Answer: The group leaves the domain's table before the answer, for bypass or for nothing. Where another member of its host group
/// stays attached, the host cannot tell the two apart: the endpoint reaches what that one does, until it too is detached.
/// Otherwise: cloud-hypervisor, for a wrong domain ID.
#[test]
fn a_detached_endpoint_must_reach_no_mapping_of_the_domain() {
    for flavour in FLAVOURS {
        for boot_bypass in [true, false] {
            let mut bench = Bench::with(flavour, Settings { boot_bypass, ..settings() });
            // Behind the end of guest memory bypass does not reach.
            let iova = RAM_SIZE + 0x5000;
            for endpoint in [LONE, LEFT] {
                assert_eq!(bench.status(&attach(1, endpoint, 0)), OK);
            }
            assert_eq!(bench.status(&map(1, iova, PAGE, 0x1000, READ | WRITE)), OK);
            assert_eq!(bench.status(&detach(1, LONE)), OK);
            assert_eq!((bench.read(LONE, iova), bench.write(LONE, iova)), (None, None));
            assert_eq!(bench.reaches_memory_as_it_is(LONE), boot_bypass);
            assert_eq!(bench.read(LEFT, iova), Some(0x1000));
            assert_eq!(bench.status(&map(1, iova + PAGE, PAGE, 0x2000, READ)), OK);
            assert_eq!((bench.read(LONE, iova + PAGE), bench.read(LEFT, iova + PAGE)), (None, Some(0x2000)));
        }
    }
}

/// Statement (5.13.6.4, text): "After all endpoints have been successfully detached from a domain, it ceases to exist and its ID can
/// be reused by the driver for another domain."
/// Answer: It does, with its mappings and the host's tables for it; a domain of the same ID starts empty, of either kind.
#[test]
fn a_domain_ceases_to_exist_with_its_last_endpoint() {
    for flavour in FLAVOURS {
        let mut bench = Bench::with(flavour, Settings { boot_bypass: false, ..settings() });
        for endpoint in [LONE, LEFT] {
            assert_eq!(bench.status(&attach(1, endpoint, 0)), OK);
        }
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        assert_eq!(bench.status(&detach(1, LONE)), OK);
        assert_eq!(bench.status(&map(1, 0x6000, PAGE, 0x1000, READ)), OK, "one is left");
        assert_eq!(bench.status(&detach(1, LEFT)), OK);
        assert_eq!(bench.status(&map(1, 0x7000, PAGE, 0x1000, READ)), NOENT);
        assert_eq!(bench.host.table_count(), 0);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.read(LONE, 0x5000), None);
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x2000, READ)), OK);
        assert_eq!(bench.status(&detach(1, LONE)), OK);
        assert_eq!(bench.status(&attach(1, LONE, BYPASS)), OK);
    }
}

/// Statement (5.13.6.4, text): "Detach an endpoint from a domain. When this request completes, the endpoint cannot access any mapping
/// from that domain anymore. However the endpoint may then be in bypass mode and access the guest-physical address space."
/// Answer: Of several in a domain, one can be detached; the others stay.
/// Otherwise: crosvm, which answers UNSUPP.
#[test]
fn one_of_several_endpoints_can_be_detached() {
    for flavour in FLAVOURS {
        let mut bench = Bench::with(flavour, Settings { boot_bypass: false, ..settings() });
        for endpoint in [LONE, LEFT, RIGHT] {
            assert_eq!(bench.status(&attach(1, endpoint, 0)), OK);
        }
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        assert_eq!(bench.status(&detach(1, LONE)), OK);
        assert_eq!(bench.attachment(LONE), Attachment::Blocked);
        assert_eq!(bench.status(&detach(1, LEFT)), OK);
        assert_eq!(bench.status(&detach(1, LEFT)), INVAL);
        assert_eq!(bench.read(RIGHT, 0x5000), Some(0x1000));
        assert_eq!(bench.status(&detach(1, RIGHT)), OK);
        assert_eq!(bench.attachment(RIGHT), Attachment::Blocked);
    }
}
