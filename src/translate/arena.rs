// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Nodes of the trees that translations are cached in: a fixed number of them, for all trees together.
//!
//! Nodes are known by their numbers, so that nothing that is read from one can lead out of the arena. Memory is taken from the
//! system as nodes come into use.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::entry::Entry;
use super::sync::{AtomicU64, Mutex};

/// How many entries a node has: as many as a bitmap has bits.
pub(super) const SLOTS: usize = 64;

/// The number of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Node(u32);

impl Node {
    /// No node.
    pub const NONE: Self = Self(u32::MAX);

    pub const fn number(self) -> u32 {
        self.0
    }

    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }
}

#[derive(Debug)]
pub(super) struct Arena {
    entries: Box<[AtomicU64]>,
    /// For each node, which of its entries are not zero. Only looked at under the lock of the tree that has the node.
    occupied: Box<[AtomicU64]>,
    free: Mutex<Free>,
    /// How often an address was put into a tree. Nothing is ordered by it, so that the model checker need not know.
    fills: std::sync::atomic::AtomicU64,
}

#[derive(Debug)]
struct Free {
    returned: Vec<Node>,
    /// The first one that was never used.
    next: u32,
}

impl Arena {
    /// An arena of so many nodes.
    pub fn new(nodes: u32) -> Self {
        let count = nodes as usize;
        let free = Mutex::new(Free { returned: Vec::new(), next: 0 });
        Self { entries: zeroed(count.saturating_mul(SLOTS)), occupied: zeroed(count), free, fills: 0.into() }
    }

    /// A node without entries, if one is left.
    pub fn take(&self) -> Option<Node> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = free.returned.pop() {
            return Some(node);
        }
        let node = Node(free.next);
        self.occupied.get(node.0 as usize)?;
        free.next += 1;
        Some(node)
    }

    /// Takes nodes back, none of which has an entry, and none of which anybody can reach any more.
    pub fn give_back(&self, nodes: &[Node]) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).returned.extend_from_slice(nodes);
    }

    /// All nodes, to look at more than one.
    #[inline]
    pub fn nodes(&self) -> Nodes<'_> {
        Nodes(&self.entries)
    }

    /// An entry; an empty one if there is no such node.
    pub fn load(&self, node: Node, slot: usize) -> Entry {
        self.nodes().load(node, slot)
    }

    pub fn store(&self, node: Node, slot: usize, value: Entry) {
        if let Some((entry, occupied)) = self.entries.get(place(node, slot)).zip(self.occupied.get(node.0 as usize)) {
            entry.store(value.to_bits(), Ordering::Release);
            let bit = 1 << slot;
            let before = occupied.load(Ordering::Relaxed);
            occupied.store(if value == Entry::EMPTY { before & !bit } else { before | bit }, Ordering::Relaxed);
        }
    }

    /// Which entries of a node are not zero.
    pub fn occupied(&self, node: Node) -> u64 {
        self.occupied.get(node.0 as usize).map_or(0, |occupied| occupied.load(Ordering::Relaxed))
    }

    /// How many nodes are in use.
    pub fn in_use(&self) -> usize {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        (free.next as usize).saturating_sub(free.returned.len())
    }

    /// Counts an address that is put into a tree.
    pub fn count_fill(&self) {
        self.fills.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// How often that was.
    pub fn fills(&self) -> u64 {
        self.fills.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// The nodes of an arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nodes<'a>(&'a [AtomicU64]);

impl Nodes<'_> {
    /// An entry; an empty one if there is no such node.
    #[inline]
    pub fn load(self, node: Node, slot: usize) -> Entry {
        // Acquire: the node that it leads to is seen as it was when the entry was made.
        self.0.get(place(node, slot)).map_or(Entry::EMPTY, |entry| Entry::from_bits(entry.load(Ordering::Acquire)))
    }
}

#[inline]
const fn place(node: Node, slot: usize) -> usize {
    node.0 as usize * SLOTS + slot
}

/// Zeroes that the system provides as they are looked at.
#[cfg(not(loom))]
fn zeroed(count: usize) -> Box<[AtomicU64]> {
    bytemuck::allocation::zeroed_slice_box(count)
}

#[cfg(loom)]
fn zeroed(count: usize) -> Box<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}
