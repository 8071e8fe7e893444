// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an operator is told of a device that works.

use super::*;

#[test]
fn endpoints_and_domains_are_told_as_they_are() {
    let mut machine = Machine::new(Flavour::Iommufd);
    let told = |machine: &Machine, id| machine.device.endpoints().find(|endpoint| endpoint.id == id).unwrap();
    let lone = EndpointStatus { id: LONE, domain: None, translation: Translation::AsFound, siblings: vec![] };
    assert_eq!(told(&machine, LONE), lone);
    machine.attach(1, LONE);
    machine.map(1, "5000-5fff", 0x1000, READ);
    let domain = Some(DomainId(1));
    assert_eq!(
        told(&machine, LONE),
        EndpointStatus { domain, translation: Translation::Domain(DomainId(1)), ..lone.clone() }
    );
    machine.attach_bypass(2, LEFT);
    machine.attach_bypass(2, RIGHT);
    assert_eq!(
        told(&machine, LEFT),
        EndpointStatus {
            id: LEFT,
            domain: Some(DomainId(2)),
            translation: Translation::Domain(DomainId(2)),
            siblings: vec![RIGHT],
        }
    );
    let domains: Vec<_> = machine.device.domains().collect();
    let of = |id, endpoints: &[EndpointId], mappings| DomainStatus {
        id: DomainId(id),
        endpoints: endpoints.to_vec(),
        mappings,
        poisoned: false,
    };
    assert_eq!(domains, [of(1, &[LONE], Some(1)), of(2, &[LEFT, RIGHT], None)]);
    assert_eq!(machine.device.domain(DomainId(1)).as_ref(), domains.first());
    assert_eq!(machine.device.domain(DomainId(3)), None);
    // Its members disagree.
    machine.attach(1, LEFT);
    assert_eq!(told(&machine, RIGHT).translation, Translation::Blocked);
    machine.device.remove_endpoint(LEFT);
    assert_eq!(told(&machine, RIGHT).siblings, [], "one that was removed is no sibling");
}

#[test]
fn mappings_are_told_from_an_address_on() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.attach_bypass(2, LEFT);
    for (iova, physical, access) in
        [("1000-1fff", 0, READ), ("5000-6fff", 0x1000, READ | WRITE), ("9000-9fff", 0, WRITE)]
    {
        assert_eq!(machine.map(1, iova, physical, access), OK);
    }
    let from = |address| -> Option<Vec<_>> {
        Some(machine.device.mappings(DomainId(1), address)?.map(|mapped| mapped.iova.start()).collect())
    };
    assert_eq!(from(0).unwrap(), [0x1000, 0x5000, 0x9000]);
    assert_eq!(from(0x6fff).unwrap(), [0x5000, 0x9000], "one that reaches there is told");
    assert_eq!(from(0x7000).unwrap(), [0x9000]);
    assert_eq!(from(u64::MAX).unwrap(), [] as [u64; 0]);
    let second = machine.device.mappings(DomainId(1), 0x2000).unwrap().next().unwrap();
    let expected = MappedRange { iova: range("5000-6fff"), physical: GuestAddress(0x1000), access: Access::READ_WRITE };
    assert_eq!(second, expected);
    assert!(machine.device.mappings(DomainId(2), 0).is_some_and(|mut mappings| mappings.next().is_none()));
    assert!(machine.device.mappings(DomainId(3), 0).is_none());
}

#[test]
fn the_latest_faults_are_remembered_until_their_endpoint_goes() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.attach(2, LEFT);
    let fail = |machine: &mut Machine, domain| {
        machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
        assert_eq!(machine.map(domain, "5000-5fff", 0x1000, READ), NOMEM);
    };
    fail(&mut machine, 1);
    fail(&mut machine, 2);
    let told = |machine: &Machine, after| -> Vec<_> {
        machine.device.recorded_faults(after).map(|recorded| (recorded.number, recorded.fault.endpoint)).collect()
    };
    assert_eq!(told(&machine, 0), [(1, LONE), (2, LEFT)]);
    // The guest being told, and its reset, are no reason to forget.
    assert!(machine.device.take_fault().is_some());
    assert_eq!(machine.device.statistics().faults_sent, 1);
    machine.device.reset();
    assert_eq!(told(&machine, 1), [(2, LEFT)]);
    machine.device.remove_endpoint(LONE);
    assert_eq!(told(&machine, 0), [(2, LEFT)]);
    for _ in 0..300 {
        machine.attach(2, LEFT);
        fail(&mut machine, 2);
    }
    assert_eq!(machine.device.faults_recorded(), 302);
    assert_eq!(told(&machine, 0).first(), Some(&(47, LEFT)), "and no more than 256");
}

#[test]
fn groups_are_counted_and_what_holds_the_guest_here_is_named() {
    let mut machine = Machine::new(Flavour::Iommufd);
    assert_eq!(machine.device.group_counts(), GroupCounts { groups: 2, blocked: 0 });
    for (domain, id) in [(1, LEFT), (1, RIGHT), (2, LEFT)] {
        assert_eq!(machine.attach(domain, id), OK);
    }
    assert_eq!(machine.device.group_counts(), GroupCounts { groups: 2, blocked: 1 });
    assert_eq!(machine.device.unmigratable_endpoint(), Some(LONE));
    machine.host.allow_migration();
    assert_eq!(machine.device.unmigratable_endpoint(), None);
    assert_eq!(machine.device.view(LONE), Some(&msi_view()));
    assert_eq!(machine.device.view(EndpointId(0x99)), None);
}
