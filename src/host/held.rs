// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory of this process that the kernel was told to map by its address, and may look at for as long as the mapping is there.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::memory::HostMemory;
use crate::range::IovaRange;

/// What keeps memory mapped in this process that is mapped in address spaces of the kernel's, by the number of the address space
/// and the first virtual address. Who has it locked during the kernel's call, and changes it accordingly, has it agree with the
/// kernel.
#[derive(Debug, Default)]
pub(super) struct Held(BTreeMap<(u32, u64), (IovaRange, HostMemory)>);

impl Held {
    /// Holds memory that was mapped.
    pub fn insert(&mut self, space: u32, iova: IovaRange, memory: &HostMemory) {
        self.0.insert((space, iova.start()), (iova, memory.clone()));
    }

    /// Holds what was copied from another address space, as far as that has it by address. The length is that of `iova`.
    #[cfg(feature = "iommufd")]
    pub fn copy(&mut self, to: u32, iova: IovaRange, from: u32, source: u64) {
        let Some(source) = iova.length().and_then(|length| IovaRange::from_length(source, length)) else { return };
        // Mappings are disjoint: only the last of those that begin before can reach into the range.
        let before = self.0.range((from, 0)..(from, source.start())).next_back();
        let inside = self.0.range((from, source.start())..=(from, source.last()));
        let place = |(range, memory): &(IovaRange, HostMemory)| {
            let part = range.intersection(source)?;
            let start = iova.start() + (part.start() - source.start());
            Some(((to, start), (IovaRange::from_length(start, part.length()?)?, memory.clone())))
        };
        let copies: Vec<_> = before.into_iter().chain(inside).filter_map(|(_, held)| place(held)).collect();
        self.0.extend(copies);
    }

    /// Lets go of what was unmapped in a range, of which no mapping reaches out.
    pub fn release(&mut self, space: u32, iova: IovaRange) {
        let inside = self.0.range((space, iova.start())..=(space, iova.last()));
        let inside: Vec<(u32, u64)> = inside.map(|(place, _)| *place).collect();
        for place in inside {
            self.0.remove(&place);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::mmap::MmapRegion;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;
    use crate::memory::GuestRam;

    /// Memory of this process, and what tells how many hold it.
    fn memory() -> (HostMemory, Arc<MmapRegion>) {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let mapping = memory.iter().next().unwrap().get_mmap();
        let ram = GuestRam::from_mmap(&memory).unwrap();
        (ram.regions()[0].whole().host().unwrap().clone(), mapping)
    }

    fn range(text: &str) -> IovaRange {
        text.parse().unwrap()
    }

    #[test]
    fn memory_is_held_until_exactly_its_mapping_is_gone() {
        let (memory, mapping) = memory();
        let before = Arc::strong_count(&mapping);
        let mut held = Held::default();
        for (space, iova) in [(1, "1000-1fff"), (1, "2000-2fff"), (2, "1000-1fff")] {
            held.insert(space, range(iova), &memory);
        }
        let count = || Arc::strong_count(&mapping) - before;
        assert_eq!(count(), 3);
        held.release(1, range("0-fff"));
        held.release(1, range("3000-ffff"));
        held.release(3, IovaRange::ALL);
        assert_eq!(count(), 3);
        held.release(1, range("2000-2fff"));
        assert_eq!(count(), 2);
        held.release(1, IovaRange::ALL);
        assert_eq!(count(), 1);
        held.release(2, range("1000-1fff"));
        assert_eq!(count(), 0);
    }

    #[cfg(feature = "iommufd")]
    #[test]
    fn a_copy_holds_what_it_was_made_from() {
        let (memory, mapping) = memory();
        let before = Arc::strong_count(&mapping);
        let mut held = Held::default();
        held.insert(1, range("1000-2fff"), &memory);
        held.insert(1, range("3000-3fff"), &memory);
        held.insert(1, range("4000-4fff"), &memory);
        let count = || Arc::strong_count(&mapping) - before;
        // The second half of the first, and all of the second.
        held.copy(2, range("9000-afff"), 1, 0x2000);
        assert_eq!(count(), 5);
        held.release(1, IovaRange::ALL);
        assert_eq!(count(), 2);
        held.copy(3, range("0-fff"), 2, 0xa000);
        held.release(2, range("9000-9fff"));
        assert_eq!(count(), 2);
        held.copy(4, range("0-fff"), 1, 0x2000);
        assert_eq!(count(), 2, "nothing is there any more");
        held.release(2, range("a000-afff"));
        held.release(3, range("0-fff"));
        assert_eq!(count(), 0);
    }
}
