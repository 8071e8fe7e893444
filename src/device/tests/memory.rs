// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that changes.

use super::*;

fn software(ranges: &[(u64, u64)]) -> GuestRam {
    let ranges: Vec<_> = ranges.iter().map(|(start, length)| (GuestAddress(*start), *length)).collect();
    GuestRam::in_software(&ranges).unwrap()
}

#[test]
fn the_same_memory_again_disturbs_nothing() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.map(1, "1000-1fff", 0, READ);
    let calls = machine.host.calls();
    machine.device.set_memory(ram());
    assert_eq!(machine.host.calls(), calls);
}

#[test]
fn memory_that_leaves_is_unmapped_and_mapped_again_when_it_is_back() {
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        let mut machine = Machine::new(flavour);
        machine.attach(1, LONE);
        machine.attach(1, LEFT);
        machine.map(1, "1000-1fff", 0, READ);
        machine.map(1, "5000-5fff", RAM_SIZE / 2, READ);
        let calls = machine.host.calls();
        machine.device.set_memory(software(&[(0, RAM_SIZE / 2)]));
        let tables = machine.host.table_count() as u64;
        assert_eq!(machine.host.calls(), calls + tables, "one mapping left, and nothing else was touched");
        for endpoint in [LONE, LEFT] {
            assert_eq!(machine.reads(endpoint, 0x5000), None);
            assert_eq!(machine.reads(endpoint, 0x1000), Some(0));
        }
        machine.check_invariants();
        assert_eq!(machine.map(1, "5000-5fff", 0, READ), INVAL, "the guest still has it mapped");
        machine.device.set_memory(ram());
        assert_eq!(machine.reads(LONE, 0x5000), Some(RAM_SIZE / 2));
        assert_eq!(machine.unmap(1, "0-ffff"), OK);
        machine.check_invariants();
    }
}

#[test]
fn a_failure_to_unmap_what_leaves_is_rebuilt_away() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.map(1, "5000-5fff", RAM_SIZE / 2, READ);
    machine.host.fail_after(0, Failure::Error(HostErrorKind::Other));
    machine.device.set_memory(software(&[(0, RAM_SIZE / 2)]));
    assert_eq!(machine.reads(LONE, 0x5000), None);
    machine.check_invariants();
}

#[test]
fn a_bypass_domain_that_could_not_follow_is_tried_again_and_reported() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach_bypass(1, LONE);
    machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    machine.device.set_memory(software(&[(0x1000, 0x1000)]));
    assert!(machine.is_blocked(LONE));
    assert_eq!(machine.device.take_fault().unwrap().endpoint, LONE);
    machine.device.set_memory(ram());
    assert_eq!(machine.reads(LONE, 0x2000), Some(0x2000));
}

#[test]
fn bypass_follows_memory() {
    let mut machine = Machine::with(Flavour::Iommufd, Settings { boot_bypass: false, ..settings() });
    machine.attach_bypass(1, LONE);
    machine.device.write_config(36, &[1]);
    machine.device.set_memory(software(&[(0x1000, 0x1000)]));
    for endpoint in [LONE, LEFT] {
        assert_eq!(machine.reads(endpoint, 0x1000), Some(0x1000));
        assert_eq!(machine.reads(endpoint, 0x2000), None);
    }
    machine.device.set_memory(GuestRam::default());
    assert!(machine.is_blocked(LEFT));
    machine.device.set_memory(ram());
    assert_eq!(machine.reads(LEFT, 0x2000), Some(0x2000));
    assert_eq!(machine.host.table_count(), 1);
}
