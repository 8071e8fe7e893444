// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two virtqueues: requests in, events out.
//!
//! Both work on any [`QueueT`] over any guest memory, within a budget, and say whether the driver is to be notified. A queue that
//! the driver has broken is an error: nothing more can be said on it until it is set up again.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::{GuestMemory, GuestMemoryError};

use crate::device::{Progress, UnfinishedMap, VirtioIommu};

mod chain;
mod memory;
mod polling;
mod ring;
#[cfg(test)]
mod tests;

use chain::Chain;
use ring::Ring;

pub use polling::{ParsePollingError, Polling, Watch};

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
    /// An available buffer starts with a descriptor that is not in the table.
    #[error("the driver made descriptor {head} available in a queue of {size}")]
    OutsideTable {
        /// The descriptor.
        head: u16,
        /// The size of the queue.
        size: u16,
    },
    /// The queue has not been set up.
    #[error("the queue is not ready")]
    NotReady,
    /// The rings are not in guest memory.
    #[error("a ring cannot be accessed")]
    Ring(#[from] virtio_queue::Error),
}

impl From<GuestMemoryError> for QueueError {
    fn from(error: GuestMemoryError) -> Self {
        Self::Ring(virtio_queue::Error::GuestMemory(error))
    }
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
    /// [`QueueError`]: the queue cannot be used further. What was taken before has been done; the driver may not have the last answer.
    pub fn process<Q: QueueT, M: GuestMemory>(
        &mut self,
        device: &mut VirtioIommu,
        queue: &mut Q,
        memory: &M,
        budget: usize,
    ) -> Result<Batch, QueueError> {
        self.process_with(device, queue, memory, budget, true)
    }

    /// Like [`process`](Self::process), but leaves kicks suppressed: for a caller that goes on watching the queue
    /// ([`has_requests`]), and calls `process` before it waits for a kick.
    ///
    /// # Errors
    ///
    /// [`QueueError`], as for `process`.
    pub fn process_quietly<Q: QueueT, M: GuestMemory>(
        &mut self,
        device: &mut VirtioIommu,
        queue: &mut Q,
        memory: &M,
        budget: usize,
    ) -> Result<Batch, QueueError> {
        self.process_with(device, queue, memory, budget, false)
    }

    fn process_with<Q: QueueT, M: GuestMemory>(
        &mut self,
        device: &mut VirtioIommu,
        queue: &mut Q,
        memory: &M,
        budget: usize,
        kicks: bool,
    ) -> Result<Batch, QueueError> {
        check_ready(queue)?;
        let (batch, notify) = Ring::for_batch(queue, memory, |ring| self.serve(device, ring, budget, kicks))?;
        Ok(Batch { notify, ..batch })
    }

    fn serve<M: GuestMemory>(
        &mut self,
        device: &mut VirtioIommu,
        ring: &mut Ring<'_, M>,
        budget: usize,
        kicks: bool,
    ) -> Result<Batch, QueueError> {
        let mut batch = Batch::default();
        let mut rounds = 0;
        ring.disable_kicks()?;
        loop {
            while self.unfinished.is_some() || ring.available()? > 0 {
                if batch.handled == budget || !self.step(device, ring)? {
                    batch.more = true;
                    return Ok(batch);
                }
                batch.handled += 1;
            }
            // The driver may be waiting for these before it sends more.
            ring.publish()?;
            if !kicks {
                return Ok(batch);
            }
            ring.enable_kicks()?;
            if ring.available()? == 0 {
                return Ok(batch);
            }
            // A driver that moves its index to and fro gets as many rounds as one that sends requests.
            rounds += 1;
            if rounds >= budget {
                batch.more = true;
                return Ok(batch);
            }
            ring.disable_kicks()?;
        }
    }

    /// Completes the request that is under way, if any, when the queue stops, be it ready still or no more. Whether the driver is to be
    /// notified.
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
        let complete = |ring: &mut Ring<'_, M>| {
            while !self.step(device, ring)? {}
            Ok(())
        };
        Ok(Ring::for_batch(queue, memory, complete)?.1)
    }

    /// Whether a request was taken and not returned.
    pub const fn is_under_way(&self) -> bool {
        self.unfinished.is_some()
    }

    /// Forgets the request that is under way: the driver reset the device and does not wait for it any more.
    pub fn forget(&mut self) {
        self.unfinished = None;
    }

    /// Takes a step of the request that is under way, or of the next one; whether it was returned.
    fn step<M: GuestMemory>(&mut self, device: &mut VirtioIommu, ring: &mut Ring<'_, M>) -> Result<bool, QueueError> {
        let (head, progress) = if let Some((head, map)) = self.unfinished.take() {
            (head, self.chain.go_on(device, map))
        } else {
            let head = ring.take()?;
            (head, self.chain.begin(device, ring, head))
        };
        match progress {
            Progress::Answered { used } => {
                let written = self.chain.reply(ring, used);
                ring.put(head, written)?;
                Ok(true)
            }
            Progress::Unfinished(map) => {
                self.unfinished = Some((head, map));
                Ok(false)
            }
        }
    }
}

fn check_ready<Q: QueueT>(queue: &Q) -> Result<(), QueueError> {
    if queue.ready() { Ok(()) } else { Err(QueueError::NotReady) }
}

/// Whether there is something to [process](Requests::process) in a request queue. Cheap enough to be asked over and over.
pub fn has_requests<Q: QueueT, M: GuestMemory>(queue: &Q, memory: &M) -> bool {
    // What is wrong with the queue is found by whoever processes it.
    queue.avail_idx(memory, Ordering::Acquire).map_or(true, |index| index.0 != queue.next_avail())
}

/// Gives the guest the fault events that wait, as far as it has provided buffers, of which no more than `budget` are
/// returned.
///
/// Linux provides its first buffers without a kick: call this whenever there are faults. Where more faults than buffers were there, a
/// kick is asked for.
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
    check_ready(queue)?;
    let (batch, notify) = Ring::for_batch(queue, memory, |ring| serve_faults(device, ring, budget))?;
    Ok(Batch { notify, ..batch })
}

fn serve_faults<M: GuestMemory>(
    device: &mut VirtioIommu,
    ring: &mut Ring<'_, M>,
    budget: usize,
) -> Result<Batch, QueueError> {
    let mut batch = Batch::default();
    let mut chain = Chain::default();
    while let Some(fault) = device.first_fault().copied() {
        if ring.available()? == 0 {
            // The event waits for the driver to come with a buffer.
            ring.enable_kicks()?;
            if ring.available()? == 0 {
                break;
            }
        }
        if batch.handled == budget {
            batch.more = true;
            break;
        }
        let event = fault.to_bytes();
        let head = ring.take()?;
        // 5.13.6.9.2: "If a buffer is too small to contain the fault report, the device SHOULD NOT use multiple buffers to
        // describe it." One that is too small, or not in guest memory, goes back unwritten, and the event waits for the next.
        let fits = chain.read(ring, head).is_ok() && chain.room() >= event.len();
        let used = if fits { chain.write(ring, &event).unwrap_or(0) } else { 0 };
        if used != 0 {
            device.take_fault();
        }
        ring.put(head, used)?;
        batch.handled += 1;
    }
    Ok(batch)
}
