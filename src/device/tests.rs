// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device over the model of a host: every request by its bytes, and after each what the host's DMA does.

use vm_memory::GuestAddress;

use super::*;
use crate::access::Access;
use crate::host::fake::{Attachment, Failure, FakeHost, Flavour};
use crate::host::{HostErrorKind, software::SoftwareGroup};
use crate::range::RangeSet;
use crate::reserved::{ReservedKind, ReservedRegion};

/// Alone in its group.
const LONE: EndpointId = EndpointId(0x08);
/// In one group with [`RIGHT`].
const LEFT: EndpointId = EndpointId(0x10);
/// In one group with [`LEFT`].
const RIGHT: EndpointId = EndpointId(0x11);

const RAM_SIZE: u64 = 0x100_0000;
const READ: u32 = 1;
const WRITE: u32 = 2;

struct Machine {
    host: FakeHost,
    device: VirtioIommu,
}

#[derive(Debug, PartialEq, Eq)]
struct Reply {
    status: u8,
    used: usize,
    body: Vec<u8>,
}

fn range(text: &str) -> IovaRange {
    text.parse().unwrap()
}

fn msi_view() -> EndpointView {
    EndpointView::new(vec![ReservedRegion { range: range("fee00000-feefffff"), kind: ReservedKind::Msi }]).unwrap()
}

fn usable() -> RangeSet {
    RangeSet::from(range("0-ffffffffffff")).subtract(msi_view().refused())
}

fn settings() -> Settings {
    Settings { probe_size: 64, ..Settings::new(range("0-ffffffffffff"), 0x1000) }
}

fn ram() -> GuestRam {
    GuestRam::in_software(&[(GuestAddress(0), RAM_SIZE / 2), (GuestAddress(RAM_SIZE / 2), RAM_SIZE / 2)]).unwrap()
}

impl Machine {
    fn new(flavour: Flavour) -> Self {
        Self::with(flavour, settings())
    }

    fn with(flavour: Flavour, settings: Settings) -> Self {
        let host = FakeHost::new(flavour);
        let groups = vec![host.group(&[LONE], usable()), host.group(&[LEFT, RIGHT], usable())];
        let endpoints = [LONE, LEFT, RIGHT].map(|id| (id, msi_view())).to_vec();
        let mut device = VirtioIommu::new(settings, endpoints, groups).unwrap();
        device.set_driver_features(device.features());
        device.set_memory(ram());
        Self { host, device }
    }

    fn send(&mut self, readable: &[u8], writable: usize) -> Reply {
        let mut buffer = vec![0xaa; writable];
        let used = self.device.handle(readable, &mut buffer);
        let status = buffer.len().checked_sub(4).map_or(0xaa, |at| buffer[at]);
        if used != 0 {
            assert_eq!(used, writable, "a reply is a full write");
            assert_eq!(buffer[writable - 3..], [0; 3], "the tail's reserved bytes are zero");
        }
        buffer.truncate(writable.saturating_sub(4));
        Reply { status, used, body: buffer }
    }

    /// Sends, and checks that a refusal changed nothing the host does.
    fn request(&mut self, readable: &[u8]) -> u8 {
        let before = self.snapshot();
        let reply = self.send(readable, 4);
        assert_eq!((reply.used, reply.body.len()), (4, 0));
        if reply.status != 0 {
            assert_eq!(self.snapshot(), before, "a refusal changes nothing");
        }
        reply.status
    }

    fn attach(&mut self, domain: u32, endpoint: EndpointId) -> u8 {
        self.request(&attach_bytes(domain, endpoint, 0))
    }

    fn attach_bypass(&mut self, domain: u32, endpoint: EndpointId) -> u8 {
        self.request(&attach_bytes(domain, endpoint, 1))
    }

    fn detach(&mut self, domain: u32, endpoint: EndpointId) -> u8 {
        let mut bytes = vec![2, 0, 0, 0];
        bytes.extend(domain.to_le_bytes());
        bytes.extend(endpoint.0.to_le_bytes());
        bytes.extend([0; 8]);
        self.request(&bytes)
    }

    fn map(&mut self, domain: u32, iova: &str, physical: u64, flags: u32) -> u8 {
        self.request(&map_bytes(domain, range(iova), physical, flags))
    }

    fn unmap(&mut self, domain: u32, iova: &str) -> u8 {
        self.request(&unmap_bytes(domain, range(iova)))
    }

    /// Everything that decides where DMA goes, on both sides.
    fn snapshot(&self) -> String {
        let sides = [LONE, LEFT, RIGHT]
            .map(|id| (self.device.endpoints[&id].domain, self.host.mappings(id), self.is_blocked(id)));
        let tables: Vec<_> = self
            .device
            .domains
            .iter()
            .map(|(id, domain)| {
                let mappings = domain.space().map(|space| space.mappings.iter().copied().collect::<Vec<_>>());
                (*id, domain.endpoints.clone(), mappings)
            })
            .collect();
        format!("{sides:?} {tables:?}")
    }

    fn is_blocked(&self, endpoint: EndpointId) -> bool {
        self.host.attachment(endpoint) == Attachment::Blocked
    }

    fn reads(&self, endpoint: EndpointId, iova: u64) -> Option<u64> {
        self.host.dma(endpoint, iova, Access::READ)
    }

    /// I1 and I2: the table of each group that is on a domain has exactly what the guest mapped, with exactly those
    /// permissions; a group whose attached members disagree is blocked (I9).
    fn check_invariants(&self) {
        for members in [&[LONE][..], &[LEFT, RIGHT]] {
            let mut domains: Vec<_> = members.iter().filter_map(|id| self.device.endpoints[id].domain).collect();
            domains.dedup();
            let [domain] = domains[..] else {
                assert!(domains.is_empty() || self.is_blocked(members[0]), "members disagree");
                continue;
            };
            let Some(space) = self.device.domains[&domain].space() else { continue };
            if self.is_blocked(members[0]) {
                continue;
            }
            let wanted: Vec<_> = space
                .mappings
                .iter()
                .filter(|mapping| mapping.bytes_on_host(&self.device.ram).is_some())
                .map(|mapping| (mapping.iova, mapping.access))
                .collect();
            let present: Vec<_> =
                self.host.mappings(members[0]).iter().map(|mapping| (mapping.iova, mapping.access)).collect();
            assert_eq!(wanted, present);
        }
    }
}

fn attach_bytes(domain: u32, endpoint: EndpointId, flags: u32) -> Vec<u8> {
    let mut bytes = vec![1, 0, 0, 0];
    for field in [domain, endpoint.0, flags, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}

fn map_bytes(domain: u32, iova: IovaRange, physical: u64, flags: u32) -> Vec<u8> {
    let mut bytes = vec![3, 0, 0, 0];
    bytes.extend(domain.to_le_bytes());
    for field in [iova.start(), iova.last(), physical] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn unmap_bytes(domain: u32, iova: IovaRange) -> Vec<u8> {
    let mut bytes = vec![4, 0, 0, 0];
    bytes.extend(domain.to_le_bytes());
    bytes.extend(iova.start().to_le_bytes());
    bytes.extend(iova.last().to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

fn probe_bytes(endpoint: EndpointId) -> Vec<u8> {
    let mut bytes = vec![5, 0, 0, 0];
    bytes.extend(endpoint.0.to_le_bytes());
    bytes.resize(72, 0);
    bytes
}

const OK: u8 = Status::Ok as u8;
const UNSUPP: u8 = Status::Unsupported as u8;
const DEVERR: u8 = Status::DeviceError as u8;
const INVAL: u8 = Status::Invalid as u8;
const RANGE: u8 = Status::Range as u8;
const NOENT: u8 = Status::NoEntry as u8;
const FAULT: u8 = Status::Fault as u8;
const NOMEM: u8 = Status::NoMemory as u8;

mod protocol {
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
        let mut expected =
            vec![1, 0, 20, 0, 1, 0, 0, 0, 0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0xff, 0xff, 0xef, 0xfe, 0, 0, 0, 0];
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
        for granule in [0, 3, 1 << 22] {
            let result = VirtioIommu::new(Settings { granule, ..settings() }, vec![], vec![]);
            assert!(matches!(result, Err(SetupError::Granule { .. })), "{granule}");
        }
    }
}

mod attaching {
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
        let mut machine = Machine::with(Flavour::Iommufd, Settings { granule: 0x800, ..settings() });
        assert_eq!(machine.send(&attach_bytes(1, LONE, 0), 4).status, UNSUPP);
        assert!(machine.is_blocked(LONE));
        let notice = machine.device.next_notice().unwrap().to_string();
        assert!(notice.contains("pages of 0x1000 bytes"), "{notice}");
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
    fn there_is_a_cap_on_domains() {
        let mut machine = Machine::with(Flavour::Iommufd, Settings { max_domains: 1, ..settings() });
        assert_eq!(machine.attach(1, LONE), OK);
        assert_eq!(machine.attach(2, LEFT), NOMEM);
        assert_eq!(machine.attach(1, LEFT), OK);
    }
}

mod groups {
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
}

mod mapping {
    use super::*;

    fn attached() -> Machine {
        let mut machine = Machine::new(Flavour::Iommufd);
        machine.attach(1, LONE);
        machine
    }

    #[test]
    fn permissions_are_kept() {
        let mut machine = attached();
        machine.map(1, "1000-1fff", 0, READ);
        machine.map(1, "2000-2fff", 0, WRITE);
        machine.map(1, "3000-3fff", 0, READ | WRITE);
        let calls = machine.host.calls();
        assert_eq!(machine.map(1, "4000-4fff", 0, 0), OK);
        assert_eq!(machine.host.calls(), calls, "a mapping that allows nothing stays in the table");
        let allowed = |iova| {
            let host = &machine.host;
            [Access::READ, Access::WRITE].map(|access| host.dma(LONE, iova, access).is_some())
        };
        assert_eq!(allowed(0x1000), [true, false]);
        assert_eq!(allowed(0x2000), [false, true]);
        assert_eq!(allowed(0x3000), [true, true]);
        assert_eq!(allowed(0x4000), [false, false]);
        machine.check_invariants();
        assert_eq!(machine.map(1, "4000-4fff", 0, READ), INVAL, "its addresses are taken");
        assert_eq!(machine.unmap(1, "0-ffff"), OK);
    }

    #[test]
    fn misaligned_map_should_be_range() {
        let mut machine = attached();
        for (iova, physical) in
            [("1001-2000", 0), ("1000-1ffe", 0), ("1000-2000", 0), ("1000-1fff", 1), ("1000-1fff", 0x800)]
        {
            assert_eq!(machine.map(1, iova, physical, READ), RANGE, "{iova} {physical:#x}");
        }
    }

    #[test]
    fn map_outside_input_range_is_range() {
        let mut machine = attached();
        assert_eq!(machine.map(1, "1000000000000-1000000000fff", 0, READ), RANGE);
        assert_eq!(machine.map(1, "fffffffff000-1000000000fff", 0, READ), RANGE);
        assert_eq!(machine.map(1, "fffffffff000-ffffffffffff", 0, READ), OK);
    }

    #[test]
    fn overlapping_map_should_be_inval() {
        let mut machine = attached();
        machine.map(1, "10000-1ffff", 0, READ);
        for iova in ["10000-1ffff", "12000-12fff", "0-fffff", "f000-10fff", "1f000-20fff"] {
            assert_eq!(machine.map(1, iova, 0, READ), INVAL, "{iova}");
        }
        assert_eq!(machine.map(1, "f000-ffff", 0, READ), OK);
        assert_eq!(machine.map(1, "20000-20fff", 0, READ), OK);
    }

    #[test]
    fn map_over_a_reserved_region_should_be_rejected() {
        let mut machine = attached();
        let calls = machine.host.calls();
        for iova in ["fee00000-fee00fff", "fedff000-fee00fff", "feeff000-fef00fff", "fed00000-ff0fffff"] {
            assert_eq!(machine.map(1, iova, 0, READ), INVAL, "{iova}");
        }
        assert_eq!(machine.host.calls(), calls, "the host is not asked");
        assert_eq!(machine.map(1, "fedff000-fedfffff", 0, READ), OK);
    }

    #[test]
    fn a_host_bridge_window_refuses_nothing() {
        // Where many hosts have their 32-bit window, and AMD Seattle has both of its.
        let mut machine = attached();
        for iova in ["80000000-80ffffff", "40000000-40ffffff", "100000000-100ffffff"] {
            assert_eq!(machine.map(1, iova, 0, READ), OK, "{iova}");
        }
        machine.check_invariants();
    }

    #[test]
    fn map_outside_guest_ram_is_fault_as_a_whole() {
        let mut machine = attached();
        assert_eq!(machine.map(1, "1000-1fff", RAM_SIZE, READ), FAULT);
        assert_eq!(machine.map(1, "1000-2fff", RAM_SIZE - 0x1000, READ), FAULT);
        assert_eq!(machine.map(1, "1000-1fff", RAM_SIZE, 0), FAULT);
        assert_eq!(machine.map(1, "1000-2fff", RAM_SIZE / 2 - 0x1000, READ), OK, "it spans two regions");
        assert_eq!(machine.reads(LONE, 0x2000), Some(RAM_SIZE / 2));
    }

    #[test]
    fn map_of_no_domain_should_be_noent_and_of_a_bypass_domain_inval() {
        let mut machine = attached();
        machine.attach_bypass(2, LEFT);
        for (domain, status) in [(7, NOENT), (2, INVAL)] {
            assert_eq!(machine.map(domain, "1000-1fff", 0, READ), status);
            assert_eq!(machine.unmap(domain, "1000-1fff"), status);
        }
    }

    #[test]
    fn the_seven_examples_of_unmap() {
        let examples: [(&[&str], &str, u8); 7] = [
            (&[], "0-4fff", OK),
            (&["0-9fff"], "0-9fff", OK),
            (&["0-4fff", "5000-9fff"], "0-9fff", OK),
            (&["0-9fff"], "0-4fff", RANGE),
            (&["0-4fff", "5000-9fff"], "0-4fff", OK),
            (&["0-4fff"], "0-9fff", OK),
            (&["0-4fff", "a000-efff"], "0-efff", OK),
        ];
        for flavour in [Flavour::Iommufd, Flavour::Type1] {
            for (maps, iova, status) in examples {
                let mut machine = Machine::new(flavour);
                machine.attach(1, LONE);
                for map in maps {
                    assert_eq!(machine.map(1, map, 0, READ), OK);
                }
                assert_eq!(machine.unmap(1, iova), status, "{maps:?} {iova}");
                let left = maps.iter().filter(|map| status != OK || !range(iova).covers(range(map))).count();
                assert_eq!(machine.host.mappings(LONE).len(), left);
                machine.check_invariants();
            }
        }
    }

    #[test]
    fn unmap_that_would_split_should_remove_nothing() {
        let mut machine = attached();
        for map in ["0-fff", "1000-1fff", "2000-4fff"] {
            machine.map(1, map, 0, READ);
        }
        assert_eq!(machine.unmap(1, "0-2fff"), RANGE);
        assert_eq!(machine.unmap(1, "3000-ffff"), RANGE);
        assert_eq!(machine.unmap(1, "3000-3fff"), RANGE);
        assert_eq!(machine.host.mappings(LONE).len(), 3);
        assert_eq!(machine.send(&unmap_bytes(1, IovaRange::ALL), 4).status, OK);
        assert!(machine.host.mappings(LONE).is_empty());
    }

    #[test]
    fn there_is_a_cap_on_mappings() {
        let mut machine = Machine::with(Flavour::Iommufd, Settings { max_mappings: 2, ..settings() });
        machine.attach(1, LONE);
        assert_eq!(machine.map(1, "0-fff", 0, READ), OK);
        assert_eq!(machine.map(1, "1000-1fff", 0, 0), OK);
        assert_eq!(machine.map(1, "2000-2fff", 0, READ), NOMEM);
        assert_eq!(machine.unmap(1, "0-fff"), OK);
        assert_eq!(machine.map(1, "2000-2fff", 0, READ), OK);
    }

    #[test]
    fn software_endpoints_need_no_host() {
        let group: Arc<dyn HostGroup> = Arc::new(SoftwareGroup::new(vec![LONE], 0x1000));
        let mut device = VirtioIommu::new(settings(), vec![(LONE, msi_view())], vec![group]).unwrap();
        device.set_memory(ram());
        let mut send = |bytes: &[u8]| {
            let mut tail = [0xaa; 4];
            assert_eq!(device.handle(bytes, &mut tail), 4);
            tail[0]
        };
        assert_eq!(send(&attach_bytes(1, LONE, 0)), OK);
        assert_eq!(send(&map_bytes(1, range("0-fff"), 0, READ)), OK);
        assert_eq!(send(&map_bytes(1, range("0-fff"), 0, READ)), INVAL);
        assert_eq!(send(&unmap_bytes(1, range("0-ffff"))), OK);
        assert_eq!(send(&map_bytes(1, range("0-fff"), 0, READ)), OK);
    }
}

mod bypass {
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
}

mod host_failures {
    use super::*;

    const KINDS: [(HostErrorKind, u8); 6] = [
        (HostErrorKind::Unmappable, INVAL),
        (HostErrorKind::AlreadyMapped, INVAL),
        (HostErrorKind::NoMemory, NOMEM),
        (HostErrorKind::BadAddress, FAULT),
        (HostErrorKind::Gone, DEVERR),
        (HostErrorKind::Other, DEVERR),
    ];

    /// Two groups in one domain, with a table each.
    fn two_tables() -> Machine {
        let mut machine = Machine::new(Flavour::Type1);
        machine.attach(1, LONE);
        machine.attach(1, LEFT);
        machine.map(1, "1000-1fff", 0, READ);
        machine
    }

    #[test]
    fn a_map_that_the_host_refuses_is_taken_back_everywhere_and_reported() {
        for k in 0..2 {
            for (kind, status) in KINDS {
                let mut machine = two_tables();
                machine.host.fail_after(k, Failure::Error(kind));
                assert_eq!(machine.map(1, "5000-5fff", 0x1000, WRITE), status, "{kind:?} at {k}");
                machine.check_invariants();
                let fault = machine.device.take_fault().unwrap();
                assert_eq!((fault.reason, fault.address), (FaultReason::Mapping, Some(0x5000)));
                assert_eq!((fault.endpoint, fault.access), (LONE, Access::WRITE));
                assert!(machine.device.next_notice().unwrap().to_string().contains("0x5000-0x5fff"));
                assert_eq!(machine.map(1, "5000-5fff", 0x1000, WRITE), OK, "it can be tried again");
            }
        }
    }

    #[test]
    fn a_map_that_cannot_be_taken_back_is_rebuilt_away() {
        let mut machine = two_tables();
        machine.host.fail_after(1, Failure::Error(HostErrorKind::NoMemory));
        machine.host.fail_after(2, Failure::Error(HostErrorKind::Other));
        assert_eq!(machine.send(&map_bytes(1, range("5000-5fff"), 0, READ), 4).status, NOMEM);
        machine.check_invariants();
        assert_eq!(machine.reads(LONE, 0x5000), None);
        assert_eq!(machine.reads(LONE, 0x1000), Some(0));
    }

    #[test]
    fn an_unmap_that_fails_is_rebuilt_without_the_range() {
        for failure in [Failure::Error(HostErrorKind::Other), Failure::Short] {
            for k in 0..2 {
                let mut machine = two_tables();
                machine.map(1, "5000-5fff", 0x1000, READ);
                machine.host.fail_after(k, failure);
                assert_eq!(machine.send(&unmap_bytes(1, range("5000-5fff")), 4).status, OK, "{failure:?} at {k}");
                for endpoint in [LONE, LEFT, RIGHT] {
                    assert_eq!(machine.reads(endpoint, 0x5000), None);
                    assert_eq!(machine.reads(endpoint, 0x1000), Some(0));
                }
                machine.check_invariants();
                let notice = machine.device.next_notice().unwrap();
                assert!(matches!(notice, Notice::OutOfStep { rebuilt: true, .. }), "{notice}");
                assert_eq!(machine.device.take_fault().unwrap().reason, FaultReason::Unknown);
            }
        }
    }

    #[test]
    fn a_domain_that_cannot_be_rebuilt_stays_blocked_until_it_is_emptied() {
        let mut machine = two_tables();
        machine.map(1, "5000-5fff", 0x1000, READ);
        for k in 0..20 {
            machine.host.fail_after(k, Failure::Error(HostErrorKind::Other));
        }
        assert_eq!(machine.send(&unmap_bytes(1, range("5000-5fff")), 4).status, DEVERR);
        machine.host.stop_failing();
        assert!(machine.is_blocked(LONE) && machine.is_blocked(LEFT));
        assert_eq!(machine.host.table_count(), 0);
        assert_eq!(machine.map(1, "7000-7fff", 0, READ), DEVERR);
        assert_eq!(machine.attach(1, LEFT), DEVERR);
        assert_eq!(machine.send(&unmap_bytes(1, range("1000-1fff")), 4).status, OK);
        assert!(!machine.is_blocked(LONE) && !machine.is_blocked(LEFT), "it is empty");
        assert_eq!(machine.map(1, "7000-7fff", 0x2000, READ), OK);
        assert_eq!(machine.reads(LEFT, 0x7000), Some(0x2000));
        machine.check_invariants();
    }

    #[test]
    fn a_domain_that_lost_its_last_mapping_with_the_host_starts_afresh() {
        for again in [map_bytes(1, range("7000-7fff"), 0x2000, READ), attach_bytes(1, RIGHT, 0)] {
            let mut machine = two_tables();
            for k in 0..20 {
                machine.host.fail_after(k, Failure::Error(HostErrorKind::Other));
            }
            assert_eq!(machine.send(&unmap_bytes(1, range("1000-1fff")), 4).status, DEVERR);
            assert!(machine.is_blocked(LONE) && machine.is_blocked(LEFT));
            machine.host.stop_failing();
            assert_eq!(machine.send(&again, 4).status, OK);
            assert!(!machine.is_blocked(LONE) && !machine.is_blocked(LEFT));
            machine.check_invariants();
        }
    }

    #[test]
    fn a_domain_that_cannot_be_rebuilt_lets_its_endpoints_leave() {
        let mut machine = two_tables();
        for k in 0..20 {
            machine.host.fail_after(k, Failure::Error(HostErrorKind::Other));
        }
        machine.send(&unmap_bytes(1, range("1000-1fff")), 4);
        machine.host.stop_failing();
        assert_eq!(machine.attach(2, LONE), OK);
        assert_eq!(machine.map(2, "1000-1fff", 0x3000, READ), OK);
        assert_eq!(machine.reads(LONE, 0x1000), Some(0x3000));
    }

    /// Runs a sequence with the k-th host call failing, for every k, and checks after each request.
    #[test]
    fn whatever_call_fails_the_books_agree_with_the_host() {
        let sequence: [&dyn Fn(&mut Machine) -> u8; 12] = [
            &|machine| machine.send(&attach_bytes(1, LONE, 0), 4).status,
            &|machine| machine.send(&map_bytes(1, range("1000-1fff"), 0, READ), 4).status,
            &|machine| machine.send(&map_bytes(1, range("3000-5fff"), 0x7f_f000, WRITE), 4).status,
            &|machine| machine.send(&attach_bytes(1, LEFT, 0), 4).status,
            &|machine| machine.send(&map_bytes(1, range("8000-8fff"), 0, READ), 4).status,
            &|machine| machine.send(&attach_bytes(1, RIGHT, 0), 4).status,
            &|machine| machine.send(&unmap_bytes(1, range("0-5fff")), 4).status,
            &|machine| machine.send(&attach_bytes(2, LEFT, 0), 4).status,
            &|machine| machine.send(&attach_bytes(2, RIGHT, 0), 4).status,
            &|machine| machine.send(&attach_bytes(3, LONE, 1), 4).status,
            &|machine| machine.send(&unmap_bytes(1, IovaRange::ALL), 4).status,
            &|machine| {
                machine.device.reset();
                OK
            },
        ];
        for flavour in [Flavour::Iommufd, Flavour::Type1] {
            let mut clean = Machine::new(flavour);
            for step in sequence {
                step(&mut clean);
            }
            let calls = clean.host.calls();
            assert!(calls > 10);
            for k in 0..calls {
                for failure in [Failure::Error(HostErrorKind::Other), Failure::Short] {
                    let mut machine = Machine::new(flavour);
                    machine.host.fail_after(k, failure);
                    for step in sequence {
                        step(&mut machine);
                        machine.check_invariants();
                    }
                    machine.device.shut_down();
                    assert_eq!(machine.host.table_count(), 0, "{flavour:?} {failure:?} at {k}");
                }
            }
        }
    }

    #[test]
    fn an_attach_that_the_host_refuses_leaves_what_was() {
        for k in 0..2 {
            let mut machine = Machine::new(Flavour::Iommufd);
            machine.attach(1, LONE);
            machine.map(1, "1000-1fff", 0, READ);
            machine.host.fail_after(k, Failure::Error(HostErrorKind::NoMemory));
            assert_eq!(machine.attach(2, LONE), NOMEM);
            assert_eq!(machine.reads(LONE, 0x1000), Some(0));
            assert_eq!(machine.host.table_count(), 1);
        }
    }
}

mod memory {
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
            machine.device.set_memory(software(&[(0, RAM_SIZE / 2)]));
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
}
