// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A piece of guest memory that is accessed many times.

use std::sync::atomic::Ordering;

use vm_memory::bitmap::BS;
use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryResult, Permissions, VolatileMemory,
    VolatileSlice,
};

/// A piece of guest memory. Where it is in this process has been looked up, unless it is there in more than one piece, or not at
/// all.
pub(super) struct Part<'m, M: GuestMemory> {
    memory: &'m M,
    start: GuestAddress,
    whole: Option<VolatileSlice<'m, BS<'m, M::Bitmap>>>,
}

impl<'m, M: GuestMemory> Part<'m, M> {
    pub fn new(memory: &'m M, start: GuestAddress, length: usize, access: Permissions) -> Self {
        let first = memory.get_slices(start, length, access).ok().and_then(|mut slices| slices.next()?.ok());
        Self { memory, start, whole: first.filter(|slice| slice.len() == length) }
    }

    /// The little-endian number at this offset.
    pub fn load(&self, offset: usize, order: Ordering) -> GuestMemoryResult<u16> {
        match self.whole.as_ref().map(|slice| slice.load(offset, order)) {
            Some(Ok(value)) => Ok(u16::from_le(value)),
            _ => self.memory.load(self.address(offset)?, order).map(u16::from_le),
        }
    }

    /// Stores a little-endian number at this offset.
    pub fn store(&self, offset: usize, value: u16, order: Ordering) -> GuestMemoryResult<()> {
        match self.whole.as_ref().map(|slice| slice.store(value.to_le(), offset, order)) {
            Some(Ok(())) => Ok(()),
            _ => self.memory.store(value.to_le(), self.address(offset)?, order),
        }
    }

    /// What is at this offset.
    pub fn read<T: ByteValued>(&self, offset: usize) -> GuestMemoryResult<T> {
        match self.whole.as_ref().map(|slice| slice.get_ref(offset)) {
            Some(Ok(place)) => Ok(place.load()),
            _ => self.memory.read_obj(self.address(offset)?),
        }
    }

    /// Writes to this offset.
    pub fn write<T: ByteValued>(&self, offset: usize, value: T) -> GuestMemoryResult<()> {
        match self.whole.as_ref().map(|slice| slice.get_ref(offset)) {
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
