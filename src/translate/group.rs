// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Groups of endpoints that are translated for here.

use std::any::Any;
use std::sync::{Arc, Weak};

use super::Translation;
use super::cache::TranslationCache;
use super::sync::{Exchanged, is_pinned, wait_for_pins};
use super::table::Table;
use super::translator::Translator;
use crate::access::Access;
use crate::host::refused::RefusedAccesses;
use crate::host::{
    AfterFailure, AttachError, Constraints, HostError, HostErrorKind, HostGroup, IoPageTable, MapError, Members,
};
use crate::id::EndpointId;
use crate::mapping::{Mapping, SMALLEST_PAGE};
use crate::memory::HostSegment;
use crate::range::{IovaRange, RangeSet};

/// A group of endpoints whose devices are emulated and ask for translations; usually just one. As it is found it is blocked.
#[derive(Debug)]
pub struct EmulatedGroup {
    members: Vec<EndpointId>,
    translation: Arc<Translation>,
    attachment: Arc<Attachment>,
}

/// What the group's translators share with it.
#[derive(Debug, Default)]
pub(super) struct Attachment {
    /// `None` while the group is blocked.
    pub table: Exchanged<Table>,
    pub refused: RefusedAccesses,
}

impl EmulatedGroup {
    pub(super) fn new(translation: Arc<Translation>, members: Vec<EndpointId>) -> Self {
        Self { members, translation, attachment: Arc::default() }
    }

    /// What the device of an endpoint translates its accesses with; `None` if the endpoint is not in the group.
    pub fn translator(&self, endpoint: EndpointId) -> Option<Translator> {
        let is_member = self.members.contains(&endpoint);
        is_member.then(|| Translator::new(endpoint, Arc::clone(&self.attachment)))
    }

    /// Has something called when an access is refused and none was waiting to be told to the guest: say, to write to an event
    /// file. It is called on the thread whose access it was, and must not block. Only the first one that is set is called.
    pub fn on_refused(&self, wake: impl Fn() + Send + Sync + 'static) {
        self.attachment.refused.on_first(Box::new(wake));
    }

    /// Has a cache of one of the members' translations told of what it must forget, as long as it lives.
    pub fn add_cache(&self, cache: &Weak<dyn TranslationCache>) {
        self.translation.caches.add(&self.attachment, cache);
    }

    /// Puts the group on a table, or on none, and waits until nobody uses the former one.
    ///
    /// # Errors
    ///
    /// A cache of the former one's translations did not forget them, and was stopped.
    fn switch(&self, table: Option<Arc<Table>>) -> Result<(), HostError> {
        let before = self.attachment.table.swap(table);
        if is_pinned() {
            // Waiting would never end. Whoever translates on this thread goes on with what it has.
            let group = Members(&self.members);
            log::error!("the device was called for {group} by a thread that holds a translation: it is not waited for");
        } else {
            wait_for_pins();
        }
        let result = self.translation.caches.invalidate_all(&self.attachment);
        drop(before);
        result
    }
}

impl HostGroup for EmulatedGroup {
    fn members(&self) -> &[EndpointId] {
        &self.members
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        let table = Arc::new(self.translation.table());
        Ok(Arc::new(EmulatedTable { translation: Arc::clone(&self.translation), table }))
    }

    fn can_share(&self, table: &dyn IoPageTable) -> bool {
        let table: &dyn Any = table;
        let own = table.downcast_ref::<EmulatedTable>();
        own.is_some_and(|table| Arc::ptr_eq(&table.translation, &self.translation))
    }

    fn is_found_blocked(&self) -> bool {
        true
    }

    fn attach(&self, table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        let table: &dyn Any = table.as_ref();
        let own = table.downcast_ref::<EmulatedTable>();
        let Some(EmulatedTable { table, .. }) = own.filter(|own| Arc::ptr_eq(&own.translation, &self.translation))
        else {
            let action = "attaching an emulated endpoint to the table of another translation";
            let error = HostError::new(HostErrorKind::Incompatible, action, None);
            return Err(AttachError { error, after: AfterFailure::PreviousTable });
        };
        if let Err(error) = self.switch(Some(Arc::clone(table))) {
            self.block();
            return Err(AttachError { error, after: AfterFailure::Blocked });
        }
        self.translation.caches.mapped(table, IovaRange::ALL);
        Ok(())
    }

    fn block(&self) {
        if let Err(error) = self.switch(None) {
            // It was stopped.
            let group = Members(&self.members);
            log::error!("a device of {group} that keeps translations goes on no more: {error}");
        }
    }

    fn refused_accesses(&self) -> Option<&RefusedAccesses> {
        Some(&self.attachment.refused)
    }

    fn can_migrate(&self) -> bool {
        true
    }
}

/// A table, and the translation that it belongs to.
#[derive(Debug)]
struct EmulatedTable {
    translation: Arc<Translation>,
    table: Arc<Table>,
}

impl IoPageTable for EmulatedTable {
    fn map(&self, iova: IovaRange, to: &[HostSegment], access: Access) -> Result<(), MapError> {
        let refused = |kind| MapError::Refused(HostError::new(kind, format!("translating {iova} here"), None));
        let Some(first) = to.first().map(HostSegment::start) else {
            return Err(refused(HostErrorKind::BadAddress));
        };
        // Consecutive guest memory is one mapping, however many regions of the host's it is in.
        let mut end = Some(first.0);
        for segment in to {
            if end != Some(segment.start().0) {
                return Err(refused(HostErrorKind::BadAddress));
            }
            end = segment.start().0.checked_add(segment.length());
        }
        let fits = iova.is_aligned(SMALLEST_PAGE)
            && first.0.is_multiple_of(SMALLEST_PAGE)
            && self.translation.aperture().covers(iova);
        if !fits {
            return Err(refused(HostErrorKind::Unmappable));
        }
        if !self.table.map(Mapping { iova, physical: first, access }) {
            return Err(refused(HostErrorKind::AlreadyMapped));
        }
        self.translation.caches.mapped(&self.table, iova);
        Ok(())
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        let failed = |action: &str| {
            let action = format!("no longer translating {iova} here: {action}");
            HostError::new(HostErrorKind::Other, action, None)
        };
        if is_pinned() {
            return Err(failed("the device was called by a thread that holds a translation"));
        }
        let gone = self.table.unmap(iova).map_err(|_| failed("a mapping reaches out of the range"))?;
        // After the wait for pins: nothing is filled in any more that was there before.
        self.translation.caches.invalidate(&self.table, iova)?;
        Ok(gone)
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        Ok(Constraints { usable: RangeSet::from(self.translation.aperture()), granule: SMALLEST_PAGE })
    }
}
