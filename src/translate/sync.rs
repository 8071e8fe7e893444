// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins and atomics, from the libraries or from the model checker.
//!
//! A thread that uses a translation is pinned meanwhile. [`wait_for_pins`] returns when every pin that was there when it was
//! called is gone; what was done before it is seen by every later pin.

#[cfg(loom)]
pub(super) use self::model::{AtomicU64, Mutex, Pin, is_pinned, pin, wait_for_pins};
#[cfg(not(loom))]
pub(super) use self::real::{AtomicU64, Mutex, Pin, is_pinned, pin, wait_for_pins};

#[cfg(not(loom))]
mod real {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    pub(in super::super) use std::sync::Mutex;
    pub(in super::super) use std::sync::atomic::AtomicU64;

    pub(in super::super) use crossbeam_epoch::{Guard as Pin, is_pinned, pin};

    /// A function that is deferred runs when everybody who was pinned then is not any more.
    pub(in super::super) fn wait_for_pins() {
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        pin().defer(move || seen.store(true, Ordering::Release));
        while !ended.load(Ordering::Acquire) {
            pin().flush();
            if !ended.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
        }
    }
}

/// What the library promises, in the terms of the model checker: pins share a lock that the waiting one takes alone.
#[cfg(loom)]
mod model {
    pub(in super::super) use loom::sync::Mutex;
    pub(in super::super) use loom::sync::atomic::AtomicU64;

    loom::lazy_static! {
        static ref PINS: loom::sync::RwLock<()> = loom::sync::RwLock::new(());
    }

    pub(in super::super) type Pin = loom::sync::RwLockReadGuard<'static, ()>;

    pub(in super::super) fn pin() -> Pin {
        PINS.read().unwrap()
    }

    pub(in super::super) const fn is_pinned() -> bool {
        false
    }

    pub(in super::super) fn wait_for_pins() {
        drop(PINS.write().unwrap());
    }
}
