// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! PROBE requests.

use virtio_iommu::device::Settings;
use virtio_iommu::host::fake::Flavour;

use crate::bench::{Bench, DOORBELL, HOLE, INVAL, LEFT, LONE, NOBODY, NOENT, OK, PROBE_SIZE, Reply, settings};
use crate::requests::{attach, probe};

const F_PROBE: u64 = 1 << 4;

/// A property, as the driver reads it.
struct Property {
    /// Where it starts.
    at: usize,
    kind: u16,
    reserved: u16,
    length: usize,
}

/// Reads a list as the specification tells drivers to: up to an empty property or the end.
fn properties(list: &[u8]) -> Vec<Property> {
    let (mut properties, mut at) = (Vec::new(), 0);
    while at + 4 <= list.len() {
        let word = |at: usize| u16::from_le_bytes([list[at], list[at + 1]]);
        let property = Property { at, kind: word(at) & 0xfff, reserved: word(at) >> 12, length: word(at + 2).into() };
        if property.kind == 0 {
            break;
        }
        at += 4 + property.length;
        properties.push(property);
    }
    properties
}

/// What PROBE says of an endpoint: the list of properties.
fn list_of(endpoint: u32) -> Vec<u8> {
    let mut reply = Bench::new(Flavour::Iommufd).inquire(&probe(endpoint), PROBE_SIZE + 4);
    assert_eq!((reply.used, &reply.bytes[PROBE_SIZE..]), (PROBE_SIZE + 4, &[OK, 0, 0, 0][..]));
    reply.bytes.truncate(PROBE_SIZE);
    reply.bytes
}

/// Statement 36 (5.13.6.7.2, MUST): "The device MUST ignore field reserved of a PROBE request."
/// Driver (5.13.6.7.1, SHOULD): "The driver SHOULD set field reserved of the PROBE request to zero."
/// Answer: Not looked at.
#[test]
fn reserved_must_be_ignored() {
    let mut bench = Bench::new(Flavour::Iommufd);
    let expected = bench.inquire(&probe(LONE), PROBE_SIZE + 4);
    assert_eq!(expected.bytes[PROBE_SIZE], OK);
    for at in 8..72 {
        let mut request = probe(LONE);
        request[at] = 0xff;
        assert_eq!(bench.inquire(&request, PROBE_SIZE + 4), expected, "byte {at}");
    }
}

/// Statement 37 (5.13.6.7.2, SHOULD): "If the endpoint identified by endpoint doesn't exist, then the device SHOULD reject the
/// request and set status to VIRTIO_IOMMU_S_NOENT."
/// Answer: NOENT, without a property.
/// Otherwise: cloud-hypervisor, which does not look.
#[test]
fn an_unknown_endpoint_should_be_noent() {
    let mut bench = Bench::new(Flavour::Iommufd);
    let mut expected = vec![0; PROBE_SIZE + 4];
    expected[PROBE_SIZE] = NOENT;
    for endpoint in [0, NOBODY, LONE | 1 << 16, u32::MAX] {
        let reply = bench.inquire(&probe(endpoint), PROBE_SIZE + 4);
        assert_eq!(reply, Reply { used: PROBE_SIZE + 4, bytes: expected.clone() });
    }
}

/// Statement 38 (5.13.6.7.2, SHOULD NOT): "If the device does not offer the VIRTIO_IOMMU_F_PROBE feature, and if the driver sends a
/// VIRTIO_IOMMU_T_PROBE request, then the device SHOULD NOT write the buffer and SHOULD set the used length to zero."
/// Answer: The feature is always offered, so PROBE is always answered.
#[test]
fn probe_is_offered_and_answered() {
    for access_platform in [false, true] {
        let mut bench = Bench::with(Flavour::Iommufd, Settings { access_platform, ..settings() });
        let offered = bench.device.features();
        assert_eq!(offered & F_PROBE, F_PROBE);
        for accepted in [offered, offered & !F_PROBE] {
            bench.device.set_driver_features(accepted);
            let reply = bench.inquire(&probe(LONE), PROBE_SIZE + 4);
            assert_eq!((reply.used, reply.bytes[PROBE_SIZE]), (PROBE_SIZE + 4, OK));
        }
    }
}

/// Statement 39 (5.13.6.7.2, SHOULD): "The device SHOULD set field reserved of a property to zero."
/// Answer: Zero.
#[test]
fn reserved_of_a_property_should_be_zero() {
    for (endpoint, count) in [(LONE, 2), (LEFT, 1)] {
        let list = list_of(endpoint);
        let reserved: Vec<u16> = properties(&list).iter().map(|property| property.reserved).collect();
        assert_eq!(reserved, vec![0; count]);
    }
}

/// Statement 40 (5.13.6.7.2, MUST): "The device MUST write the size of a property without the struct virtio_iommu_probe_property
/// header, in bytes, into length."
/// Answer: 20 for a RESV_MEM property, which has 24 bytes.
#[test]
fn the_length_must_be_without_the_header() {
    let list = list_of(LONE);
    for property in properties(&list) {
        assert_eq!((property.kind, property.length), (1, 20));
    }
    assert_eq!(list[..4], [1, 0, 20, 0]);
}

/// Statement 41 (5.13.6.7.2, MUST): "When two properties follow each other, the device MUST put the second property exactly (length +
/// 4) bytes after the beginning of the first one."
/// Answer: At 0 and at 24.
#[test]
fn the_second_property_must_follow_the_first_exactly() {
    let list = list_of(LONE);
    let starts: Vec<usize> = properties(&list).iter().map(|property| property.at).collect();
    assert_eq!(starts, [0, 24]);
    let addresses = |at: usize| (list[at + 8..at + 16].to_vec(), list[at + 16..at + 24].to_vec());
    for (at, (start, last)) in [(0, DOORBELL), (24, HOLE)] {
        assert_eq!(addresses(at), (start.to_le_bytes().to_vec(), last.to_le_bytes().to_vec()));
    }
}

/// Statement 42 (5.13.6.7.2, SHOULD NOT): "If the properties list is smaller than probe_size, the device SHOULD NOT write any
/// property. It SHOULD reject the request and set status to VIRTIO_IOMMU_S_INVAL."
/// Answer: INVAL, and zeroes, even if the endpoint's properties would fit.
/// Otherwise: cloud-hypervisor (used length 0) and QEMU (DEVERR, at the start of the buffer).
#[test]
fn a_list_smaller_than_probe_size_should_be_inval() {
    let mut bench = Bench::new(Flavour::Iommufd);
    for writable in 4..PROBE_SIZE + 4 {
        let mut expected = vec![0; writable];
        expected[writable - 4] = INVAL;
        assert_eq!(bench.inquire(&probe(LONE), writable), Reply { used: writable, bytes: expected });
    }
}

/// Statement 43 (5.13.6.7.2, SHOULD): "If the device doesn't fill all probe_size bytes with properties, it SHOULD fill the remaining
/// bytes of properties with zeroes."
/// Answer: Zeroes.
#[test]
fn the_rest_of_the_list_should_be_zeroes() {
    for (endpoint, filled) in [(LONE, 48), (LEFT, 24)] {
        let list = list_of(endpoint);
        assert_eq!(list[filled..], vec![0; PROBE_SIZE - filled]);
        assert_ne!(list[filled - 24..filled], [0; 24]);
    }
}

/// Driver (5.13.6.7.1, MUST): "The size of properties MUST be probe_size bytes."
/// Answer: A larger buffer has the properties at its start, the status at its end, and zeroes between; a smaller one: statement 42.
#[test]
fn a_list_larger_than_probe_size_has_the_status_at_its_end() {
    let mut bench = Bench::new(Flavour::Iommufd);
    assert_eq!(bench.device.config()[32..36], [64, 0, 0, 0]);
    for writable in [PROBE_SIZE + 5, PROBE_SIZE + 28, 4096] {
        let mut expected = list_of(LONE);
        expected.resize(writable, 0);
        expected[writable - 4] = OK;
        assert_eq!(bench.inquire(&probe(LONE), writable), Reply { used: writable, bytes: expected });
    }
}

/// Driver (5.13.6.7, text): "This probe is performed before attaching the endpoint to a domain."
/// Answer: It may be sent at any time, and says the same.
#[test]
fn probe_says_the_same_of_an_attached_endpoint() {
    let mut bench = Bench::new(Flavour::Iommufd);
    let before = bench.inquire(&probe(LONE), PROBE_SIZE + 4);
    assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
    assert_eq!(bench.status(&attach(1, LEFT, 0)), OK);
    assert_eq!(bench.inquire(&probe(LONE), PROBE_SIZE + 4), before);
}
