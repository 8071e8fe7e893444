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

/// Guest memory that is accessed in many places, of which most are near the one before.
pub(super) struct Surroundings<'m, M: GuestMemory> {
    memory: &'m M,
    access: Permissions,
    start: GuestAddress,
    found: Option<VolatileSlice<'m, BS<'m, M::Bitmap>>>,
}

impl<'m, M: GuestMemory> Surroundings<'m, M> {
    /// How much is looked up at a time, and what it is aligned to.
    const SIZE: usize = 2 << 20;

    pub const fn new(memory: &'m M, access: Permissions) -> Self {
        Self { memory, access, start: GuestAddress(0), found: None }
    }

    /// Reads what is there.
    pub fn read(&mut self, start: GuestAddress, bytes: &mut [u8]) -> GuestMemoryResult<()> {
        if let Some(slice) = self.near(start, bytes.len()) {
            slice.copy_to(bytes);
            return Ok(());
        }
        self.move_to(start);
        self.memory.read_slice(bytes, start)
    }

    /// Writes there.
    pub fn write(&mut self, start: GuestAddress, bytes: &[u8]) -> GuestMemoryResult<()> {
        if let Some(slice) = self.near(start, bytes.len()) {
            slice.copy_from(bytes);
            return Ok(());
        }
        self.move_to(start);
        self.memory.write_slice(bytes, start)
    }

    /// A part of it.
    pub fn part(&mut self, start: GuestAddress, length: usize) -> Part<'m, M> {
        if let Some(slice) = self.near(start, length) {
            return Part { memory: self.memory, start, whole: Some(slice) };
        }
        self.move_to(start);
        Part::new(self.memory, start, length, self.access)
    }

    fn near(&self, start: GuestAddress, length: usize) -> Option<VolatileSlice<'m, BS<'m, M::Bitmap>>> {
        let offset = start.checked_offset_from(self.start)?;
        self.found.as_ref()?.subslice(usize::try_from(offset).ok()?, length).ok()
    }

    fn move_to(&mut self, address: GuestAddress) {
        self.start = GuestAddress(address.mask(!(Self::SIZE as u64 - 1)));
        let slices = self.memory.get_slices(self.start, Self::SIZE, self.access);
        self.found = slices.ok().and_then(|mut slices| slices.next()?.ok());
    }
}
