// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A split virtqueue (virtio 1.3, 2.7), found in guest memory once for a batch of buffers.
//!
//! What [`QueueT`] offers finds every field of the rings anew. Here the three parts are looked up when the batch begins, and the
//! used index is published for a group of buffers. The queue itself is told where it stands when the batch ends.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemory};

use super::QueueError;
use super::chain::Table;
use super::memory::{Memory, Part};

/// The flag in an available ring that asks for no interrupts (2.7.6).
pub(super) const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// The flag in a used ring that asks for no kicks (2.7.8).
const USED_F_NO_NOTIFY: u16 = 1;
/// Where the index is in an available and in a used ring, behind the flags.
const INDEX: usize = 2;
/// Where the entries are.
const ENTRIES: usize = 4;
const AVAILABLE_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;
/// How many used buffers the driver is shown at a time, at most: it can use their descriptors again.
const PUBLISHED_AT_ONCE: u16 = 32;

/// The device's side of a queue, for the length of a batch.
pub(super) struct Ring<'m, M: GuestMemory> {
    size: u16,
    event_idx: bool,
    /// The table of its descriptors.
    pub table: Table<'m, M>,
    /// Where its buffers are.
    pub memory: Memory<'m, M>,
    available: Part<'m, M>,
    used: Part<'m, M>,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// The used index that the driver has been shown.
    published: Wrapping<u16>,
    /// Where the batch began.
    first_used: Wrapping<u16>,
}

impl<'m, M: GuestMemory> Ring<'m, M> {
    /// Has a batch of buffers served; what that came to, and whether the driver is to be notified. Whether the queue is ready is not
    /// asked.
    pub fn for_batch<Q: QueueT, T>(
        queue: &mut Q,
        memory: &'m M,
        serve: impl FnOnce(&mut Self) -> Result<T, QueueError>,
    ) -> Result<(T, bool), QueueError> {
        let mut ring = Self::of(queue, memory);
        let result = serve(&mut ring);
        // What was returned before an error is the driver's all the same.
        let published = ring.publish();
        queue.set_next_avail(ring.next_available.0);
        queue.set_next_used(ring.published.0);
        let value = result?;
        published?;
        Ok((value, ring.wants_notification()?))
    }

    /// Finds the parts of a queue.
    fn of<Q: QueueT>(queue: &Q, memory: &'m M) -> Self {
        let size = queue.size();
        let entries = usize::from(size);
        let next_used = Wrapping(queue.next_used());
        let mut memory = Memory::new(memory);
        Self {
            size,
            event_idx: queue.event_idx_enabled(),
            table: Table::new(&mut memory, GuestAddress(queue.desc_table()), size),
            // Both rings end in an index for notifications.
            available: memory.part(GuestAddress(queue.avail_ring()), ENTRIES + entries * AVAILABLE_ENTRY + 2),
            used: memory.part(GuestAddress(queue.used_ring()), ENTRIES + entries * USED_ENTRY + 2),
            memory,
            next_available: Wrapping(queue.next_avail()),
            next_used,
            published: next_used,
            first_used: next_used,
        }
    }

    /// How many buffers the driver has made available that were not taken.
    pub fn available(&self) -> Result<u16, QueueError> {
        let available = (Wrapping(self.available.load(INDEX, Ordering::Acquire)?) - self.next_available).0;
        // 2.7.13.3: an index that runs ahead of the queue's size means nothing.
        if available > self.size {
            return Err(QueueError::TooManyAvailable { available, size: self.size });
        }
        Ok(available)
    }

    /// Takes the next available buffer: the first descriptor of its chain, which is in the table. There must be one.
    pub fn take(&mut self) -> Result<u16, QueueError> {
        let slot = self.slot(self.next_available);
        let head = self.available.load(ENTRIES + slot * AVAILABLE_ENTRY, Ordering::Relaxed)?;
        if head >= self.size {
            return Err(QueueError::OutsideTable { head, size: self.size });
        }
        self.next_available += 1;
        Ok(head)
    }

    /// Returns a buffer of which so much was written. The driver sees it in a while, at the latest when it is
    /// [published](Self::publish).
    pub fn put(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        // `struct virtq_used_elem`: the head, then the length.
        let element = u64::from(head) | u64::from(written) << 32;
        self.used.write(ENTRIES + self.slot(self.next_used) * USED_ENTRY, element.to_le())?;
        self.next_used += 1;
        if (self.next_used - self.published).0 >= PUBLISHED_AT_ONCE { self.publish() } else { Ok(()) }
    }

    /// Shows the driver all buffers that were returned.
    pub fn publish(&mut self) -> Result<(), QueueError> {
        if self.published != self.next_used {
            // What was written to the buffers and the ring is seen by whoever sees the index.
            self.used.store(INDEX, self.next_used.0, Ordering::Release)?;
            self.published = self.next_used;
        }
        Ok(())
    }

    /// Asks the driver not to kick.
    pub fn disable_kicks(&self) -> Result<(), QueueError> {
        // With event indices it does not, once it has, until it is asked to.
        if !self.event_idx {
            self.used.store(0, USED_F_NO_NOTIFY, Ordering::Relaxed)?;
        }
        Ok(())
    }

    /// Asks the driver to kick when there is another buffer.
    pub fn enable_kicks(&self) -> Result<(), QueueError> {
        if self.event_idx {
            let event = ENTRIES + usize::from(self.size) * USED_ENTRY;
            self.used.store(event, self.next_available.0, Ordering::Relaxed)?;
        } else {
            self.used.store(0, 0, Ordering::Relaxed)?;
        }
        // Whoever looks at the available index after this sees every buffer for which there was no kick.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Whether the driver is to be notified of what was published since the batch began.
    fn wants_notification(&self) -> Result<bool, QueueError> {
        if self.published == self.first_used {
            return Ok(false);
        }
        // What was published is seen by a driver whose wish is not seen here.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return Ok(self.available.load(0, Ordering::Relaxed)? & AVAIL_F_NO_INTERRUPT == 0);
        }
        // 2.7.7.2: when the used index passed the one that the driver asked for.
        let event = ENTRIES + usize::from(self.size) * AVAILABLE_ENTRY;
        let wanted = Wrapping(self.available.load(event, Ordering::Relaxed)?);
        Ok(self.published - wanted - Wrapping(1) < self.published - self.first_used)
    }

    /// Where an index is in a ring.
    fn slot(&self, index: Wrapping<u16>) -> usize {
        usize::from(index.0.checked_rem(self.size).unwrap_or(0))
    }
}
