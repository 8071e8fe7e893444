// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Accesses that a host refused, on their way to the guest as fault events.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::access::Access;
use crate::id::EndpointId;

/// An access that did not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusedAccess {
    /// Whose access it was.
    pub endpoint: EndpointId,
    /// The I/O virtual address.
    pub address: u64,
    /// What was tried.
    pub access: Access,
    /// Why.
    pub reason: RefusalReason,
}

/// Why an access did not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// The endpoint's group has no table.
    NoTable,
    /// Nothing is mapped there.
    NotMapped,
    /// What is mapped there does not allow it.
    NotAllowed,
}

/// Refused accesses of a group, from any thread: the oldest are kept, later ones are counted when there is no room.
#[derive(Default)]
pub struct RefusedAccesses {
    state: Mutex<State>,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<RefusedAccess>,
    dropped: u64,
}

impl RefusedAccesses {
    /// How many can wait.
    pub(crate) const CAPACITY: usize = 32;

    /// Has something called when one is added and none was waiting, and at once if one is waiting already. Only the first function
    /// that is given is called.
    pub fn on_first(&self, wake: Box<dyn Fn() + Send + Sync>) {
        if self.wake.set(wake).is_ok() && !self.lock().waiting.is_empty() {
            self.wake();
        }
    }

    /// Adds one, if there is room.
    pub fn push(&self, refused: RefusedAccess) {
        let mut state = self.lock();
        let was_empty = state.waiting.is_empty();
        if state.waiting.len() < Self::CAPACITY {
            state.waiting.push_back(refused);
        } else {
            state.dropped = state.dropped.saturating_add(1);
        }
        drop(state);
        if was_empty {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(wake) = self.wake.get() {
            wake();
        }
    }

    /// Takes the oldest.
    pub fn pop(&self) -> Option<RefusedAccess> {
        self.lock().waiting.pop_front()
    }

    /// How many there was no room for.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for RefusedAccesses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("RefusedAccesses")
            .field("waiting", &state.waiting)
            .field("dropped", &state.dropped)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn what_waits_already_wakes_at_once() {
        let refused = RefusedAccess {
            endpoint: EndpointId(1),
            address: 0x1000,
            access: Access::READ,
            reason: RefusalReason::NotMapped,
        };
        let accesses = RefusedAccesses::default();
        let woken = Arc::new(AtomicUsize::new(0));
        let wake = |woken: &Arc<AtomicUsize>| {
            let woken = Arc::clone(woken);
            Box::new(move || _ = woken.fetch_add(1, Ordering::Relaxed))
        };
        accesses.push(refused);
        accesses.on_first(wake(&woken));
        assert_eq!(woken.load(Ordering::Relaxed), 1);
        accesses.push(refused);
        assert_eq!(woken.load(Ordering::Relaxed), 1, "one was waiting");
        while accesses.pop().is_some() {}
        accesses.push(refused);
        assert_eq!(woken.load(Ordering::Relaxed), 2);
        accesses.on_first(wake(&woken));
        assert_eq!(woken.load(Ordering::Relaxed), 2, "only the first is called");
    }

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let accesses = RefusedAccesses::default();
        let of = |address| RefusedAccess {
            endpoint: EndpointId(1),
            address,
            access: Access::WRITE,
            reason: RefusalReason::NoTable,
        };
        let room = RefusedAccesses::CAPACITY as u64;
        (0..room).map(of).for_each(|refused| accesses.push(refused));
        assert_eq!(accesses.dropped(), 0);
        (room..room + 3).map(of).for_each(|refused| accesses.push(refused));
        assert_eq!(accesses.dropped(), 3);
        assert_eq!(accesses.pop(), Some(of(0)), "the oldest are kept");
        assert_eq!(accesses.dropped(), 3);
    }
}
