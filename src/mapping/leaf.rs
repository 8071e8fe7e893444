// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Up to 64 mappings.

use std::collections::TryReserveError;
use std::ops::{Deref, DerefMut, Range};

use vm_memory::GuestAddress;

use super::{Mapping, SMALLEST_PAGE};
use crate::access::Access;
use crate::range::IovaRange;

const CAPACITY: usize = 64;
const READ: u64 = 1;
const WRITE: u64 = 2;

/// Mappings in ascending order. What lies behind the first `count` of each array means nothing.
#[derive(Debug)]
pub(super) struct Leaf {
    count: usize,
    starts: [u64; CAPACITY],
    lasts: [u64; CAPACITY],
    /// The physical address, with the access in bits that it has not.
    targets: [u64; CAPACITY],
}

impl Default for Leaf {
    fn default() -> Self {
        Self { count: 0, starts: [0; CAPACITY], lasts: [0; CAPACITY], targets: [0; CAPACITY] }
    }
}

/// A leaf in memory of its own.
#[derive(Debug, Default)]
pub(super) struct OwnLeaf(
    /// The one way to ask for memory for a value that can be told that there is none leads over a vector.
    Box<[Leaf; 1]>,
);

impl OwnLeaf {
    /// An empty leaf, if there is memory for it.
    pub fn try_new() -> Result<Self, TryReserveError> {
        let mut room = Vec::new();
        room.try_reserve_exact(1)?;
        room.push(Leaf::default());
        Ok(room.into_boxed_slice().try_into().map_or_else(|_| Self::default(), Self))
    }
}

impl Deref for OwnLeaf {
    type Target = Leaf;

    fn deref(&self) -> &Leaf {
        let [leaf] = self.0.as_ref();
        leaf
    }
}

impl DerefMut for OwnLeaf {
    fn deref_mut(&mut self) -> &mut Leaf {
        let [leaf] = self.0.as_mut();
        leaf
    }
}

#[expect(clippy::indexing_slicing, reason = "the count is never more than there is room for, and places are below it")]
impl Leaf {
    /// With fewer mappings than this a leaf is joined with a neighbour, if both fit in one.
    pub const SPARSE: usize = CAPACITY / 4;

    pub const fn len(&self) -> usize {
        self.count
    }

    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub const fn is_full(&self) -> bool {
        self.count == CAPACITY
    }

    pub const fn is_sparse(&self) -> bool {
        self.count < Self::SPARSE
    }

    /// The first address of a mapping.
    pub fn start(&self, place: usize) -> Option<u64> {
        self.starts().get(place).copied()
    }

    pub fn last(&self) -> Option<Mapping> {
        self.get(self.count.checked_sub(1)?)
    }

    pub fn iter(&self) -> impl Iterator<Item = Mapping> {
        self.mappings(0..self.count)
    }

    /// How many mappings start at this address or before. What is likely is tried first.
    pub fn count_up_to(&self, address: u64, likely: usize) -> usize {
        let starts = self.starts();
        let up_to = |place: usize| starts.get(place).is_some_and(|start| *start <= address);
        if likely <= self.count && !up_to(likely) && likely.checked_sub(1).is_none_or(up_to) {
            return likely;
        }
        starts.partition_point(|start| *start <= address)
    }

    pub fn mappings(&self, places: Range<usize>) -> impl Iterator<Item = Mapping> {
        places.filter_map(|place| self.get(place))
    }

    pub fn get(&self, place: usize) -> Option<Mapping> {
        let iova = IovaRange::new(self.start(place)?, self.lasts[place])?;
        let target = self.targets[place];
        let access = Access { read: target & READ != 0, write: target & WRITE != 0 };
        Some(Mapping { iova, physical: GuestAddress(target & !(SMALLEST_PAGE - 1)), access })
    }

    /// Puts a mapping in the place of the last of so many, if that starts where it does; whether it does.
    pub fn replace(&mut self, behind: usize, mapping: Mapping) -> bool {
        let Some(place) = behind.checked_sub(1).filter(|place| self.starts[*place] == mapping.iova.start()) else {
            return false;
        };
        self.set(place, mapping);
        true
    }

    /// Adds a mapping behind so many, where it belongs; the leaf is not full.
    pub fn insert(&mut self, behind: usize, mapping: Mapping) {
        for array in [&mut self.starts, &mut self.lasts, &mut self.targets] {
            array.copy_within(behind..self.count, behind + 1);
        }
        self.count += 1;
        self.set(behind, mapping);
    }

    /// Makes room for a mapping behind so many: moves the upper half to an empty leaf, or nothing if it comes after all others, so
    /// that leaves filled in order stay full.
    pub fn split_off(&mut self, behind: usize, upper: &mut Self) {
        let from = if behind == self.count { self.count } else { self.count / 2 };
        upper.take(self, from..self.count);
        self.count = from;
    }

    /// Adds the mappings of the next leaf, if there is room for them.
    pub fn append(&mut self, next: &Self) -> bool {
        // Some room is left: a leaf that is split and joined in turn costs.
        let fits = self.count + next.count <= CAPACITY * 3 / 4;
        if fits {
            self.take(next, 0..next.count);
        }
        fits
    }

    /// Removes mappings; how many there were.
    pub fn remove(&mut self, places: Range<usize>) -> usize {
        let end = places.end.min(self.count);
        for array in [&mut self.starts, &mut self.lasts, &mut self.targets] {
            array.copy_within(end..self.count, places.start);
        }
        self.count -= end - places.start;
        end - places.start
    }

    fn starts(&self) -> &[u64] {
        &self.starts[..self.count]
    }

    fn set(&mut self, place: usize, mapping: Mapping) {
        let Mapping { iova, physical, access } = mapping;
        self.starts[place] = iova.start();
        self.lasts[place] = iova.last();
        self.targets[place] = physical.0 | (u64::from(access.read) * READ) | (u64::from(access.write) * WRITE);
    }

    /// Copies mappings of another leaf behind its own.
    fn take(&mut self, other: &Self, places: Range<usize>) {
        let to = self.count..self.count + places.len();
        self.starts[to.clone()].copy_from_slice(&other.starts[places.clone()]);
        self.lasts[to.clone()].copy_from_slice(&other.lasts[places.clone()]);
        self.targets[to.clone()].copy_from_slice(&other.targets[places.clone()]);
        self.count = to.end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: usize) -> Mapping {
        let start = number as u64 * SMALLEST_PAGE;
        let iova = IovaRange::new(start, start + SMALLEST_PAGE - 1).unwrap();
        Mapping { iova, physical: GuestAddress(start), access: Access::READ }
    }

    /// A leaf with every other page from one on.
    fn leaf(from: usize, count: usize) -> Leaf {
        let mut leaf = Leaf::default();
        for place in 0..count {
            leaf.insert(place, page(from + 2 * place));
        }
        leaf
    }

    fn pages(leaf: &Leaf) -> Vec<u64> {
        leaf.iter().map(|mapping| mapping.iova.start() / SMALLEST_PAGE).collect()
    }

    #[test]
    fn sizes() {
        for count in 0..=CAPACITY {
            let leaf = leaf(0, count);
            assert_eq!(leaf.len(), count);
            assert_eq!((leaf.is_empty(), leaf.is_sparse(), leaf.is_full()), (count == 0, count < 16, count == 64));
            assert_eq!(leaf.start(count), None);
            assert_eq!(leaf.last(), count.checked_sub(1).map(|last| page(2 * last)));
        }
    }

    #[test]
    fn what_is_likely_changes_no_count() {
        let leaf = leaf(1, 5);
        for address in (0..12u64).map(|number| number * SMALLEST_PAGE) {
            let count = leaf.iter().filter(|mapping| mapping.iova.start() <= address).count();
            for likely in 0..8 {
                assert_eq!(leaf.count_up_to(address, likely), count, "{address:#x}, {likely}");
            }
        }
    }

    #[test]
    fn one_is_put_where_it_belongs() {
        for behind in 0..=8 {
            let mut leaf = leaf(1, 8);
            leaf.insert(behind, page(2 * behind));
            let mut expected: Vec<u64> = (0..8).map(|place| 2 * place + 1).collect();
            expected.insert(behind, 2 * behind as u64);
            assert_eq!(pages(&leaf), expected);
        }
    }

    #[test]
    fn only_the_one_before_is_replaced() {
        let mut leaf = leaf(0, 3);
        let grown = Mapping { access: Access::READ_WRITE, ..page(2) };
        for behind in [0, 1, 3] {
            assert!(!leaf.replace(behind, grown));
        }
        assert!(leaf.replace(2, grown));
        assert_eq!(leaf.iter().collect::<Vec<_>>(), [page(0), grown, page(4)]);
    }

    #[test]
    fn any_are_removed() {
        for first in 0..6 {
            for end in first..=6 {
                let mut leaf = leaf(0, 6);
                assert_eq!(leaf.remove(first..end), end - first);
                let mut expected: Vec<u64> = (0..6).map(|place| 2 * place).collect();
                expected.drain(first..end);
                assert_eq!(pages(&leaf), expected);
            }
        }
        let mut leaf = leaf(0, 6);
        assert_eq!(leaf.remove(2..usize::MAX), 4);
        assert_eq!(pages(&leaf), [0, 2]);
    }

    #[test]
    fn the_upper_half_is_split_off_but_for_one_that_comes_last() {
        for (behind, kept) in [(0, 32), (32, 32), (63, 32), (64, 64)] {
            let (mut lower, mut upper) = (leaf(0, CAPACITY), Leaf::default());
            lower.split_off(behind, &mut upper);
            assert_eq!((lower.len(), upper.len()), (kept, CAPACITY - kept));
            assert_eq!([pages(&lower), pages(&upper)].concat(), pages(&leaf(0, CAPACITY)));
        }
    }

    #[test]
    fn two_are_joined_that_leave_a_quarter_free() {
        let mut lower = leaf(0, 10);
        assert!(!lower.append(&leaf(20, 39)));
        assert_eq!(pages(&lower), pages(&leaf(0, 10)));
        assert!(lower.append(&leaf(20, 38)));
        assert_eq!(pages(&lower), pages(&leaf(0, 48)));
    }
}
