// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two virtqueues: requests in, events out.
//!
//! Both work on any [`QueueT`] over any guest memory, within a budget, and say whether the driver is to be notified. A queue that
//! the driver has broken is an error: nothing more can be said on it until it is set up again.

#![forbid(unsafe_code)]

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::device::{Progress, UnfinishedMap, VirtioIommu};

mod chain;
#[cfg(test)]
mod tests;

use chain::Chain;

/// The flag in an available ring that asks for no interrupts (2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// What a batch of buffers came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// How many descriptor chains were returned.
    pub handled: usize,
    /// The budget was used up, or a large MAP is under way: there may be more, for which the driver will not kick again.
    pub more: bool,
    /// The driver is to be notified.
    pub notify: bool,
}

/// A queue that breaks the rules, or is not in guest memory.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// More buffers are available than the queue can have.
    #[error("the driver made {available} buffers available in a queue of {size}")]
    TooManyAvailable {
        /// How many more than were taken.
        available: u16,
        /// The size of the queue.
        size: u16,
    },
    /// An available buffer cannot be taken.
    #[error("the next available buffer cannot be read")]
    Unreadable,
    /// The rings are not in guest memory.
    #[error("a ring cannot be accessed")]
    Ring(#[from] virtio_queue::Error),
}

/// The request queue's device side: the request that is under way, if any.
#[derive(Debug, Default)]
pub struct Requests {
    chain: Chain,
    unfinished: Option<(u16, UnfinishedMap)>,
}

impl Requests {
    /// Handles requests until none is available, or `budget` of them have been returned, or a step of a large MAP has been
    /// taken. Call it again if there is [`more`](Batch::more), and let others at the device before.
    ///
    /// # Errors
    ///
    /// [`QueueError`]: the queue cannot be used further. What was taken before has been answered.
    pub fn process<Q: QueueT, M: GuestMemory>(
        &mut self,
        device: &mut VirtioIommu,
        queue: &mut Q,
        memory: &M,
        budget: usize,
    ) -> Result<Batch, QueueError> {
        let mut batch = Batch::default();
        let mut rounds = 0;
        queue.disable_notification(memory)?;
        'kicks: loop {
            // A driver that moves its index to and fro gets as many rounds as one that sends requests.
            rounds += 1;
            while self.unfinished.is_some() || available(queue, memory)? > 0 {
                if batch.handled == budget || rounds > budget {
                    batch.more = true;
                    break 'kicks;
                }
                if !self.step(device, queue, memory)? {
                    batch.more = true;
                    break 'kicks;
                }
                batch.handled += 1;
            }
            if !queue.enable_notification(memory)? {
                break;
            }
            queue.disable_notification(memory)?;
        }
        batch.notify = batch.handled > 0 && wants_notification(queue, memory)?;
        Ok(batch)
    }

    /// Completes the request that is under way, if any, before the queue stops. Whether the driver is to be notified.
    ///
    /// # Errors
    ///
    /// [`QueueError`]
    pub fn complete<Q: QueueT, M: GuestMemory>(
        &mut self,
        device: &mut VirtioIommu,
        queue: &mut Q,
        memory: &M,
    ) -> Result<bool, QueueError> {
        if self.unfinished.is_none() {
            return Ok(false);
        }
        while !self.step(device, queue, memory)? {}
        wants_notification(queue, memory)
    }

    /// Forgets the request that is under way: the driver reset the device and does not wait for it any more.
    pub fn forget(&mut self) {
        self.unfinished = None;
    }

    /// Takes a step of the request that is under way, or of the next one; whether it was returned.
    fn step<Q: QueueT, M: GuestMemory>(
        &mut self,
        device: &mut VirtioIommu,
        queue: &mut Q,
        memory: &M,
    ) -> Result<bool, QueueError> {
        let (head, progress) = match self.unfinished.take() {
            Some((head, map)) => (head, self.chain.go_on(device, map)),
            None => (self.chain.take(queue, memory)?, self.chain.begin(device, memory)),
        };
        match progress {
            Progress::Answered { used } => {
                queue.add_used(memory, head, self.chain.reply(memory, used))?;
                Ok(true)
            }
            Progress::Unfinished(map) => {
                self.unfinished = Some((head, map));
                Ok(false)
            }
        }
    }
}

/// Gives the guest the fault events that wait, as far as it has provided buffers, of which no more than `budget` are
/// returned.
///
/// Linux provides its buffers without a kick: call this whenever there are faults.
///
/// # Errors
///
/// [`QueueError`]: the queue cannot be used further.
pub fn deliver_faults<Q: QueueT, M: GuestMemory>(
    device: &mut VirtioIommu,
    queue: &mut Q,
    memory: &M,
    budget: usize,
) -> Result<Batch, QueueError> {
    let mut batch = Batch::default();
    let mut chain = Chain::default();
    while let Some(fault) = device.first_fault().copied() {
        if available(queue, memory)? == 0 {
            break;
        }
        if batch.handled == budget {
            batch.more = true;
            break;
        }
        let event = fault.to_bytes();
        let head = chain.take(queue, memory)?;
        // 5.13.6.9.2: "If a buffer is too small to contain the fault report, the device SHOULD NOT use multiple buffers to
        // describe it." One that is too small, or not in guest memory, goes back unwritten, and the event waits for the next.
        let fits = chain.writable_length().is_some_and(|length| length >= event.len());
        let used = if fits { chain.write(memory, &event).unwrap_or(0) } else { 0 };
        if used != 0 {
            device.take_fault();
        }
        queue.add_used(memory, head, used)?;
        batch.handled += 1;
    }
    batch.notify = batch.handled > 0 && wants_notification(queue, memory)?;
    Ok(batch)
}

/// How many buffers the driver has made available that were not taken.
fn available<Q: QueueT, M: GuestMemory>(queue: &Q, memory: &M) -> Result<u16, QueueError> {
    let available = (queue.avail_idx(memory, Ordering::Acquire)? - Wrapping(queue.next_avail())).0;
    let size = queue.size();
    // 2.7.13.3: an index that runs ahead of the queue's size means nothing.
    if available > size {
        return Err(QueueError::TooManyAvailable { available, size });
    }
    Ok(available)
}

fn wants_notification<Q: QueueT, M: GuestMemory>(queue: &mut Q, memory: &M) -> Result<bool, QueueError> {
    // The queue counts what it returned since it was last asked.
    let wanted = queue.needs_notification(memory)?;
    if queue.event_idx_enabled() {
        return Ok(wanted);
    }
    let flags: u16 =
        memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)?;
    Ok(u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0)
}
