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

    /// Has something called when one is added and none was waiting. Only the first function that is given is called.
    pub fn on_first(&self, wake: Box<dyn Fn() + Send + Sync>) {
        let _ = self.wake.set(wake);
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
        if was_empty && let Some(wake) = self.wake.get() {
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
