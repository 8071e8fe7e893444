// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fields with values that no driver should send.

use virtio_iommu::id::EndpointId;

use crate::common::{attach, detach, map, probe, unmap};
use crate::machine::{INVAL, LEFT, LONE, Machine, OK, PROBE_SIZE, READ, WRITE};

/// Requests that are answered with OK, one after the other, with the size of what is written.
fn session() -> [(Vec<u8>, u32); 5] {
    [
        (probe(LONE.0), PROBE_SIZE + 4),
        (attach(1, LONE.0, 0), 4),
        (map(1, 0x5000, 0x2000, 0x8000, READ | WRITE), 4),
        (unmap(1, 0x4000, 0x1_0000), 4),
        (detach(1, LONE.0), 4),
    ]
}

/// Takes the session with some bytes changed, beside one without: answers, books and host must be the same.
fn check_ignored(change: impl Fn(&mut [u8])) {
    let (mut plain, mut changed) = (Machine::new(), Machine::new());
    for (bytes, writable) in session() {
        let mut other = bytes.clone();
        change(&mut other);
        let reply = plain.send(&bytes, writable);
        assert_eq!((reply.status, reply.used), (OK, writable));
        assert_eq!(changed.send(&other, writable), reply, "type {}", bytes[0]);
        assert_eq!(changed.view(), plain.view(), "type {}", bytes[0]);
    }
}

#[test]
fn an_unknown_type_comes_back_untouched() {
    let mut machine = Machine::new();
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    let (before, calls) = (machine.view(), machine.host.calls());
    let mut count = 0;
    for kind in (0..=u8::MAX).filter(|kind| !(1..=5).contains(kind)) {
        for mut bytes in [attach(2, LONE.0, 0), probe(LONE.0)] {
            bytes[0] = kind;
            for writable in [4, PROBE_SIZE + 4] {
                assert_eq!(machine.send(&bytes, writable).used, 0, "type {kind}");
                count += 1;
            }
        }
    }
    assert_eq!((machine.view(), machine.host.calls()), (before, calls));
    assert_eq!(machine.device.statistics().unreadable, count);
}

#[test]
fn head_reserved_must_be_ignored_by_every_request() {
    for at in 1..4 {
        check_ignored(|bytes| bytes[at] = 0xff);
    }
}

#[test]
fn detach_and_probe_reserved_must_be_ignored() {
    check_ignored(|bytes| match bytes[0] {
        2 => bytes[12..].fill(0xff),
        5 => bytes[8..].fill(0xff),
        _ => (),
    });
}

#[test]
fn attach_reserved_not_zero_must_be_inval() {
    let mut machine = Machine::new();
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    for bit in 0..32 {
        for endpoint in [LONE, LEFT] {
            let mut bytes = attach(2, endpoint.0, 0);
            bytes[16..20].copy_from_slice(&(1u32 << bit).to_le_bytes());
            assert_eq!(machine.request(&bytes), INVAL, "bit {bit}");
        }
    }
}

#[test]
fn attach_unknown_flag_must_be_inval() {
    let mut machine = Machine::new();
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    for bit in 1..32 {
        for (endpoint, bypass) in [(LONE, 0), (LEFT, 0), (LEFT, 1), (EndpointId(99), 0)] {
            assert_eq!(machine.request(&attach(2, endpoint.0, 1 << bit | bypass)), INVAL, "bit {bit}");
        }
    }
}

#[test]
fn unmap_reserved_not_zero_is_inval_and_removes_nothing() {
    let mut machine = Machine::new();
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    assert_eq!(machine.request(&map(1, 0x5000, 0x1000, 0x8000, READ)), OK);
    for bit in 0..32 {
        let mut bytes = unmap(1, 0x5000, 0x1000);
        bytes[24..28].copy_from_slice(&(1u32 << bit).to_le_bytes());
        assert_eq!(machine.request(&bytes), INVAL, "bit {bit}");
    }
    assert_eq!(machine.reads(LONE, 0x5000), Some(0x8000));
}

#[test]
fn map_unknown_flag_must_be_inval() {
    let mut machine = Machine::new();
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    let calls = machine.host.calls();
    // Bit 2 is MMIO, which is not offered.
    for bit in 2..32 {
        for known in 0..4 {
            let bytes = map(1, 0x5000, 0x1000, 0x8000, 1 << bit | known);
            assert_eq!(machine.request(&bytes), INVAL, "bit {bit}");
        }
    }
    assert_eq!(machine.host.calls(), calls, "the host is not asked");
}
