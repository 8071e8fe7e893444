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
    use std::sync::Mutex;

    use super::*;
    use crate::host::fake::{Attachment, FakeHost, Flavour};
    use crate::host::{AfterFailure, HostErrorKind};
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

    /// A group and a table that answer every question with the same, refuse what they are asked to do, and keep what that was.
    #[derive(Debug, Default)]
    struct Stubborn {
        answer: bool,
        refused: RefusedAccesses,
        asked: Mutex<Vec<String>>,
    }

    impl Stubborn {
        fn refuse(&self, what: String) -> HostError {
            self.asked.lock().unwrap().push(what);
            HostError::new(HostErrorKind::Gone, "", None)
        }
    }

    impl HostGroup for Stubborn {
        fn members(&self) -> &[EndpointId] {
            &[]
        }

        fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
            Err(self.refuse("table".to_owned()))
        }

        fn can_share(&self, _: &dyn IoPageTable) -> bool {
            self.answer
        }

        fn is_found_blocked(&self) -> bool {
            self.answer
        }

        fn attach(&self, _: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
            Err(AttachError { error: self.refuse("attach".to_owned()), after: AfterFailure::Blocked })
        }

        fn block(&self) {
            self.refuse("block".to_owned());
        }

        fn release(&self, member: EndpointId) {
            self.refuse(format!("release {member}"));
        }

        fn refused_accesses(&self) -> Option<&RefusedAccesses> {
            self.answer.then_some(&self.refused)
        }

        fn can_migrate(&self) -> bool {
            self.answer
        }

        fn memory_changed(&self, _: &GuestRam) {
            self.refuse("memory".to_owned());
        }
    }

    impl IoPageTable for Stubborn {
        fn map(&self, iova: IovaRange, _: &[HostSegment], _: Access) -> Result<(), MapError> {
            Err(MapError::Refused(self.refuse(format!("map {iova}"))))
        }

        fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
            self.refuse(format!("unmap {iova}"));
            Ok(iova.start())
        }

        fn constraints(&self) -> Result<Constraints, HostError> {
            Err(self.refuse("constraints".to_owned()))
        }

        fn in_software(&self) -> bool {
            self.answer
        }
    }

    #[test]
    fn a_timed_group_and_its_tables_say_what_those_say_that_are_timed() {
        for answer in [false, true] {
            let inner = Arc::new(Stubborn { answer, ..Stubborn::default() });
            let time = Arc::new(HostTime::default());
            let group = TimedGroup::new(Arc::clone(&inner) as _, Arc::clone(&time));
            let table: Arc<dyn IoPageTable> = Arc::new(TimedTable { table: Arc::clone(&inner) as _, time });
            assert_eq!(
                [group.can_share(&*table), group.is_found_blocked(), group.can_migrate(), table.in_software()],
                [answer; 4]
            );
            assert_eq!(
                group.refused_accesses().map(std::ptr::from_ref),
                answer.then_some(std::ptr::from_ref(&inner.refused))
            );
            assert!(group.new_table().is_err() && group.attach(&table).is_err() && table.constraints().is_err());
            group.block();
            group.release(EndpointId(1));
            group.memory_changed(&GuestRam::default());
            assert!(table.map("5000-5fff".parse().unwrap(), &[], Access::READ).is_err());
            assert_eq!(table.unmap("7000-7fff".parse().unwrap()).unwrap(), 0x7000);
            let release = format!("release {}", EndpointId(1));
            let asked = [
                "table",
                "attach",
                "constraints",
                "block",
                &release,
                "memory",
                "map 0x5000-0x5fff",
                "unmap 0x7000-0x7fff",
            ];
            assert_eq!(*inner.asked.lock().unwrap(), asked);
        }
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
