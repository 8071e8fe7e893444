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
#[cfg(test)]
mod tests;

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
    pub fn last_up_to(&self, address: u64) -> Option<Mapping> {
        let Place { leaf, behind } = self.place_behind(address);
        match behind.checked_sub(1) {
            Some(last) => self.leaves.get(leaf)?.leaf.get(last),
            None => self.leaves.get(leaf.checked_sub(1)?)?.leaf.last(),
        }
    }

    /// The mapping that an address is in.
    pub fn at(&self, address: u64) -> Option<Mapping> {
        self.last_up_to(address).filter(|mapping| address <= mapping.iova.last())
    }

    /// A mapping that has an address of `iova` in it: the last one.
    pub fn overlapping(&self, iova: IovaRange) -> Option<Mapping> {
        // Mappings are disjoint: of those that start before the range ends, the last one reaches furthest.
        self.last_up_to(iova.last()).filter(|before| before.iova.overlaps(iova))
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
