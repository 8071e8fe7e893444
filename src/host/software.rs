// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Endpoints behind no host IOMMU: devices that the VMM emulates.
//!
//! There is no table on the host to keep in step: requests for such endpoints are checked and remembered, and nobody can ask for a
//! translation. Where devices do ask, there is feature `translate`.

#![forbid(unsafe_code)]

use std::any::Any;
use std::sync::Arc;

use super::{AttachError, Constraints, HostError, HostGroup, IoPageTable, MapError};
use crate::access::Access;
use crate::id::EndpointId;
use crate::memory::HostSegment;
use crate::range::{IovaRange, RangeSet};

/// A group of emulated endpoints that the guest cannot isolate from each other; usually just one.
#[derive(Debug)]
pub struct SoftwareGroup {
    members: Vec<EndpointId>,
    granule: u64,
}

impl SoftwareGroup {
    /// A group of these endpoints, whose mappings are multiples of `granule` bytes, a power of two.
    pub fn new(members: Vec<EndpointId>, granule: u64) -> Self {
        Self { members, granule }
    }
}

impl HostGroup for SoftwareGroup {
    fn members(&self) -> &[EndpointId] {
        &self.members
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        Ok(Arc::new(SoftwareTable { granule: self.granule }))
    }

    fn can_share(&self, table: &dyn IoPageTable) -> bool {
        let table: &dyn Any = table;
        table.is::<SoftwareTable>()
    }

    fn attach(&self, _table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        Ok(())
    }

    fn block(&self) {}

    fn can_migrate(&self) -> bool {
        true
    }
}

/// Stands for the table that a host would have.
#[derive(Debug)]
struct SoftwareTable {
    granule: u64,
}

impl IoPageTable for SoftwareTable {
    fn map(&self, _iova: IovaRange, _to: &[HostSegment], _access: Access) -> Result<(), MapError> {
        Ok(())
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        Ok(iova.length().unwrap_or(u64::MAX))
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        Ok(Constraints { usable: RangeSet::from(IovaRange::ALL), granule: self.granule })
    }

    fn in_software(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::{FakeHost, Flavour};

    #[test]
    fn a_table_is_any_emulated_groups_and_unmaps_what_it_is_asked_to() {
        let [one, other] = [1, 2].map(|id| SoftwareGroup::new(vec![EndpointId(id)], 0x1000));
        let table = one.new_table().unwrap();
        assert!(other.can_share(table.as_ref()) && other.can_migrate());
        assert!(table.in_software());
        let host = FakeHost::new(Flavour::Iommufd).group(&[EndpointId(3)], RangeSet::from(IovaRange::ALL));
        assert!(!one.can_share(host.new_table().unwrap().as_ref()));
        assert_eq!(table.unmap("1000-2fff".parse().unwrap()).unwrap(), 0x2000);
        assert_eq!(table.unmap(IovaRange::ALL).unwrap(), u64::MAX);
    }
}
