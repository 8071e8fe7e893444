// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Groups with one address space of their own, which cannot be exchanged: VFIO type1 containers, and whatever else a VMM maps
//! memory with. Attaching a table means to map what it has, one mapping after the other; if one fails, all is taken back and
//! what was there before is mapped again.

#![forbid(unsafe_code)]

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::pieces::map_pieces;
use super::{
    AfterFailure, AttachError, Constraints, HostError, HostErrorKind, HostGroup, IoPageTable, MapError, Members,
};
use crate::access::Access;
use crate::causes::with_causes;
use crate::id::EndpointId;
use crate::memory::HostSegment;
use crate::range::IovaRange;

/// How often a mapper is told to unmap everything before it is given up: each time it may do so in part, or refuse.
const PATIENCE: u32 = 8;

/// Maps memory for the devices of one host group, in an address space in which nobody else maps anything.
pub trait DmaMapper: Debug + Send + Sync {
    /// Maps a piece of memory from `iova` on, with no more permission than asked, but for reading where only writing was asked
    /// for and hardware has no such thing. The memory must stay where it is until it is unmapped: the group keeps the segments of
    /// its tables, which hold it ([`HostMemory`](crate::memory::HostMemory)); a mapper whose host goes on looking at addresses
    /// after an unmap that failed keeps a clone itself.
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    fn map(&self, iova: u64, memory: &HostSegment, access: Access) -> Result<(), HostError>;

    /// Removes all mappings in a range, none of which reaches out of it, and returns how many bytes that were. It is asked for
    /// [`IovaRange::ALL`] until it says 0: a group is attached to nothing else before.
    ///
    /// # Errors
    ///
    /// Some mappings may be gone and some not.
    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError>;

    /// What can be mapped.
    ///
    /// # Errors
    ///
    /// Whatever the host says.
    fn constraints(&self) -> Result<Constraints, HostError>;

    /// Whether a device that may only read is kept from writing. If not, a read-only MAP of the guest is refused.
    fn honours_read_only(&self) -> bool {
        true
    }
}

/// A group whose devices are behind a [`DmaMapper`]. As it is found, nothing is mapped.
#[derive(Debug)]
pub struct ReplayGroup<M> {
    members: Vec<EndpointId>,
    space: Arc<Space<M>>,
}

/// The one address space that there is.
#[derive(Debug)]
struct Space<M> {
    mapper: M,
    /// Whose mappings are there. Locked before any table's own.
    live: Mutex<Option<Arc<Mappings>>>,
}

/// What a table maps, by first address.
type Mappings = Mutex<BTreeMap<u64, Entry>>;

#[derive(Clone, Debug)]
struct Entry {
    iova: IovaRange,
    to: Vec<HostSegment>,
    access: Access,
}

impl<M: DmaMapper + 'static> ReplayGroup<M> {
    /// The group of these endpoints.
    pub fn new(mapper: M, members: Vec<EndpointId>) -> Self {
        Self { members, space: Arc::new(Space { mapper, live: Mutex::default() }) }
    }

    /// What maps for it.
    pub fn mapper(&self) -> &M {
        &self.space.mapper
    }
}

impl<M: DmaMapper> Space<M> {
    fn live(&self) -> MutexGuard<'_, Option<Arc<Mappings>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps an entry, or nothing of it.
    fn map(&self, entry: &Entry) -> Result<(), MapError> {
        let map = |iova, segment: &HostSegment| self.mapper.map(iova, segment, entry.access);
        map_pieces(entry.iova, &entry.to, map, |mapped| self.mapper.unmap(mapped))
    }

    /// Maps everything that a table has, or some of it if that fails.
    fn replay(&self, mappings: &Mappings) -> Result<(), HostError> {
        let entries = lock(mappings);
        entries.values().try_for_each(|entry| self.map(entry)).map_err(HostError::from)
    }

    /// Unmaps everything, and is content only when the host says that nothing was left to unmap.
    ///
    /// # Errors
    ///
    /// Something may still be mapped.
    fn clear(&self) -> Result<(), HostError> {
        let mut refusal = None;
        for _ in 0..PATIENCE {
            match self.mapper.unmap(IovaRange::ALL) {
                Ok(0) => return Ok(()),
                Ok(_) => (),
                Err(error) => refusal = Some(error),
            }
        }
        Err(refusal.unwrap_or_else(|| {
            let action = format!("unmapping everything, {PATIENCE} times: there was something left each time");
            HostError::new(HostErrorKind::Other, action, None)
        }))
    }
}

fn lock(mappings: &Mappings) -> MutexGuard<'_, BTreeMap<u64, Entry>> {
    mappings.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M: DmaMapper> ReplayGroup<M> {
    /// Unmaps everything for a group that is to have no table. This cannot fail: a host that goes on refusing has a fault that
    /// nothing is left to do about, and no other table is attached while it has.
    fn clear_or_say(&self) {
        if let Err(error) = self.space.clear() {
            let group = Members(&self.members);
            log::error!("the host keeps what is mapped for {group}: {}", with_causes(&error));
        }
    }
}

impl<M: DmaMapper + 'static> HostGroup for ReplayGroup<M> {
    fn members(&self) -> &[EndpointId] {
        &self.members
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        Ok(Arc::new(ReplayTable { space: Arc::clone(&self.space), mappings: Arc::default() }))
    }

    fn can_share(&self, _table: &dyn IoPageTable) -> bool {
        false
    }

    fn attach(&self, table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        let table: &dyn Any = table.as_ref();
        let own = table.downcast_ref::<ReplayTable<M>>().filter(|table| Arc::ptr_eq(&table.space, &self.space));
        let Some(table) = own else {
            let error = HostError::new(HostErrorKind::Incompatible, "attaching to the table of another group", None);
            return Err(AttachError { error, after: AfterFailure::PreviousTable });
        };
        let mut live = self.space.live();
        if live.as_ref().is_some_and(|live| Arc::ptr_eq(live, &table.mappings)) {
            return Ok(());
        }
        let previous = live.take();
        self.space.clear().map_err(|error| AttachError { error, after: AfterFailure::Blocked })?;
        let Err(error) = self.space.replay(&table.mappings) else {
            *live = Some(Arc::clone(&table.mappings));
            return Ok(());
        };
        if let Some(previous) = previous
            && self.space.clear().is_ok()
            && self.space.replay(&previous).is_ok()
        {
            *live = Some(previous);
            return Err(AttachError { error, after: AfterFailure::PreviousTable });
        }
        self.clear_or_say();
        Err(AttachError { error, after: AfterFailure::Blocked })
    }

    fn is_found_blocked(&self) -> bool {
        true
    }

    fn block(&self) {
        let mut live = self.space.live();
        self.clear_or_say();
        *live = None;
    }
}

/// What would be mapped for the group, and is while the group is attached.
#[derive(Debug)]
struct ReplayTable<M> {
    space: Arc<Space<M>>,
    mappings: Arc<Mappings>,
}

impl<M: DmaMapper> ReplayTable<M> {
    fn is_live(&self, live: Option<&Arc<Mappings>>) -> bool {
        live.is_some_and(|live| Arc::ptr_eq(live, &self.mappings))
    }
}

impl<M: DmaMapper + 'static> IoPageTable for ReplayTable<M> {
    fn map(&self, iova: IovaRange, to: &[HostSegment], access: Access) -> Result<(), MapError> {
        if access == Access::READ && !self.space.mapper.honours_read_only() {
            let action = format!("mapping {iova} for reading only");
            return Err(MapError::Refused(HostError::new(HostErrorKind::Unsupported, action, None)));
        }
        let live = self.space.live();
        let entry = Entry { iova, to: to.to_vec(), access };
        if self.is_live(live.as_ref()) {
            self.space.map(&entry)?;
        }
        lock(&self.mappings).insert(iova.start(), entry);
        Ok(())
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        let live = self.space.live();
        let mut mappings = lock(&self.mappings);
        let inside: Vec<u64> = mappings.range(iova.start()..=iova.last()).map(|(start, _)| *start).collect();
        let removed = inside.iter().filter_map(|start| mappings.remove(start));
        let staged = removed.filter_map(|entry| entry.iova.length()).sum();
        if !self.is_live(live.as_ref()) {
            return Ok(staged);
        }
        self.space.mapper.unmap(iova)
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        self.space.mapper.constraints()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use vm_memory::GuestAddress;

    use super::*;
    use crate::device::{Settings, VirtioIommu};
    use crate::memory::GuestRam;
    use crate::range::RangeSet;
    use crate::reserved::EndpointView;

    /// A mapper that cannot keep a device from writing, and counts what is mapped.
    #[derive(Debug, Default)]
    struct Plain {
        mapped: Mutex<BTreeMap<u64, (u64, Access)>>,
        /// It unmaps nothing, and says so.
        refuses: AtomicBool,
        /// It says of every range that all of it was mapped.
        boasts: bool,
    }

    impl DmaMapper for Plain {
        fn map(&self, iova: u64, memory: &HostSegment, access: Access) -> Result<(), HostError> {
            self.mapped.lock().unwrap().insert(iova, (memory.length(), access));
            Ok(())
        }

        fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
            if self.refuses.load(Ordering::Relaxed) {
                return Err(HostError::new(HostErrorKind::Other, "unmapping", None));
            }
            let mut mapped = self.mapped.lock().unwrap();
            let inside: Vec<u64> = mapped.range(iova.start()..=iova.last()).map(|(start, _)| *start).collect();
            let gone = inside.iter().filter_map(|start| mapped.remove(start)).map(|(length, _)| length).sum();
            Ok(if self.boasts { iova.length().unwrap_or(u64::MAX) } else { gone })
        }

        fn constraints(&self) -> Result<Constraints, HostError> {
            Ok(Constraints { usable: RangeSet::from(IovaRange::ALL), granule: 0x1000 })
        }

        fn honours_read_only(&self) -> bool {
            false
        }
    }

    #[test]
    fn reading_only_is_refused_where_it_would_be_widened() {
        let group = ReplayGroup::new(Plain::default(), vec![EndpointId(1)]);
        let ram = GuestRam::in_software(&[(GuestAddress(0), 0x4000)]).unwrap();
        let segments = ram.segments(GuestAddress(0), 0x1000).unwrap();
        let table = group.new_table().unwrap();
        let iova: IovaRange = "1000-1fff".parse().unwrap();
        let Err(MapError::Refused(error)) = table.map(iova, &segments, Access::READ) else {
            panic!("it was mapped");
        };
        assert_eq!(error.kind, HostErrorKind::Unsupported);
        table.map(iova, &segments, Access::WRITE).unwrap();
        assert_eq!(group.mapper().mapped.lock().unwrap().len(), 0, "nothing is mapped before the group is attached");
        assert!(group.is_found_blocked());
        assert_eq!(table.unmap("0-ffff".parse().unwrap()).unwrap(), 0x1000);
        assert_eq!(table.unmap(iova).unwrap(), 0);
        table.map(iova, &segments, Access::WRITE).unwrap();
        group.attach(&table).unwrap();
        assert_eq!(group.mapper().mapped.lock().unwrap()[&0x1000], (0x1000, Access::WRITE));
        group.attach(&table).unwrap();
        group.block();
        assert_eq!(group.mapper().mapped.lock().unwrap().len(), 0);
    }

    impl Plain {
        fn starts(&self) -> Vec<u64> {
            self.mapped.lock().unwrap().keys().copied().collect()
        }
    }

    #[test]
    fn an_attach_fails_while_the_former_tables_mappings_cannot_be_removed() {
        let group = ReplayGroup::new(Plain::default(), vec![EndpointId(1)]);
        let ram = GuestRam::in_software(&[(GuestAddress(0), 0x4000)]).unwrap();
        let segments = ram.segments(GuestAddress(0), 0x1000).unwrap();
        let (one, other) = (group.new_table().unwrap(), group.new_table().unwrap());
        one.map("1000-1fff".parse().unwrap(), &segments, Access::WRITE).unwrap();
        other.map("8000-8fff".parse().unwrap(), &segments, Access::WRITE).unwrap();
        group.attach(&one).unwrap();
        group.mapper().refuses.store(true, Ordering::Relaxed);
        for table in [&other, &one] {
            assert_eq!(group.attach(table).map_err(|error| error.after), Err(AfterFailure::Blocked));
            assert_eq!(group.mapper().starts(), [0x1000]);
        }
        group.mapper().refuses.store(false, Ordering::Relaxed);
        group.attach(&other).unwrap();
        assert_eq!(group.mapper().starts(), [0x8000]);
    }

    #[test]
    fn a_mapper_that_never_says_that_nothing_is_left_is_not_believed() {
        let group = ReplayGroup::new(Plain { boasts: true, ..Plain::default() }, vec![EndpointId(1)]);
        group.block();
        let table = group.new_table().unwrap();
        let error = group.attach(&table).unwrap_err();
        assert_eq!((error.error.kind, error.after), (HostErrorKind::Other, AfterFailure::Blocked));
    }

    #[test]
    fn no_unmap_is_answered_with_ok_while_the_mapping_is_there() {
        const DEVERR: u8 = 3;
        let endpoint = EndpointId(1);
        let group = Arc::new(ReplayGroup::new(Plain::default(), vec![endpoint]));
        let settings = Settings { boot_bypass: false, ..Settings::new("0-ffffffff".parse().unwrap(), 0x1000) };
        let seen: Vec<Arc<dyn HostGroup>> = vec![Arc::clone(&group) as _];
        let mut device = VirtioIommu::new(settings, vec![(endpoint, EndpointView::default())], seen).unwrap();
        device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 0x4000)]).unwrap());
        device.set_driver_features(device.features());
        let mut send = |words: &[u32]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let mut reply = [0xaa; 4];
            assert_eq!(device.handle(&bytes, &mut reply), 4);
            reply[0]
        };
        assert_eq!(send(&[1, 1, endpoint.0, 0, 0]), 0);
        assert_eq!(send(&[3, 1, 0x5000, 0, 0x5fff, 0, 0x1000, 0, 3]), 0);
        group.mapper().refuses.store(true, Ordering::Relaxed);
        assert_eq!(send(&[4, 1, 0x5000, 0, 0x5fff, 0, 0]), DEVERR);
        assert_eq!(send(&[1, 2, endpoint.0, 0, 0]), DEVERR, "to another domain");
        group.mapper().refuses.store(false, Ordering::Relaxed);
        assert_eq!(send(&[1, 2, endpoint.0, 0, 0]), 0);
        assert!(group.mapper().starts().is_empty());
    }

    #[test]
    fn tables_are_each_groups_own() {
        let group = || ReplayGroup::new(Plain::default(), vec![EndpointId(1)]);
        let (one, other) = (group(), group());
        let table = one.new_table().unwrap();
        assert!(!one.can_share(table.as_ref()) && !other.can_share(table.as_ref()));
        let error = other.attach(&table).unwrap_err();
        assert_eq!((error.error.kind, error.after), (HostErrorKind::Incompatible, AfterFailure::PreviousTable));
    }
}
