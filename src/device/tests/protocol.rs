// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The wire, the configuration, set-up.

use super::*;

#[test]
fn unknown_type_should_not_be_written() {
    let mut machine = Machine::new(Flavour::Iommufd);
    for kind in [0, 6, 255] {
        let reply = machine.send(&[kind, 0, 0, 0, 0, 0, 0, 0], 4);
        assert_eq!(reply, Reply { status: 0xaa, used: 0, body: vec![] });
    }
    assert_eq!(machine.send(&[], 4).used, 0);
    assert_eq!(machine.send(&[1, 0, 0], 4).used, 0);
}

#[test]
fn no_room_for_a_tail_is_returned_unwritten_and_does_nothing() {
    let mut machine = Machine::new(Flavour::Iommufd);
    for writable in 0..4 {
        let reply = machine.send(&attach_bytes(1, LONE, 0), writable);
        assert_eq!(reply.used, 0);
        assert!(reply.body.iter().all(|byte| *byte == 0xaa));
    }
    assert_eq!(machine.device.statistics().unreadable, 4);
    assert_eq!(machine.device.endpoints[&LONE].domain, None);
}

#[test]
fn a_short_request_is_inval_and_a_long_one_is_read() {
    let mut machine = Machine::new(Flavour::Iommufd);
    let mut bytes = attach_bytes(1, LONE, 0);
    for length in 4..bytes.len() {
        assert_eq!(machine.request(&bytes[..length]), INVAL, "{length}");
    }
    bytes.extend([0xff; 100]);
    assert_eq!(machine.request(&bytes), OK);
    // Of each kind, the last byte is missed: also where it is a reserved one.
    let mut detach = vec![2, 0, 0, 0, 1, 0, 0, 0, LONE.0 as u8, 0, 0, 0];
    detach.extend([0; 8]);
    let iova = range("0-fff");
    for whole in [detach, map_bytes(1, iova, 0, READ), unmap_bytes(1, iova), probe_bytes(LONE)] {
        assert_eq!(machine.request(&whole[..whole.len() - 1]), INVAL, "{whole:?}");
    }
}

#[test]
fn the_status_is_in_the_last_four_bytes_whatever_the_size() {
    let mut machine = Machine::new(Flavour::Iommufd);
    for writable in [4, 5, 16, 4096] {
        let reply = machine.send(&attach_bytes(1, EndpointId(99), 0), writable);
        assert_eq!((reply.status, reply.used), (NOENT, writable));
        assert!(reply.body.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn the_page_sizes_are_the_granule_and_those_of_large_pages() {
    for (granule, mask) in [(0x1000, 0x4020_1000u64), (0x1_0000, 0x4021_0000), (1 << 21, 0x4020_0000)] {
        let settings = Settings { granule, input_range: range("0-ffffffffffff"), ..settings() };
        let machine = Machine::with(Flavour::Iommufd, settings);
        assert_eq!(machine.device.config()[..8], mask.to_le_bytes(), "{granule:#x}");
    }
}

#[test]
fn the_configuration_is_40_little_endian_bytes() {
    let mut machine = Machine::new(Flavour::Iommufd);
    let mut expected = vec![0, 0x10, 0x20, 0x40, 0, 0, 0, 0];
    expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);
    expected.extend([0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 64, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(machine.device.config().to_vec(), expected);
    machine.device.write_config(0, &[0xff; 40]);
    assert_eq!(machine.device.config().to_vec(), expected, "neither 0 nor 1");
    machine.device.write_config(0, &[0; 40]);
    expected[36] = 0;
    assert_eq!(machine.device.config().to_vec(), expected, "only bypass is written");
    machine.device.write_config(36, &[1]);
    assert_eq!(machine.device.config()[36], 1);
    for (offset, bytes) in [(37, &[0u8][..]), (0, &[0; 36]), (36, &[]), (usize::MAX, &[0]), (36, &[2])] {
        machine.device.write_config(offset, bytes);
        assert_eq!(machine.device.config()[36], 1, "{offset}");
    }
}

#[test]
fn features_offered() {
    let features = Machine::new(Flavour::Iommufd).device.features();
    assert_eq!(features, 1 << 0 | 1 << 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 28 | 1 << 29 | 1 << 32);
    let settings = Settings { access_platform: true, ..settings() };
    assert_eq!(Machine::with(Flavour::Iommufd, settings).device.features(), features | 1 << 33);
}

#[test]
fn probe_answers_with_the_regions_and_zeroes() {
    let mut machine = Machine::new(Flavour::Iommufd);
    let reply = machine.send(&probe_bytes(LONE), 68);
    let mut expected = vec![1, 0, 20, 0, 1, 0, 0, 0, 0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0xff, 0xff, 0xef, 0xfe, 0, 0, 0, 0];
    expected.resize(64, 0);
    assert_eq!(reply, Reply { status: OK, used: 68, body: expected });
}

#[test]
fn probe_with_less_than_probe_size_should_be_inval_without_a_property() {
    let mut machine = Machine::new(Flavour::Iommufd);
    for writable in 4..68 {
        let reply = machine.send(&probe_bytes(LONE), writable);
        assert_eq!((reply.status, reply.used), (INVAL, writable));
        assert!(reply.body.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn probe_of_an_unknown_endpoint_should_be_noent() {
    let mut machine = Machine::new(Flavour::Iommufd);
    let reply = machine.send(&probe_bytes(EndpointId(0x99)), 68);
    assert_eq!((reply.status, reply.used), (NOENT, 68));
    assert!(reply.body.iter().all(|byte| *byte == 0));
}

#[test]
fn requests_are_counted_by_kind() {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine.map(1, "0-fff", 0, READ);
    machine.map(1, "0-fff", 0, READ);
    machine.unmap(1, "0-fff");
    machine.send(&probe_bytes(LONE), 68);
    machine.send(&[9, 0, 0, 0], 4);
    let text = machine.device.statistics().to_string();
    assert_eq!(text, "1 PROBE, 1 ATTACH, 0 DETACH, 2 MAP, 1 UNMAP; 1 failed, 1 unreadable");
    machine.attach(1, EndpointId(9));
    machine.detach(2, LONE);
    machine.unmap(9, "0-fff");
    machine.send(&probe_bytes(EndpointId(9)), 68);
    assert_eq!(machine.device.statistics().failed(), 5);
}

#[test]
fn endpoints_groups_and_settings_must_fit_each_other() {
    let group =
        |members: &[EndpointId]| -> Arc<dyn HostGroup> { Arc::new(SoftwareGroup::new(members.to_vec(), 0x1000)) };
    let view = || EndpointView::default();
    let new = |endpoints: &[EndpointId], groups: Vec<Arc<dyn HostGroup>>| {
        let endpoints = endpoints.iter().map(|id| (*id, view())).collect();
        VirtioIommu::new(settings(), endpoints, groups).map(|_| ()).unwrap_err()
    };
    assert_eq!(new(&[LONE], vec![]), SetupError::NoGroup(LONE));
    assert_eq!(new(&[], vec![group(&[LONE])]), SetupError::UnknownMember(LONE));
    assert_eq!(new(&[LONE], vec![group(&[LONE]), group(&[LONE])]), SetupError::GroupTwice(LONE));
    assert_eq!(new(&[LONE, LONE], vec![group(&[LONE])]), SetupError::EndpointTwice(LONE));
    let two = || {
        let high = ReservedRegion { range: range("fd00000000-ffffffffff"), kind: ReservedKind::Reserved };
        EndpointView::new(vec![msi_view().reported()[0], high]).unwrap()
    };
    let sized = |probe_size| {
        let settings = Settings { probe_size, ..settings() };
        VirtioIommu::new(settings, vec![(LONE, two())], vec![group(&[LONE])]).map(|_| ())
    };
    assert!(matches!(sized(47), Err(SetupError::ProbeSize { regions: 2, .. })));
    assert_eq!(sized(48), Ok(()));
    assert_eq!(sized(0xfffc), Ok(()));
    assert_eq!(sized(0xfffd), Err(SetupError::ReplySize(0xfffd)));
    let coarse = Settings { granule: 1 << 21, ..settings() };
    assert!(VirtioIommu::new(coarse, vec![], vec![]).is_ok());
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    let inverted = Settings { domain_range: 2..=1, ..settings() };
    assert!(matches!(VirtioIommu::new(inverted, vec![], vec![]), Err(SetupError::DomainRange(_))));
    for map_step in [0, 0x800, 0x3000] {
        let result = VirtioIommu::new(Settings { map_step, ..settings() }, vec![], vec![]);
        assert_eq!(result.map(|_| ()), Err(SetupError::MapStep(map_step)));
    }
    for granule in [0, 3, 0x800, 1 << 22] {
        let result = VirtioIommu::new(Settings { granule, ..settings() }, vec![], vec![]);
        assert!(matches!(result, Err(SetupError::Granule { .. })), "{granule}");
    }
}
