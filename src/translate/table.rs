// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A page table in software: the mappings under a lock, and a tree of what was looked up before that is read without one.
//!
//! The tree has 64 entries a node. An entry is empty, leads to a node below, or translates: the whole block of addresses that it
//! stands for, which some mapping covers, or a page in it that is alone there. It is filled when a lookup misses, under the lock,
//! and emptied under the lock when mappings go; so nothing that is not mapped is ever filled in. The tree is as high as the largest
//! address that was looked up needs. Nodes are few: without one left, lookups go through the lock.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::arena::{Arena, Node, SLOTS};
use super::entry::{Entry, PAGE_SHIFT};
use super::sync::{AtomicU64, Mutex, wait_for_pins};
use crate::access::Access;
use crate::mapping::{Mapping, MappingTable, WouldSplit};
use crate::range::IovaRange;

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
    /// A [`Root`].
    root: AtomicU64,
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

/// Where a tree begins.
#[derive(Clone, Copy, Debug)]
struct Root {
    node: Node,
    /// The bits of an address that an entry of the node spans.
    shift: u32,
}

impl Root {
    const fn to_bits(self) -> u64 {
        ((self.node.number() as u64) << 8) | self.shift as u64
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "it was made from a node's number and a shift")]
    const fn from_bits(bits: u64) -> Self {
        Self { node: Node::from_number((bits >> 8) as u32), shift: bits as u32 & 0x3f }
    }

    /// Whether the tree has a place for an address.
    #[inline]
    const fn reaches(self, iova: u64) -> bool {
        iova >> self.shift < SLOTS as u64
    }
}

impl Table {
    /// A table whose tree has no more than `most_nodes` nodes from this arena.
    pub fn new(arena: &Arc<Arena>, most_nodes: u32) -> Self {
        let root = Root { node: Node::NONE, shift: PAGE_SHIFT };
        Self {
            arena: Arc::clone(arena),
            root: AtomicU64::new(root.to_bits()),
            most_nodes,
            truth: Mutex::new(Truth { mappings: MappingTable::default(), nodes: 0 }),
        }
    }

    /// What an address translates to, if it is mapped. The caller is pinned as long as it makes use of the answer.
    #[inline]
    pub fn lookup(&self, iova: u64) -> Option<Hit> {
        match self.lookup_in_tree(iova) {
            Some(hit) => Some(hit),
            None => self.lookup_in_truth(iova),
        }
    }

    #[inline]
    fn root(&self) -> Root {
        Root::from_bits(self.root.load(Ordering::Acquire))
    }

    #[inline]
    fn lookup_in_tree(&self, iova: u64) -> Option<Hit> {
        let root = self.root();
        if !root.reaches(iova) {
            return None;
        }
        let nodes = self.arena.nodes();
        let Root { mut node, mut shift } = root;
        let entry = loop {
            let entry = nodes.load(node, slot_of(iova, shift));
            let Some(below) = entry.as_node() else { break entry };
            node = below;
            // No entry of the lowest nodes leads to another.
            shift = shift.wrapping_sub(NODE_SHIFT) % u64::BITS;
        };
        if !entry.translates() {
            return None;
        }
        let mut mask = block_mask(shift);
        if let Some(index) = entry.lone_page() {
            if (iova & mask) >> PAGE_SHIFT != index {
                return None;
            }
            mask = block_mask(PAGE_SHIFT);
        }
        let offset = iova & mask;
        Some(Hit { physical: entry.physical() + offset, length: mask - offset + 1, access: entry.access() })
    }

    /// Looks an address up among the mappings, and has it found in the tree from now on.
    #[cold]
    #[inline(never)]
    fn lookup_in_truth(&self, iova: u64) -> Option<Hit> {
        let mut truth = self.truth.lock().unwrap_or_else(PoisonError::into_inner);
        let mapping = truth.mappings.at(iova)?;
        self.fill(&mut truth, mapping, iova);
        let physical = mapping.physical.0 + (iova - mapping.iova.start());
        // A length of 2^64 does not fit; one byte less does no harm.
        let length = (mapping.iova.last() - iova).saturating_add(1);
        Some(Hit { physical, length, access: mapping.access })
    }

    /// Makes an entry for the largest block around an address that a mapping covers, unless there is no node for it.
    fn fill(&self, truth: &mut Truth, mapping: Mapping, iova: u64) {
        let Some(Root { mut node, mut shift }) = self.grow(truth, iova) else { return };
        loop {
            let slot = slot_of(iova, shift);
            let entry = self.arena.load(node, slot);
            if let Some(below) = entry.as_node() {
                node = below;
            } else if let Some(entry) = entry_for(mapping, iova, shift, entry) {
                self.arena.count_fill();
                return self.arena.store(node, slot, entry);
            } else {
                let Some(below) = self.take_node(truth) else { return };
                if let Some((slot, entry)) = push_down(entry, shift) {
                    self.arena.store(below, slot, entry);
                }
                self.arena.store(node, slot, Entry::node(below));
                node = below;
            }
            let Some(below) = shift.checked_sub(NODE_SHIFT) else { return };
            shift = below;
        }
    }

    /// Makes the tree so high that it has a place for an address, if there are nodes for it.
    fn grow(&self, truth: &mut Truth, iova: u64) -> Option<Root> {
        let mut root = self.root();
        if root.node == Node::NONE {
            root.node = self.take_node(truth)?;
            self.root.store(root.to_bits(), Ordering::Release);
        }
        // A root whose entries span 60 bits of an address reaches all of them.
        while !root.reaches(iova) {
            // The former root stays what it is: somebody may be in it.
            let node = self.take_node(truth)?;
            self.arena.store(node, 0, Entry::node(root.node));
            root = Root { node, shift: root.shift + NODE_SHIFT };
            self.root.store(root.to_bits(), Ordering::Release);
        }
        Some(root)
    }

    fn take_node(&self, truth: &mut Truth) -> Option<Node> {
        if truth.nodes >= self.most_nodes {
            return None;
        }
        let node = self.arena.take()?;
        truth.nodes += 1;
        Some(node)
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
        let root = self.root();
        let last = if root.reaches(iova.last()) { iova.last() } else { u64::MAX };
        if root.reaches(iova.start())
            && let Some(iova) = IovaRange::new(iova.start(), last)
        {
            self.clear_node(root.node, root.shift, iova, unused);
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
            // What is left and right of it in the range is not in this block.
            let start = if slot == first { iova.start() } else { 0 };
            let end = if slot == last { iova.last() } else { u64::MAX };
            let Some(part) = IovaRange::new(start & block_mask(shift), end & block_mask(shift)) else { continue };
            let entry = self.arena.load(node, slot);
            if let Some(below) = entry.as_node()
                && let Some(below_shift) = shift.checked_sub(NODE_SHIFT)
            {
                self.clear_node(below, below_shift, part, unused);
                if self.arena.occupied(below) != 0 {
                    continue;
                }
                unused.push(below);
            }
            let stays = entry.lone_page().is_some_and(|index| {
                let offset = index << PAGE_SHIFT;
                offset < part.start() || part.last() < offset
            });
            if !stays {
                self.arena.store(node, slot, Entry::EMPTY);
            }
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let mut unused = Vec::new();
        let mut truth = self.truth.lock().unwrap_or_else(PoisonError::into_inner);
        self.clear(&mut truth, IovaRange::ALL, &mut unused);
        unused.extend(Some(self.root().node).filter(|node| *node != Node::NONE));
        self.arena.give_back(&unused);
    }
}

/// The entry that translates an address by a mapping in a block of so many bits, instead of the entry that is there; `None` if
/// there is no such entry.
fn entry_for(mapping: Mapping, iova: u64, shift: u32, there: Entry) -> Option<Entry> {
    let mask = block_mask(shift);
    let physical = |start: u64| mapping.physical.0 + (start - mapping.iova.start());
    if mapping.iova.covers(IovaRange::new(iova & !mask, iova | mask)?) {
        return Some(Entry::block(physical(iova & !mask), mapping.access));
    }
    let is_possible = shift <= Entry::LARGEST_WITH_PAGE && there == Entry::EMPTY;
    let index = (iova & mask) >> PAGE_SHIFT;
    if is_possible { Entry::page(physical(iova & !block_mask(PAGE_SHIFT)), mapping.access, index) } else { None }
}

/// The entry for the page that is alone in a block of so many bits, and its place, in the node below.
fn push_down(entry: Entry, shift: u32) -> Option<(usize, Entry)> {
    let offset = entry.lone_page()? << PAGE_SHIFT;
    let below = shift.checked_sub(NODE_SHIFT)?;
    let index = (offset & block_mask(below)) >> PAGE_SHIFT;
    let entry = if below == PAGE_SHIFT {
        Entry::block(entry.physical(), entry.access())
    } else {
        Entry::page(entry.physical(), entry.access(), index)?
    };
    Some((slot_of(offset, below), entry))
}

/// The bits of an address below those that choose an entry which spans `shift` bits.
#[inline]
const fn block_mask(shift: u32) -> u64 {
    // No shift is more than that of the highest root.
    !(u64::MAX << (shift % u64::BITS))
}

/// Which entry of a node stands for an address, in a node whose entries span `shift` bits.
#[inline]
const fn slot_of(iova: u64, shift: u32) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "only the lowest bits count")]
    let slot = (iova >> shift) as usize % SLOTS;
    slot
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::mapping::SMALLEST_PAGE;

    fn table(nodes: u32) -> Table {
        Table::new(&Arc::new(Arena::new(64)), nodes)
    }

    fn map(table: &Table, iova: u64) {
        let iova = IovaRange::from_length(iova, SMALLEST_PAGE).unwrap();
        assert!(table.map(Mapping { iova, physical: GuestAddress(0), access: Access::READ }));
    }

    fn is_in_tree(table: &Table, iova: u64) -> bool {
        table.lookup_in_tree(iova).is_some()
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
    fn pages_that_are_alone_take_no_nodes_of_their_own() {
        let table = table(64);
        let top = 0x0fff_f000;
        map(&table, top);
        table.lookup(top).unwrap();
        let alone = table.arena.in_use();
        map(&table, 0x0800_0000);
        table.lookup(0x0800_0000).unwrap();
        assert_eq!(table.arena.in_use(), alone, "each in an entry for 16 MiB");
        map(&table, top - 0x1000);
        table.lookup(top - 0x1000).unwrap();
        assert_eq!(table.arena.in_use(), alone + 2, "the entry for 16 MiB, then that for 256 KiB was given up");
        for page in [top, top - 0x1000, 0x0800_0000] {
            assert!(is_in_tree(&table, page));
            assert!(!is_in_tree(&table, page ^ 0x8000));
        }
    }

    #[test]
    fn an_unmap_beside_a_page_that_is_alone_leaves_it() {
        let table = table(64);
        let page = 0x0fff_8000;
        map(&table, page);
        table.lookup(page).unwrap();
        for around in ["ff00000-fff7fff", "fff9000-fffffff"] {
            assert_eq!(table.unmap(around.parse().unwrap()).unwrap(), 0);
            assert!(is_in_tree(&table, page), "{around}");
        }
        table.unmap("fff8000-fff8fff".parse().unwrap()).unwrap();
        assert!(!is_in_tree(&table, page));
    }

    #[test]
    fn a_table_reaches_all_addresses() {
        let table = table(64);
        let pages = [0, 1 << 42, 1 << 48, 1 << 54, 1 << 60, u64::MAX - 0xfff];
        for page in pages {
            map(&table, page);
            table.lookup(page).unwrap();
        }
        assert_eq!(pages.map(|page| is_in_tree(&table, page)), [true; 6]);
    }

    #[test]
    fn a_table_that_found_no_node_uses_one_that_is_given_back() {
        let arena = Arc::new(Arena::new(5));
        let [first, second] = [0, 1].map(|_| Table::new(&arena, 5));
        // Five nodes: three roots, and two for pages side by side.
        let pages = [0x200_0000, 0x200_1000];
        for page in pages {
            map(&first, page);
            first.lookup(page).unwrap();
        }
        assert_eq!(arena.in_use(), 5);
        map(&second, pages[0]);
        second.lookup(pages[0]).unwrap();
        assert!(!is_in_tree(&second, pages[0]));
        drop(first);
        second.lookup(pages[0]).unwrap();
        assert!(is_in_tree(&second, pages[0]));
        second.unmap(IovaRange::ALL).unwrap();
        drop(second);
        // All five are as good as new.
        assert_eq!(arena.in_use(), 0);
        let third = Table::new(&arena, 5);
        for page in pages {
            map(&third, page);
            third.lookup(page).unwrap();
            assert!(is_in_tree(&third, page));
        }
    }

    #[test]
    fn nodes_that_are_not_used_any_more_can_be_used_again() {
        // The roots of lower trees stay below the highest one.
        let table = table(10);
        for round in 0..20u64 {
            let page = round << 40;
            map(&table, page);
            table.lookup(page).unwrap();
            assert!(is_in_tree(&table, page), "round {round}");
            table.unmap(IovaRange::from_length(page, SMALLEST_PAGE).unwrap()).unwrap();
        }
    }
}
