// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! ATTACH and DETACH.

use super::*;

#[test]
fn attach_of_an_unknown_endpoint_must_be_noent() {
    let mut machine = Machine::new(Flavour::Iommufd);
    assert_eq!(machine.attach(1, EndpointId(0x99)), NOENT);
    assert!(machine.device.domains.is_empty());
}

#[test]
fn a_domain_outside_domain_range_is_inval() {
    let settings = Settings { domain_range: 2..=3, ..settings() };
    let mut machine = Machine::with(Flavour::Iommufd, settings);
    assert_eq!(machine.attach(1, LONE), INVAL);
    assert_eq!(machine.attach(4, LONE), INVAL);
    assert_eq!(machine.map(4, "0-fff", 0, READ), INVAL);
    assert_eq!(machine.unmap(1, "0-fff"), INVAL);
    assert_eq!(machine.attach(3, LONE), OK);
}

#[test]
fn mappings_reach_the_host_and_end_with_the_domain() {
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        let mut machine = Machine::new(flavour);
        assert_eq!(machine.attach(1, LONE), OK);
        assert_eq!(machine.reads(LONE, 0x5000), None);
        assert_eq!(machine.map(1, "5000-6fff", 0x1000, READ), OK);
        assert_eq!(machine.reads(LONE, 0x6123), Some(0x2123));
        assert_eq!(machine.detach(1, LONE), OK);
        assert_eq!(machine.attach(1, LONE), OK);
        assert_eq!(machine.reads(LONE, 0x6123), None, "the domain ceased to exist");
        machine.check_invariants();
    }
}

#[test]
fn a_second_endpoint_gets_the_mappings_that_are_there() {
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        let mut machine = Machine::new(flavour);
        machine.attach(1, LONE);
        machine.map(1, "5000-5fff", 0x1000, READ);
        machine.map(1, "7000-7fff", RAM_SIZE / 2 - 0x1000, WRITE);
        assert_eq!(machine.attach(1, LEFT), OK);
        assert_eq!(machine.reads(LEFT, 0x5000), Some(0x1000));
        let tables = if flavour == Flavour::Iommufd { 1 } else { 2 };
        assert_eq!(machine.host.table_count(), tables);
        assert_eq!(machine.map(1, "9000-9fff", 0x2000, READ), OK);
        assert_eq!(machine.reads(LONE, 0x9000), Some(0x2000));
        assert_eq!(machine.reads(RIGHT, 0x9000), Some(0x2000), "the host moves the whole group");
        machine.check_invariants();
    }
}

#[test]
fn an_endpoint_moves_to_another_domain_in_one_request() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.map(1, "5000-5fff", 0x1000, READ);
    assert_eq!(machine.attach(2, LONE), OK);
    assert_eq!(machine.reads(LONE, 0x5000), None);
    assert_eq!(machine.map(1, "8000-8fff", 0, READ), NOENT, "the old domain is gone");
    assert_eq!(machine.host.table_count(), 1);
}

#[test]
fn attaching_again_to_the_same_domain_keeps_its_mappings() {
    let mut machine = Machine::new(Flavour::Type1);
    machine.attach(1, LONE);
    machine.map(1, "5000-5fff", 0x1000, READ);
    let calls = machine.host.calls();
    assert_eq!(machine.attach(1, LONE), OK);
    assert_eq!(machine.reads(LONE, 0x5000), Some(0x1000));
    assert_eq!(machine.host.calls(), calls, "the host is not asked");
}

#[test]
fn bypass_flag_inconsistent_with_the_domain_should_be_inval_and_keeps_the_old_attachment() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.attach_bypass(2, LEFT);
    assert_eq!(machine.attach(2, LONE), INVAL);
    assert_eq!(machine.attach_bypass(1, LEFT), INVAL);
    assert_eq!(machine.reads(LEFT, 0x3000), Some(0x3000));
    assert_eq!(machine.reads(LONE, 0x3000), None);
}

#[test]
fn bypass_flag_without_the_feature_is_inval() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.device.set_driver_features(machine.device.features() & !feature::BYPASS_CONFIG);
    assert_eq!(machine.attach_bypass(1, LONE), INVAL);
}

#[test]
fn detach_of_an_unknown_endpoint_must_be_noent() {
    let mut machine = Machine::new(Flavour::Iommufd);
    assert_eq!(machine.detach(1, EndpointId(0x99)), NOENT);
}

#[test]
fn detach_from_a_domain_it_is_not_in_is_inval_and_changes_nothing() {
    let mut machine = Machine::new(Flavour::Iommufd);
    assert_eq!(machine.detach(1, LONE), INVAL);
    machine.attach(1, LONE);
    machine.attach(2, LEFT);
    machine.map(1, "5000-5fff", 0x1000, READ);
    assert_eq!(machine.detach(2, LONE), INVAL);
    assert_eq!(machine.detach(3, LONE), INVAL);
    assert_eq!(machine.reads(LONE, 0x5000), Some(0x1000));
}

/// [`LONE`] reaches 48 bits, [`LEFT`] 39.
fn narrow_and_wide() -> (FakeHost, VirtioIommu) {
    let host = FakeHost::new(Flavour::Iommufd);
    let tail = ReservedRegion { range: range("8000000000-ffffffffffff"), kind: ReservedKind::Reserved };
    let narrow = EndpointView::new(vec![msi_view().reported()[0], tail]).unwrap();
    let narrow_usable = usable().subtract(narrow.refused());
    let groups = vec![host.group(&[LONE], usable()), host.group(&[LEFT], narrow_usable)];
    let endpoints = vec![(LONE, msi_view()), (LEFT, narrow)];
    let mut device = VirtioIommu::new(settings(), endpoints, groups).unwrap();
    device.set_memory(ram());
    (host, device)
}

fn send(device: &mut VirtioIommu, bytes: &[u8]) -> u8 {
    let mut tail = [0xaa; 4];
    assert_eq!(device.handle(bytes, &mut tail), 4);
    tail[0]
}

#[test]
fn attach_should_be_unsupp_when_the_domain_maps_what_the_endpoint_reserves() {
    let (host, mut device) = narrow_and_wide();
    let high = range("8000000000-8000000fff");
    assert_eq!(send(&mut device, &attach_bytes(1, LONE, 0)), OK);
    assert_eq!(send(&mut device, &map_bytes(1, high, 0, READ)), OK);
    let calls = host.calls();
    assert_eq!(send(&mut device, &attach_bytes(1, LEFT, 0)), UNSUPP);
    assert_eq!(host.calls(), calls, "the host is not asked");
    assert_eq!(send(&mut device, &unmap_bytes(1, high)), OK);
    assert_eq!(send(&mut device, &attach_bytes(1, LEFT, 0)), OK);
    assert_eq!(send(&mut device, &map_bytes(1, high, 0, READ)), INVAL, "reserved for one of the endpoints");
}

#[test]
fn a_narrow_and_a_wide_endpoint_share_a_domain_in_either_order() {
    for order in [[LONE, LEFT], [LEFT, LONE]] {
        let (_host, mut device) = narrow_and_wide();
        send(&mut device, &attach_bytes(9, order[1], 0));
        for endpoint in order {
            assert_eq!(send(&mut device, &attach_bytes(1, endpoint, 0)), OK, "{order:?}");
        }
    }
}

#[test]
fn a_host_that_maps_less_than_promised_is_blocked_and_unsupp() {
    let host = FakeHost::new(Flavour::Iommufd);
    let narrow = RangeSet::from(range("0-7fffffffff")).subtract(msi_view().refused());
    let groups = vec![host.group(&[LONE], narrow)];
    let mut device = VirtioIommu::new(settings(), vec![(LONE, msi_view())], groups).unwrap();
    device.set_memory(ram());
    assert_eq!(send(&mut device, &attach_bytes(1, LONE, 0)), UNSUPP);
    assert_eq!(host.attachment(LONE), Attachment::Blocked);
    let notice = device.next_notice().unwrap().to_string();
    assert!(notice.contains("0x8000000000-0xffffffffffff"), "{notice}");
    assert_eq!(host.table_count(), 0);
    assert_eq!(device.first_fault(), None, "the guest knows by the status");
}

#[test]
fn a_host_that_maps_in_larger_pages_than_promised_is_blocked_and_unsupp() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.host.coarsen(0x1_0000);
    assert_eq!(machine.send(&attach_bytes(1, LONE, 0), 4).status, UNSUPP);
    assert!(machine.is_blocked(LONE));
    let notice = machine.device.next_notice().unwrap().to_string();
    assert!(notice.contains("pages of 0x10000 bytes"), "{notice}");
}

#[test]
fn an_endpoint_that_loses_its_domain_to_a_broken_promise_has_an_event_and_leaves_no_table() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.host.narrow(LONE, RangeSet::from(range("0-7fffffffff")));
    assert_eq!(machine.send(&attach_bytes(2, LONE, 0), 4).status, UNSUPP);
    assert!(machine.is_blocked(LONE));
    assert_eq!(machine.host.table_count(), 0);
    assert_eq!(machine.device.take_fault().unwrap().endpoint, LONE);
}

#[test]
fn a_refused_attach_that_blocks_nobody_has_no_event() {
    let mut machine = Machine::new(Flavour::Iommufd);
    assert_eq!(machine.attach(1, LONE), OK);
    machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    assert_eq!(machine.attach(2, LONE), NOMEM);
    assert_eq!(machine.device.first_fault(), None, "it is where it was");
    // Blocked before, and still.
    let mut machine = Machine::new(Flavour::Iommufd);
    assert_eq!((machine.attach(1, LEFT), machine.attach(1, RIGHT), machine.attach(2, LEFT)), (OK, OK, OK));
    assert!(machine.is_blocked(LEFT), "they disagree");
    machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    assert_eq!(machine.attach(2, RIGHT), NOMEM);
    assert_eq!(machine.device.first_fault(), None);
}

#[test]
fn what_is_reserved_for_an_endpoint_can_be_mapped_when_it_has_left() {
    let (_host, mut device) = narrow_and_wide();
    let high = range("8000000000-8000000fff");
    assert_eq!(send(&mut device, &attach_bytes(1, LONE, 0)), OK);
    for leave in [attach_bytes(2, LEFT, 0), detach_bytes(1, LEFT)] {
        assert_eq!(send(&mut device, &attach_bytes(1, LEFT, 0)), OK);
        assert_eq!(send(&mut device, &map_bytes(1, high, 0, READ)), INVAL);
        assert_eq!(send(&mut device, &leave), OK);
        assert_eq!(send(&mut device, &map_bytes(1, high, 0, READ)), OK);
        assert_eq!(send(&mut device, &unmap_bytes(1, high)), OK);
    }
}

#[test]
fn there_is_a_cap_on_domains() {
    let mut machine = Machine::with(Flavour::Iommufd, Settings { max_domains: 1, ..settings() });
    assert_eq!(machine.attach(1, LONE), OK);
    assert_eq!(machine.attach(2, LEFT), NOMEM);
    // The first domain ends with the move.
    assert_eq!(machine.attach(2, LONE), OK);
    assert_eq!(machine.attach(2, LEFT), OK);
    assert_eq!(machine.attach(1, LONE), NOMEM, "the other one stays in its domain");
}
