// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device over the model of a host, and what holds for both at any time, by what the device saves of itself.

use std::collections::BTreeMap;

use virtio_iommu::access::Access;
use virtio_iommu::device::{DeviceState, DomainState, MappingState, Settings, VirtioIommu};
use virtio_iommu::host::fake::{Attachment, FakeHost, FakeMapping, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};
use vm_memory::GuestAddress;

/// Alone in its group.
pub const LONE: EndpointId = EndpointId(8);
/// Two in one group.
pub const PAIR: [EndpointId; 2] = [EndpointId(16), EndpointId(17)];
/// All endpoints, by group.
pub const GROUPS: [&[EndpointId]; 2] = [&[LONE], &PAIR];
/// The smallest page.
pub const PAGE: u64 = 0x1000;
/// How many bytes of properties PROBE answers with.
pub const PROBE_SIZE: usize = 64;
/// Guest memory: two regions that touch, and one behind a hole.
pub const RAM: [(GuestAddress, u64); 3] =
    [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000), (GuestAddress(0x2_0000), 0x4000)];

/// A device and the host behind it.
pub struct Machine {
    /// The host.
    pub host: FakeHost,
    /// The device.
    pub device: VirtioIommu,
}

/// Where the DMA of each endpoint goes, and what is said of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    state: DeviceState,
    hosts: Vec<(Attachment, Vec<FakeMapping>)>,
    config: Vec<u8>,
}

fn range(text: &str) -> IovaRange {
    text.parse().expect("a range")
}

/// What an endpoint must not map.
pub fn view(endpoint: EndpointId) -> EndpointView {
    let msi = ReservedRegion { range: range("fee00000-feefffff"), kind: ReservedKind::Msi };
    let own = ReservedRegion { range: range("18000-18fff"), kind: ReservedKind::Reserved };
    let regions = if endpoint == LONE { vec![own, msi] } else { vec![msi] };
    EndpointView::new(regions).expect("they are disjoint")
}

/// The input range.
pub fn input_range() -> IovaRange {
    range("0-ffffffff")
}

impl Machine {
    /// A device that a driver has set up.
    pub fn new(flavour: Flavour, boot_bypass: bool) -> Self {
        let host = FakeHost::new(flavour);
        let groups = GROUPS.map(|members| {
            let refused = members.iter().fold(RangeSet::new(), |all, id| all.union(view(*id).refused()));
            host.group(members, RangeSet::from(IovaRange::ALL).subtract(&refused))
        });
        let endpoints = GROUPS.concat().into_iter().map(|id| (id, view(id))).collect();
        // Small steps, few domains and mappings: all limits are near.
        let settings = Settings {
            boot_bypass,
            probe_size: PROBE_SIZE as u32,
            domain_range: 0..=0xffff,
            max_mappings: 12,
            max_mappings_in_all: 16,
            map_step: 4 * PAGE,
            ..Settings::new(input_range(), PAGE)
        };
        let mut device = VirtioIommu::new(settings, endpoints, groups.to_vec()).expect("they fit each other");
        device.set_memory(GuestRam::in_software(&RAM).expect("disjoint regions"));
        device.set_driver_features(device.features());
        Self { host, device }
    }

    /// Everything that a refusal must not change.
    pub fn snapshot(&mut self) -> Snapshot {
        let hosts = GROUPS.iter().filter_map(|members| members.first());
        Snapshot {
            state: self.device.save(),
            hosts: hosts.map(|id| (self.host.attachment(*id), self.host.mappings(*id))).collect(),
            config: self.device.config().to_vec(),
        }
    }

    /// I1, I2, I4, I7, I8, I9, I15 of docs/invariants.md.
    pub fn check(&mut self) {
        let state = self.device.save();
        check_domains(&state);
        for members in GROUPS {
            let mut domains: Vec<_> = members.iter().filter_map(|member| domain_of(&state, *member)).collect();
            domains.dedup_by_key(|domain| domain.id);
            let attachment = self.host.attachment(members[0]);
            let reached = pages_of_host(&self.host.mappings(members[0]));
            match domains[..] {
                [] if state.bypass && attachment == Attachment::AsFound => (),
                [] if state.bypass => {
                    assert_eq!(reached, identity(), "bypass is guest memory, each address for itself");
                }
                [] => assert_eq!(attachment, Attachment::Blocked, "{members:?} are in no domain"),
                [domain] => {
                    assert!(matches!(attachment, Attachment::Table(_)), "{members:?} are in {}", domain.id);
                    let wanted = if domain.bypass { identity() } else { pages_of_guest(&domain.mappings) };
                    assert_eq!(reached, wanted, "domain {} is on the host what it is in the table", domain.id);
                }
                _ => assert_eq!(attachment, Attachment::Blocked, "{members:?} disagree"),
            }
        }
    }
}

/// The domain that an endpoint is in.
pub fn domain_of(state: &DeviceState, endpoint: EndpointId) -> Option<&DomainState> {
    state.domains.iter().find(|domain| domain.endpoints.contains(&endpoint.0))
}

/// What holds for a state by itself.
fn check_domains(state: &DeviceState) {
    let mut endpoints: Vec<u32> = state.domains.iter().flat_map(|domain| domain.endpoints.clone()).collect();
    endpoints.sort_unstable();
    assert!(endpoints.windows(2).all(|pair| pair[0] < pair[1]), "an endpoint is in two domains");
    assert!(
        endpoints.iter().all(|id| GROUPS.concat().contains(&EndpointId(*id))),
        "an endpoint is none of the device's"
    );
    assert!(state.domains.windows(2).all(|pair| pair[0].id < pair[1].id), "domains are not in order");
    assert!(state.domains.iter().map(|domain| domain.mappings.len()).sum::<usize>() <= 16, "too many mappings");
    for domain in &state.domains {
        assert!(!domain.endpoints.is_empty(), "domain {} is empty", domain.id);
        assert!(!domain.bypass || domain.mappings.is_empty(), "bypass domain {} has mappings", domain.id);
        assert!(domain.id <= 0xffff && domain.mappings.len() <= 12, "domain {} is past a limit", domain.id);
        let apart = domain.mappings.windows(2).all(|pair| pair[0].last < pair[1].first);
        assert!(apart, "mappings of domain {} overlap or are not in order", domain.id);
        for mapping in &domain.mappings {
            let iova = IovaRange::new(mapping.first, mapping.last).expect("it does not end before it starts");
            assert!(iova.is_aligned(PAGE) && mapping.physical.is_multiple_of(PAGE), "{mapping:?} is not made of pages");
            assert!(input_range().covers(iova), "{mapping:?} is out of the input range");
            for endpoint in &domain.endpoints {
                let refused = view(EndpointId(*endpoint));
                assert_eq!(refused.refused().overlapping(iova), None, "{mapping:?} is over a region of {endpoint}");
            }
        }
    }
}

type Pages = BTreeMap<u64, (u64, Access)>;

/// Guest memory, each page for itself.
fn identity() -> Pages {
    let pages = RAM.iter().flat_map(|(start, length)| (start.0..start.0 + length).step_by(PAGE as usize));
    pages.map(|page| (page, (page, Access::READ_WRITE))).collect()
}

fn pages_of_host(mappings: &[FakeMapping]) -> Pages {
    let mut pages = Pages::new();
    for mapping in mappings {
        let mut iova = mapping.iova.start();
        for (start, length) in &mapping.to {
            for physical in (*start..start + length).step_by(PAGE as usize) {
                assert_eq!(pages.insert(iova, (physical, mapping.access)), None);
                iova += PAGE;
            }
        }
    }
    pages
}

/// What a host must reach: mappings that allow something, all of which is guest memory.
fn pages_of_guest(mappings: &[MappingState]) -> Pages {
    let ram = GuestRam::in_software(&RAM).expect("disjoint regions");
    let mut pages = Pages::new();
    for mapping in mappings {
        let length = mapping.last - mapping.first + 1;
        let access = Access { read: mapping.read, write: mapping.write };
        if !access.is_none() && ram.covers(GuestAddress(mapping.physical), length) {
            for offset in (0..length).step_by(PAGE as usize) {
                pages.insert(mapping.first + offset, (mapping.physical + offset, access));
            }
        }
    }
    pages
}

/// Requests as bytes.
pub mod encode {
    fn words(kind: u8, words: &[u32]) -> Vec<u8> {
        let mut bytes = vec![kind, 0, 0, 0];
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes
    }

    /// ATTACH
    pub fn attach(domain: u32, endpoint: u32, flags: u32) -> Vec<u8> {
        words(1, &[domain, endpoint, flags, 0])
    }

    /// DETACH
    pub fn detach(domain: u32, endpoint: u32) -> Vec<u8> {
        words(2, &[domain, endpoint, 0, 0])
    }

    /// MAP
    pub fn map(domain: u32, first: u64, last: u64, physical: u64, flags: u32) -> Vec<u8> {
        let mut bytes = words(3, &[domain]);
        bytes.extend([first, last, physical].iter().flat_map(|address| address.to_le_bytes()));
        bytes.extend(flags.to_le_bytes());
        bytes
    }

    /// UNMAP
    pub fn unmap(domain: u32, first: u64, last: u64) -> Vec<u8> {
        let mut bytes = words(4, &[domain]);
        bytes.extend([first, last].iter().flat_map(|address| address.to_le_bytes()));
        bytes.extend([0; 4]);
        bytes
    }

    /// PROBE
    pub fn probe(endpoint: u32) -> Vec<u8> {
        let mut bytes = words(5, &[endpoint]);
        bytes.resize(72, 0);
        bytes
    }
}
