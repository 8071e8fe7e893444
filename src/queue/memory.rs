// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory for the length of a batch: a region is looked up once, as long as what is accessed is in it.

use std::sync::atomic::Ordering;

use vm_memory::bitmap::BS;
use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryResult, VolatileMemory, VolatileSlice,
};

type Region<M> = <<M as GuestMemory>::PhysicalMemory as GuestMemoryBackend>::R;
type Slice<'m, M> = VolatileSlice<'m, BS<'m, <Region<M> as GuestMemoryRegion>::B>>;

/// Guest memory, and the region of it that was accessed last. Memory that is not as it is in this process, but behind an IOMMU,
/// has no regions: every access goes its whole way.
pub(super) struct Memory<'m, M: GuestMemory> {
    memory: &'m M,
    region: Option<(GuestAddress, Slice<'m, M>)>,
}

impl<'m, M: GuestMemory> Memory<'m, M> {
    pub const fn new(memory: &'m M) -> Self {
        Self { memory, region: None }
    }

    /// Reads from there.
    pub fn read(&mut self, start: GuestAddress, bytes: &mut [u8]) -> GuestMemoryResult<()> {
        match self.slice(start, bytes.len()) {
            Some(slice) => {
                slice.copy_to(bytes);
                Ok(())
            }
            None => self.memory.read_slice(bytes, start),
        }
    }

    /// Writes there.
    pub fn write(&mut self, start: GuestAddress, bytes: &[u8]) -> GuestMemoryResult<()> {
        match self.slice(start, bytes.len()) {
            Some(slice) => {
                slice.copy_from(bytes);
                Ok(())
            }
            None => self.memory.write_slice(bytes, start),
        }
    }

    /// A piece that is accessed many times.
    pub fn part(&mut self, start: GuestAddress, length: usize) -> Part<'m, M> {
        Part { memory: self.memory, start, slice: self.slice(start, length) }
    }

    /// A piece as it is in this process; `None` if it is there in more than one piece, or not at all.
    fn slice(&mut self, start: GuestAddress, length: usize) -> Option<Slice<'m, M>> {
        self.slice_of_region(start, length).or_else(|| {
            let region = self.memory.physical_memory()?.find_region(start)?;
            self.region = Some((region.start_addr(), region.as_volatile_slice().ok()?));
            self.slice_of_region(start, length)
        })
    }

    fn slice_of_region(&self, start: GuestAddress, length: usize) -> Option<Slice<'m, M>> {
        let (region, slice) = self.region.as_ref()?;
        let offset = usize::try_from(start.checked_offset_from(*region)?).ok()?;
        slice.subslice(offset, length).ok()
    }
}

/// A piece of guest memory that is accessed many times.
pub(super) struct Part<'m, M: GuestMemory> {
    memory: &'m M,
    start: GuestAddress,
    /// Where it is in this process, if it is there in one piece.
    slice: Option<Slice<'m, M>>,
}

impl<M: GuestMemory> Part<'_, M> {
    /// The little-endian number at this offset.
    pub fn load(&self, offset: usize, order: Ordering) -> GuestMemoryResult<u16> {
        match self.slice.as_ref().map(|slice| slice.load(offset, order)) {
            Some(Ok(value)) => Ok(u16::from_le(value)),
            _ => self.memory.load(self.address(offset)?, order).map(u16::from_le),
        }
    }

    /// Stores a little-endian number at this offset.
    pub fn store(&self, offset: usize, value: u16, order: Ordering) -> GuestMemoryResult<()> {
        match self.slice.as_ref().map(|slice| slice.store(value.to_le(), offset, order)) {
            Some(Ok(())) => Ok(()),
            _ => self.memory.store(value.to_le(), self.address(offset)?, order),
        }
    }

    /// What is at this offset.
    pub fn read<T: ByteValued>(&self, offset: usize) -> GuestMemoryResult<T> {
        match self.slice.as_ref().map(|slice| slice.get_ref(offset)) {
            Some(Ok(place)) => Ok(place.load()),
            _ => self.memory.read_obj(self.address(offset)?),
        }
    }

    /// Writes to this offset.
    pub fn write<T: ByteValued>(&self, offset: usize, value: T) -> GuestMemoryResult<()> {
        match self.slice.as_ref().map(|slice| slice.get_ref(offset)) {
            Some(Ok(place)) => {
                place.store(value);
                Ok(())
            }
            _ => self.memory.write_obj(value, self.address(offset)?),
        }
    }

    fn address(&self, offset: usize) -> GuestMemoryResult<GuestAddress> {
        self.start.checked_add(offset as u64).ok_or(GuestMemoryError::GuestAddressOverflow)
    }
}
