// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hosts that do not follow.

use super::*;

const KINDS: [(HostErrorKind, u8); 6] = [
    (HostErrorKind::Unmappable, INVAL),
    (HostErrorKind::AlreadyMapped, INVAL),
    (HostErrorKind::NoMemory, NOMEM),
    (HostErrorKind::BadAddress, FAULT),
    (HostErrorKind::Gone, DEVERR),
    (HostErrorKind::Other, DEVERR),
];

/// Two groups in one domain, with a table each.
fn two_tables() -> Machine {
    let mut machine = Machine::new(Flavour::Type1);
    machine.attach(1, LONE);
    machine.attach(1, LEFT);
    machine.map(1, "1000-1fff", 0, READ);
    machine
}

#[test]
fn a_map_that_the_host_refuses_is_taken_back_everywhere_and_reported() {
    for k in 0..2 {
        for (kind, status) in KINDS {
            let mut machine = two_tables();
            machine.host.fail_after(k, Failure::Error(kind));
            assert_eq!(machine.map(1, "5000-5fff", 0x1000, WRITE), status, "{kind:?} at {k}");
            machine.check_invariants();
            let fault = machine.device.take_fault().unwrap();
            assert_eq!((fault.reason, fault.address), (FaultReason::Mapping, Some(0x5000)));
            assert_eq!((fault.endpoint, fault.access), (LONE, Access::WRITE));
            assert!(machine.device.next_notice().unwrap().to_string().contains("0x5000-0x5fff"));
            assert_eq!(machine.map(1, "5000-5fff", 0x1000, WRITE), OK, "it can be tried again");
        }
    }
}

#[test]
fn notices_are_kept_up_to_a_limit_and_counted_beyond() {
    let mut machine = two_tables();
    for _ in 0..34 {
        machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
        machine.map(1, "5000-5fff", 0x1000, WRITE);
    }
    assert_eq!(machine.device.statistics().notices_dropped, 2);
    assert_eq!(std::iter::from_fn(|| machine.device.next_notice()).count(), 32);
}

#[test]
fn a_map_that_cannot_be_taken_back_is_rebuilt_away() {
    let mut machine = two_tables();
    machine.host.fail_after(1, Failure::Error(HostErrorKind::NoMemory));
    machine.host.fail_after(2, Failure::Error(HostErrorKind::Other));
    assert_eq!(machine.send(&map_bytes(1, range("5000-5fff"), 0, READ), 4).status, NOMEM);
    machine.check_invariants();
    assert_eq!(machine.reads(LONE, 0x5000), None);
    assert_eq!(machine.reads(LONE, 0x1000), Some(0));
}

#[test]
fn an_unmap_that_fails_is_rebuilt_without_the_range() {
    for failure in [Failure::Error(HostErrorKind::Other), Failure::Short] {
        for k in 0..2 {
            let mut machine = two_tables();
            machine.map(1, "5000-5fff", 0x1000, READ);
            machine.host.fail_after(k, failure);
            assert_eq!(machine.send(&unmap_bytes(1, range("5000-5fff")), 4).status, OK, "{failure:?} at {k}");
            for endpoint in [LONE, LEFT, RIGHT] {
                assert_eq!(machine.reads(endpoint, 0x5000), None);
                assert_eq!(machine.reads(endpoint, 0x1000), Some(0));
            }
            machine.check_invariants();
            let notice = machine.device.next_notice().unwrap();
            assert!(matches!(notice, Notice::OutOfStep { rebuilt: true, .. }), "{notice}");
            assert_eq!(machine.device.take_fault().unwrap().reason, FaultReason::Unknown);
        }
    }
}

#[test]
fn a_domain_that_cannot_be_rebuilt_stays_blocked_until_it_is_emptied() {
    let mut machine = two_tables();
    machine.map(1, "5000-5fff", 0x1000, READ);
    for k in 0..20 {
        machine.host.fail_after(k, Failure::Error(HostErrorKind::Other));
    }
    assert_eq!(machine.send(&unmap_bytes(1, range("5000-5fff")), 4).status, DEVERR);
    machine.host.stop_failing();
    assert!(machine.is_blocked(LONE) && machine.is_blocked(LEFT));
    assert_eq!(machine.host.table_count(), 0);
    assert_eq!(machine.map(1, "7000-7fff", 0, READ), DEVERR);
    assert_eq!(machine.attach(1, LEFT), DEVERR);
    assert_eq!(machine.send(&unmap_bytes(1, range("1000-1fff")), 4).status, OK);
    assert!(!machine.is_blocked(LONE) && !machine.is_blocked(LEFT), "it is empty");
    assert_eq!(machine.map(1, "7000-7fff", 0x2000, READ), OK);
    assert_eq!(machine.reads(LEFT, 0x7000), Some(0x2000));
    machine.check_invariants();
}

#[test]
fn a_domain_that_lost_its_last_mapping_with_the_host_starts_afresh() {
    for again in [map_bytes(1, range("7000-7fff"), 0x2000, READ), attach_bytes(1, RIGHT, 0)] {
        let mut machine = two_tables();
        for k in 0..20 {
            machine.host.fail_after(k, Failure::Error(HostErrorKind::Other));
        }
        assert_eq!(machine.send(&unmap_bytes(1, range("1000-1fff")), 4).status, DEVERR);
        assert!(machine.is_blocked(LONE) && machine.is_blocked(LEFT));
        machine.host.stop_failing();
        assert_eq!(machine.send(&again, 4).status, OK);
        assert!(!machine.is_blocked(LONE) && !machine.is_blocked(LEFT));
        machine.check_invariants();
    }
}

#[test]
fn a_domain_that_cannot_be_rebuilt_lets_its_endpoints_leave() {
    let mut machine = two_tables();
    for k in 0..20 {
        machine.host.fail_after(k, Failure::Error(HostErrorKind::Other));
    }
    machine.send(&unmap_bytes(1, range("1000-1fff")), 4);
    machine.host.stop_failing();
    assert_eq!(machine.attach(2, LONE), OK);
    assert_eq!(machine.map(2, "1000-1fff", 0x3000, READ), OK);
    assert_eq!(machine.reads(LONE, 0x1000), Some(0x3000));
}

/// Runs a sequence with the k-th host call failing, for every k, and checks after each request.
#[test]
fn whatever_call_fails_the_books_agree_with_the_host() {
    let sequence: [&dyn Fn(&mut Machine) -> u8; 12] = [
        &|machine| machine.send(&attach_bytes(1, LONE, 0), 4).status,
        &|machine| machine.send(&map_bytes(1, range("1000-1fff"), 0, READ), 4).status,
        &|machine| machine.send(&map_bytes(1, range("3000-5fff"), 0x7f_f000, WRITE), 4).status,
        &|machine| machine.send(&attach_bytes(1, LEFT, 0), 4).status,
        &|machine| machine.send(&map_bytes(1, range("8000-8fff"), 0, READ), 4).status,
        &|machine| machine.send(&attach_bytes(1, RIGHT, 0), 4).status,
        &|machine| machine.send(&unmap_bytes(1, range("0-5fff")), 4).status,
        &|machine| machine.send(&attach_bytes(2, LEFT, 0), 4).status,
        &|machine| machine.send(&attach_bytes(2, RIGHT, 0), 4).status,
        &|machine| machine.send(&attach_bytes(3, LONE, 1), 4).status,
        &|machine| machine.send(&unmap_bytes(1, IovaRange::ALL), 4).status,
        &|machine| {
            machine.device.reset();
            OK
        },
    ];
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        let mut clean = Machine::new(flavour);
        for step in sequence {
            step(&mut clean);
        }
        let calls = clean.host.calls();
        assert!(calls > 10);
        for k in 0..calls {
            for failure in [Failure::Error(HostErrorKind::Other), Failure::Short] {
                let mut machine = Machine::new(flavour);
                machine.host.fail_after(k, failure);
                for step in sequence {
                    step(&mut machine);
                    machine.check_invariants();
                }
                machine.device.shut_down();
                assert_eq!(machine.host.table_count(), 0, "{flavour:?} {failure:?} at {k}");
            }
        }
    }
}

#[test]
fn an_attach_that_the_host_refuses_leaves_what_was() {
    for k in 0..2 {
        let mut machine = Machine::new(Flavour::Iommufd);
        machine.attach(1, LONE);
        machine.map(1, "1000-1fff", 0, READ);
        machine.host.fail_after(k, Failure::Error(HostErrorKind::NoMemory));
        assert_eq!(machine.attach(2, LONE), NOMEM);
        assert_eq!(machine.reads(LONE, 0x1000), Some(0));
        assert_eq!(machine.host.table_count(), 1);
    }
}

#[test]
fn an_attach_that_costs_an_endpoint_its_table_has_one_event() {
    for k in 0..2 {
        let mut machine = Machine::new(Flavour::Type1);
        machine.attach(1, LONE);
        machine.host.fail_after(k, Failure::Error(HostErrorKind::NoMemory));
        assert_eq!(machine.send(&attach_bytes(2, LONE, 0), 4).status, NOMEM);
        let event = machine.is_blocked(LONE).then_some(LONE);
        assert_eq!(event.is_some(), k == 1, "a table that cannot be made costs nothing");
        assert_eq!(machine.device.take_fault().map(|fault| fault.endpoint), event);
        assert_eq!(machine.device.take_fault(), None);
        // The endpoint is still in its domain, and blocked: that is known.
        machine.host.fail_after(k, Failure::Error(HostErrorKind::NoMemory));
        assert_eq!(machine.send(&attach_bytes(2, LONE, 0), 4).status, NOMEM);
        assert_eq!(machine.device.take_fault().is_some(), k == 0 && machine.is_blocked(LONE));
    }
}

#[test]
fn a_group_that_is_settled_on_less_than_promised_has_one_event_for_each_member() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LEFT);
    machine.attach(1, RIGHT);
    machine.attach(2, LEFT);
    machine.host.narrow(LEFT, RangeSet::from(range("0-7fffffffff")));
    // The members agree again, on a table that has less.
    assert_eq!(machine.detach(2, LEFT), OK);
    assert!(machine.is_blocked(RIGHT));
    assert_eq!(machine.device.take_fault().map(|fault| fault.endpoint), Some(RIGHT));
    assert_eq!(machine.device.take_fault(), None);
}

#[test]
fn a_bypass_that_the_host_refuses_is_told_as_what_it_is() {
    for k in 0..2 {
        let mut machine = Machine::new(Flavour::Iommufd);
        machine.attach(1, LONE);
        machine.host.fail_after(k, Failure::Error(HostErrorKind::NoMemory));
        assert_eq!(machine.detach(1, LONE), OK);
        assert!(machine.is_blocked(LONE));
        let notice = machine.device.next_notice();
        assert!(
            matches!(notice, Some(Notice::AttachFailed { endpoint: LONE, domain: None, blocked: true, .. })),
            "{notice:?}"
        );
    }
}
