// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether guest memory can be cut off by whoever else has its file.

use log::info;
use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Says what happens if guest memory is cut off, unless it cannot be.
pub(super) fn say_if_unsealed(memory: &GuestMemoryMmap) {
    if let Some(start) = unsealed(memory) {
        info!(
            "guest memory at {start:#x} is not sealed with F_SEAL_SHRINK: if whoever has its file makes it shorter, this process ends \
             with 3, and DMA of the devices is refused"
        );
    }
}

/// The guest-physical address of a region whose file can become shorter: of files that can be sealed at all (memory of tmpfs and
/// hugetlbfs) one that is not sealed against it, and every other file.
fn unsealed(memory: &GuestMemoryMmap) -> Option<u64> {
    let is_sealed = |seals: SealFlags| seals.contains(SealFlags::SHRINK);
    let region = memory.iter().find(|region| {
        let place = region.file_offset();
        place.is_some_and(|place| !fcntl_get_seals(place.file()).is_ok_and(is_sealed))
    })?;
    Some(region.start_addr().0)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
    use vm_memory::{FileOffset, GuestAddress};

    use super::*;

    #[test]
    fn memory_that_can_be_cut_off_is_found() {
        let memfd = |seals: SealFlags| {
            let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
            file.set_len(0x1000).unwrap();
            fcntl_add_seals(&file, seals).unwrap();
            file
        };
        let memory = |files: Vec<File>| {
            let region = |(file, start)| (GuestAddress(start), 0x1000, Some(FileOffset::new(file, 0)));
            let ranges: Vec<_> = files.into_iter().zip((0..).step_by(0x1000)).map(region).collect();
            GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
        };
        let sealed = || memfd(SealFlags::SHRINK | SealFlags::GROW);
        assert_eq!(unsealed(&memory(vec![sealed(), sealed()])), None);
        assert_eq!(unsealed(&memory(vec![sealed(), memfd(SealFlags::GROW)])), Some(0x1000));
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1000).unwrap();
        assert_eq!(unsealed(&memory(vec![sealed(), sealed(), file])), Some(0x2000));
    }
}
