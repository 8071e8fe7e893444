// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A page table in software: the mappings under a lock, and a tree of what was looked up before that is read without one.
//!
//! The tree has 64 entries a node. An entry is empty, leads to a node below, or translates the whole block of addresses that it
//! stands for, which some mapping covers. It is filled when a lookup misses, under the lock, and emptied under the lock when
//! mappings go; so nothing that is not mapped is ever filled in. Nodes are few: without one left, lookups go through the lock.

use std::sync::{Arc, PoisonError};

use super::arena::{Arena, Node, SLOTS};
use super::sync::{Mutex, wait_for_pins};
use crate::access::Access;
use crate::mapping::{Mapping, MappingTable, SMALLEST_PAGE, WouldSplit};
use crate::range::IovaRange;

const READ: u64 = 1;
const WRITE: u64 = 2;
/// The entry leads to a node.
const NODE: u64 = 4;
/// The entry translates.
const BLOCK: u64 = 8;

/// The bits of an address that a page spans.
const PAGE_SHIFT: u32 = SMALLEST_PAGE.trailing_zeros();
/// The bits of an address that a node resolves.
const NODE_SHIFT: u32 = SLOTS.trailing_zeros();

/// What an address translates to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hit {
    /// The guest-physical address.
    pub physical: u64,
    /// How many bytes from it on belong together; at least one.
    pub length: u64,
    pub access: Access,
}

#[derive(Debug)]
pub(super) struct Table {
    arena: Arc<Arena>,
    /// If there was none left, nothing is cached.
    root: Option<Node>,
    /// The bits of an address that an entry of the root spans.
    root_shift: u32,
    /// How many nodes the tree may have.
    most_nodes: u32,
    truth: Mutex<Truth>,
}

#[derive(Debug)]
struct Truth {
    mappings: MappingTable,
    /// How many nodes the tree has.
    nodes: u32,
}

impl Table {
    /// A table for addresses of so many bits, with no more than `most_nodes` nodes from this arena.
    pub fn new(arena: &Arc<Arena>, address_bits: u32, most_nodes: u32) -> Self {
        let levels = address_bits.saturating_sub(PAGE_SHIFT).div_ceil(NODE_SHIFT).max(1);
        let root = if most_nodes == 0 { None } else { arena.take() };
        Self {
            arena: Arc::clone(arena),
            root,
            root_shift: PAGE_SHIFT + NODE_SHIFT * (levels - 1),
            most_nodes,
            truth: Mutex::new(Truth { mappings: MappingTable::default(), nodes: u32::from(root.is_some()) }),
        }
    }

    /// What an address translates to, if it is mapped. The caller is pinned as long as it makes use of the answer.
    pub fn lookup(&self, iova: u64) -> Option<Hit> {
        match self.root.and_then(|root| self.lookup_in_tree(root, iova)) {
            Some(hit) => Some(hit),
            None => self.lookup_in_truth(iova),
        }
    }

    /// Whether the tree has a place for an address.
    const fn reaches(&self, iova: u64) -> bool {
        iova >> self.root_shift < SLOTS as u64
    }

    fn lookup_in_tree(&self, root: Node, iova: u64) -> Option<Hit> {
        if !self.reaches(iova) {
            return None;
        }
        let (mut node, mut shift) = (root, self.root_shift);
        loop {
            let entry = self.arena.load(node, slot_of(iova, shift));
            if entry & BLOCK != 0 {
                let offset = iova & block_mask(shift);
                let access = Access { read: entry & READ != 0, write: entry & WRITE != 0 };
                let physical = (entry & !(SMALLEST_PAGE - 1)) + offset;
                return Some(Hit { physical, length: block_mask(shift) - offset + 1, access });
            }
            if entry & NODE == 0 {
                return None;
            }
            node = node_of(entry);
            shift = shift.checked_sub(NODE_SHIFT)?;
        }
    }

    /// Looks an address up among the mappings, and has it found in the tree from now on.
    #[cold]
    fn lookup_in_truth(&self, iova: u64) -> Option<Hit> {
        let mut truth = self.truth.lock().unwrap_or_else(PoisonError::into_inner);
        let mapping = truth.mappings.at(iova)?;
        self.fill(&mut truth, mapping, iova);
        let physical = mapping.physical.0 + (iova - mapping.iova.start());
        // A length of 2^64 does not fit; one byte less does no harm.
        let length = (mapping.iova.last() - iova).saturating_add(1);
        Some(Hit { physical, length, access: mapping.access })
    }

    /// Makes an entry for the largest block around an address that a mapping covers.
    fn fill(&self, truth: &mut Truth, mapping: Mapping, iova: u64) {
        let Some(mut node) = self.root.filter(|_| self.reaches(iova)) else { return };
        let mut shift = self.root_shift;
        loop {
            let slot = slot_of(iova, shift);
            let entry = self.arena.load(node, slot);
            if entry & NODE != 0 {
                node = node_of(entry);
            } else {
                let mask = block_mask(shift);
                let block = IovaRange::new(iova & !mask, iova | mask);
                if block.is_some_and(|block| mapping.iova.covers(block)) {
                    let offset = (iova & !mask) - mapping.iova.start();
                    let access = u64::from(mapping.access.read) * READ + u64::from(mapping.access.write) * WRITE;
                    return self.arena.store(node, slot, (mapping.physical.0 + offset) | access | BLOCK);
                }
                if shift == PAGE_SHIFT || truth.nodes >= self.most_nodes {
                    return;
                }
                let Some(below) = self.arena.take() else { return };
                truth.nodes += 1;
                self.arena.store(node, slot, (u64::from(below.number()) << PAGE_SHIFT) | NODE);
                node = below;
            }
            let Some(below) = shift.checked_sub(NODE_SHIFT) else { return };
            shift = below;
        }
    }

    /// Adds a mapping, which overlaps no other and starts at a page, as its physical address does; whether none does.
    pub fn map(&self, mapping: Mapping) -> bool {
        let mut truth = self.truth.lock().unwrap_or_else(PoisonError::into_inner);
        let free = truth.mappings.overlapping(mapping.iova).is_none();
        if free {
            truth.mappings.insert(mapping);
        }
        free
    }

    /// Removes all mappings in a range, and waits until nobody uses them any more; how many bytes that were.
    ///
    /// The caller is not pinned.
    pub fn unmap(&self, iova: IovaRange) -> Result<u64, WouldSplit> {
        let mut unused = Vec::new();
        let bytes = {
            let mut truth = self.truth.lock().unwrap_or_else(PoisonError::into_inner);
            let lengths = truth.mappings.covered(iova)?.map(|mapping| mapping.iova.size());
            let bytes: u128 = lengths.sum();
            truth.mappings.remove(iova);
            self.clear(&mut truth, iova, &mut unused);
            bytes
        };
        // Without the lock: a pinned thread may wait for it.
        wait_for_pins();
        self.arena.give_back(&unused);
        Ok(u64::try_from(bytes).unwrap_or(u64::MAX))
    }

    /// Empties the tree's entries for a range, of which no mapping reaches out, and takes off the nodes that are empty then.
    fn clear(&self, truth: &mut Truth, iova: IovaRange, unused: &mut Vec<Node>) {
        let reach = self.root.filter(|_| self.reaches(iova.start()));
        if let Some(root) = reach {
            let last = if self.reaches(iova.last()) { iova.last() } else { u64::MAX };
            if let Some(iova) = IovaRange::new(iova.start(), last) {
                self.clear_node(root, self.root_shift, iova, unused);
            }
        }
        truth.nodes = truth.nodes.saturating_sub(u32::try_from(unused.len()).unwrap_or(u32::MAX));
    }

    /// Empties a node's entries for a range of addresses that it stands for.
    fn clear_node(&self, node: Node, shift: u32, iova: IovaRange, unused: &mut Vec<Node>) {
        let (first, last) = (slot_of(iova.start(), shift), slot_of(iova.last(), shift));
        let mut slots = self.arena.occupied(node) & (u64::MAX << first) & (u64::MAX >> (SLOTS - 1 - last));
        while slots != 0 {
            let slot = slots.trailing_zeros() as usize;
            slots &= slots - 1;
            let entry = self.arena.load(node, slot);
            if entry & NODE != 0
                && let Some(below_shift) = shift.checked_sub(NODE_SHIFT)
            {
                // What is left and right of it in the range is not below.
                let start = if slot == first { iova.start() } else { 0 };
                let end = if slot == last { iova.last() } else { u64::MAX };
                let below = node_of(entry);
                if let Some(part) = IovaRange::new(start & block_mask(shift), end & block_mask(shift)) {
                    self.clear_node(below, below_shift, part, unused);
                }
                if self.arena.occupied(below) != 0 {
                    continue;
                }
                unused.push(below);
            }
            self.arena.store(node, slot, 0);
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let mut unused = Vec::new();
        let mut truth = self.truth.lock().unwrap_or_else(PoisonError::into_inner);
        self.clear(&mut truth, IovaRange::ALL, &mut unused);
        unused.extend(self.root);
        self.arena.give_back(&unused);
    }
}

/// The bits of an address below those that choose an entry which spans `shift` bits.
const fn block_mask(shift: u32) -> u64 {
    match 1u64.checked_shl(shift) {
        Some(size) => size - 1,
        None => u64::MAX,
    }
}

/// Which entry of a node stands for an address, in a node whose entries span `shift` bits.
const fn slot_of(iova: u64, shift: u32) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "only the lowest bits count")]
    let slot = (iova >> shift) as usize % SLOTS;
    slot
}

const fn node_of(entry: u64) -> Node {
    #[expect(clippy::cast_possible_truncation, reason = "it was made from a node's number")]
    Node::from_number((entry >> PAGE_SHIFT) as u32)
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn table(nodes: u32) -> Table {
        Table::new(&Arc::new(Arena::new(64)), 48, nodes)
    }

    fn map(table: &Table, iova: u64) {
        let iova = IovaRange::from_length(iova, SMALLEST_PAGE).unwrap();
        assert!(table.map(Mapping { iova, physical: GuestAddress(0), access: Access::READ }));
    }

    fn is_in_tree(table: &Table, iova: u64) -> bool {
        table.lookup_in_tree(table.root.unwrap(), iova).is_some()
    }

    #[test]
    fn an_unmap_leaves_the_entries_around_it() {
        let table = table(64);
        let pages = [0x3f_e000, 0x3f_f000, 0x40_0000, 0x40_1000];
        for page in pages {
            map(&table, page);
            assert!(!is_in_tree(&table, page), "it was not looked up yet");
            table.lookup(page).unwrap();
        }
        table.unmap(IovaRange::new(0x3f_f000, 0x40_0fff).unwrap()).unwrap();
        assert_eq!(pages.map(|page| is_in_tree(&table, page)), [true, false, false, true]);
    }

    #[test]
    fn nodes_that_are_not_used_any_more_can_be_used_again() {
        let table = table(7);
        for round in 0..20u64 {
            let page = round << 40;
            map(&table, page);
            table.lookup(page).unwrap();
            assert!(is_in_tree(&table, page), "round {round}");
            table.unmap(IovaRange::from_length(page, SMALLEST_PAGE).unwrap()).unwrap();
        }
    }
}
