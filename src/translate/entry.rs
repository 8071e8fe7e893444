// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Entries of the trees that translations are cached in.

use super::arena::Node;
use crate::access::Access;
use crate::mapping::SMALLEST_PAGE;

const READ: u64 = 1;
const WRITE: u64 = 2;
const NODE: u64 = 4;
const BLOCK: u64 = 8;
const PAGE: u64 = 16;

/// The bits of an address that a page spans.
pub(super) const PAGE_SHIFT: u32 = SMALLEST_PAGE.trailing_zeros();
/// Where the index of a lone page begins: behind the physical address.
const INDEX_SHIFT: u32 = 52;

/// An entry of a node: 64 bits that are read and written at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    pub const EMPTY: Self = Self(0);

    /// Blocks of more bits than this have no room for the index of a page in them.
    pub const LARGEST_WITH_PAGE: u32 = PAGE_SHIFT + (u64::BITS - INDEX_SHIFT);

    /// Leads to a node.
    pub const fn node(node: Node) -> Self {
        Self(((node.number() as u64) << PAGE_SHIFT) | NODE)
    }

    /// Translates all of the block that it stands for, from this physical address on.
    pub fn block(physical: u64, access: Access) -> Self {
        Self(physical | BLOCK | bits(access))
    }

    /// Translates one page in the block that it stands for, and nothing else of it; `None` if the address has too many bits.
    pub fn page(physical: u64, access: Access, index: u64) -> Option<Self> {
        (physical >> INDEX_SHIFT == 0).then(|| Self(physical | BLOCK | PAGE | bits(access) | (index << INDEX_SHIFT)))
    }

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// The node that it leads to.
    #[inline]
    pub const fn as_node(self) -> Option<Node> {
        #[expect(clippy::cast_possible_truncation, reason = "it was made from a node's number")]
        if self.0 & NODE == 0 { None } else { Some(Node::from_number((self.0 >> PAGE_SHIFT) as u32)) }
    }

    /// Whether it translates something.
    #[inline]
    pub const fn translates(self) -> bool {
        self.0 & BLOCK != 0
    }

    /// The index of the page that it translates, if that is all.
    #[inline]
    pub const fn lone_page(self) -> Option<u64> {
        if self.0 & PAGE == 0 { None } else { Some(self.0 >> INDEX_SHIFT) }
    }

    /// The physical address of what it translates.
    #[inline]
    pub const fn physical(self) -> u64 {
        let address = self.0 & !(SMALLEST_PAGE - 1);
        if self.0 & PAGE == 0 { address } else { address & ((1 << INDEX_SHIFT) - 1) }
    }

    #[inline]
    pub const fn access(self) -> Access {
        Access { read: self.0 & READ != 0, write: self.0 & WRITE != 0 }
    }
}

fn bits(access: Access) -> u64 {
    (u64::from(access.read) * READ) | (u64::from(access.write) * WRITE)
}
