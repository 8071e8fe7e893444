// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the device reaches guest memory: through its IOMMU.

use std::ops::Range;

use virtio_iommu::access::Access;
use virtio_iommu::translate::{TranslationFault, Translator};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryError, GuestMemoryMmap};

/// Guest memory by the addresses that the guest gave the device.
///
/// The memory is that of the vhost-user connection rather than what QEMU maps over vfio-user: they are the same, but it is the
/// former that MAP requests were checked against, and that is waited for when memory leaves.
pub struct Bus {
    translator: Translator,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
}

/// DMA that did not get through, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// The guest has not allowed it, and was told.
    #[error(transparent)]
    Fault(#[from] TranslationFault),
    /// There is no memory where the guest mapped some.
    #[error("guest memory cannot be reached: {0}")]
    Memory(#[from] GuestMemoryError),
}

impl Bus {
    /// A bus of an endpoint.
    pub const fn new(translator: Translator, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> Self {
        Self { translator, memory }
    }

    /// Reads guest memory, as far as it is mapped. Returns where in it the first byte was.
    pub fn read(&self, iova: u64, bytes: &mut [u8]) -> Result<Option<GuestAddress>, DmaError> {
        self.access(iova, bytes.len(), Access::READ, |memory, from, part| {
            memory.read_slice(bytes.get_mut(part).unwrap_or_default(), from)
        })
    }

    /// Writes guest memory, as far as it is mapped. Returns where in it the first byte is.
    pub fn write(&self, iova: u64, bytes: &[u8]) -> Result<Option<GuestAddress>, DmaError> {
        self.access(iova, bytes.len(), Access::WRITE, |memory, to, part| {
            memory.write_slice(bytes.get(part).unwrap_or_default(), to)
        })
    }

    /// Shows the guest memory behind a range of addresses, and which part of the range each piece is.
    fn access(
        &self,
        iova: u64,
        length: usize,
        access: Access,
        mut act: impl FnMut(&GuestMemoryMmap, GuestAddress, Range<usize>) -> Result<(), GuestMemoryError>,
    ) -> Result<Option<GuestAddress>, DmaError> {
        // In this order, and until the end: an UNMAP is not answered before.
        let pinned = self.translator.pin();
        let memory = self.memory.memory();
        let (mut first, mut done) = (None, 0);
        for segment in pinned.segments(iova, length, access) {
            let segment = segment?;
            act(&memory, segment.start, done..done + segment.length)?;
            first = first.or(Some(segment.start));
            done += segment.length;
        }
        Ok(first)
    }
}
