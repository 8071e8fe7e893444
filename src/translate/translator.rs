// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an emulated device translates its accesses with.

use std::iter::FusedIterator;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::group::Attachment;
use super::memory::IovaMemory;
use super::sync::{Loaded, Pin, pin};
use super::table::Table;
use crate::access::Access;
use crate::host::refused::{RefusalReason, RefusedAccess};
use crate::id::EndpointId;

/// An access that the guest has not allowed. The guest is told by a fault event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("endpoint {}: {} access to {:#x} refused: {}", .0.endpoint, .0.access, .0.address, explain(.0.reason))]
pub struct TranslationFault(pub RefusedAccess);

const fn explain(reason: RefusalReason) -> &'static str {
    match reason {
        RefusalReason::NoTable => "the endpoint is in no domain, or blocked",
        RefusalReason::NotMapped => "nothing is mapped there",
        RefusalReason::NotAllowed => "the mapping does not allow it",
    }
}

/// A piece of guest memory that consecutive I/O virtual addresses stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first guest-physical address.
    pub start: GuestAddress,
    /// How many bytes; never zero.
    pub length: usize,
}

/// Translates the accesses of one endpoint. Cheap to clone; used from any thread.
#[derive(Clone, Debug)]
pub struct Translator {
    endpoint: EndpointId,
    attachment: Arc<Attachment>,
}

impl Translator {
    pub(super) const fn new(endpoint: EndpointId, attachment: Arc<Attachment>) -> Self {
        Self { endpoint, attachment }
    }

    /// The endpoint.
    pub const fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// Holds on to the translations as they are: until the value is dropped no UNMAP, DETACH or change of tables completes. To be
    /// had once for each descriptor chain.
    pub fn pin(&self) -> Pinned<'_> {
        // In this order: a table that was exchanged before the pin is not found.
        let pin = pin();
        let table = self.attachment.table.load();
        Pinned { table, translator: self, _pin: pin }
    }

    /// Shows the guest memory that a range of addresses stands for, piece by piece. When an UNMAP of any of it is answered, `act`
    /// has returned. It must not call the device: the device would wait for it.
    ///
    /// A piece that cannot be accessed is an error, after which none follows, and an event for the guest.
    pub fn with_translation<R>(
        &self,
        iova: u64,
        length: usize,
        access: Access,
        act: impl FnOnce(Segments<'_, '_>) -> R,
    ) -> R {
        act(self.pin().segments(iova, length, access))
    }

    /// Guest memory as the endpoint sees it, by I/O virtual addresses; pinned like [`pin`](Self::pin).
    pub fn memory<'t, M: GuestMemoryBackend>(&'t self, physical: &'t M) -> IovaMemory<'t, M> {
        IovaMemory::new(self.pin(), physical)
    }
}

/// Translations that hold while this value lives. It stays on its thread.
#[derive(Debug)]
pub struct Pinned<'t> {
    table: Loaded<Table>,
    translator: &'t Translator,
    // Dropped last.
    _pin: Pin,
}

impl Pinned<'_> {
    /// The guest memory that an address stands for, as far as it belongs together, but no more than `most` bytes, which is not
    /// zero. No event is made of a fault.
    ///
    /// # Errors
    ///
    /// [`TranslationFault`]
    #[inline]
    pub fn translate(&self, iova: u64, most: usize, access: Access) -> Result<Segment, TranslationFault> {
        let fault = |reason| self.fault(iova, access, reason);
        let table = self.table.as_deref().ok_or_else(|| fault(RefusalReason::NoTable))?;
        let hit = table.lookup(iova).ok_or_else(|| fault(RefusalReason::NotMapped))?;
        if (access.read && !hit.access.read) || (access.write && !hit.access.write) {
            return Err(fault(RefusalReason::NotAllowed));
        }
        let length = usize::try_from(hit.length).map_or(most, |length| length.min(most));
        Ok(Segment { start: GuestAddress(hit.physical), length })
    }

    /// The guest memory that a range of addresses stands for, piece by piece.
    pub const fn segments(&self, iova: u64, length: usize, access: Access) -> Segments<'_, '_> {
        let wraps = length != 0 && iova.checked_add(length as u64 - 1).is_none();
        Segments { pinned: self, iova, left: length, access, wraps, ahead: None }
    }

    pub(super) const fn fault(&self, address: u64, access: Access, reason: RefusalReason) -> TranslationFault {
        TranslationFault(RefusedAccess { endpoint: self.translator.endpoint, address, access, reason })
    }

    /// Tells the guest of a fault.
    pub fn report(&self, fault: TranslationFault) {
        self.translator.attachment.refused.push(fault.0);
    }
}

/// The pieces of a range, ascending; adjacent ones are one. Made by [`Pinned::segments`].
#[derive(Debug)]
pub struct Segments<'p, 't> {
    pinned: &'p Pinned<'t>,
    iova: u64,
    left: usize,
    access: Access,
    /// The range passes the end of the address space.
    wraps: bool,
    /// What was translated already.
    ahead: Option<Result<Segment, TranslationFault>>,
}

impl Segments<'_, '_> {
    /// Translates from the next address on, and goes past what it found; nothing is left behind a fault.
    fn step(&mut self) -> Result<Segment, TranslationFault> {
        let result = self.pinned.translate(self.iova, self.left, self.access).and_then(|found| {
            if self.wraps {
                Err(self.pinned.fault(self.iova, self.access, RefusalReason::NotMapped))
            } else {
                Ok(found)
            }
        });
        match result {
            Ok(found) => {
                self.left -= found.length;
                self.iova = self.iova.wrapping_add(found.length as u64);
            }
            Err(fault) => {
                self.left = 0;
                self.pinned.report(fault);
            }
        }
        result
    }
}

impl Iterator for Segments<'_, '_> {
    type Item = Result<Segment, TranslationFault>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut piece = match self.ahead.take() {
            None if self.left == 0 => return None,
            None => self.step(),
            Some(ahead) => ahead,
        };
        while let Ok(segment) = &mut piece
            && self.left != 0
        {
            match self.step() {
                Ok(next) if segment.start.0.checked_add(segment.length as u64) == Some(next.start.0) => {
                    segment.length += next.length;
                }
                other => {
                    self.ahead = Some(other);
                    break;
                }
            }
        }
        Some(piece)
    }
}

impl FusedIterator for Segments<'_, '_> {}
