// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All requests.

use virtio_iommu::device::Settings;
use virtio_iommu::host::fake::{Attachment, Flavour};

use crate::bench::{
    BYPASS, BYPASS_OFFSET, Bench, FAULT, FLAVOURS, INVAL, LEFT, LONE, NOBODY, NOENT, OK, PAGE, PROBE_SIZE, RAM_SIZE,
    RANGE, READ, RIGHT, Reply, UNWRITTEN, settings,
};
use crate::requests::{attach, detach, map, probe, unmap};

const F_VERSION_1: u64 = 1 << 32;

/// Requests of every kind that succeed when they are sent in this order.
fn every_kind() -> [Vec<u8>; 5] {
    [attach(1, LONE, 0), map(1, 0x5000, PAGE, 0x1000, READ), probe(LONE), unmap(1, 0x5000, PAGE), detach(1, LONE)]
}

/// Statement 8 (5.13.6.2, SHOULD): "The device SHOULD set status to VIRTIO_IOMMU_S_OK if a request succeeds."
/// Answer: OK, once the host has followed.
#[test]
fn success_should_be_ok() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert!(matches!(bench.attachment(LONE), Attachment::Table(_)));
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        assert_eq!(bench.read(LONE, 0x5fff), Some(0x1fff));
        assert_eq!(bench.inquire(&probe(LONE), PROBE_SIZE + 4).bytes[PROBE_SIZE..], [OK, 0, 0, 0]);
        assert_eq!(bench.status(&unmap(1, 0x5000, PAGE)), OK);
        assert_eq!(bench.read(LONE, 0x5fff), None);
        assert_eq!(bench.status(&detach(1, LONE)), OK);
        assert!(bench.reaches_memory_as_it_is(LONE));
    }
}

/// Statement 9 (5.13.6.2, SHOULD NOT): "If a request type is not recognized, the device SHOULD NOT write the buffer and SHOULD set
/// the used length to zero."
/// Answer: Returned unwritten, with used length 0.
/// Otherwise: QEMU, which writes UNSUPP.
#[test]
fn an_unknown_type_should_not_be_written() {
    let mut bench = Bench::new(Flavour::Iommufd);
    for kind in (0..=u8::MAX).filter(|kind| !(1..=5).contains(kind)) {
        let mut request = probe(LONE);
        request[0] = kind;
        for writable in [4, PROBE_SIZE + 4] {
            let reply = bench.inquire(&request, writable);
            assert_eq!(reply, Reply { used: 0, bytes: vec![UNWRITTEN; writable] }, "type {kind}");
        }
    }
}

/// Statement 10 (5.13.6.2, MUST): "The device MUST ignore field reserved of struct virtio_iommu_req_head"
/// Driver (5.13.6.1, SHOULD): "The driver SHOULD set field reserved of struct virtio_iommu_req_head to zero"
/// Answer: Not looked at.
#[test]
fn reserved_of_the_head_must_be_ignored() {
    let mut bench = Bench::new(Flavour::Iommufd);
    for mut request in every_kind() {
        request[1..4].copy_from_slice(&[1, 0x80, 0xff]);
        let reply = bench.send(&request, PROBE_SIZE + 4);
        assert_eq!((reply.used, &reply.bytes[PROBE_SIZE..]), (PROBE_SIZE + 4, &[OK, 0, 0, 0][..]), "{request:x?}");
    }
    assert!(bench.reaches_memory_as_it_is(LONE));
}

/// Statement 11 (5.13.6.2, SHOULD): "SHOULD set field reserved of struct virtio_iommu_req_tail to zero."
/// Answer: Zero, whatever the status.
#[test]
fn reserved_of_the_tail_should_be_zero() {
    let mut bench = Bench::new(Flavour::Iommufd);
    let mut tail = |request: &[u8]| bench.send(request, PROBE_SIZE + 4).bytes[PROBE_SIZE..].to_vec();
    for request in every_kind() {
        assert_eq!(tail(&request), [OK, 0, 0, 0], "{request:x?}");
    }
    let refused = [
        (attach(1, NOBODY, 0), NOENT),
        (detach(1, NOBODY), NOENT),
        (map(1, 0, PAGE, 0, READ), NOENT),
        (unmap(1, 0, PAGE), NOENT),
        (probe(NOBODY), NOENT),
    ];
    for (request, status) in refused {
        assert_eq!(tail(&request), [status, 0, 0, 0], "{request:x?}");
    }
}

/// Driver (5.13.6.1, SHOULD): "When a device uses a buffer without having written to it (i.e. used length is zero), the driver
/// SHOULD interpret it as a request failure."
/// Answer: Every status is written, at the end of the device-writable part, and the used length is the whole of that: Linux takes 0
/// for success.
/// Otherwise: cloud-hypervisor, which has used length 0 for every refusal.
#[test]
fn every_status_is_a_full_write() {
    let mut bench = Bench::new(Flavour::Iommufd);
    assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
    let mut unknown_flag = attach(1, LONE, 0);
    unknown_flag[12] = 2;
    let cases = [
        (attach(1, NOBODY, 0), NOENT),
        (unknown_flag, INVAL),
        (detach(7, LONE), INVAL),
        (map(1, 0x800, PAGE, 0, READ), RANGE),
        (map(1, 0, PAGE, RAM_SIZE, READ), FAULT),
        (unmap(7, 0, PAGE), NOENT),
        (probe(NOBODY), NOENT),
    ];
    for (request, status) in cases {
        for writable in [PROBE_SIZE + 4, PROBE_SIZE + 5, 4096] {
            let mut expected = vec![0; writable];
            expected[writable - 4] = status;
            let reply = bench.inquire(&request, writable);
            assert_eq!(reply, Reply { used: writable, bytes: expected }, "{request:x?}");
        }
    }
}

/// Statement (5.13.6, text): "When the device fails to parse a request, for instance if a request is too small for its type and the
/// device cannot find the tail, then it is unable to set status. In that case, it returns the buffers without writing to them."
/// Answer: Without room for a status: unwritten, used length 0, and nothing is done. A request that is too short but leaves room:
/// INVAL.
/// Otherwise: QEMU, which stops the device.
#[test]
fn a_buffer_without_room_for_a_status_is_returned_unwritten() {
    let mut bench = Bench::new(Flavour::Iommufd);
    for request in every_kind() {
        for writable in 0..4 {
            let reply = bench.inquire(&request, writable);
            assert_eq!(reply, Reply { used: 0, bytes: vec![UNWRITTEN; writable] }, "{request:x?}");
        }
        for length in 0..4 {
            let reply = bench.inquire(&request[..length], 4);
            assert_eq!(reply, Reply { used: 0, bytes: vec![UNWRITTEN; 4] }, "there is no whole head");
        }
        for length in 4..request.len() {
            assert_eq!(bench.status(&request[..length]), INVAL, "{length} bytes of {request:x?}");
        }
    }
}

/// Statement 12 (5.13.6.2, SHOULD NOT): "The device SHOULD NOT let unattached endpoints that are not in bypass mode access the
/// guest-physical address space."
/// Answer: Their group is blocked: from SET_FEATURES on, after DETACH, after a reset. A group that has an attached member reaches
/// what that does; see DETACH.
/// Otherwise: crosvm, as its comments say, for groups.
#[test]
fn an_unattached_endpoint_without_bypass_should_reach_nothing() {
    for flavour in FLAVOURS {
        let mut bench = Bench::with(flavour, Settings { boot_bypass: false, ..settings() });
        let reaches_nothing = |bench: &Bench, endpoint| {
            bench.read(endpoint, 0).or(bench.write(endpoint, 0)).or(bench.read(endpoint, 0x5000)).is_none()
        };
        assert!([LONE, LEFT, RIGHT].iter().all(|id| reaches_nothing(&bench, *id)), "from the features on");
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        assert!([LEFT, RIGHT].iter().all(|id| reaches_nothing(&bench, *id)));
        assert_eq!(bench.status(&detach(1, LONE)), OK);
        assert!(reaches_nothing(&bench, LONE));
        assert_eq!(bench.status(&attach(1, LONE, BYPASS)), OK);
        bench.device.reset();
        assert!(reaches_nothing(&bench, LONE));
    }
}

/// Statement (5.13.6, text): "config field bypass is 1 and the endpoint is not attached to a domain. This applies even if the driver
/// does not accept the VIRTIO_IOMMU_F_BYPASS_CONFIG feature and the device initializes field bypass to 1."
/// Answer: It applies.
#[test]
fn bypass_applies_even_if_the_feature_is_not_accepted() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        bench.device.set_driver_features(F_VERSION_1);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.read(LONE, 0), None);
        assert_eq!(bench.status(&detach(1, LONE)), OK);
        assert!(bench.reaches_memory_as_it_is(LONE));
    }
}

/// Statement (5.13.6, text): "All accesses from an endpoint in bypass mode are allowed and translated by the IOMMU using the identity
/// function."
/// Answer: Each address of guest memory means itself, in a bypass domain and in none; there is nothing else to reach.
/// Otherwise: cloud-hypervisor, which has no identity mapping for assigned devices.
#[test]
fn bypass_is_the_identity_function() {
    for flavour in FLAVOURS {
        let mut bench = Bench::new(flavour);
        assert_eq!(bench.status(&attach(1, LONE, BYPASS)), OK);
        assert!(bench.reaches_memory_as_it_is(LONE));
        bench.device.write_config(BYPASS_OFFSET, &[0]);
        assert!(bench.reaches_memory_as_it_is(LONE), "the domain's bypass is not the configuration's");
        bench.device.write_config(BYPASS_OFFSET, &[1]);
        assert_eq!(bench.status(&detach(1, LONE)), OK);
        assert!(bench.reaches_memory_as_it_is(LONE));
    }
}

/// Driver (5.13.6.1, MUST NOT): "If the VIRTIO_IOMMU_F_DOMAIN_RANGE feature is negotiated, the driver MUST NOT send requests with
/// domain less than domain_range.start or greater than domain_range.end."
/// Answer: INVAL.
#[test]
fn a_domain_outside_of_domain_range_is_inval() {
    let mut bench = Bench::with(Flavour::Iommufd, Settings { domain_range: 2..=3, ..settings() });
    assert_eq!(bench.device.config()[24..32], [2, 0, 0, 0, 3, 0, 0, 0]);
    for domain in [0, 1, 4, u32::MAX] {
        assert_eq!(bench.status(&attach(domain, LONE, 0)), INVAL);
        assert_eq!(bench.status(&attach(domain, LONE, BYPASS)), INVAL);
        assert_eq!(bench.status(&detach(domain, LONE)), INVAL);
        assert_eq!(bench.status(&map(domain, 0, PAGE, 0, READ)), INVAL);
        assert_eq!(bench.status(&unmap(domain, 0, PAGE)), INVAL);
    }
    assert_eq!(bench.status(&attach(2, LONE, 0)), OK);
    assert_eq!(bench.status(&attach(3, LONE, 0)), OK);
}
