// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hosts that refuse at the worst moment, and requests that are much for a host.

use std::sync::Arc;

use virtio_iommu::access::Access;
use virtio_iommu::device::{Settings, SetupError, VirtioIommu};
use virtio_iommu::host::fake::{Attachment, Failure, FakeHost, Flavour};
use virtio_iommu::host::{HostErrorKind, HostGroup};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::IovaRange;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use crate::common::{attach, map};
use crate::machine::{
    FILL, LEFT, LONE, Machine, NEXT, NOMEM, OK, READ, REPLY, REQUEST, RIGHT, WRITABLE, WRITE, map_to, msi_view,
    settings, unmap_to, usable,
};

#[test]
fn an_attach_that_fails_at_any_mapping_leaves_nothing_of_the_domain() {
    const MAPPINGS: u64 = 8;
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        let mut failures = 0;
        for call in 0.. {
            let mut machine = Machine::with(flavour, settings());
            assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
            for page in 0..MAPPINGS {
                let bytes = map(1, 0x10_0000 + page * 0x2000, 0x1000, page * 0x1000, READ | WRITE);
                assert_eq!(machine.request(&bytes), OK);
            }
            let (before, mapped) = (machine.device.save(), machine.host.mappings(LONE));
            let tables = machine.host.table_count();
            machine.host.fail_after(call, Failure::Error(HostErrorKind::NoMemory));
            let reply = machine.send(&attach(1, LEFT.0, 0), 4);
            machine.host.stop_failing();
            if reply.status == OK {
                assert_eq!(machine.host.mappings(LEFT), mapped);
                break;
            }
            failures += 1;
            // To learn what the host can map is a call too; a host that does not tell breaks its promise.
            assert!([NOMEM, crate::machine::UNSUPP].contains(&reply.status), "{flavour:?} at {call}: {}", reply.status);
            assert_eq!(reply.used, 4);
            assert_eq!(machine.device.save().domains, before.domains, "{flavour:?} at {call}: it is attached");
            assert_eq!((machine.host.mappings(LONE), machine.host.table_count()), (mapped.clone(), tables));
            for endpoint in [LEFT, RIGHT] {
                assert!(!matches!(machine.host.attachment(endpoint), Attachment::Table(_)), "{flavour:?} at {call}");
            }
            assert_eq!(machine.request(&attach(1, LEFT.0, 0)), OK, "it can be tried again");
            assert_eq!(machine.host.mappings(LEFT), mapped);
        }
        let calls_per_mapping = u64::from(flavour == Flavour::Type1);
        assert!(failures > MAPPINGS * calls_per_mapping, "{flavour:?}: {failures} calls");
    }
}

#[test]
fn a_map_of_a_tebibyte_lets_others_in_and_is_answered_once() {
    const GIB: u64 = 1 << 30;
    const STEPS: u64 = 1024;
    let mut machine = Machine::new();
    let regions = [(GuestAddress(0), 2 * GIB), (GuestAddress(4 * GIB), STEPS * GIB)];
    machine.device.set_memory(GuestRam::in_software(&regions).unwrap());
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    machine.ring.write(&map_to(1, 16 * STEPS * GIB, 17 * STEPS * GIB - 1, 4 * GIB, READ | WRITE), REQUEST);
    machine.ring.write(&[FILL; 8], REPLY);
    machine.ring.put(0, &[Descriptor::new(REQUEST, 36, NEXT, 1), Descriptor::new(REPLY, 4, WRITABLE, 0)]);
    machine.ring.offer(0);
    for step in 1..=STEPS {
        let batch = machine.process(64).unwrap();
        assert_eq!((batch.handled, batch.more), if step < STEPS { (0, true) } else { (1, false) }, "step {step}");
        // So much is mapped, and others are served.
        assert_eq!(machine.writes(LONE, (16 * STEPS + step) * GIB - 1), Some((4 + step) * GIB - 1));
        assert_eq!(machine.writes(LONE, (16 * STEPS + step) * GIB), None);
        machine.device.write_config(36, &[(step % 2) as u8]);
        assert_eq!(machine.device.config()[36], (step % 2) as u8);
        assert_eq!(machine.is_blocked(LEFT), step % 2 == 0);
        let expected = if step < STEPS { [FILL; 8] } else { [OK, 0, 0, 0, FILL, FILL, FILL, FILL] };
        assert_eq!(machine.ring.read(REPLY, 8), expected, "step {step}");
    }
    assert_eq!((machine.ring.take(), machine.ring.take()), (Some((0, 4)), None));
    assert_eq!(machine.device.save().domains[0].mappings.len(), 1);
    let calls = machine.host.calls();
    assert_eq!(machine.send(&unmap_to(1, 0, u64::MAX), 4).status, OK);
    assert_eq!((machine.host.calls() - calls, machine.host.mappings(LONE)), (1, vec![]));
}

#[test]
fn what_may_not_be_written_is_not_written_whatever_the_flags() {
    let mut machine = Machine::new();
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    for flags in 0..4 {
        let iova = 0x1000 * u64::from(flags);
        assert_eq!(machine.request(&map(1, iova, 0x1000, 0x8000, flags)), OK);
    }
    // To a second endpoint, and to one that moves, with the permissions that they were mapped with.
    for request in [attach(1, LEFT.0, 0), attach(2, LONE.0, 0), attach(1, LONE.0, 0)] {
        assert_eq!(machine.request(&request), OK);
    }
    for endpoint in [LONE, LEFT, RIGHT] {
        for flags in 0..4u32 {
            let reaches = |access| machine.host.dma(endpoint, 0x1000 * u64::from(flags), access).is_some();
            assert_eq!(reaches(Access::READ), flags & READ != 0, "flags {flags}");
            assert_eq!(reaches(Access::WRITE), flags & WRITE != 0, "flags {flags}");
            assert_eq!(reaches(Access::READ_WRITE), flags == READ | WRITE, "flags {flags}");
        }
    }
}

#[test]
fn an_endpoint_in_two_groups_or_twice_is_no_device() {
    let host = FakeHost::new(Flavour::Iommufd);
    let group = |members: &[EndpointId]| -> Arc<dyn HostGroup> { host.group(members, usable()) };
    let new = |endpoints: &[EndpointId], groups| {
        let settings = Settings::new(IovaRange::new(0, 0xffff_ffff).unwrap(), 0x1000);
        let endpoints = endpoints.iter().map(|id| (*id, msi_view())).collect();
        VirtioIommu::new(settings, endpoints, groups).map(|_| ()).unwrap_err()
    };
    let twice = [group(&[LONE]), group(&[LONE])];
    assert_eq!(new(&[LONE], twice.to_vec()), SetupError::GroupTwice(LONE));
    assert_eq!(new(&[LONE], vec![group(&[LONE, LONE])]), SetupError::GroupTwice(LONE));
    assert_eq!(new(&[LONE, LONE], vec![group(&[LONE])]), SetupError::EndpointTwice(LONE));
    assert_eq!(host.calls(), 0, "no host was asked");
}
