// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The mappings of an I/O address space: disjoint, ordered, by first address.
//!
//! They are kept in leaves of up to 64, each with an array for the first addresses, the last ones and the targets: a search
//! looks at first addresses only, and a range that covers many leaves is removed leaf by leaf.

#![forbid(unsafe_code)]

use std::collections::TryReserveError;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::GuestAddress;

use crate::access::Access;
use crate::memory::{GuestRam, HostSegment};
use crate::range::{IovaRange, RangeSet};

mod leaf;

use leaf::OwnLeaf;

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

    /// Puts [`segments`](Self::segments) in the place of whatever is there; whether there are any.
    pub fn put_segments(&self, ram: &GuestRam, segments: &mut Vec<HostSegment>) -> bool {
        let length = self.iova.length().filter(|_| !self.access.is_none());
        length.is_some_and(|length| ram.put_segments(self.physical, length, segments))
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
    /// In order. They are few (a million mappings are in 16 to 64 thousand of them) and seldom come and go, so moving what is
    /// behind one costs less than a tree above them.
    leaves: Vec<Entry>,
    /// Memory for the next leaf, taken before it is known whether it is needed.
    spare: Option<OwnLeaf>,
    count: usize,
    recent: Recent,
}

/// A leaf, which is not empty.
#[derive(Debug)]
struct Entry {
    /// No first address in the leaf is below, and every one in the leaves before is.
    from: u64,
    leaf: OwnLeaf,
}

/// A place for a mapping: in which leaf, and behind how many mappings there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    leaf: usize,
    behind: usize,
}

/// Where a search ended last. The next one is likely to end there too, so it is tried first; any value does.
#[derive(Debug, Default)]
struct Recent {
    leaf: AtomicUsize,
    behind: AtomicUsize,
}

impl Recent {
    fn get(&self) -> Place {
        Place { leaf: self.leaf.load(Ordering::Relaxed), behind: self.behind.load(Ordering::Relaxed) }
    }

    fn set(&self, place: Place) {
        self.leaf.store(place.leaf, Ordering::Relaxed);
        self.behind.store(place.behind, Ordering::Relaxed);
    }
}

impl MappingTable {
    pub const fn len(&self) -> usize {
        self.count
    }

    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn iter(&self) -> impl Iterator<Item = Mapping> {
        self.leaves.iter().flat_map(|entry| entry.leaf.iter())
    }

    /// The place behind all mappings that start at this address or before.
    fn place_behind(&self, address: u64) -> Place {
        let recent = self.recent.get();
        let can_be_in = |leaf: usize| self.leaves.get(leaf).is_some_and(|entry| entry.from <= address);
        let leaf = if can_be_in(recent.leaf) && !can_be_in(recent.leaf + 1) {
            recent.leaf
        } else {
            self.leaves.partition_point(|entry| entry.from <= address).saturating_sub(1)
        };
        let behind = self.leaves.get(leaf).map_or(0, |entry| entry.leaf.count_up_to(address, recent.behind));
        let place = Place { leaf, behind };
        self.recent.set(place);
        place
    }

    /// The place before all mappings that start at this address or behind.
    fn place_before(&self, address: u64) -> Place {
        let mut place = self.place_behind(address);
        let last = place.behind.checked_sub(1).filter(|last| self.starts_at(place.leaf, *last) == Some(address));
        place.behind = last.unwrap_or(place.behind);
        place
    }

    fn starts_at(&self, leaf: usize, place: usize) -> Option<u64> {
        self.leaves.get(leaf)?.leaf.start(place)
    }

    /// The last mapping that starts at this address or before.
    pub fn last_from(&self, address: u64) -> Option<Mapping> {
        let Place { leaf, behind } = self.place_behind(address);
        match behind.checked_sub(1) {
            Some(last) => self.leaves.get(leaf)?.leaf.get(last),
            None => self.leaves.get(leaf.checked_sub(1)?)?.leaf.last(),
        }
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

    /// Whether there is memory for one more mapping, wherever it is.
    pub fn has_room(&self) -> bool {
        self.spare.is_some() && self.leaves.len() < self.leaves.capacity()
    }

    /// Takes memory for one more mapping, so that adding it cannot fail.
    pub fn make_room(&mut self) -> Result<(), TryReserveError> {
        self.leaves.try_reserve(1)?;
        if self.spare.is_none() {
            self.spare = Some(OwnLeaf::try_new()?);
        }
        Ok(())
    }

    /// Adds a mapping, or lets one grow that starts there; no other one may overlap it. Whether there is one more.
    pub fn insert(&mut self, mapping: Mapping) -> bool {
        let start = mapping.iova.start();
        let mut place = self.place_behind(start);
        let Some(entry) = self.leaves.get_mut(place.leaf) else {
            let leaf = self.spare.take().unwrap_or_default();
            self.leaves.push(Entry { from: start, leaf });
            return self.insert(mapping);
        };
        if entry.leaf.replace(place.behind, mapping) {
            return false;
        }
        entry.from = entry.from.min(start);
        if entry.leaf.is_full() {
            place = self.split(place, start);
        }
        if let Some(entry) = self.leaves.get_mut(place.leaf) {
            entry.leaf.insert(place.behind, mapping);
            self.count += 1;
        }
        // Mappings often come in order.
        self.recent.set(Place { behind: place.behind + 1, ..place });
        true
    }

    /// Makes room in a leaf that is full; where the place is then, for a mapping that starts there.
    fn split(&mut self, place: Place, start: u64) -> Place {
        let Some(entry) = self.leaves.get_mut(place.leaf) else { return place };
        let mut upper = self.spare.take().unwrap_or_default();
        entry.leaf.split_off(place.behind, &mut upper);
        let kept = entry.leaf.len();
        let from = upper.start(0).unwrap_or(start);
        self.leaves.insert(place.leaf + 1, Entry { from, leaf: upper });
        // Between the two it goes to the upper one, if that is empty.
        match place.behind.checked_sub(kept) {
            Some(behind) if start >= from => Place { leaf: place.leaf + 1, behind },
            _ => place,
        }
    }

    /// The mappings in a range, ascending.
    ///
    /// # Errors
    ///
    /// [`WouldSplit`] if one of them reaches out of the range.
    pub fn covered(&self, iova: IovaRange) -> Result<impl Iterator<Item = Mapping>, WouldSplit> {
        let ends = [self.at(iova.last()), self.at(iova.start())];
        if ends.into_iter().flatten().any(|mapping| !iova.covers(mapping.iova)) {
            return Err(WouldSplit);
        }
        let (first, end) = (self.place_before(iova.start()), self.place_behind(iova.last()));
        let leaves = self.leaves.get(first.leaf..=end.leaf).unwrap_or_default();
        Ok((first.leaf..).zip(leaves).flat_map(move |(leaf, entry)| {
            let from = if leaf == first.leaf { first.behind } else { 0 };
            let to = if leaf == end.leaf { end.behind } else { entry.leaf.len() };
            entry.leaf.mappings(from..to)
        }))
    }

    /// The mappings that reach to an address or start behind it, ascending.
    pub fn from(&self, address: u64) -> impl Iterator<Item = Mapping> {
        let reaching = self.at(address).filter(|mapping| mapping.iova.start() < address);
        let first = self.place_before(address);
        let behind = self.leaves.iter().enumerate().skip(first.leaf).flat_map(move |(leaf, entry)| {
            let from = if leaf == first.leaf { first.behind } else { 0 };
            entry.leaf.mappings(from..entry.leaf.len())
        });
        reaching.into_iter().chain(behind)
    }

    /// Removes every mapping that starts in a range; how many.
    pub fn remove(&mut self, iova: IovaRange) -> usize {
        let before = self.count;
        let (first, end) = (self.place_before(iova.start()), self.place_behind(iova.last()));
        if first.leaf == end.leaf {
            self.remove_in_leaf(first.leaf, first.behind..end.behind);
        } else {
            // All leaves between the first and the last one are gone with what they have.
            self.remove_in_leaf(first.leaf, first.behind..usize::MAX);
            self.remove_in_leaf(end.leaf, 0..end.behind);
            let gone = self.leaves.drain(first.leaf + 1..end.leaf);
            self.count -= gone.map(|entry| entry.leaf.len()).sum::<usize>();
            self.tidy(first.leaf + 1);
        }
        self.tidy(first.leaf);
        if self.leaves.len() < self.leaves.capacity() / 4 {
            self.leaves.shrink_to(self.leaves.len() * 2);
        }
        before - self.count
    }

    fn remove_in_leaf(&mut self, leaf: usize, places: Range<usize>) {
        if let Some(entry) = self.leaves.get_mut(leaf) {
            self.count -= entry.leaf.remove(places);
        }
    }

    /// Gives up a leaf that is empty. Joins one that is nearly so with the next one or the one before, so that memory follows the
    /// number of mappings.
    fn tidy(&mut self, leaf: usize) {
        match self.leaves.get(leaf) {
            Some(entry) if entry.leaf.is_empty() => _ = self.leaves.remove(leaf),
            Some(entry) if entry.leaf.is_sparse() => {
                for low in [Some(leaf), leaf.checked_sub(1)].into_iter().flatten() {
                    if let Some([lower, upper]) = self.leaves.get_mut(low..).and_then(<[_]>::first_chunk_mut)
                        && lower.leaf.append(&upper.leaf)
                    {
                        self.leaves.remove(low + 1);
                        return;
                    }
                }
            }
            _ => (),
        }
    }

    /// How many bytes all this takes, without what the allocator adds.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.leaves.len() * size_of::<leaf::Leaf>() + self.leaves.capacity() * size_of::<Entry>()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::leaf::Leaf;
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
            let behind = mapped.iter().copied().filter(|iova| iova.last() >= start);
            prop_assert_eq!(table.from(start).map(|mapping| mapping.iova).collect::<Vec<_>>(), behind.collect::<Vec<_>>());
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

    fn page(number: u64) -> IovaRange {
        range(number << 12, (number << 12) | 0xfff)
    }

    /// How many mappings each leaf has.
    fn leaves(table: &MappingTable) -> Vec<usize> {
        table.leaves.iter().map(|entry| entry.leaf.len()).collect()
    }

    #[test]
    fn the_next_search_is_likely_to_end_where_the_last_one_did() {
        let mut table = table(&(0..100).map(|number| page(2 * number)).collect::<Vec<_>>());
        assert_eq!(leaves(&table), [64, 36]);
        assert_eq!(table.recent.get(), Place { leaf: 1, behind: 36 });
        table.at(0x4000);
        assert_eq!(table.recent.get(), Place { leaf: 0, behind: 3 });
        // In the leaf that is full, between the two halves, which it goes to the lower one of.
        table.insert(mapping(page(63), 0, Access::READ));
        assert_eq!((leaves(&table), table.recent.get()), (vec![33, 32, 36], Place { leaf: 0, behind: 33 }));
        table.insert(mapping(page(65), 0, Access::READ));
        assert_eq!((leaves(&table), table.recent.get()), (vec![33, 33, 36], Place { leaf: 1, behind: 2 }));
        assert!(table.iter().map(|mapping| mapping.iova.start()).is_sorted());
    }

    #[test]
    fn leaves_that_lose_most_are_joined_with_a_neighbour() {
        let full = || table(&(0..192).map(page).collect::<Vec<_>>());
        let mut table = full();
        assert_eq!(leaves(&table), [64, 64, 64]);
        // The middle one becomes sparse, and both neighbours are full.
        table.remove(range(64 << 12, (114 << 12) - 1));
        assert_eq!(leaves(&table), [64, 14, 64]);
        // The next one can take it now, or the one before.
        table.remove(range(160 << 12, (192 << 12) - 1));
        assert_eq!(leaves(&table), [64, 14, 32]);
        table.remove(range(114 << 12, (115 << 12) - 1));
        assert_eq!(leaves(&table), [64, 45]);
        let mut table = full();
        table.remove(range(30 << 12, (64 << 12) - 1));
        table.remove(range(64 << 12, (114 << 12) - 1));
        assert_eq!(leaves(&table), [44, 64]);
        // From the middle of one to the middle of another: both are joined, and what was between them is gone.
        let mut table = full();
        table.remove(range(10 << 12, (180 << 12) - 1));
        assert_eq!(leaves(&table), [22]);
        assert_eq!(table.len(), 22);
    }

    #[test]
    fn memory_for_leaves_is_given_back() {
        let mut table = table(&(0..64 * 64).map(page).collect::<Vec<_>>());
        let before = table.leaves.capacity();
        table.remove(range(16 << 18, (64 << 18) - 1));
        assert_eq!((table.leaves.len(), table.leaves.capacity()), (16, before), "a quarter is in use");
        table.remove(range(15 << 18, (16 << 18) - 1));
        assert_eq!((table.leaves.len(), table.leaves.capacity()), (15, 30));
    }

    #[test]
    fn room_is_for_one_mapping_wherever_it_is() {
        let mut table = MappingTable::default();
        assert!(!table.has_room());
        table.make_room().unwrap();
        assert!(table.has_room());
        table.insert(mapping(page(0), 0, Access::READ));
        assert!(!table.has_room(), "its leaf was the spare one");
        table.make_room().unwrap();
        table.insert(mapping(page(1), 0, Access::READ));
        assert!(table.has_room(), "there was room in the leaf");
        while table.leaves.len() < table.leaves.capacity() {
            table.make_room().unwrap();
            table.insert(mapping(page(table.len() as u64), 0, Access::READ));
        }
        table.spare = Some(OwnLeaf::default());
        assert!(!table.has_room(), "the list of leaves is full");
        table.make_room().unwrap();
        assert!(table.has_room());
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
