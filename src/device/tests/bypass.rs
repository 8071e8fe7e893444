// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bypass, reset, and the end of the device.

use super::*;

fn without_boot_bypass() -> Machine {
    Machine::with(Flavour::Iommufd, Settings { boot_bypass: false, ..settings() })
}

#[test]
fn with_boot_bypass_the_groups_stay_as_found() {
    let machine = Machine::new(Flavour::Iommufd);
    assert_eq!(machine.host.attachment(LONE), Attachment::AsFound);
    assert_eq!(machine.host.calls(), 0);
}

#[test]
fn without_boot_bypass_everything_is_blocked_from_the_features_on() {
    let mut machine = without_boot_bypass();
    assert!(machine.is_blocked(LONE) && machine.is_blocked(LEFT));
    machine.attach(1, LONE);
    machine.detach(1, LONE);
    assert!(machine.is_blocked(LONE));
}

#[test]
fn without_boot_bypass_everything_is_blocked_from_the_memory_on_be_there_none() {
    let host = FakeHost::new(Flavour::Iommufd);
    let groups = vec![host.group(&[LONE], usable())];
    let settings = Settings { boot_bypass: false, ..settings() };
    let mut device = VirtioIommu::new(settings, vec![(LONE, msi_view())], groups).unwrap();
    assert_eq!(host.attachment(LONE), Attachment::AsFound);
    device.set_memory(GuestRam::default());
    assert_eq!(host.attachment(LONE), Attachment::Blocked);
}

#[test]
fn a_detached_endpoint_reaches_guest_memory_and_nothing_else() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.map(1, "5000-5fff", 0x1000, READ);
    machine.detach(1, LONE);
    assert_eq!(machine.reads(LONE, 0x5000), Some(0x5000));
    assert_eq!(machine.host.dma(LONE, RAM_SIZE - 1, Access::READ_WRITE), Some(RAM_SIZE - 1));
    assert_eq!(machine.reads(LONE, RAM_SIZE), None);
}

#[test]
fn the_config_byte_switches_endpoints_that_are_in_no_domain() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LEFT);
    machine.device.write_config(36, &[0]);
    assert!(machine.is_blocked(LONE) && !machine.is_blocked(LEFT));
    machine.device.write_config(36, &[1]);
    assert_eq!(machine.reads(LONE, 0x3000), Some(0x3000));
    assert_eq!(machine.reads(LEFT, 0x3000), None);
}

#[test]
fn bypass_tables_are_shared_and_freed() {
    let mut machine = without_boot_bypass();
    machine.attach_bypass(1, LONE);
    machine.attach_bypass(2, LEFT);
    assert_eq!(machine.host.table_count(), 1);
    machine.detach(1, LONE);
    machine.detach(2, LEFT);
    assert_eq!(machine.host.table_count(), 0);
}

#[test]
fn a_group_in_bypass_joins_a_bypass_domain_without_mapping_memory_again() {
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        let mut machine = Machine::with(flavour, Settings { boot_bypass: false, ..settings() });
        machine.device.write_config(36, &[1]);
        let before = machine.host.attachment(LONE);
        assert_eq!(machine.attach_bypass(1, LONE), OK, "{flavour:?}");
        assert_eq!(machine.host.attachment(LONE), before, "{flavour:?}");
    }
}

#[test]
fn bypass_is_refused_when_memory_lies_in_a_reserved_region() {
    let host = FakeHost::new(Flavour::Iommufd);
    let hole = ReservedRegion { range: range("8000-8fff"), kind: ReservedKind::Reserved };
    let view = EndpointView::new(vec![msi_view().reported()[0], hole]).unwrap();
    let group = host.group(&[LONE], usable().subtract(view.refused()));
    let mut device = VirtioIommu::new(settings(), vec![(LONE, view)], vec![group]).unwrap();
    device.set_driver_features(device.features());
    device.set_memory(ram());
    let mut tail = [0; 4];
    device.handle(&attach_bytes(1, LONE, 1), &mut tail);
    assert_eq!(tail[0], UNSUPP);
    device.handle(&attach_bytes(1, LONE, 0), &mut tail);
    assert_eq!(tail[0], OK);
    device.reset();
    assert_eq!(host.attachment(LONE), Attachment::Blocked);
    let notice = device.next_notice().unwrap().to_string();
    assert!(notice.contains("guest memory at 0x8000-0x8fff"), "{notice}");
}

#[test]
fn a_member_that_moves_away_is_refused_a_bypass_that_it_could_not_have() {
    let host = FakeHost::new(Flavour::Iommufd);
    let hole = ReservedRegion { range: range("8000-8fff"), kind: ReservedKind::Reserved };
    let view = EndpointView::new(vec![msi_view().reported()[0], hole]).unwrap();
    let group = host.group(&[LEFT, RIGHT], usable().subtract(view.refused()));
    let endpoints = vec![(LEFT, view.clone()), (RIGHT, view)];
    let mut device = VirtioIommu::new(settings(), endpoints, vec![group]).unwrap();
    device.set_driver_features(device.features());
    device.set_memory(ram());
    for (domain, id, flags, status) in [(1, LEFT, 0, OK), (1, RIGHT, 0, OK), (2, LEFT, 1, UNSUPP)] {
        let mut tail = [0xaa; 4];
        assert_eq!(device.handle(&attach_bytes(domain, id, flags), &mut tail), 4);
        assert_eq!(tail, [status, 0, 0, 0]);
    }
    assert!(matches!(host.attachment(LEFT), Attachment::Table(_)), "nothing changed");
    assert_eq!(device.save().domains.iter().map(|domain| domain.endpoints.len()).collect::<Vec<_>>(), [2]);
    let mut tail = [0xaa; 4];
    assert_eq!(device.handle(&attach_bytes(2, LEFT, 0), &mut tail), 4);
    assert_eq!(tail, [OK, 0, 0, 0], "a domain that has mappings is not refused");
}

#[test]
fn reset_detaches_everything_and_keeps_bypass() {
    for boot_bypass in [true, false] {
        let mut machine = Machine::with(Flavour::Iommufd, Settings { boot_bypass, ..settings() });
        machine.attach(1, LONE);
        machine.map(1, "5000-5fff", 0x1000, READ);
        machine.attach(2, LEFT);
        machine.device.write_config(36, &[u8::from(!boot_bypass)]);
        machine.device.reset();
        assert_eq!(machine.device.config()[36], u8::from(!boot_bypass));
        assert!(machine.device.domains.is_empty());
        let reached = if boot_bypass { None } else { Some(0x5000) };
        assert_eq!(machine.reads(LONE, 0x5000), reached);
        assert_eq!(machine.host.table_count(), usize::from(!boot_bypass));
        assert_eq!(machine.map(1, "0-fff", 0, READ), NOENT);
        assert_eq!(machine.detach(1, LONE), INVAL);
    }
}

#[test]
fn reset_drops_the_events_that_wait() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    machine.map(1, "0-fff", 0, READ);
    assert!(machine.device.first_fault().is_some());
    machine.device.reset();
    assert_eq!(machine.device.first_fault(), None);
}

#[test]
fn system_reset_restores_bypass() {
    for boot_bypass in [true, false] {
        let mut machine = Machine::with(Flavour::Iommufd, Settings { boot_bypass, ..settings() });
        machine.device.write_config(36, &[u8::from(!boot_bypass)]);
        machine.attach(1, LONE);
        machine.device.system_reset();
        assert_eq!(machine.device.config()[36], u8::from(boot_bypass));
        assert_eq!(machine.device.bypass(), boot_bypass);
        assert_eq!(machine.is_blocked(LONE), !boot_bypass);
    }
}

#[test]
fn a_device_that_was_plugged_after_it_was_blocked_is_blocked_again() {
    let mut machine = without_boot_bypass();
    machine.host.attach_elsewhere(LONE);
    machine.device.reset();
    assert!(machine.is_blocked(LONE));
    machine.host.attach_elsewhere(LONE);
    machine.device.shut_down();
    assert!(machine.is_blocked(LONE));
}

#[test]
fn a_device_that_is_dropped_unused_leaves_a_running_vm_alone() {
    let host = FakeHost::new(Flavour::Iommufd);
    let groups = vec![host.group(&[LONE], usable())];
    drop(VirtioIommu::new(settings(), vec![(LONE, msi_view())], groups).unwrap());
    assert_eq!(host.attachment(LONE), Attachment::AsFound);
    let machine = Machine::new(Flavour::Iommufd);
    let host = machine.host.clone();
    let mut machine = machine;
    machine.attach(1, LONE);
    drop(machine);
    assert_eq!((host.attachment(LONE), host.attachment(LEFT)), (Attachment::Blocked, Attachment::AsFound));
}

#[test]
fn nothing_is_attached_after_shutting_down() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.device.shut_down();
    assert_eq!(machine.attach(1, LONE), DEVERR);
    assert_eq!(machine.attach_bypass(1, LONE), DEVERR);
    machine.device.set_memory(GuestRam::default());
    machine.device.set_memory(ram());
    machine.device.write_config(36, &[0]);
    machine.device.write_config(36, &[1]);
    machine.device.reset();
    machine.device.set_driver_features(machine.device.features());
    assert!(machine.is_blocked(LONE) && machine.is_blocked(LEFT));
    assert_eq!(machine.host.table_count(), 0);
}

#[test]
fn shutting_down_blocks_everything_and_frees_every_table() {
    let mut machine = Machine::new(Flavour::Type1);
    machine.attach(1, LONE);
    machine.attach_bypass(2, LEFT);
    machine.device.shut_down();
    assert!(machine.is_blocked(LONE) && machine.is_blocked(LEFT));
    assert_eq!(machine.host.table_count(), 0);
}
