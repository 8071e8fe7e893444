// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Endpoints, and the host groups they are in.

use std::sync::Arc;

use crate::host::{HostGroup, IoPageTable};
use crate::id::{DomainId, EndpointId};
use crate::reserved::EndpointView;

/// A device that the guest knows.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// What the guest is told about it.
    pub view: EndpointView,
    /// Where its group is in the device's list.
    pub group: usize,
    /// The domain that it is attached to.
    pub domain: Option<DomainId>,
}

/// A host group and what it is attached to.
#[derive(Debug)]
pub(super) struct Group {
    pub host: Arc<dyn HostGroup>,
    pub table: GroupTable,
}

/// What translates the DMA of a group.
#[derive(Debug)]
pub(super) enum GroupTable {
    /// What whoever started the VM left there: by convention guest memory, each address for itself.
    AsFound,
    /// Nothing: all DMA is refused.
    Blocked,
    /// Guest memory, each address for itself.
    Bypass(Arc<dyn IoPageTable>),
    /// A table of this domain.
    Domain(DomainId, Arc<dyn IoPageTable>),
}

impl Group {
    pub fn members(&self) -> &[EndpointId] {
        self.host.members()
    }

    /// Refuses all DMA of the group.
    pub fn block(&mut self) {
        if !matches!(self.table, GroupTable::Blocked) {
            self.host.block();
            self.table = GroupTable::Blocked;
        }
    }

    /// Whether a table of this domain translates the group's DMA.
    pub fn is_on(&self, domain: DomainId) -> bool {
        matches!(self.table, GroupTable::Domain(id, _) if id == domain)
    }

    /// Whether exactly this table translates the group's DMA.
    pub fn uses(&self, table: &Arc<dyn IoPageTable>) -> bool {
        match &self.table {
            GroupTable::Bypass(own) | GroupTable::Domain(_, own) => Arc::ptr_eq(own, table),
            GroupTable::AsFound | GroupTable::Blocked => false,
        }
    }
}
