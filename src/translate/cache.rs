// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Translations that are kept by others.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::group::Attachment;
use super::table::Table;
use crate::host::HostError;
use crate::range::IovaRange;

/// Keeps translations of an endpoint where no pin reaches them, as a device in the host's kernel does. It is filled by who is
/// [pinned](super::Pinned), so that what has gone is never filled in after it was invalidated.
pub trait TranslationCache: fmt::Debug + Send + Sync {
    /// Forgets all translations that have an address in a range. When this returns, none of them is used any more, and none is
    /// until it is filled in again. More may be forgotten than asked for.
    ///
    /// # Errors
    ///
    /// They may still be used: UNMAP fails, and the endpoint is blocked.
    fn invalidate(&self, iova: IovaRange) -> Result<(), HostError>;

    /// A range can be translated now, in which nothing could before. By default nothing is done.
    fn mapped(&self, iova: IovaRange) {
        let _ = iova;
    }

    /// Ends the device's access to memory for good, after it did not forget. This cannot fail.
    fn stop(&self);
}

/// The caches of all endpoints of a translation.
#[derive(Debug, Default)]
pub(super) struct Caches(Mutex<Vec<GroupCache>>);

/// The attachment of a group, and a cache of one of its members.
type GroupCache = (Weak<Attachment>, Weak<dyn TranslationCache>);

impl Caches {
    /// Adds one, for an endpoint of the group with this attachment.
    pub fn add(&self, attachment: &Arc<Attachment>, cache: &Weak<dyn TranslationCache>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(_, cache)| cache.strong_count() != 0);
        all.push((Arc::downgrade(attachment), Weak::clone(cache)));
    }

    /// Has those forget a range whose groups are attached to a table. The first failure is returned; the others are asked
    /// nevertheless.
    pub fn invalidate(&self, table: &Table, iova: IovaRange) -> Result<(), HostError> {
        let results = self.on(table).into_iter().map(|cache| cache.invalidate(iova));
        results.fold(Ok(()), Result::and)
    }

    /// Has those of a group forget everything. Those that do not are stopped, and the first failure is returned.
    pub fn invalidate_all(&self, attachment: &Arc<Attachment>) -> Result<(), HostError> {
        let results = self.of(|other| std::ptr::eq(other, Arc::as_ptr(attachment))).into_iter().map(|cache| {
            let result = cache.invalidate(IovaRange::ALL);
            if result.is_err() {
                cache.stop();
            }
            result
        });
        results.fold(Ok(()), Result::and)
    }

    /// Tells those of a mapping whose groups are attached to its table.
    pub fn mapped(&self, table: &Table, iova: IovaRange) {
        self.on(table).iter().for_each(|cache| cache.mapped(iova));
    }

    /// The caches of the groups that are attached to a table.
    fn on(&self, table: &Table) -> Vec<Arc<dyn TranslationCache>> {
        self.of(|attachment| attachment.table.load().as_deref().is_some_and(|other| std::ptr::eq(other, table)))
    }

    /// The caches of the groups that something holds for. They are called without the lock.
    fn of(&self, is_meant: impl Fn(&Attachment) -> bool) -> Vec<Arc<dyn TranslationCache>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let meant =
            all.iter().filter(|(attachment, _)| attachment.upgrade().is_some_and(|attachment| is_meant(&attachment)));
        meant.filter_map(|(_, cache)| cache.upgrade()).collect()
    }
}
