// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Up to 64 mappings.

use std::ops::Range;

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

/// What came of a mapping that was to be inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Insertion {
    /// There is one more.
    Added,
    /// It took the place of one that starts where it does.
    Replaced,
    /// The leaf is full.
    NoRoom,
}

impl Default for Leaf {
    fn default() -> Self {
        Self { count: 0, starts: [0; CAPACITY], lasts: [0; CAPACITY], targets: [0; CAPACITY] }
    }
}

#[expect(clippy::indexing_slicing, reason = "the count is never more than there is room for, and places are below it")]
impl Leaf {
    /// With fewer mappings than this a leaf is joined with a neighbour, if both fit in one.
    pub const SPARSE: usize = CAPACITY / 4;

    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    const fn is_full(&self) -> bool {
        self.count == CAPACITY
    }

    pub const fn len(&self) -> usize {
        self.count
    }

    pub const fn is_sparse(&self) -> bool {
        self.count < Self::SPARSE
    }

    /// The first address of the first mapping.
    pub fn first(&self) -> Option<u64> {
        self.starts().first().copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = Mapping> {
        self.mappings(0..self.count)
    }

    /// The mappings that start in a range.
    pub fn starting_in(&self, iova: IovaRange) -> impl Iterator<Item = Mapping> {
        self.mappings(self.places_in(iova))
    }

    /// The last mapping that starts at this address or before.
    pub fn last_from(&self, address: u64) -> Option<Mapping> {
        self.get(self.place_after(address).checked_sub(1)?)
    }

    /// Adds a mapping, if there is room for it, or puts it in the place of one that starts where it does.
    pub fn insert(&mut self, mapping: Mapping) -> Insertion {
        let start = mapping.iova.start();
        let place = self.place_after(start);
        if let Some(before) = place.checked_sub(1).filter(|before| self.starts[*before] == start) {
            self.set(before, mapping);
            return Insertion::Replaced;
        }
        if self.is_full() {
            return Insertion::NoRoom;
        }
        for array in [&mut self.starts, &mut self.lasts, &mut self.targets] {
            array.copy_within(place..self.count, place + 1);
        }
        self.count += 1;
        self.set(place, mapping);
        Insertion::Added
    }

    /// Makes room for a mapping that starts here: takes the upper half off, or nothing if it comes after all others, so that
    /// leaves filled in order stay full.
    pub fn split_off(&mut self, start: u64) -> Box<Self> {
        let from = if self.place_after(start) == self.count { self.count } else { self.count / 2 };
        let mut upper = Box::<Self>::default();
        upper.take(self, from..self.count);
        self.count = from;
        upper
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

    /// Removes the mappings that start in a range; how many.
    pub fn remove_starting_in(&mut self, iova: IovaRange) -> usize {
        let places = self.places_in(iova);
        for array in [&mut self.starts, &mut self.lasts, &mut self.targets] {
            array.copy_within(places.end..self.count, places.start);
        }
        self.count -= places.len();
        places.len()
    }

    fn starts(&self) -> &[u64] {
        &self.starts[..self.count]
    }

    /// Where a mapping that starts behind this address would be.
    fn place_after(&self, address: u64) -> usize {
        self.starts().partition_point(|start| *start <= address)
    }

    /// Where the mappings are that start in a range.
    fn places_in(&self, iova: IovaRange) -> Range<usize> {
        self.starts().partition_point(|start| *start < iova.start())..self.place_after(iova.last())
    }

    fn mappings(&self, places: Range<usize>) -> impl Iterator<Item = Mapping> {
        places.filter_map(|place| self.get(place))
    }

    fn get(&self, place: usize) -> Option<Mapping> {
        let iova = IovaRange::new(self.starts[place], self.lasts[place])?;
        let target = self.targets[place];
        let access = Access { read: target & READ != 0, write: target & WRITE != 0 };
        Some(Mapping { iova, physical: GuestAddress(target & !(SMALLEST_PAGE - 1)), access })
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
