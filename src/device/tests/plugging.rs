// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Endpoints that come and go.

use super::*;
use crate::host::refused::{RefusalReason, RefusedAccess, RefusedAccesses};
use crate::host::{AttachError, HostError};

const NEW: EndpointId = EndpointId(0x20);

fn view(ranges: &[&str]) -> EndpointView {
    let region = |text: &&str| ReservedRegion { range: range(text), kind: ReservedKind::Reserved };
    EndpointView::new(ranges.iter().map(region).collect()).unwrap()
}

#[test]
fn an_endpoint_that_is_added_can_be_used_at_once() {
    let mut machine = Machine::new(Flavour::Iommufd);
    let group = machine.host.group(&[NEW], RangeSet::from(range("0-ffffffffffff")));
    assert_eq!(machine.request(&attach_bytes(1, NEW, 0)), NOENT);
    machine.device.add_group(group, vec![(NEW, view(&["1000-1fff"]))]).unwrap();
    assert_eq!(machine.host.attachment(NEW), Attachment::AsFound, "bypass is on");
    let probed = machine.send(&probe_bytes(NEW), 68);
    assert_eq!((probed.status, probed.body[8..16].to_vec()), (OK, 0x1000u64.to_le_bytes().to_vec()));
    assert_eq!(machine.request(&attach_bytes(1, NEW, 0)), OK);
    assert_eq!(machine.map(1, "1000-1fff", 0x1000, READ), INVAL, "its regions count");
    assert_eq!(machine.map(1, "5000-5fff", 0x1000, READ), OK);
    assert_eq!(machine.reads(NEW, 0x5000), Some(0x1000));
    // And those of a domain that it would join.
    machine.attach(2, LONE);
    machine.map(2, "1000-1fff", 0x1000, READ);
    assert_eq!(machine.request(&attach_bytes(2, NEW, 0)), UNSUPP);
    assert_eq!(machine.reads(NEW, 0x5000), Some(0x1000));
}

#[test]
fn an_endpoint_that_is_added_is_blocked_where_bypass_is_off() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.device.write_config(36, &[0]);
    let group = machine.host.group(&[NEW], usable());
    machine.device.add_group(group, vec![(NEW, view(&[]))]).unwrap();
    assert_eq!(machine.host.attachment(NEW), Attachment::Blocked);
}

#[test]
fn what_does_not_fit_the_device_is_not_added() {
    let mut machine = Machine::new(Flavour::Iommufd);
    let before = machine.snapshot();
    let mut refused = |members: &[EndpointId], views: Vec<(EndpointId, EndpointView)>| {
        let group = machine.host.group(members, usable());
        let error = machine.device.add_group(group, views).unwrap_err();
        assert_eq!(machine.device.groups.len(), 2);
        error
    };
    assert_eq!(refused(&[NEW], vec![]), SetupError::UnknownMember(NEW));
    assert_eq!(refused(&[LONE], vec![(LONE, view(&[]))]), SetupError::EndpointTwice(LONE));
    assert_eq!(refused(&[NEW], vec![(NEW, view(&[])), (LONE, view(&[]))]), SetupError::NoGroup(LONE));
    // The probe size is what it was: 64 bytes have room for two.
    let three = view(&["1000-1fff", "3000-3fff", "5000-5fff"]);
    let too_many = SetupError::ProbeSize { endpoint: NEW, regions: 3, probe_size: 64 };
    assert_eq!(refused(&[NEW], vec![(NEW, three)]), too_many);
    assert_eq!(machine.snapshot(), before);
    assert!(!machine.device.endpoints.contains_key(&NEW));
}

#[test]
fn an_endpoint_that_is_removed_reaches_nothing_and_leaves_nothing() {
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        let mut machine = Machine::new(flavour);
        machine.attach(1, LONE);
        machine.map(1, "5000-5fff", 0x1000, READ);
        machine.attach(2, LEFT);
        machine.map(2, "5000-5fff", 0x2000, READ);
        assert!(machine.device.remove_endpoint(LONE));
        assert!(!machine.device.remove_endpoint(LONE));
        assert!(machine.is_blocked(LONE));
        assert_eq!(machine.host.released(), [LONE]);
        assert_eq!(machine.host.table_count(), 1);
        for bytes in [attach_bytes(1, LONE, 0), map_bytes(1, range("6000-6fff"), 0, READ)] {
            assert_eq!(machine.send(&bytes, 4), Reply { status: NOENT, used: 4, body: vec![] });
        }
        assert_eq!(machine.send(&probe_bytes(LONE), 68).status, NOENT);
        // The others go on.
        assert_eq!(machine.reads(LEFT, 0x5000), Some(0x2000));
        assert_eq!(machine.send(&map_bytes(2, range("6000-6fff"), 0x3000, READ), 4).status, OK);
        assert_eq!(machine.reads(LEFT, 0x6000), Some(0x3000));
        assert_eq!(machine.send(&attach_bytes(3, LEFT, 0), 4).status, OK);
        assert_eq!(machine.reads(LEFT, 0x6000), None);
        assert_eq!(machine.send(&attach_bytes(2, LEFT, 0), 4).status, OK);
        // The ID is used again, and inherits nothing.
        let group = machine.host.regroup(&[LONE], usable());
        machine.device.add_group(group, vec![(LONE, msi_view())]).unwrap();
        assert_eq!(machine.attach(1, LONE), OK);
        assert_eq!(machine.reads(LONE, 0x5000), None);
    }
}

#[test]
fn a_sibling_of_one_that_is_removed_goes_on() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LEFT);
    machine.attach(1, RIGHT);
    machine.map(1, "5000-5fff", 0x1000, READ);
    assert!(machine.device.remove_endpoint(LEFT));
    assert_eq!(machine.host.released(), [LEFT]);
    assert_eq!(machine.reads(RIGHT, 0x5000), Some(0x1000));
    assert!(machine.device.remove_endpoint(RIGHT));
    assert!(machine.is_blocked(RIGHT));
    assert_eq!(machine.host.table_count(), 0);
    assert_eq!(machine.device.groups.len(), 1);
    assert_eq!(machine.attach_remaining(), OK);
}

#[test]
fn one_that_disagreed_and_is_removed_lets_its_sibling_go_on() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LEFT);
    machine.attach(1, RIGHT);
    machine.map(1, "5000-5fff", 0x1000, READ);
    machine.attach(2, LEFT);
    assert!(machine.is_blocked(RIGHT));
    machine.device.remove_endpoint(LEFT);
    assert_eq!(machine.reads(RIGHT, 0x5000), Some(0x1000));
    assert!(!machine.device.domains.contains_key(&DomainId(2)));
}

#[test]
fn events_of_one_that_is_removed_are_not_delivered() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    assert_eq!(machine.map(1, "5000-5fff", 0x1000, READ), NOMEM);
    assert_eq!(machine.device.first_fault().unwrap().endpoint, LONE);
    machine.device.remove_endpoint(LONE);
    assert_eq!(machine.device.first_fault(), None);
}

#[test]
fn an_id_that_is_used_again_counts_for_its_former_group_no_more() {
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        let mut machine = Machine::new(flavour);
        machine.device.remove_endpoint(LEFT);
        let group = machine.host.regroup(&[LEFT], usable());
        machine.device.add_group(group, vec![(LEFT, view(&["1000-1fff", "fee00000-feefffff"]))]).unwrap();
        assert_eq!(machine.attach(5, LEFT), OK);
        assert_eq!(machine.map(5, "5000-5fff", 0x1000, READ), OK);
        // The one that was its sibling is in no domain, and follows the configuration.
        machine.device.write_config(36, &[0]);
        assert!(machine.is_blocked(RIGHT));
        machine.device.set_memory(GuestRam::in_software(&[(GuestAddress(0), RAM_SIZE)]).unwrap());
        assert_eq!((machine.reads(LEFT, 0x5000), machine.reads(RIGHT, 0x5000)), (Some(0x1000), None));
        // It goes where it likes, with regions of its own only.
        assert_eq!(machine.attach(7, RIGHT), OK);
        assert_eq!(machine.map(7, "1000-1fff", 0x2000, READ), OK);
        assert_eq!((machine.reads(LEFT, 0x1000), machine.reads(RIGHT, 0x1000)), (None, Some(0x2000)));
        machine.device.remove_endpoint(RIGHT);
        assert!(machine.is_blocked(RIGHT));
        assert_eq!(machine.reads(LEFT, 0x5000), Some(0x1000));
    }
}

#[test]
fn accesses_of_one_that_is_removed_are_no_events() {
    let mut machine = Machine::new(Flavour::Iommufd);
    let refused = Arc::new(RefusedAccesses::default());
    let group = Arc::new(Refusing { members: [NEW, EndpointId(0x21)], refused: Arc::clone(&refused) });
    machine.device.add_group(group, vec![(NEW, view(&[])), (EndpointId(0x21), view(&[]))]).unwrap();
    machine.device.remove_endpoint(NEW);
    for endpoint in [NEW, EndpointId(0x21)] {
        let (access, reason) = (Access::READ, RefusalReason::NotMapped);
        refused.push(RefusedAccess { endpoint, address: 0x5000, access, reason });
    }
    assert_eq!(machine.device.first_fault().map(|fault| fault.endpoint), Some(EndpointId(0x21)));
    machine.device.take_fault();
    assert_eq!(machine.device.first_fault(), None);
    for _ in 0..RefusedAccesses::CAPACITY + 3 {
        let endpoint = EndpointId(0x21);
        refused.push(RefusedAccess {
            endpoint,
            address: 0x5000,
            access: Access::READ,
            reason: RefusalReason::NotMapped,
        });
    }
    assert_eq!(machine.device.statistics().faults_dropped, 3);
    machine.device.remove_endpoint(EndpointId(0x21));
    assert_eq!(machine.device.statistics().faults_dropped, 3, "what was counted stays so");
}

#[test]
fn devices_that_somebody_bound_since_are_blocked_once_more() {
    let mut machine = Machine::with(Flavour::Iommufd, Settings { boot_bypass: false, ..settings() });
    assert_eq!(machine.reads(LONE, 0x1000), None);
    machine.host.attach_elsewhere(LONE);
    assert_eq!(machine.reads(LONE, 0x1000), Some(0x1000));
    machine.device.devices_were_bound();
    assert_eq!(machine.reads(LONE, 0x1000), None);
}

/// A group whose devices report what is refused.
#[derive(Debug)]
struct Refusing {
    members: [EndpointId; 2],
    refused: Arc<RefusedAccesses>,
}

impl HostGroup for Refusing {
    fn members(&self) -> &[EndpointId] {
        &self.members
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        SoftwareGroup::new(vec![], 0x1000).new_table()
    }

    fn can_share(&self, _table: &dyn IoPageTable) -> bool {
        false
    }

    fn attach(&self, _table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        Ok(())
    }

    fn block(&self) {}

    fn refused_accesses(&self) -> Option<&RefusedAccesses> {
        Some(&self.refused)
    }
}

impl Machine {
    /// Attaches the endpoint whose group is left, whatever its place is now.
    fn attach_remaining(&mut self) -> u8 {
        self.send(&attach_bytes(7, LONE, 0), 4).status
    }
}
