// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device over the model of a host: every request by its bytes, and after each what the host's DMA does.

use vm_memory::GuestAddress;

use super::*;
use crate::access::Access;
use crate::host::fake::{Attachment, Failure, FakeHost, FakeMapping, Flavour};
use crate::host::{HostErrorKind, software::SoftwareGroup};
use crate::range::{IovaRange, RangeSet};
use crate::reserved::{ReservedKind, ReservedRegion};

mod attaching;
mod bypass;
mod exchanges;
#[cfg(all(feature = "iommufd", feature = "type1"))]
mod generated;
mod groups;
mod host_failures;
mod mapping;
mod memory;
mod plugging;
mod protocol;
mod states;
mod status;

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
        self.request(&detach_bytes(domain, endpoint))
    }

    fn map(&mut self, domain: u32, iova: &str, physical: u64, flags: u32) -> u8 {
        self.request(&map_bytes(domain, range(iova), physical, flags))
    }

    fn unmap(&mut self, domain: u32, iova: &str) -> u8 {
        self.request(&unmap_bytes(domain, range(iova)))
    }

    /// Everything that decides where DMA goes, on both sides.
    fn snapshot(&self) -> String {
        let domain = |id| self.device.endpoints.get(&id).and_then(|endpoint| endpoint.domain);
        let sides = [LONE, LEFT, RIGHT].map(|id| (domain(id), self.host.mappings(id), self.is_blocked(id)));
        let tables: Vec<_> = self
            .device
            .domains
            .iter()
            .map(|(id, domain)| {
                let mappings = domain.space().map(|space| space.mappings.iter().collect::<Vec<_>>());
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

    /// I1 and I2 of docs/invariants.md: the table of each group that is on a domain has exactly what the guest mapped, with exactly those
    /// permissions; a group whose attached members disagree is blocked (I9).
    fn check_invariants(&self) {
        let spaces = self.device.domains.values().filter_map(Domain::space);
        assert_eq!(self.device.mappings_in_all, spaces.map(|space| space.mappings.len()).sum::<usize>());
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
            // A large mapping is several of the host's, cut where a step ends.
            let mut present: Vec<(IovaRange, Access)> = Vec::new();
            for FakeMapping { iova, access, .. } in self.host.mappings(members[0]) {
                let part_of = |whole: &&(IovaRange, Access)| whole.0.covers(iova) && whole.0.start() != iova.start();
                if iova.start() % self.device.settings.map_step == 0 && wanted.iter().any(|whole| part_of(&whole)) {
                    let (before, _) = present.pop().unwrap();
                    assert_eq!(before.last() + 1, iova.start());
                    present.push((IovaRange::new(before.start(), iova.last()).unwrap(), access));
                } else {
                    present.push((iova, access));
                }
            }
            assert_eq!(wanted, present);
        }
    }
}

fn detach_bytes(domain: u32, endpoint: EndpointId) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0];
    bytes.extend(domain.to_le_bytes());
    bytes.extend(endpoint.0.to_le_bytes());
    bytes.extend([0; 8]);
    bytes
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
