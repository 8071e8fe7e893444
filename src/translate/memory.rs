// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory by I/O virtual addresses.

use std::iter::FusedIterator;

use vm_memory::bitmap::{BS, BitmapSlice};
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::iommu::{Error as IommuError, IovaRange as VmMemoryRange};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions, VolatileSlice};

use super::translator::{Pinned, TranslationFault};
use crate::access::Access;

/// Guest memory as an endpoint sees it: a [`GuestMemory`] for virtqueues and whatever else is generic over it.
///
/// The translations hold until it is dropped, and so do all slices that come from it: an UNMAP is not answered before. Pages that
/// are written are marked in the physical memory's own dirty bitmaps, by guest-physical address.
#[derive(Debug)]
pub struct IovaMemory<'t, M> {
    pinned: Pinned<'t>,
    physical: &'t M,
}

impl<'t, M: GuestMemoryBackend> IovaMemory<'t, M> {
    pub(super) const fn new(pinned: Pinned<'t>, physical: &'t M) -> Self {
        Self { pinned, physical }
    }
}

impl<M: GuestMemoryBackend> GuestMemory for IovaMemory<'_, M> {
    type PhysicalMemory = M;
    type Bitmap = <M::R as GuestMemoryRegion>::B;

    /// Makes no fault event: it is a question, not an access.
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let (mut iova, mut left) = (addr.0, count);
        while left != 0 {
            let Ok(found) = self.pinned.translate(iova, left, access_of(access)) else {
                return false;
            };
            if !GuestMemoryBackend::check_range(self.physical, found.start, found.length) {
                return false;
            }
            left -= found.length;
            match iova.checked_add(found.length as u64) {
                Some(next) => iova = next,
                None => return left == 0,
            }
        }
        true
    }

    fn get_slices(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'_, BS<'_, Self::Bitmap>>> {
        let physical = self.physical;
        let access = access_of(access);
        // Most accesses are in one piece, and are spared the search for more.
        let whole = self.pinned.translate(addr.0, count, access).ok().filter(|found| found.length == count);
        let mut segments = if whole.is_some() { None } else { Some(self.pinned.segments(addr.0, count, access)) };
        let mut current = whole.map(|found| GuestMemoryBackend::get_slices(physical, found.start, found.length));
        let pieces = std::iter::from_fn(move || {
            loop {
                if let Some(slice) = current.as_mut().and_then(Iterator::next) {
                    return Some(slice);
                }
                match segments.as_mut()?.next()? {
                    Ok(segment) => {
                        current = Some(GuestMemoryBackend::get_slices(physical, segment.start, segment.length));
                    }
                    Err(fault) => return Some(Err(error_of(fault))),
                }
            }
        });
        Ok(Slices { pieces, ended: false })
    }
}

/// Ends with the first error: `stop_on_error()` of vm-memory passes over errors, and would go on with what comes behind.
struct Slices<I> {
    pieces: I,
    ended: bool,
}

impl<'a, B: BitmapSlice, I: Iterator<Item = Result<VolatileSlice<'a, B>>>> Iterator for Slices<I> {
    type Item = I::Item;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let piece = self.pieces.next();
        self.ended = !matches!(piece, Some(Ok(_)));
        piece
    }
}

impl<'a, B: BitmapSlice, I: Iterator<Item = Result<VolatileSlice<'a, B>>>> FusedIterator for Slices<I> {}

impl<'a, B: BitmapSlice, I: Iterator<Item = Result<VolatileSlice<'a, B>>>> GuestMemorySliceIterator<'a, B>
    for Slices<I>
{
}

pub(super) const fn access_of(permissions: Permissions) -> Access {
    match permissions {
        Permissions::No => Access::NONE,
        Permissions::Read => Access::READ,
        Permissions::Write => Access::WRITE,
        Permissions::ReadWrite => Access::READ_WRITE,
    }
}

pub(super) fn error_of(fault: TranslationFault) -> Error {
    let iova_range = VmMemoryRange { base: GuestAddress(fault.0.address), length: 1 };
    Error::IommuError(IommuError::CannotResolve { iova_range, reason: fault.to_string() })
}
