// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long the host's calls take: a group that does what another one does, and keeps the time.

#![forbid(unsafe_code)]

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::refused::RefusedAccesses;
use super::{AttachError, Constraints, HostError, HostGroup, IoPageTable, MapError};
use crate::access::Access;
use crate::id::EndpointId;
use crate::memory::{GuestRam, HostSegment};
use crate::range::IovaRange;

/// The time that calls of the host took, of all groups that share it.
#[derive(Debug, Default)]
pub struct HostTime(AtomicU64);

impl HostTime {
    /// What they took so far.
    pub fn spent(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }

    fn keep<T>(&self, call: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = call();
        let nanoseconds = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.0.fetch_add(nanoseconds, Ordering::Relaxed);
        result
    }
}

/// A group whose calls are timed, and those of its tables.
#[derive(Debug)]
pub struct TimedGroup {
    group: Arc<dyn HostGroup>,
    time: Arc<HostTime>,
}

impl TimedGroup {
    /// Times the calls of a group.
    pub fn new(group: Arc<dyn HostGroup>, time: Arc<HostTime>) -> Self {
        Self { group, time }
    }
}

/// A table of such a group.
#[derive(Debug)]
struct TimedTable {
    table: Arc<dyn IoPageTable>,
    time: Arc<HostTime>,
}

/// The table that the group itself made.
fn inner(table: &dyn IoPageTable) -> &dyn IoPageTable {
    let any: &dyn Any = table;
    any.downcast_ref::<TimedTable>().map_or(table, |timed| timed.table.as_ref())
}

impl HostGroup for TimedGroup {
    fn members(&self) -> &[EndpointId] {
        self.group.members()
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        let table = self.time.keep(|| self.group.new_table())?;
        Ok(Arc::new(TimedTable { table, time: Arc::clone(&self.time) }))
    }

    fn can_share(&self, table: &dyn IoPageTable) -> bool {
        self.group.can_share(inner(table))
    }

    fn is_found_blocked(&self) -> bool {
        self.group.is_found_blocked()
    }

    fn attach(&self, table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        let any: &dyn Any = table.as_ref();
        let own = any.downcast_ref::<TimedTable>().map_or(table, |timed| &timed.table);
        self.time.keep(|| self.group.attach(own))
    }

    fn block(&self) {
        self.time.keep(|| self.group.block());
    }

    fn release(&self, member: EndpointId) {
        self.time.keep(|| self.group.release(member));
    }

    fn refused_accesses(&self) -> Option<&RefusedAccesses> {
        self.group.refused_accesses()
    }

    fn can_migrate(&self) -> bool {
        self.group.can_migrate()
    }

    fn memory_changed(&self, ram: &GuestRam) {
        self.time.keep(|| self.group.memory_changed(ram));
    }
}

impl IoPageTable for TimedTable {
    fn map(&self, iova: IovaRange, to: &[HostSegment], access: Access) -> Result<(), MapError> {
        self.time.keep(|| self.table.map(iova, to, access))
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        self.time.keep(|| self.table.unmap(iova))
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        self.time.keep(|| self.table.constraints())
    }

    fn in_software(&self) -> bool {
        self.table.in_software()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::{Attachment, FakeHost, Flavour};
    use crate::range::RangeSet;

    #[test]
    fn a_timed_group_does_what_its_group_does_and_shares_its_tables() {
        let host = FakeHost::new(Flavour::Iommufd);
        let time = Arc::new(HostTime::default());
        let [first, second] = [1, 2].map(|id| {
            TimedGroup::new(host.group(&[EndpointId(id)], RangeSet::from(IovaRange::ALL)), Arc::clone(&time))
        });
        let untimed = host.group(&[EndpointId(3)], RangeSet::from(IovaRange::ALL));
        assert_eq!(first.members(), [EndpointId(1)]);
        let table = first.new_table().unwrap();
        let theirs = untimed.new_table().unwrap();
        assert!(second.can_share(table.as_ref()) && first.can_share(theirs.as_ref()));
        for group in [&first, &second] {
            group.attach(&table).unwrap();
        }
        assert_eq!(host.attachment(EndpointId(1)), host.attachment(EndpointId(2)));
        assert_ne!(host.attachment(EndpointId(2)), Attachment::Blocked);
        first.attach(&theirs).unwrap();
        second.block();
        assert_eq!(host.attachment(EndpointId(2)), Attachment::Blocked);
        assert!(time.spent() > Duration::ZERO);
        // A table outlives what is attached to it.
        first.block();
    }

    #[test]
    fn the_time_of_calls_adds_up() {
        let time = HostTime::default();
        for _ in 0..2 {
            time.keep(|| std::thread::sleep(Duration::from_millis(5)));
        }
        assert!(time.spent() >= Duration::from_millis(10), "{:?}", time.spent());
    }
}
