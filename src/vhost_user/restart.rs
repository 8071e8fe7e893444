// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Telling a pause from a reset.
//!
//! QEMU stops the rings with `GET_VRING_BASE` when the guest is paused and when its driver resets the device, and says
//! which it was only when it starts them again: after a pause with the base that it was given, after a reset with 0.

use std::num::Wrapping;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// Where a ring is and how far it was consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Position {
    next_available: u16,
    rings: [u64; 3],
}

impl Position {
    pub fn of<Q: QueueT>(queue: &Q) -> Self {
        Self { next_available: queue.next_avail(), rings: [queue.desc_table(), queue.avail_ring(), queue.used_ring()] }
    }
}

/// What the start of a stopped ring means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// The guest goes on.
    Resume,
    /// The guest's driver starts anew.
    Reset,
    /// Neither fits: the frontend lost count. What the guest believes is not known.
    Unexpected,
}

/// What the start of a ring means that was stopped at `stopped` and is about to run at `now`. `next_used` is the used
/// index in guest memory; `has_history` whether the ring carries an answer in the slot before it.
pub(super) fn judge(stopped: Position, now: Position, next_used: u16, has_history: bool) -> Start {
    let from_zero = now.next_available == 0 && next_used == 0;
    if now == stopped {
        // The index of a pause is 0 too, once in 65536 requests. Then the slot before it holds an answer, while a
        // driver that starts anew has zeroed its ring.
        return if from_zero && !has_history { Start::Reset } else { Start::Resume };
    }
    if from_zero { Start::Reset } else { Start::Unexpected }
}

/// Whether the used ring carries an answer in the slot before its index.
pub(super) fn has_history<Q: QueueT, M: GuestMemory>(queue: &Q, memory: &M) -> bool {
    // struct virtq_used: flags, index, then elements of id and length.
    let slot = u64::from((Wrapping(queue.next_used()) - Wrapping(1)).0 % queue.size().max(1));
    let length = queue.used_ring().checked_add(4 + 8 * slot + 4);
    length.is_some_and(|address| memory.read_obj::<u32>(GuestAddress(address)).is_ok_and(|length| length != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(next_available: u16, base: u64) -> Position {
        Position { next_available, rings: [base, base + 0x1000, base + 0x2000] }
    }

    #[test]
    fn the_same_base_and_place_is_a_pause() {
        assert_eq!(judge(at(7, 0x1000), at(7, 0x1000), 7, true), Start::Resume);
        assert_eq!(judge(at(7, 0x1000), at(7, 0x1000), 5, true), Start::Resume);
    }

    #[test]
    fn a_start_from_zero_is_a_reset() {
        assert_eq!(judge(at(7, 0x1000), at(0, 0x1000), 0, false), Start::Reset);
        assert_eq!(judge(at(7, 0x1000), at(0, 0x9000), 0, true), Start::Reset);
    }

    #[test]
    fn at_a_full_turn_the_ring_itself_decides() {
        assert_eq!(judge(at(0, 0x1000), at(0, 0x1000), 0, true), Start::Resume);
        assert_eq!(judge(at(0, 0x1000), at(0, 0x1000), 0, false), Start::Reset);
    }

    #[test]
    fn anything_else_is_unexpected() {
        assert_eq!(judge(at(7, 0x1000), at(8, 0x1000), 8, true), Start::Unexpected);
        assert_eq!(judge(at(7, 0x1000), at(7, 0x9000), 7, true), Start::Unexpected);
        assert_eq!(judge(at(7, 0x1000), at(0, 0x1000), 7, true), Start::Unexpected);
    }
}
