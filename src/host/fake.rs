// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A strict model of a host IOMMU, for tests: it refuses what the kernel refuses, can be told to fail at any call, and
//! says where a device's DMA would land. It stands for the groups and page tables of a backend; in [`kernel`] is a model of the
//! kernel below the backends.

// A model for tests stops at its first contradiction.
#![allow(clippy::expect_used, clippy::missing_panics_doc)]

use std::any::Any;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{AfterFailure, AttachError, Constraints, HostError, HostErrorKind, HostGroup, IoPageTable, MapError};
use crate::access::Access;
use crate::id::EndpointId;
use crate::memory::HostSegment;
use crate::range::{IovaRange, RangeSet};

#[cfg(all(feature = "iommufd", feature = "type1"))]
mod iommufd_rules;
#[cfg(all(feature = "iommufd", feature = "type1"))]
pub mod kernel;
#[cfg(all(feature = "iommufd", feature = "type1"))]
mod type1_rules;

/// Which API of Linux the host behaves like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// Tables are shared, attaching replaces, unmapping nothing is an error.
    Iommufd,
    /// A table for each group, an attach that fails leaves the group with none, unmapping nothing is no error.
    Type1,
}

/// How a call is to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It returns this error and changes nothing.
    Error(HostErrorKind),
    /// An unmap removes only the first mapping in the range and says so; any other call fails with an error.
    Short,
}

/// What a group's DMA goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// Whatever the VM was started with.
    AsFound,
    /// Nothing.
    Blocked,
    /// The table with this number.
    Table(u32),
}

/// One mapping of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FakeMapping {
    /// The virtual addresses.
    pub iova: IovaRange,
    /// The guest-physical pieces, in order: first address and length.
    pub to: Vec<(u64, u64)>,
    /// What a device may do.
    pub access: Access,
}

/// A host with groups, tables and a plan of failures.
#[derive(Clone, Debug)]
pub struct FakeHost {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    flavour: Flavour,
    granule: u64,
    tables: BTreeMap<u32, BTreeMap<u64, FakeMapping>>,
    next_table: u32,
    groups: Vec<GroupState>,
    calls: u64,
    failures: BTreeMap<u64, Failure>,
    released: Vec<EndpointId>,
    can_migrate: bool,
    /// What each map waits for.
    gate: Option<Arc<Mutex<Receiver<()>>>>,
}

#[derive(Debug)]
struct GroupState {
    members: Vec<EndpointId>,
    usable: RangeSet,
    attachment: Attachment,
}

/// The smallest page of the model, unless it is told otherwise.
const GRANULE: u64 = 0x1000;

impl FakeHost {
    /// A host without groups.
    pub fn new(flavour: Flavour) -> Self {
        let state = State {
            flavour,
            granule: GRANULE,
            tables: BTreeMap::new(),
            next_table: 1,
            groups: Vec::new(),
            calls: 0,
            failures: BTreeMap::new(),
            released: Vec::new(),
            can_migrate: false,
            gate: None,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Adds a group whose devices can use these addresses.
    pub fn group(&self, members: &[EndpointId], usable: RangeSet) -> Arc<dyn HostGroup> {
        self.group_with(members, usable, Vec::new())
    }

    fn group_with(
        &self,
        members: &[EndpointId],
        usable: RangeSet,
        files: Vec<(EndpointId, OwnedFd)>,
    ) -> Arc<dyn HostGroup> {
        let mut state = self.lock();
        state.groups.push(GroupState { members: members.to_vec(), usable, attachment: Attachment::AsFound });
        let index = state.groups.len() - 1;
        Arc::new(FakeGroup { host: self.clone(), members: members.to_vec(), index, files: Mutex::new(files) })
    }

    /// Adds a group of endpoints that were in another one, which is gone.
    pub fn regroup(&self, members: &[EndpointId], usable: RangeSet) -> Arc<dyn HostGroup> {
        self.regroup_with(members, usable, Vec::new())
    }

    /// The same, with a file of each of them, which the group has until that endpoint is released.
    pub fn regroup_by_files(&self, devices: Vec<(EndpointId, OwnedFd)>, usable: RangeSet) -> Arc<dyn HostGroup> {
        let members: Vec<EndpointId> = devices.iter().map(|(id, _)| *id).collect();
        self.regroup_with(&members, usable, devices)
    }

    fn regroup_with(
        &self,
        members: &[EndpointId],
        usable: RangeSet,
        files: Vec<(EndpointId, OwnedFd)>,
    ) -> Arc<dyn HostGroup> {
        for group in &mut self.lock().groups {
            group.members.retain(|member| !members.contains(member));
        }
        self.group_with(members, usable, files)
    }

    /// The members whose files were closed, in that order.
    pub fn released(&self) -> Vec<EndpointId> {
        self.lock().released.clone()
    }

    /// Makes the call after `after` more calls fail; 0 is the next one. Only calls that can fail are counted.
    pub fn fail_after(&self, after: u64, failure: Failure) {
        let mut state = self.lock();
        let at = state.calls + after;
        state.failures.insert(at, failure);
    }

    /// Forgets all failures that have not happened.
    pub fn stop_failing(&self) {
        self.lock().failures.clear();
    }

    /// Makes each map wait until it is let on by a message to this channel, or the channel is gone.
    pub fn hold_maps(&self) -> SyncSender<()> {
        let (let_on, gate) = sync_channel(0);
        self.lock().gate = Some(Arc::new(Mutex::new(gate)));
        let_on
    }

    /// How many calls were made that could have failed.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// What the group of an endpoint is attached to.
    pub fn attachment(&self, endpoint: EndpointId) -> Attachment {
        self.lock().group_of(endpoint).attachment
    }

    /// What is mapped in the table that the group of an endpoint is attached to, ascending.
    pub fn mappings(&self, endpoint: EndpointId) -> Vec<FakeMapping> {
        let state = self.lock();
        match state.group_of(endpoint).attachment {
            Attachment::Table(id) => state.tables.get(&id).into_iter().flat_map(BTreeMap::values).cloned().collect(),
            Attachment::AsFound | Attachment::Blocked => Vec::new(),
        }
    }

    /// The guest-physical address that a device's DMA reaches; `None` if it is refused. A group that is as it was
    /// found reaches every address as it is.
    pub fn dma(&self, endpoint: EndpointId, iova: u64, access: Access) -> Option<u64> {
        let state = self.lock();
        let table = match state.group_of(endpoint).attachment {
            Attachment::AsFound => return Some(iova),
            Attachment::Blocked => return None,
            Attachment::Table(id) => state.tables.get(&id)?,
        };
        let (_, mapping) = table.range(..=iova).next_back()?;
        let allowed = (mapping.access.read || !access.read) && (mapping.access.write || !access.write);
        if iova > mapping.iova.last() || !allowed {
            return None;
        }
        let mut offset = iova - mapping.iova.start();
        for (start, length) in &mapping.to {
            if offset < *length {
                return Some(start + offset);
            }
            offset -= length;
        }
        None
    }

    /// The devices of a group can use less from now on.
    pub fn narrow(&self, endpoint: EndpointId, usable: RangeSet) {
        let mut state = self.lock();
        let group = state.groups.iter_mut().find(|group| group.members.contains(&endpoint));
        group.expect("the endpoint is in a group").usable = usable;
    }

    /// All groups can map no smaller pages than this from now on.
    pub fn coarsen(&self, granule: u64) {
        self.lock().granule = granule;
    }

    /// The guest can go on on another host with the devices of all groups from now on, as it can with emulated ones.
    pub fn allow_migration(&self) {
        self.lock().can_migrate = true;
    }

    /// Somebody else attaches the group of an endpoint to guest memory as it is, as a VMM does with a device that it plugs.
    pub fn attach_elsewhere(&self, endpoint: EndpointId) {
        let mut state = self.lock();
        let group = state.groups.iter_mut().find(|group| group.members.contains(&endpoint));
        group.expect("the endpoint is in a group").attachment = Attachment::AsFound;
    }

    /// How many tables there are.
    pub fn table_count(&self) -> usize {
        self.lock().tables.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the model does not panic under its lock")
    }
}

impl State {
    fn group_of(&self, endpoint: EndpointId) -> &GroupState {
        self.groups.iter().find(|group| group.members.contains(&endpoint)).expect("the endpoint is in a group")
    }

    /// Counts a call; the failure that is planned for it.
    fn call(&mut self) -> Option<Failure> {
        let failure = self.failures.remove(&self.calls);
        self.calls += 1;
        failure
    }

    fn usable(&self, table: u32) -> RangeSet {
        let attached = self.groups.iter().filter(|group| group.attachment == Attachment::Table(table));
        attached.fold(RangeSet::from(IovaRange::ALL), |usable, group| usable.intersect(&group.usable))
    }
}

/// The mappings of a table that have an address of a range in them.
fn overlapping(table: &BTreeMap<u64, FakeMapping>, range: IovaRange) -> Vec<IovaRange> {
    let before = table.range(..range.start()).next_back().into_iter();
    let inside = before.chain(table.range(range.start()..=range.last()));
    inside.map(|(_, mapping)| mapping.iova).filter(|iova| iova.overlaps(range)).collect()
}

fn error(kind: HostErrorKind) -> HostError {
    HostError::new(kind, "a call that fails by plan or by rule", None)
}

fn planned(failure: Failure) -> HostError {
    match failure {
        Failure::Error(kind) => error(kind),
        Failure::Short => error(HostErrorKind::Other),
    }
}

#[derive(Debug)]
struct FakeGroup {
    host: FakeHost,
    members: Vec<EndpointId>,
    index: usize,
    files: Mutex<Vec<(EndpointId, OwnedFd)>>,
}

impl FakeGroup {
    fn set(&self, state: &mut State, attachment: Attachment) {
        state.groups.get_mut(self.index).expect("groups are never removed").attachment = attachment;
    }
}

impl HostGroup for FakeGroup {
    fn members(&self) -> &[EndpointId] {
        &self.members
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        let mut state = self.host.lock();
        if let Some(failure) = state.call() {
            return Err(planned(failure));
        }
        let id = state.next_table;
        state.next_table += 1;
        state.tables.insert(id, BTreeMap::new());
        Ok(Arc::new(FakeTable { host: self.host.clone(), id }))
    }

    fn can_share(&self, table: &dyn IoPageTable) -> bool {
        let table: &dyn Any = table;
        self.host.lock().flavour == Flavour::Iommufd && table.is::<FakeTable>()
    }

    fn attach(&self, table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        let table: &dyn Any = table.as_ref();
        let id = table.downcast_ref::<FakeTable>().expect("tables of this model are attached to its groups").id;
        let mut state = self.host.lock();
        let mapped: Vec<IovaRange> =
            state.tables.get(&id).expect("a live table").values().map(|mapping| mapping.iova).collect();
        let usable = state.groups.get(self.index).expect("groups are never removed").usable.clone();
        let refusal = match state.call() {
            Some(failure) => Some(planned(failure)),
            None if mapped.iter().all(|iova| usable.covers(*iova)) => None,
            None => Some(error(HostErrorKind::ReservedConflict)),
        };
        let Some(error) = refusal else {
            self.set(&mut state, Attachment::Table(id));
            return Ok(());
        };
        if state.flavour == Flavour::Type1 {
            self.set(&mut state, Attachment::Blocked);
            return Err(AttachError { error, after: AfterFailure::Blocked });
        }
        Err(AttachError { error, after: AfterFailure::PreviousTable })
    }

    fn block(&self) {
        self.set(&mut self.host.lock(), Attachment::Blocked);
    }

    fn can_migrate(&self) -> bool {
        self.host.lock().can_migrate
    }

    fn release(&self, member: EndpointId) {
        self.host.lock().released.push(member);
        self.files.lock().expect("the model does not panic under its lock").retain(|(id, _)| *id != member);
    }
}

#[derive(Debug)]
struct FakeTable {
    host: FakeHost,
    id: u32,
}

impl IoPageTable for FakeTable {
    fn map(&self, iova: IovaRange, to: &[HostSegment], access: Access) -> Result<(), MapError> {
        let gate = self.host.lock().gate.clone();
        if let Some(gate) = gate {
            // One whose sender is gone is open.
            let _ = gate.lock().expect("the model does not panic under its lock").recv();
        }
        let mut state = self.host.lock();
        if let Some(failure) = state.call() {
            return Err(MapError::Refused(planned(failure)));
        }
        let length: u128 = to.iter().map(|segment| u128::from(segment.length())).sum();
        let granule = state.granule;
        let aligned = iova.is_aligned(granule) && to.iter().all(|segment| segment.start().0 & (granule - 1) == 0);
        if length != iova.size() || !aligned || access.is_none() || !state.usable(self.id).covers(iova) {
            return Err(MapError::Refused(error(HostErrorKind::Unmappable)));
        }
        let table = state.tables.get_mut(&self.id).expect("a live table");
        if !overlapping(table, iova).is_empty() {
            return Err(MapError::Refused(error(HostErrorKind::AlreadyMapped)));
        }
        let to = to.iter().map(|segment| (segment.start().0, segment.length())).collect();
        table.insert(iova.start(), FakeMapping { iova, to, access });
        Ok(())
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        let mut state = self.host.lock();
        let (failure, flavour, granule) = (state.call(), state.flavour, state.granule);
        let table = state.tables.get_mut(&self.id).expect("a live table");
        let inside = overlapping(table, iova);
        let take = match failure {
            Some(Failure::Error(kind)) => return Err(error(kind)),
            Some(Failure::Short) => inside.len().min(1),
            None => inside.len(),
        };
        let nothing = inside.is_empty() && flavour == Flavour::Iommufd;
        if nothing || inside.iter().any(|mapped| !iova.covers(*mapped)) {
            return Err(error(HostErrorKind::Other));
        }
        let mut gone = 0;
        for mapped in inside.into_iter().take(take) {
            table.remove(&mapped.start());
            gone += mapped.length().expect("no mapping is the whole address space");
        }
        // A short unmap of one mapping has to lie about its length to be short.
        Ok(if failure == Some(Failure::Short) { gone - granule.min(gone) } else { gone })
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        let mut state = self.host.lock();
        match state.call() {
            Some(failure) => Err(planned(failure)),
            None => Ok(Constraints { usable: state.usable(self.id), granule: state.granule }),
        }
    }
}

impl Drop for FakeTable {
    fn drop(&mut self) {
        let mut state = self.host.lock();
        let attached = state.groups.iter().any(|group| group.attachment == Attachment::Table(self.id));
        if !attached {
            state.tables.remove(&self.id);
        } else if !std::thread::panicking() {
            panic!("table {} was dropped with a group attached: the kernel would say EBUSY", self.id);
        }
    }
}
