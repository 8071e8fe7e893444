// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hosts that count what they are asked.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_iommu::access::Access;
use virtio_iommu::host::{AttachError, Constraints, HostError, HostGroup, IoPageTable, MapError};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::HostSegment;
use virtio_iommu::range::{IovaRange, RangeSet};

use crate::case::PAGE;

/// What a host was asked.
#[derive(Debug, Default)]
pub struct Calls {
    /// Whatever changes it.
    pub changes: AtomicU64,
    /// What it can do.
    pub questions: AtomicU64,
    pub maps: AtomicU64,
    /// How many bytes it maps.
    pub bytes: AtomicU64,
}

/// A group on a host that does nothing, with tables that no other group can use.
#[derive(Debug)]
pub struct PrivateGroup {
    pub members: [EndpointId; 1],
    pub calls: Arc<Calls>,
}

impl HostGroup for PrivateGroup {
    fn members(&self) -> &[EndpointId] {
        &self.members
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        Ok(Arc::new(PrivateTable { calls: Arc::clone(&self.calls) }))
    }

    fn can_share(&self, _table: &dyn IoPageTable) -> bool {
        false
    }

    fn attach(&self, _table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        Ok(())
    }

    fn block(&self) {}
}

#[derive(Debug)]
struct PrivateTable {
    calls: Arc<Calls>,
}

impl IoPageTable for PrivateTable {
    fn map(&self, iova: IovaRange, _to: &[HostSegment], _access: Access) -> Result<(), MapError> {
        self.calls.maps.fetch_add(1, Ordering::Relaxed);
        self.calls.bytes.fetch_add(iova.length().unwrap(), Ordering::Relaxed);
        Ok(())
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        Ok(iova.length().unwrap())
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        Ok(Constraints { usable: RangeSet::from(IovaRange::ALL), granule: PAGE })
    }
}

/// A group that counts what is asked of the host behind it.
#[derive(Debug)]
pub struct CountedGroup {
    pub host: Arc<dyn HostGroup>,
    pub calls: Arc<Calls>,
}

/// A table that does.
#[derive(Debug)]
struct CountedTable {
    table: Arc<dyn IoPageTable>,
    calls: Arc<Calls>,
}

impl CountedTable {
    fn of(table: &dyn IoPageTable) -> &Self {
        let table: &dyn Any = table;
        table.downcast_ref().expect("all tables are counted")
    }
}

impl Calls {
    fn change(&self) {
        self.changes.fetch_add(1, Ordering::Relaxed);
    }
}

impl HostGroup for CountedGroup {
    fn members(&self) -> &[EndpointId] {
        self.host.members()
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        self.calls.change();
        Ok(Arc::new(CountedTable { table: self.host.new_table()?, calls: Arc::clone(&self.calls) }))
    }

    fn can_share(&self, table: &dyn IoPageTable) -> bool {
        self.host.can_share(CountedTable::of(table).table.as_ref())
    }

    fn attach(&self, table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        self.calls.change();
        self.host.attach(&CountedTable::of(table.as_ref()).table)
    }

    fn block(&self) {
        self.calls.change();
        self.host.block();
    }
}

impl IoPageTable for CountedTable {
    fn map(&self, iova: IovaRange, to: &[HostSegment], access: Access) -> Result<(), MapError> {
        self.calls.change();
        self.table.map(iova, to, access)
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        self.calls.change();
        self.table.unmap(iova)
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        self.calls.questions.fetch_add(1, Ordering::Relaxed);
        self.table.constraints()
    }
}
