// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pins, atomics and what is exchanged as a whole, from the libraries or from the model checker.
//!
//! A thread that uses a translation is pinned meanwhile. [`wait_for_pins`] returns when every pin that was there when it was
//! called is gone; what was done before it is seen by every later pin.

#[cfg(loom)]
pub(super) use self::model::{AtomicU64, Exchanged, Loaded, Mutex, Pin, is_pinned, pin, wait_for_pins};
#[cfg(not(loom))]
pub(super) use self::real::{AtomicU64, Exchanged, Loaded, Mutex, Pin, is_pinned, pin, wait_for_pins};

#[cfg(not(loom))]
mod real {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, LazyLock};

    use crossbeam_epoch::{Collector, LocalHandle};

    pub(in super::super) use std::sync::Mutex;
    pub(in super::super) use std::sync::atomic::AtomicU64;

    pub(in super::super) use arc_swap::ArcSwapOption as Exchanged;
    pub(in super::super) use crossbeam_epoch::Guard as Pin;

    /// What was found in an [`Exchanged`].
    pub(in super::super) type Loaded<T> = arc_swap::Guard<Option<Arc<T>>>;

    /// Whose pins are waited for: those of this crate. The library's own collector is everybody's in the process, and whoever is
    /// pinned there for long would hold up each UNMAP.
    static COLLECTOR: LazyLock<Collector> = LazyLock::new(Collector::new);

    thread_local! {
        static HANDLE: LocalHandle = COLLECTOR.register();
    }

    /// Pins the thread, also one that is about to end and has lost its handle.
    #[inline]
    pub(in super::super) fn pin() -> Pin {
        HANDLE.try_with(LocalHandle::pin).unwrap_or_else(|_| COLLECTOR.register().pin())
    }

    pub(in super::super) fn is_pinned() -> bool {
        HANDLE.try_with(LocalHandle::is_pinned).unwrap_or(false)
    }

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

/// What the libraries promise, in the terms of the model checker: pins share a lock that the waiting one takes alone, and an exchange
/// is under a lock, which the checker sees.
#[cfg(loom)]
mod model {
    use std::sync::Arc;

    pub(in super::super) use loom::sync::Mutex;
    pub(in super::super) use loom::sync::atomic::AtomicU64;

    loom::lazy_static! {
        static ref PINS: loom::sync::RwLock<()> = loom::sync::RwLock::new(());
    }

    pub(in super::super) type Pin = loom::sync::RwLockReadGuard<'static, ()>;

    pub(in super::super) type Loaded<T> = Option<Arc<T>>;

    #[derive(Debug)]
    pub(in super::super) struct Exchanged<T>(Mutex<Option<Arc<T>>>);

    impl<T> Default for Exchanged<T> {
        fn default() -> Self {
            Self(Mutex::new(None))
        }
    }

    impl<T> Exchanged<T> {
        pub fn load(&self) -> Loaded<T> {
            self.0.lock().unwrap().clone()
        }

        pub fn swap(&self, value: Option<Arc<T>>) -> Option<Arc<T>> {
            std::mem::replace(&mut *self.0.lock().unwrap(), value)
        }
    }

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
