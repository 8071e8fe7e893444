// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! States that a backend does not take.

use serde_json::Value;

use super::*;
use crate::common::alone::{alone, peak_memory};

/// What a backend that nobody is connected to says of a state that it does not take. Nothing is changed, and no host is asked.
fn refusal(terms: Terms, state: &[u8]) -> String {
    let (host, backend) = terms.backend();
    let before = (host.calls(), backend.inspect(VirtioIommu::config));
    let (reader, writer) = pipe().unwrap();
    backend.set_device_state_fd(Direction::LOAD, STOPPED, File::from(OwnedFd::from(reader))).unwrap();
    send(writer, state);
    let error = backend.check_device_state().expect_err("it is refused");
    assert_eq!((host.calls(), backend.inspect(VirtioIommu::config)), before, "{error}");
    assert_eq!(backend.inspect(|device| device.domains().count()), 0, "{error}");
    error.to_string()
}

/// A state with something else at a place.
fn changed(state: &[u8], place: &str, value: impl Into<Value>) -> Vec<u8> {
    let mut document: Value = serde_json::from_slice(state).unwrap();
    *document.pointer_mut(place).unwrap() = value.into();
    serde_json::to_vec(&document).unwrap()
}

#[test]
fn a_state_that_is_cut_off_or_has_more_to_it_is_refused() {
    let (mut source, _) = stopped_guest();
    let state = save(&mut source);
    source.end();
    for length in [0, 1, 20, state.len() / 2, state.len() - 1] {
        assert!(refusal(Terms::new(), &state[..length]).contains("EOF"), "{length}");
    }
    assert!(refusal(Terms::new(), &[&state[..], b"{}"].concat()).contains("trailing"));
    assert!(refusal(Terms::new(), b"no JSON").contains("cannot be read"));
    let named = refusal(Terms::new(), b"{\"version\":1,\"\\n\\u001b[2J\":1}");
    assert!(!named.contains(char::is_control) && named.contains("unknown field"), "{named:?}");
}

#[test]
fn a_state_of_another_version_is_refused_by_that_whatever_else_is_in_it() {
    let (mut source, _) = stopped_guest();
    let state = save(&mut source);
    source.end();
    for version in [0, 2, u64::from(u32::MAX)] {
        assert!(refusal(Terms::new(), &changed(&state, "/version", version)).contains(&format!("version {version},")));
        let device = refusal(Terms::new(), &changed(&state, "/device/version", version));
        assert!(device.contains(&format!("version {version} cannot")), "{device}");
    }
    assert!(refusal(Terms::new(), b"{\"version\":2,\"news\":[]}").contains("version 2,"));
}

#[test]
fn a_backend_that_is_not_what_the_guest_was_told_refuses_it_and_says_why() {
    let (mut source, _) = stopped_guest();
    let state = save(&mut source);
    source.end();
    let refused = |change: fn(&mut Terms)| {
        let mut terms = Terms::new();
        change(&mut terms);
        refusal(terms, &state)
    };
    for (change, expected) in [
        (
            (|terms| terms.settings.granule = 0x4000) as fn(&mut Terms),
            "the page sizes 0x40201000, and here it is 0x40204000",
        ),
        (
            |terms| terms.settings.input_range = "0-ffffffffff".parse().unwrap(),
            "the input range 0x0-0x7fffffffff, and here it is 0x0-0xffffffffff",
        ),
        (|terms| terms.settings.domain_range = 0..=100, "the domain range 0x0-0xffffffff, and here it is 0x0-0x64"),
        (|terms| terms.settings.probe_size = 512, "the probe size 1536, and here it is 512"),
        (|terms| terms.endpoints.truncate(1), "the guest has endpoint 0000:00:04.0, and this backend has not"),
        (
            |terms| terms.endpoints[0].1.clear(),
            "0xfee00000-0xfeefffff (msi) for endpoint 0000:00:03.0, and here it is no reserved region",
        ),
        (|terms| terms.endpoints[1].1[0].kind = ReservedKind::Reserved, "here it is 0xfee00000-0xfeefffff (reserved)"),
        (|terms| terms.settings.max_domains = 1, "NOMEM"),
        (|terms| terms.settings.max_mappings = 1, "NOMEM"),
    ] {
        let said = refused(change);
        assert!(said.contains(expected), "{said}");
    }
    // An endpoint that the guest does not know of is no harm.
    let mut more = Terms::new();
    more.endpoints.push((EndpointId(0x28), Vec::new()));
    let mut target = more.bench();
    assert!(load(&mut target, &state));
    target.end();
}

#[test]
fn a_state_that_no_device_can_be_in_is_refused() {
    let (mut source, _) = stopped_guest();
    let state = save(&mut source);
    source.end();
    for (place, value) in [
        ("/device/domains/0/mappings/0/last", 0x8fff),
        ("/device/domains/0/mappings/0/physical", 1),
        ("/device/domains/0/mappings/1/last", u64::MAX),
        ("/device/domains/0/endpoints/0", 77),
        ("/device/faults/0/endpoint", 77),
        ("/device/driver_features", u64::MAX),
    ] {
        refusal(Terms::new(), &changed(&state, place, value));
    }
}

#[test]
fn a_device_that_is_in_use_takes_no_state() {
    let (mut source, base) = stopped_guest();
    let state = save(&mut source);
    let before = source.host.calls();
    assert!(!load(&mut source, &state));
    assert_eq!(source.host.calls(), before);
    source.machine().start_ring(base);
    assert_eq!(source.send(&unmap(1, 0x5000, 0x1000)), OK);
    source.end();
}

#[test]
fn a_state_that_is_too_long_is_refused_before_it_takes_memory() {
    alone("migrating::refused::a_state_that_is_too_long_is_refused_before_it_takes_memory", || {
        let (_, backend) = Terms::new().backend();
        let before = peak_memory();
        let (reader, writer) = pipe().unwrap();
        backend.set_device_state_fd(Direction::LOAD, STOPPED, File::from(OwnedFd::from(reader))).unwrap();
        let start = br#"{"version":1,"told":{"page_size_mask":1,"input_range":[0,0],"domain_range":[0,0],"probe_size":0,
            "endpoints":[{"id":0,"regions":[]}]},"request_queue":null,"device":{"version":1,"driver_features":0,"bypass":true,
            "domains":[{"id":0,"bypass":false,"endpoints":[0"#;
        send(writer, &[&start[..], &b",0".repeat(16 << 20)].concat());
        let error = backend.check_device_state().unwrap_err().to_string();
        assert!(error.contains("longer than"), "{error}");
        // What was sent is twice that in this process already.
        let grown = peak_memory() - before;
        assert!(grown < 96 << 20, "{grown:#x} bytes");
    });
}
