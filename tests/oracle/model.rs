// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An oracle: what a guest may be answered, and what its endpoints may reach.
//!
//! Written from virtio 1.3 section 5.13 and docs/invariants.md alone, and slow on purpose: every granule has
//! an entry of its own and every question is a scan. It shares nothing with the device but wire bytes and plain
//! integers. Its host never fails, honours every permission and has memory enough. All ranges are inclusive.

use std::collections::{BTreeMap, BTreeSet};

const ATTACH: u8 = 1;
const DETACH: u8 = 2;
const MAP: u8 = 3;
const UNMAP: u8 = 4;
const PROBE: u8 = 5;

const OK: usize = 0;
const UNSUPP: usize = 2;
const INVAL: usize = 4;
const RANGE: usize = 5;
const NOENT: usize = 6;
const FAULT: usize = 7;
const NOMEM: usize = 8;

/// What is fixed before the guest runs; only `ram` changes later.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    pub granule: u64, // bytes, a power of two
    pub input_range: (u64, u64),
    pub domain_range: (u32, u32),
    pub probe_size: u32, // the properties of every endpoint fit
    pub boot_bypass: bool,
    pub max_domains: usize,
    pub max_mappings: usize, // in one domain
    pub max_mappings_in_all: usize,
    pub ram: Vec<(u64, u64)>,
    pub endpoints: Vec<EndpointFacts>,
}

/// One endpoint, its host IOMMU group, and what it reserves: start, last, subtype (0 RESERVED, 1 MSI); sorted, disjoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EndpointFacts {
    pub id: u32,
    pub group: usize,
    pub reserved: Vec<(u64, u64, u8)>,
}

/// Where a DMA access goes: nowhere, or to a guest-physical address for these kinds of access, one at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    Blocked,
    To { physical: u64, read: bool, write: bool },
}

/// The model. A domain exists while an endpoint is attached to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Oracle {
    facts: Facts,
    bypass_config: bool, // negotiated
    bypass: bool,
    attached: BTreeMap<u32, (u32, bool)>, // endpoint to its domain, and whether that is a bypass domain
    granules: BTreeMap<(u32, u64), (u64, u64, u64, u32)>, // domain and IOVA to virt_start, virt_end, phys_start, flags of MAP
}

impl Oracle {
    /// The state when the system starts.
    pub fn new(facts: Facts) -> Self {
        Self { bypass: facts.boot_bypass, facts, ..Self::default() }
    }

    /// Every status that is right for this request in this state: OK alone, or one for each rule that it breaks, as
    /// no order of checks is prescribed. Empty: the buffer must be returned unwritten.
    pub fn allowed(&self, readable: &[u8], writable_len: usize) -> Vec<u8> {
        let mut broken = [false; NOMEM + 1]; // by status
        let facts = &self.facts;
        let domain = le32(readable, 4); // in PROBE, the endpoint
        let outside = domain < facts.domain_range.0 || domain > facts.domain_range.1;
        let exists = self.attached.values().any(|attached| attached.0 == domain);
        let is_bypass = self.attached.values().any(|attached| *attached == (domain, true));
        match le32(readable, 0) as u8 {
            _ if writable_len < 4 => return vec![],
            kind @ ATTACH..=PROBE if readable.len() < [0, 20, 20, 36, 28, 72][usize::from(kind)] => {
                broken[INVAL] = true;
            }
            ATTACH => {
                let (id, flags, bypass) = (le32(readable, 8), le32(readable, 12), le32(readable, 12) & 1 != 0);
                broken[INVAL] |= outside || flags > 1 || le32(readable, 16) != 0;
                broken[INVAL] |= bypass && !self.bypass_config || exists && bypass != is_bypass;
                // A domain that this endpoint is the last to leave makes room for the new one.
                let mut others = self.attached.clone();
                let was_attached = others.remove(&id).is_some();
                broken[NOMEM] |= !exists && BTreeSet::from_iter(others.values()).len() >= facts.max_domains;
                broken[NOENT] |= self.endpoint(id).is_none();
                broken[UNSUPP] |= bypass && facts.ram.iter().any(|ram| self.reserves(id, *ram, &[0]));
                broken[UNSUPP] |= self.within(domain).any(|(granule, _)| self.reserves(id, granule, &[0, 1]));
                // An attached member of a group may move away from its siblings. An unattached one must join them all.
                let elsewhere = |sibling| others.get(&sibling).is_some_and(|attached| attached.0 != domain);
                broken[UNSUPP] |= !was_attached && self.group(id).any(elsewhere);
            }
            DETACH => {
                let id = le32(readable, 8);
                let attached = self.attached.get(&id).map(|attached| attached.0);
                broken[NOENT] |= self.endpoint(id).is_none();
                broken[INVAL] |= outside || self.endpoint(id).is_some() && attached != Some(domain);
            }
            MAP => {
                let (start, end, physical) = (le64(readable, 8), le64(readable, 16), le64(readable, 24));
                let (granule, physical_end) = (facts.granule, physical.checked_add(end.saturating_sub(start)));
                broken[INVAL] |= outside || is_bypass || end < start || le32(readable, 32) > 3; // READ and WRITE
                broken[NOENT] |= !exists && !outside;
                broken[RANGE] |= start % granule != 0 || end % granule != granule - 1 || physical % granule != 0;
                broken[RANGE] |=
                    end < start || physical_end.is_none() || start < facts.input_range.0 || end > facts.input_range.1;
                broken[FAULT] |= start <= end && physical_end.is_some_and(|last| !self.is_ram((physical, last)));
                broken[INVAL] |= self.within(domain).any(|(granule, _)| overlap(granule, (start, end)));
                let mut members = self.attached.iter().filter(|(_, attached)| attached.0 == domain);
                broken[INVAL] |= members.any(|(id, _)| self.reserves(*id, (start, end), &[0, 1]));
                let mappings = BTreeSet::from_iter(self.granules.iter().map(|(key, mapping)| (key.0, mapping)));
                let of_domain = mappings.iter().filter(|mapping| mapping.0 == domain).count();
                broken[NOMEM] |=
                    exists && of_domain >= facts.max_mappings || mappings.len() >= facts.max_mappings_in_all;
            }
            UNMAP => {
                let (start, end) = (le64(readable, 8), le64(readable, 16));
                broken[INVAL] |= outside || is_bypass || end < start || le32(readable, 24) != 0;
                broken[NOENT] |= !exists && !outside;
                // The range need not be aligned, but a mapping with a byte in it must lie in it.
                let mut affected = self.within(domain).filter(|(granule, _)| overlap(*granule, (start, end)));
                broken[RANGE] |= end < start || affected.any(|(_, mapping)| mapping.0 < start || mapping.1 > end);
            }
            PROBE => {
                broken[NOENT] |= self.endpoint(le32(readable, 4)).is_none();
                broken[INVAL] |= writable_len - 4 < facts.probe_size as usize;
            }
            _ => return vec![],
        }
        broken[OK] = !broken.contains(&true);
        (0..).zip(broken).filter(|rule| rule.1).map(|rule| rule.0).collect()
    }

    /// Handles a request, with the first of the allowed statuses. Returns the used length.
    pub fn handle(&mut self, readable: &[u8], writable: &mut [u8]) -> usize {
        let (used, allowed) = (writable.len(), self.allowed(readable, writable.len()));
        let [status, ..] = allowed[..] else { return 0 };
        writable.fill(0);
        writable[used - 4] = status;
        let domain = le32(readable, 4);
        match readable[0] {
            _ if status != OK as u8 => return used,
            ATTACH => _ = self.attached.insert(le32(readable, 8), (domain, le32(readable, 12) == 1)),
            DETACH => _ = self.attached.remove(&le32(readable, 8)),
            MAP => {
                let mapping = (le64(readable, 8), le64(readable, 16), le64(readable, 24), le32(readable, 32));
                for offset in (0..=mapping.1 - mapping.0).step_by(self.facts.granule as usize) {
                    self.granules.insert((domain, mapping.0 + offset), mapping);
                }
            }
            UNMAP => {
                let (start, end) = (le64(readable, 8), le64(readable, 16));
                self.granules.retain(|key, _| *key < (domain, start) || *key > (domain, end));
            }
            _ => {
                let endpoint = self.endpoint(le32(readable, 4)).unwrap();
                for (property, region) in writable.chunks_exact_mut(24).zip(&endpoint.reserved) {
                    let head = 1 | 20 << 16 | u64::from(region.2) << 32; // RESV_MEM, length after this, subtype
                    property.copy_from_slice(&[head, region.0, region.1].map(u64::to_le_bytes).concat());
                }
            }
        }
        self.granules.retain(|key, _| self.attached.values().any(|of| of.0 == key.0));
        used
    }

    /// Configuration space: five words. The fourth has two domains, the last `probe_size` and `bypass`.
    pub fn config(&self) -> [u8; 40] {
        let facts = &self.facts;
        let page_size_mask = facts.granule | (2 << 20 | 1 << 30) & !(facts.granule - 1);
        let domain_range = u64::from(facts.domain_range.0) | u64::from(facts.domain_range.1) << 32;
        let probe_size = u64::from(facts.probe_size) | u64::from(self.bypass) << 32;
        let words = [page_size_mask, facts.input_range.0, facts.input_range.1, domain_range, probe_size];
        words.map(u64::to_le_bytes).concat().try_into().unwrap()
    }

    /// The driver writes configuration space: only `bypass` takes it, and only 0 or 1. Whether it was negotiated cannot be asked: a
    /// vhost-user frontend tells what was when the queues start.
    pub fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        if let Some(value @ 0..=1) = 36_usize.checked_sub(offset).and_then(|at| bytes.get(at)) {
            self.bypass = *value == 1;
        }
    }

    /// The features that were negotiated: of these, `BYPASS_CONFIG` matters.
    pub fn set_driver_features(&mut self, features: u64) {
        self.bypass_config = features & 1 << 6 != 0;
    }

    /// Device reset: `bypass` alone survives.
    pub fn reset(&mut self) {
        *self = Self { bypass: self.bypass, ..Self::new(self.facts.clone()) };
    }

    /// System reset.
    pub fn system_reset(&mut self) {
        *self = Self::new(self.facts.clone());
    }

    /// Guest RAM changes while the guest runs. Mappings stay.
    pub fn set_memory(&mut self, ram: Vec<(u64, u64)>) {
        self.facts.ram = ram;
    }

    /// Where DMA of the endpoint's host group at this address goes.
    pub fn reaches(&self, endpoint: u32, iova: u64) -> Reach {
        // RAM under a doorbell is cut off from the identity map: nothing ever maps what is reserved.
        let cut_off = self.reserves(endpoint, (iova, iova), &[1]);
        let identity = self.is_bypassed(endpoint) && self.is_ram((iova, iova)) && !cut_off;
        let byte = identity.then_some((iova, iova, true, true));
        for (first, physical, read, write) in self.granules(endpoint).into_iter().chain(byte) {
            if first <= iova && iova - first < self.facts.granule {
                return Reach::To { physical: physical + (iova - first), read, write };
            }
        }
        Reach::Blocked
    }

    /// What the table of the endpoint's host group must hold: each granule's IOVA and physical address, read, write.
    /// A mapping without permission, or not wholly in RAM at present, is in no table.
    pub fn granules(&self, endpoint: u32) -> Vec<(u64, u64, bool, bool)> {
        let mut held = vec![];
        for (&(domain, iova), &(start, end, physical, flags)) in &self.granules {
            if self.table(endpoint).0 == Some(domain) && flags != 0 && self.is_ram((physical, physical + (end - start)))
            {
                held.push((iova, physical + (iova - start), flags & 1 != 0, flags & 2 != 0));
            }
        }
        held
    }

    /// Whether the endpoint's host group has the identity map of guest RAM: not while a member reserves some of it.
    pub fn is_bypassed(&self, endpoint: u32) -> bool {
        self.table(endpoint).1 && !self.facts.ram.iter().any(|ram| self.reserves(endpoint, *ram, &[0]))
    }

    /// The domain that the endpoint's host group is in, and whether it asks for the identity map. Attached members that
    /// agree decide for the whole group, attached or not. While they disagree it is blocked.
    fn table(&self, endpoint: u32) -> (Option<u32>, bool) {
        let named = self.group(endpoint).filter_map(|member| self.attached.get(&member));
        match *Vec::from_iter(BTreeSet::from_iter(named)) {
            [] => (None, self.bypass && self.endpoint(endpoint).is_some()),
            [&(domain, bypass)] => (Some(domain), bypass),
            _ => (None, false),
        }
    }

    /// All endpoints of the endpoint's host group, itself among them.
    fn group(&self, endpoint: u32) -> impl Iterator<Item = u32> {
        let group = self.endpoint(endpoint).map(|facts| facts.group);
        let members = self.facts.endpoints.iter().filter(move |member| Some(member.group) == group);
        members.map(|member| member.id)
    }

    fn endpoint(&self, id: u32) -> Option<&EndpointFacts> {
        self.facts.endpoints.iter().find(|endpoint| endpoint.id == id)
    }

    /// The granules of a domain, each with the mapping that it is part of: first and last byte of both.
    fn within(&self, domain: u32) -> impl Iterator<Item = ((u64, u64), (u64, u64))> {
        let granules = self.granules.iter().filter(move |(key, _)| key.0 == domain);
        granules.map(|(key, mapping)| ((key.1, key.1 + (self.facts.granule - 1)), (mapping.0, mapping.1)))
    }

    /// Whether the endpoint's host group reserves a byte of the range, by a region of these subtypes: what one member reserves
    /// its siblings do too, as they reach the same table.
    fn reserves(&self, endpoint: u32, range: (u64, u64), subtypes: &[u8]) -> bool {
        let members = self.group(endpoint).filter_map(|id| self.endpoint(id));
        let mut regions = members.flat_map(|facts| &facts.reserved).filter(|region| subtypes.contains(&region.2));
        regions.any(|region| overlap((region.0, region.1), range))
    }

    /// Whether every byte is guest RAM, of one region or of several that touch.
    fn is_ram(&self, (start, last): (u64, u64)) -> bool {
        let mut regions = self.facts.ram.iter().filter(|ram| overlap(**ram, (start, start)));
        regions.any(|ram| last <= ram.1 || self.is_ram((ram.1 + 1, last)))
    }
}

fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 <= b.1 && b.0 <= a.1
}

/// Bytes that are missing are 0, which is no type of request.
fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap()))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
