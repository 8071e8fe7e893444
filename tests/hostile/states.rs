// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! States that somebody has tampered with, as the text that they are kept in.

use proptest::prelude::*;
use serde_json::{Map, Value};
use virtio_iommu::device::{DeviceState, DomainState, MappingState, RestoreError, Settings};
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::{Failure, Flavour};
use virtio_iommu::id::DomainId;
use virtio_iommu::request::Status;

use crate::common::{attach, map};
use crate::machine::{LEFT, LONE, Machine, NOMEM, OK, READ, RIGHT, WRITE, settings};

/// Two domains with mappings, whose endpoints have parted, a bypass domain, and an event.
fn busy() -> Machine {
    let mut machine = Machine::new();
    for request in [attach(7, LEFT.0, 0), attach(7, RIGHT.0, 0), map(7, 0x1000, 0x2000, 0x4000, READ)] {
        assert_eq!(machine.request(&request), OK);
    }
    assert_eq!(machine.request(&map(7, 0x5000, 0x1000, 0x8000, READ | WRITE)), OK);
    machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    assert_eq!(machine.request(&map(7, 0x9000, 0x1000, 0, WRITE)), NOMEM);
    assert_eq!(machine.request(&attach(9, RIGHT.0, 0)), OK);
    assert_eq!(machine.request(&map(9, 0x1000, 0x1000, 0x2000, 0)), OK);
    assert_eq!(machine.request(&attach(3, LONE.0, 1)), OK);
    machine.device.write_config(36, &[0]);
    machine
}

fn text(machine: &mut Machine) -> String {
    serde_json::to_string(&machine.device.save()).unwrap()
}

/// What a device does with a state that came from anywhere: it is refused before a host is asked, or taken whole.
fn restore(text: &[u8]) -> Result<(), Option<RestoreError>> {
    let state: DeviceState = serde_json::from_slice(text).map_err(|_| None)?;
    let mut machine = Machine::with(Flavour::Type1, settings());
    let (before, calls) = (machine.view(), machine.host.calls());
    match machine.device.restore(&state) {
        Ok(()) => {
            assert_eq!(machine.device.save(), state, "another state was taken");
            machine.check_books();
            Ok(())
        }
        Err(error) => {
            assert_eq!((machine.view(), machine.host.calls()), (before, calls), "{error}");
            assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK, "the device works");
            Err(Some(error))
        }
    }
}

#[test]
fn a_state_is_the_same_to_the_byte_when_it_was_restored_and_saved_again() {
    let saved = text(&mut busy());
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        let mut machine = Machine::with(flavour, settings());
        machine.device.restore(&serde_json::from_str(&saved).unwrap()).unwrap();
        assert_eq!(text(&mut machine), saved);
        machine.check_books();
    }
}

#[test]
fn there_is_one_version_and_every_other_is_refused() {
    let mut state = busy().device.save();
    for version in [0, 2, u32::MAX] {
        state.version = version;
        let error = restore(&serde_json::to_vec(&state).unwrap()).unwrap_err().unwrap();
        assert_eq!(error, RestoreError::Version(version));
    }
    state.version = DeviceState::VERSION;
    assert_eq!(restore(&serde_json::to_vec(&state).unwrap()), Ok(()));
}

#[test]
fn a_state_with_a_field_too_few_or_too_many_is_refused() {
    let saved: Value = serde_json::from_str(&text(&mut busy())).unwrap();
    let mut count = 0;
    for place in ["", "/domains/0", "/domains/1/mappings/0", "/faults/0"] {
        let change = |act: &dyn Fn(&mut Map<String, Value>)| {
            let mut changed = saved.clone();
            act(changed.pointer_mut(place).unwrap().as_object_mut().unwrap());
            restore(changed.to_string().as_bytes())
        };
        assert_eq!(change(&|_| ()), Ok(()));
        for field in saved.pointer(place).unwrap().as_object().unwrap().keys() {
            // What may not be known may be left out.
            let expected = if field == "address" { Ok(()) } else { Err(None) };
            assert_eq!(change(&|object| _ = object.remove(field)), expected, "{place} without {field}");
            count += 1;
        }
        assert_eq!(change(&|object| _ = object.insert("more".to_owned(), Value::Null)), Err(None), "{place}");
    }
    assert_eq!(count, 5 + 4 + 5 + 5);
}

#[test]
fn a_state_over_a_limit_is_refused_before_any_host_is_asked() {
    let limited = Settings { max_domains: 2, max_mappings: 2, max_mappings_in_all: 3, ..settings() };
    let mapping = |page: u64| MappingState {
        first: page << 12,
        last: (page << 12) | 0xfff,
        physical: 0x4000,
        read: true,
        write: true,
    };
    let domain = |id, endpoint: u32, count| DomainState {
        id,
        bypass: false,
        endpoints: vec![endpoint],
        mappings: (0..count).map(mapping).collect(),
    };
    let refusal = |domains: Vec<DomainState>| {
        let state = DeviceState { domains, faults: Vec::new(), ..busy().device.save() };
        let mut machine = Machine::with(Flavour::Iommufd, limited.clone());
        let (before, calls) = (machine.view(), machine.host.calls());
        let result = machine.device.restore(&state);
        if result.is_err() {
            assert_eq!((machine.view(), machine.host.calls()), (before, calls));
        }
        result
    };
    let over = |domain, page: u64| {
        let MappingState { first, last, .. } = mapping(page);
        Err(RestoreError::Mapping { domain: DomainId(domain), first, last, status: Status::NoMemory })
    };
    assert_eq!(refusal(vec![domain(1, LONE.0, 2), domain(2, LEFT.0, 1)]), Ok(()));
    assert_eq!(refusal(vec![domain(1, LONE.0, 3)]), over(1, 2));
    assert_eq!(refusal(vec![domain(1, LONE.0, 2), domain(2, LEFT.0, 2)]), over(2, 1));
    let three = vec![domain(1, LONE.0, 0), domain(2, LEFT.0, 0), domain(3, RIGHT.0, 0)];
    let error = RestoreError::Endpoint { endpoint: RIGHT, domain: DomainId(3), status: Status::NoMemory };
    assert_eq!(refusal(three), Err(error));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn a_state_with_flipped_bits_is_refused_or_a_state_like_any_other(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0..8u32), 1..4),
        numbers in proptest::collection::vec((any::<prop::sample::Index>(), prop_oneof![Just(u64::MAX), Just(0), any::<u64>()]), 0..2),
    ) {
        let mut bytes = text(&mut busy()).into_bytes();
        // Another number in the place of one that is there.
        for (index, number) in numbers {
            let starts: Vec<usize> = (1..bytes.len())
                .filter(|at| bytes[*at].is_ascii_digit() && !bytes[at - 1].is_ascii_digit())
                .collect();
            let start = starts[index.index(starts.len())];
            let length = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            bytes.splice(start..start + length, number.to_string().into_bytes());
        }
        for (index, bit) in flips {
            let at = index.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        let _ = restore(&bytes);
    }
}
