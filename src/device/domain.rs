// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A domain and its mappings.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::access::Access;
use crate::host::{HostError, HostGroup, IoPageTable};
use crate::id::EndpointId;
use crate::memory::{GuestRam, HostSegment};
use crate::range::{IovaRange, RangeSet};

/// An I/O address space of the guest.
#[derive(Debug)]
pub(super) struct Domain {
    /// The endpoints that are attached; never empty between two requests.
    pub endpoints: BTreeSet<EndpointId>,
    /// How addresses are translated.
    pub kind: DomainKind,
}

/// How the addresses of a domain are translated.
#[derive(Debug)]
pub(super) enum DomainKind {
    /// Every address means itself.
    Bypass,
    /// By mappings.
    Mapped(AddressSpace),
}

/// The mappings of a domain and the page tables that follow them.
#[derive(Debug, Default)]
pub(super) struct AddressSpace {
    /// What the guest mapped: the truth.
    pub mappings: MappingTable,
    /// The host's tables, each in step with `mappings` unless the space is poisoned.
    pub tables: Vec<Arc<dyn IoPageTable>>,
    /// The host could not be brought back in step: the groups are blocked and there are no tables.
    pub poisoned: bool,
}

impl Domain {
    pub fn new(bypass: bool) -> Self {
        let kind = if bypass { DomainKind::Bypass } else { DomainKind::Mapped(AddressSpace::default()) };
        Self { endpoints: BTreeSet::new(), kind }
    }

    pub const fn is_bypass(&self) -> bool {
        matches!(self.kind, DomainKind::Bypass)
    }

    /// The mappings and tables, unless it is a bypass domain.
    pub const fn space(&self) -> Option<&AddressSpace> {
        match &self.kind {
            DomainKind::Bypass => None,
            DomainKind::Mapped(space) => Some(space),
        }
    }

    pub const fn space_mut(&mut self) -> Option<&mut AddressSpace> {
        match &mut self.kind {
            DomainKind::Bypass => None,
            DomainKind::Mapped(space) => Some(space),
        }
    }
}

impl AddressSpace {
    /// A table that the group can use: one that is there, or a new one with the same mappings.
    pub fn table_for(&mut self, host: &dyn HostGroup, ram: &GuestRam) -> Result<Arc<dyn IoPageTable>, HostError> {
        if let Some(table) = self.tables.iter().find(|table| host.can_share(table.as_ref())) {
            return Ok(Arc::clone(table));
        }
        let table = host.new_table()?;
        if !table.in_software() {
            for mapping in self.mappings.iter() {
                if let Some(segments) = mapping.segments(ram) {
                    // A table that fails half-way is dropped, and what it mapped with it.
                    table.map(mapping.iova, &segments, mapping.access).map_err(HostError::from)?;
                }
            }
        }
        self.tables.push(Arc::clone(&table));
        Ok(table)
    }
}

/// What one MAP request made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub iova: IovaRange,
    pub physical: GuestAddress,
    pub access: Access,
}

impl Mapping {
    /// The guest memory that host page tables must reach through this mapping; `None` if it is kept in the table
    /// only, because it allows nothing or because not all of it is RAM.
    pub fn segments(&self, ram: &GuestRam) -> Option<Vec<HostSegment>> {
        if self.access.is_none() {
            return None;
        }
        ram.segments(self.physical, self.iova.length()?)
    }

    /// How many bytes of it host page tables reach: all or none.
    pub fn bytes_on_host(&self, ram: &GuestRam) -> Option<u64> {
        let length = self.iova.length().filter(|_| !self.access.is_none())?;
        ram.covers(self.physical, length).then_some(length)
    }
}

/// An UNMAP that would remove a mapping in part.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct WouldSplit;

/// The mappings of a domain: disjoint and ordered.
#[derive(Debug, Default)]
pub(super) struct MappingTable {
    /// By first address.
    entries: BTreeMap<u64, Mapping>,
}

impl MappingTable {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.entries.values()
    }

    /// The first mapping that has an address of `iova` in it.
    pub fn overlapping(&self, iova: IovaRange) -> Option<&Mapping> {
        // Mappings are disjoint: of those that start before the range ends, the last one reaches furthest.
        let (_, before) = self.entries.range(..=iova.last()).next_back()?;
        before.iova.overlaps(iova).then_some(before)
    }

    /// The first of these ranges that a mapping reaches into.
    pub fn overlapping_any(&self, ranges: &RangeSet) -> Option<IovaRange> {
        ranges.ranges().iter().copied().find(|range| self.overlapping(*range).is_some())
    }

    /// Adds a mapping, or lets one grow that starts there; no other one may overlap it.
    pub fn insert(&mut self, mapping: Mapping) {
        self.entries.insert(mapping.iova.start(), mapping);
    }

    /// The mappings in a range, ascending.
    ///
    /// # Errors
    ///
    /// [`WouldSplit`] if one of them reaches out of the range.
    pub fn covered(&self, iova: IovaRange) -> Result<impl Iterator<Item = &Mapping>, WouldSplit> {
        let edge = |at: u64| self.overlapping(IovaRange::new(at, at)?);
        let ends = [edge(iova.start()), edge(iova.last())];
        if ends.into_iter().flatten().any(|mapping| !iova.covers(mapping.iova)) {
            return Err(WouldSplit);
        }
        Ok(self.entries.range(iova.start()..=iova.last()).map(|(_, mapping)| mapping))
    }

    /// Removes every mapping that starts in a range.
    pub fn remove(&mut self, iova: IovaRange) {
        while let Some((start, _)) = self.entries.range(iova.start()..=iova.last()).next() {
            let start = *start;
            self.entries.remove(&start);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(start, last).unwrap()
    }

    fn table(ranges: &[IovaRange]) -> MappingTable {
        let mut table = MappingTable::default();
        for iova in ranges {
            table.insert(Mapping { iova: *iova, physical: GuestAddress(0), access: Access::READ });
        }
        table
    }

    proptest! {
        #[test]
        fn lookups_agree_with_single_addresses(
            cuts in proptest::collection::btree_set(0..40u64, 0..16), start in 0..40u64, more in 0..40u64,
        ) {
            // Every other stretch between two cuts is mapped.
            let cuts: Vec<u64> = cuts.into_iter().collect();
            let mapped: Vec<_> = cuts.chunks_exact(2).map(|pair| range(pair[0], pair[1] - 1)).collect();
            let table = table(&mapped);
            let probe = range(start, start + more);
            let touched: Vec<_> = mapped.iter().copied().filter(|iova| iova.overlaps(probe)).collect();
            let split = touched.iter().any(|iova| !probe.covers(*iova));
            prop_assert_eq!(table.overlapping(probe).is_some(), !touched.is_empty());
            match table.covered(probe) {
                Ok(covered) => {
                    prop_assert!(!split);
                    prop_assert_eq!(covered.map(|mapping| mapping.iova).collect::<Vec<_>>(), touched);
                }
                Err(WouldSplit) => prop_assert!(split),
            }
        }
    }

    #[test]
    fn the_top_of_the_address_space_can_be_looked_up() {
        let top = range(u64::MAX - 0xfff, u64::MAX);
        let table = table(&[top]);
        assert_eq!(table.covered(IovaRange::ALL).unwrap().count(), 1);
        assert!(table.covered(range(u64::MAX, u64::MAX)).is_err());
        assert!(table.overlapping(range(0, u64::MAX - 0x1000)).is_none());
    }
}
