// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The mappings of an I/O address space: disjoint, ordered, by first address.
//!
//! They are kept in leaves of up to 64, each with an array for the first addresses, the last ones and the targets: a search
//! looks at first addresses only, and a range that covers many leaves is removed leaf by leaf.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use vm_memory::GuestAddress;

use crate::access::Access;
use crate::memory::{GuestRam, HostSegment};
use crate::range::{IovaRange, RangeSet};

mod leaf;

use leaf::Leaf;

/// The smallest page that mappings can be made of, in bytes.
pub(crate) const SMALLEST_PAGE: u64 = 1 << 12;

/// What one MAP request made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub iova: IovaRange,
    /// A multiple of the smallest page.
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
pub(crate) struct WouldSplit;

/// Mappings, disjoint and ordered.
#[derive(Debug, Default)]
pub(crate) struct MappingTable {
    /// None of them is empty, and each is under a key that no first address in it is below and every one in the leaves before is.
    leaves: BTreeMap<u64, Box<Leaf>>,
    count: usize,
}

impl MappingTable {
    pub const fn len(&self) -> usize {
        self.count
    }

    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn iter(&self) -> impl Iterator<Item = Mapping> {
        self.leaves.values().flat_map(|leaf| leaf.iter())
    }

    /// The last mapping that starts at this address or before.
    pub fn last_from(&self, address: u64) -> Option<Mapping> {
        // The leaf under the last key may start further on.
        self.leaves.range(..=address).rev().find_map(|(_, leaf)| leaf.last_from(address))
    }

    /// The mapping that an address is in.
    pub fn at(&self, address: u64) -> Option<Mapping> {
        self.last_from(address).filter(|mapping| address <= mapping.iova.last())
    }

    /// A mapping that has an address of `iova` in it: the last one.
    pub fn overlapping(&self, iova: IovaRange) -> Option<Mapping> {
        // Mappings are disjoint: of those that start before the range ends, the last one reaches furthest.
        self.last_from(iova.last()).filter(|before| before.iova.overlaps(iova))
    }

    /// The first of these ranges that a mapping reaches into.
    pub fn overlapping_any(&self, ranges: &RangeSet) -> Option<IovaRange> {
        ranges.ranges().iter().copied().find(|range| self.overlapping(*range).is_some())
    }

    /// Adds a mapping, or lets one grow that starts there; no other one may overlap it.
    pub fn insert(&mut self, mapping: Mapping) {
        let start = mapping.iova.start();
        let Some(key) = self.leaves.range(..=start).next_back().map(|(key, _)| *key) else {
            return self.insert_first(mapping);
        };
        let Some(leaf) = self.leaves.get_mut(&key) else { return };
        if leaf.replace(mapping) {
            return;
        }
        self.count += 1;
        if leaf.insert(mapping) {
            return;
        }
        let mut upper = leaf.split_off(start);
        let into = if upper.first().is_none_or(|first| first <= start) { &mut upper } else { leaf };
        into.insert(mapping);
        if let Some(first) = upper.first() {
            self.leaves.insert(first, upper);
        }
    }

    /// Adds a mapping that comes before all others.
    fn insert_first(&mut self, mapping: Mapping) {
        self.count += 1;
        let mut leaf = match self.leaves.first_entry() {
            Some(entry) if !entry.get().is_full() => entry.remove(),
            _ => Box::default(),
        };
        leaf.insert(mapping);
        self.leaves.insert(mapping.iova.start(), leaf);
    }

    /// The mappings in a range, ascending.
    ///
    /// # Errors
    ///
    /// [`WouldSplit`] if one of them reaches out of the range.
    pub fn covered(&self, iova: IovaRange) -> Result<impl Iterator<Item = Mapping>, WouldSplit> {
        let ends = [self.at(iova.start()), self.at(iova.last())];
        if ends.into_iter().flatten().any(|mapping| !iova.covers(mapping.iova)) {
            return Err(WouldSplit);
        }
        let before = self.leaves.range(..iova.start()).next_back().into_iter();
        let leaves = before.chain(self.leaves.range(iova.start()..=iova.last()));
        Ok(leaves.flat_map(move |(_, leaf)| leaf.starting_in(iova)))
    }

    /// Removes every mapping that starts in a range.
    pub fn remove(&mut self, iova: IovaRange) {
        let mut edges = [None, None];
        let before = self.leaves.range(..iova.start()).next_back().map(|(key, _)| *key);
        if let Some(key) = before {
            self.remove_in_leaf(key, iova);
            edges[0] = Some(key);
        }
        while let Some(key) = self.leaves.range(iova.start()..=iova.last()).next().map(|(key, _)| *key) {
            if !self.remove_in_leaf(key, iova) {
                // The last one, with mappings behind the range.
                edges[1] = Some(key);
                break;
            }
        }
        for key in edges.into_iter().flatten() {
            self.join(key);
        }
    }

    /// Removes every mapping in a leaf that starts in a range; whether that was all, and the leaf is gone.
    fn remove_in_leaf(&mut self, key: u64, iova: IovaRange) -> bool {
        let Some(leaf) = self.leaves.get_mut(&key) else {
            return true;
        };
        self.count -= leaf.remove_starting_in(iova);
        let gone = leaf.is_empty();
        if gone {
            self.leaves.remove(&key);
        }
        gone
    }

    /// If a leaf is nearly empty, joins it with the next one or the one before, so that memory follows the number of mappings.
    fn join(&mut self, key: u64) {
        if self.leaves.get(&key).is_none_or(|leaf| !leaf.is_sparse()) {
            return;
        }
        let next = self.leaves.range(key..).nth(1).map(|(next, _)| (key, *next));
        let before = self.leaves.range(..key).next_back().map(|(before, _)| (*before, key));
        for (low, high) in next.into_iter().chain(before) {
            let Some(upper) = self.leaves.remove(&high) else { continue };
            let Some(leaf) = self.leaves.get_mut(&low) else { continue };
            match leaf.append(upper) {
                None => return,
                Some(upper) => _ = self.leaves.insert(high, upper),
            }
        }
    }

    /// How many bytes all this takes, without what the allocator adds.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        // A node of the tree holds 11 keys and values in 272 bytes, and is at least half full; sorted insertion leaves just that.
        let per_leaf = size_of::<Leaf>() + 272usize.div_ceil(6);
        self.leaves.len() * per_leaf
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(start, last).unwrap()
    }

    fn mapping(iova: IovaRange, physical: u64, access: Access) -> Mapping {
        Mapping { iova, physical: GuestAddress(physical), access }
    }

    fn table(ranges: &[IovaRange]) -> MappingTable {
        let mut table = MappingTable::default();
        for iova in ranges {
            table.insert(mapping(*iova, 0, Access::READ));
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
            prop_assert_eq!(table.overlapping(probe).map(|mapping| mapping.iova), touched.last().copied());
            match table.covered(probe) {
                Ok(covered) => {
                    prop_assert!(!split);
                    prop_assert_eq!(covered.map(|mapping| mapping.iova).collect::<Vec<_>>(), touched);
                }
                Err(WouldSplit) => prop_assert!(split),
            }
        }
    }

    const ACCESSES: [Access; 4] = [Access::NONE, Access::READ, Access::WRITE, Access::READ_WRITE];

    /// Insertions and removals in any order, against a plain map.
    fn compare(steps: impl Iterator<Item = (u64, u64, bool)>, spread: u64) -> MappingTable {
        let mut table = MappingTable::default();
        let mut plain: BTreeMap<u64, Mapping> = BTreeMap::new();
        for (index, (first, more, removes)) in steps.enumerate() {
            let iova = range(first * spread, (first + more) * spread + (spread - 1));
            if removes {
                let inside: Vec<_> = plain.range(iova.start()..=iova.last()).map(|(_, mapping)| *mapping).collect();
                if let Ok(covered) = table.covered(iova) {
                    assert_eq!(covered.collect::<Vec<_>>(), inside);
                }
                table.remove(iova);
                plain.retain(|start, _| !(iova.start()..=iova.last()).contains(start));
            } else if table.overlapping(iova).is_none() {
                let new = mapping(iova, index as u64 * SMALLEST_PAGE, ACCESSES[index % 4]);
                table.insert(new);
                assert_eq!(plain.insert(iova.start(), new), None);
            }
            assert_eq!(table.len(), plain.len());
        }
        assert!(table.iter().eq(plain.values().copied()));
        for address in plain.values().flat_map(|mapping| [mapping.iova.start(), mapping.iova.last()]) {
            let found = plain.range(..=address).next_back().map(|(_, mapping)| *mapping);
            assert_eq!(table.at(address), found);
        }
        // Two leaves side by side have more than a leaf has room for, or the second is not sparse.
        assert!(table.leaves.len() <= plain.len() / Leaf::SPARSE + 1, "{} in {}", plain.len(), table.leaves.len());
        table
    }

    proptest! {
        #[test]
        fn leaves_are_split_and_joined_unseen(
            steps in proptest::collection::vec((0..400u64, 0..3u64, prop::bool::weighted(0.3)), 0..1500),
            wide in proptest::collection::vec((0..400u64, 0..300u64, Just(true)), 0..4),
        ) {
            let middle = steps.len() / 2;
            let (first, second) = steps.split_at(middle);
            let all = first.iter().chain(&wide).chain(second).copied();
            compare(all, u64::MAX / 1024);
        }
    }

    #[test]
    fn memory_follows_the_number_of_mappings() {
        let dense = table(&(0..65536).map(|page| range(page << 12, (page << 12) | 0xfff)).collect::<Vec<_>>());
        assert!(dense.bytes() / 65536 <= 25, "{}", dense.bytes() / 65536);
        // One mapping stays of each leaf that there was.
        let mut table = dense;
        for leaf in 0..1024u64 {
            table.remove(range((leaf << 18) | 0x1000, (leaf << 18) | 0x3_ffff));
        }
        assert_eq!(table.len(), 1024);
        assert!(table.bytes() / 1024 <= 4 * 25, "{}", table.bytes() / 1024);
        // Shuffled.
        let mut page = 0u64;
        let shuffled = (0..65536).map(|_| {
            page = (page * 40961 + 12345) % 65536;
            range(page << 12, (page << 12) | 0xfff)
        });
        let shuffled: Vec<_> = shuffled.collect();
        let table = self::table(&shuffled);
        assert_eq!(table.len(), 65536);
        assert!(table.bytes() / 65536 <= 36, "{}", table.bytes() / 65536);
    }

    #[test]
    fn a_mapping_can_grow() {
        let mut table = table(&[range(0x1000, 0x1fff), range(0x8000, 0x8fff)]);
        table.insert(mapping(range(0x1000, 0x4fff), 0, Access::READ));
        assert_eq!((table.len(), table.at(0x4fff).map(|mapping| mapping.iova)), (2, Some(range(0x1000, 0x4fff))));
    }

    #[test]
    fn the_top_of_the_address_space_can_be_looked_up() {
        let top = range(u64::MAX - 0xfff, u64::MAX);
        let mut table = table(&[top]);
        assert_eq!(table.covered(IovaRange::ALL).unwrap().count(), 1);
        assert!(table.covered(range(u64::MAX, u64::MAX)).is_err());
        assert!(table.overlapping(range(0, u64::MAX - 0x1000)).is_none());
        table.remove(IovaRange::ALL);
        assert!(table.is_empty() && table.leaves.is_empty());
    }
}
