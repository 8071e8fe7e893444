// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host groups with two members.

use super::*;

#[test]
fn an_unattached_member_cannot_go_to_another_domain_than_its_sibling() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LEFT);
    machine.map(1, "5000-5fff", 0x1000, READ);
    assert_eq!(machine.attach(2, RIGHT), UNSUPP);
    assert_eq!(machine.reads(LEFT, 0x5000), Some(0x1000));
    assert_eq!(machine.attach(1, RIGHT), OK);
    machine.check_invariants();
}

#[test]
fn a_group_moves_by_two_attaches_and_is_blocked_in_between() {
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        let mut machine = Machine::new(flavour);
        machine.attach(1, LEFT);
        machine.attach(1, RIGHT);
        machine.attach(2, LONE);
        machine.map(2, "5000-5fff", 0x1000, READ);
        assert_eq!(machine.attach(2, LEFT), OK);
        assert!(machine.is_blocked(LEFT));
        assert_eq!(machine.attach(2, RIGHT), OK);
        assert_eq!(machine.reads(RIGHT, 0x5000), Some(0x1000));
        machine.check_invariants();
    }
}

#[test]
fn a_failure_at_the_second_member_leaves_the_group_blocked_and_can_be_retried() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LEFT);
    machine.attach(1, RIGHT);
    machine.attach(2, LEFT);
    machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    assert_eq!(machine.attach(2, RIGHT), NOMEM);
    assert!(machine.is_blocked(RIGHT));
    assert_eq!(machine.device.endpoints[&RIGHT].domain, Some(DomainId(1)));
    assert_eq!(machine.attach(2, RIGHT), OK);
    assert!(!machine.is_blocked(RIGHT));
}

#[test]
fn detach_of_one_leaves_the_group_to_its_sibling() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LEFT);
    machine.attach(1, RIGHT);
    machine.map(1, "5000-5fff", 0x1000, READ);
    assert_eq!(machine.detach(1, LEFT), OK);
    assert_eq!(machine.reads(RIGHT, 0x5000), Some(0x1000));
    assert_eq!(machine.detach(1, LEFT), INVAL);
    machine.device.write_config(36, &[0]);
    assert_eq!(machine.reads(RIGHT, 0x5000), Some(0x1000), "bypass is for groups without an attached member");
    assert_eq!(machine.detach(1, RIGHT), OK);
    assert!(machine.is_blocked(RIGHT));
}

#[test]
fn when_the_member_that_disagrees_is_detached_the_others_go_on() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LEFT);
    machine.attach(1, RIGHT);
    machine.map(1, "5000-5fff", 0x1000, READ);
    machine.attach(2, LEFT);
    assert!(machine.is_blocked(RIGHT));
    assert_eq!(machine.detach(2, LEFT), OK);
    assert_eq!(machine.reads(RIGHT, 0x5000), Some(0x1000));
    machine.check_invariants();
}
