// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Saved states, good and bad.

use super::*;

type Change = fn(&mut DeviceState);

/// A device whose left and right endpoints have parted, with a bypass domain, an event, and memory that has left.
fn busy() -> Machine {
    let mut machine = Machine::new(Flavour::Iommufd);
    assert_eq!(machine.attach(7, LEFT), OK);
    assert_eq!(machine.attach(7, RIGHT), OK);
    machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    assert_eq!(machine.map(7, "9000-9fff", 0, WRITE), NOMEM);
    assert_eq!(machine.map(7, "1000-2fff", 0x4000, READ), OK);
    assert_eq!(machine.map(7, "5000-5fff", RAM_SIZE / 2, READ | WRITE), OK);
    assert_eq!(machine.attach(2, RIGHT), OK);
    assert_eq!(machine.map(2, "0-fff", 0, 0), OK);
    assert_eq!(machine.attach_bypass(3, LONE), OK);
    machine.device.write_config(config::BYPASS, &[0]);
    machine.device.set_memory(GuestRam::in_software(&[(GuestAddress(0), RAM_SIZE / 2)]).unwrap());
    machine
}

/// A new device with the same memory.
fn new() -> Machine {
    let mut machine = Machine::new(Flavour::Type1);
    machine.device.set_memory(GuestRam::in_software(&[(GuestAddress(0), RAM_SIZE / 2)]).unwrap());
    machine
}

#[test]
fn a_state_that_was_saved_is_restored() {
    let mut machine = busy();
    // A frontend may set the features anew.
    machine.device.set_driver_features(0);
    let state = machine.device.save();
    assert_eq!(state.domains.iter().map(|domain| domain.id).collect::<Vec<_>>(), [2, 3, 7]);
    assert_eq!((state.faults.len(), state.bypass), (1, false));
    let mut other = new();
    other.device.restore(&state).unwrap();
    assert_eq!(other.device.save(), state);
    assert!(other.is_blocked(LEFT), "they disagree still");
    assert_eq!(other.reads(LONE, 0x1234), Some(0x1234));
    assert_eq!(other.device.take_fault(), machine.device.take_fault());
    // It goes on where the other one was.
    assert_eq!(other.attach(7, RIGHT), OK);
    assert_eq!((other.reads(LEFT, 0x1000), other.reads(LEFT, 0x5000)), (Some(0x4000), None));
    other.device.set_memory(ram());
    assert_eq!(other.reads(RIGHT, 0x5000), Some(RAM_SIZE / 2), "its memory is back");
    other.check_invariants();
}

#[test]
fn a_state_that_no_device_can_be_in_is_refused_before_any_host_is_asked() {
    let state = busy().device.save();
    let mapping = |first, last, physical| MappingState { first, last, physical, read: true, write: false };
    let refused = |first, last, status| RestoreError::Mapping { domain: DomainId(7), first, last, status };
    let cases: [(Change, RestoreError); 12] = [
        (|state| state.version = 2, RestoreError::Version(2)),
        (|state| state.driver_features |= 1 << 50, RestoreError::Features(1 << 50)),
        (|state| state.domains.swap(0, 1), RestoreError::Domain(DomainId(2))),
        (|state| state.domains[1].id = 2, RestoreError::Domain(DomainId(2))),
        (|state| state.domains[1].endpoints.clear(), RestoreError::Domain(DomainId(3))),
        (|state| state.domains[1].endpoints.push(LEFT.0), RestoreError::EndpointTwice(LEFT)),
        (
            |state| state.domains[1].endpoints.push(99),
            RestoreError::Endpoint { endpoint: EndpointId(99), domain: DomainId(3), status: Status::NoEntry },
        ),
        (|state| state.faults[0].reason = 9, RestoreError::FaultReason(9)),
        (|state| state.faults[0].endpoint = 99, RestoreError::FaultEndpoint(EndpointId(99))),
        (|state| state.domains[2].mappings[0].last = 0x3000, refused(0x1000, 0x3000, Status::Range)),
        (|state| state.domains[2].mappings[1].last = 0x4fff, refused(0x5000, 0x4fff, Status::Range)),
        (|state| state.domains[2].mappings[1].first = 0x2000, refused(0x2000, 0x5fff, Status::Invalid)),
    ];
    let mut all: Vec<(DeviceState, RestoreError)> = Vec::new();
    for (change, error) in cases {
        let mut state = state.clone();
        change(&mut state);
        all.push((state, error));
    }
    // Over the doorbell; at the end of everything; in a bypass domain; twice.
    for (domain, bad, status) in [
        (7, mapping(0xfee0_0000, 0xfee0_0fff, 0), Status::Invalid),
        (7, mapping(0, u64::MAX, 0), Status::Range),
        (7, mapping(0x8000, 0x9fff, u64::MAX - 0xfff), Status::Range),
        (7, mapping(0x5000, 0x5fff, 0), Status::Invalid),
        (3, mapping(0, 0xfff, 0), Status::Invalid),
    ] {
        let (first, last) = (bad.first, bad.last);
        let mut state = state.clone();
        let found = state.domains.iter_mut().find(|state| state.id == domain).unwrap();
        found.mappings.push(bad);
        all.push((state, RestoreError::Mapping { domain: DomainId(domain), first, last, status }));
    }
    for (state, error) in all {
        let mut other = new();
        let (before, calls) = (other.snapshot(), other.host.calls());
        assert_eq!(other.device.restore(&state), Err(error.clone()), "{error}");
        assert_eq!((other.snapshot(), other.host.calls()), (before, calls), "{error}");
        assert_eq!(other.device.restore(&busy().device.save()), Ok(()), "it is as good as new");
    }
}

/// The group of [`LONE`] has a hole at 8000-8fff; there is memory up to there.
fn with_a_hole() -> (FakeHost, VirtioIommu) {
    let host = FakeHost::new(Flavour::Iommufd);
    let hole = ReservedRegion { range: range("8000-8fff"), kind: ReservedKind::Reserved };
    let view = EndpointView::new(vec![hole, msi_view().reported()[0]]).unwrap();
    let group = host.group(&[LONE], usable().subtract(view.refused()));
    let mut device = VirtioIommu::new(settings(), vec![(LONE, view)], vec![group]).unwrap();
    device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 0x8000)]).unwrap());
    (host, device)
}

#[test]
fn an_endpoint_whose_bypass_domain_was_given_memory_that_it_cannot_reach_is_restored_blocked() {
    let (host, mut device) = with_a_hole();
    device.set_driver_features(device.features());
    let mut tail = [0xaa; 4];
    assert_eq!(device.handle(&attach_bytes(4, LONE, 1), &mut tail), 4);
    assert_eq!(tail, [OK, 0, 0, 0]);
    device.set_memory(ram());
    assert_eq!(host.attachment(LONE), Attachment::Blocked);
    let state = device.save();
    assert_eq!(state.domains[0].endpoints, [LONE.0]);
    let (host, mut device) = with_a_hole();
    device.set_memory(ram());
    device.restore(&state).unwrap();
    assert_eq!(device.save(), state);
    assert_eq!(host.attachment(LONE), Attachment::Blocked);
}

#[test]
fn memory_that_had_left_may_have_been_anywhere() {
    let mut state = busy().device.save();
    let top = u64::MAX - 0xfff;
    assert_eq!(state.domains[2].mappings[1].physical, RAM_SIZE / 2, "it has left");
    state.domains[2].mappings[1].physical = top;
    let mut other = new();
    other.device.restore(&state).unwrap();
    assert_eq!(other.device.save(), state);
    state.domains[2].mappings[1].physical = top + 0x1000 / 2;
    let error = new().device.restore(&state).unwrap_err();
    assert!(matches!(error, RestoreError::Mapping { status: Status::Range, .. }), "{error}");
}

#[test]
fn a_host_that_refuses_a_state_leaves_the_device_reset() {
    let state = busy().device.save();
    let calls = {
        let mut machine = new();
        let before = machine.host.calls();
        machine.device.restore(&state).unwrap();
        machine.host.calls() - before
    };
    assert!(calls > 2);
    for at in 0..calls {
        let mut machine = new();
        let bypass = !state.bypass;
        machine.device.write_config(36, &[u8::from(bypass)]);
        machine.host.fail_after(at, Failure::Error(HostErrorKind::NoMemory));
        if machine.device.restore(&state).is_err() {
            assert_eq!((machine.device.save().domains, machine.device.bypass()), (vec![], bypass));
            assert!([LONE, LEFT, RIGHT].iter().all(|id| machine.reads(*id, 0x1000).is_none_or(|to| to == 0x1000)));
        }
        machine.check_invariants();
    }
}

#[test]
fn a_device_in_use_takes_no_state() {
    let mut machine = busy();
    let state = machine.device.save();
    assert_eq!(machine.device.restore(&state), Err(RestoreError::InUse));
    assert_eq!(machine.device.save(), state);
    let mut ended = new();
    ended.device.shut_down();
    assert_eq!(ended.device.restore(&state), Err(RestoreError::InUse));
}

#[cfg(feature = "serde")]
#[test]
fn a_state_is_written_and_read_by_names() {
    let state = busy().device.save();
    let text = serde_json::to_string(&state).unwrap();
    assert!(text.contains(r#"{"first":4096,"last":12287,"physical":16384,"read":true,"write":false}"#), "{text}");
    assert_eq!(serde_json::from_str::<DeviceState>(&text).unwrap(), state);
    assert!(serde_json::from_str::<DeviceState>(&text.replace("\"bypass\"", "\"by\"")).is_err());
}
