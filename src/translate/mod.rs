// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Translation in software, for devices that are emulated in this process.
//!
//! A [`Translation`] makes groups of endpoints ([`EmulatedGroup`]) for the device to attach, and each endpoint has a
//! [`Translator`] that its emulated device asks, from any thread. Lookups take no lock: what was looked up before is found in a
//! tree of atomics. What a device holds while it makes use of an answer is a [`Pinned`]; it is had once for a descriptor chain.
//!
//! # What UNMAP promises
//!
//! When UNMAP is answered with OK, every use of a translation in its range that had begun is over, and none can begin; the same
//! holds for DETACH, for ATTACH to another domain, and for memory that leaves. It is a barrier: the request waits for whoever is
//! pinned then, by any [`Translation`] of the process, so nobody should be for longer than it takes to copy something, and no
//! thread that is pinned may call the device. This holds for [`Translator::with_translation`] and [`IovaMemory`], whose slices
//! cannot outlive it, and for whoever keeps translations as a [`TranslationCache`], which is told to forget them before the
//! answer. It does not hold for [`IommuAdapter`], which has no say in how long its caller keeps a slice.
//!
//! # Locks
//!
//! A thread that translates takes, where the tree does not have the answer, the lock of its table's mappings and under it that of the
//! free nodes; that of the refused accesses, to report one; and nothing else. Neither is held while anybody waits: who unmaps waits for
//! pins, and calls caches, after it let go of the mappings. Whatever lock the device is behind comes before these, and no thread that is
//! pinned takes that.
//!
//! # Memory
//!
//! The tree is filled as addresses are looked up, from a fixed number of nodes for the whole translation ([`Limits`]), so that no
//! guest can have it grow. Where there is no node left, lookups take a lock and search the mappings.

#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::id::EndpointId;
use crate::range::IovaRange;

mod adapter;
mod arena;
mod cache;
mod entry;
mod group;
mod memory;
#[cfg(loom)]
#[cfg(test)]
mod model;
mod sync;
mod table;
#[cfg(not(loom))]
#[cfg(test)]
mod tests;
mod translator;
#[cfg(feature = "vhost")]
pub mod vhost;

use arena::Arena;
use cache::Caches;
use table::Table;

pub use adapter::IommuAdapter;
pub use cache::TranslationCache;
pub use group::EmulatedGroup;
pub use memory::IovaMemory;
pub use translator::{Pinned, Segment, Segments, TranslationFault, Translator};

/// How much a [`Translation`] may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many bits addresses have, from 12 to 64: 48 by default. What lies behind cannot be mapped.
    pub address_bits: u32,
    /// How many nodes of 520 bytes there are for all domains; 262144 by default, which is 130 MiB if a guest uses them all. A node
    /// serves 256 KiB of addresses that are mapped page by page.
    pub nodes: u32,
    /// How many of them a domain may have; half by default.
    pub nodes_per_domain: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { address_bits: 48, nodes: 1 << 18, nodes_per_domain: 1 << 17 }
    }
}

/// What a [`Translation`] uses of its [`Limits`], and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// How many addresses, one by one or in blocks, were looked up in vain and then put where the next lookup finds them.
    pub fills: u64,
    /// How many nodes of all domains are in use now.
    pub nodes: usize,
}

/// Translates for the emulated endpoints of a VM.
#[derive(Debug)]
pub struct Translation {
    limits: Limits,
    arena: Arc<Arena>,
    caches: Caches,
}

impl Translation {
    /// A translation without groups.
    ///
    /// # Panics
    ///
    /// There is no room for the nodes among the addresses of this process. (Memory is taken as they come into use.)
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, arena: Arc::new(Arena::new(limits.nodes)), caches: Caches::default() })
    }

    /// A group of endpoints, which the guest cannot isolate from each other; usually just one.
    pub fn group(self: &Arc<Self>, members: Vec<EndpointId>) -> EmulatedGroup {
        EmulatedGroup::new(Arc::clone(self), members)
    }

    /// How much is used, and how often lookups had to go to the guest's mappings.
    pub fn usage(&self) -> Usage {
        Usage { fills: self.arena.fills(), nodes: self.arena.in_use() }
    }

    fn table(&self) -> Table {
        Table::new(&self.arena, self.limits.nodes_per_domain)
    }

    /// The addresses that can be mapped.
    fn aperture(&self) -> IovaRange {
        let last = 1u64.checked_shl(self.limits.address_bits).map_or(u64::MAX, |size| size - 1);
        IovaRange::new(0, last).unwrap_or(IovaRange::ALL)
    }
}
