// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tables behind bypass: guest memory, each address for itself.

use std::sync::Arc;

use super::VirtioIommu;
use super::group::GroupTable;
use crate::access::Access;
use crate::host::{HostError, HostErrorKind, IoPageTable};
use crate::id::EndpointId;
use crate::range::IovaRange;
use crate::reserved::{EndpointView, ReservedKind};

impl VirtioIommu {
    /// Lets a group of which no member is attached reach guest memory as it is. If it cannot, it is blocked.
    pub(super) fn put_group_in_bypass(&mut self, group: usize) {
        if matches!(self.group(group).table, GroupTable::AsFound | GroupTable::Bypass(_)) {
            return;
        }
        // Without memory there is nothing to reach. The group is settled again when there is some.
        if self.ram.regions().is_empty() {
            self.group_mut(group).block();
            return;
        }
        let result = match self.identity_table(group) {
            Ok(table) => self.attach_group(group, None, &table),
            Err(error) => Err(self.attach_failed(group, None, &error)),
        };
        if result.is_err() {
            self.group_mut(group).block();
        }
    }

    /// A table for the group in which guest memory is mapped to itself: one that is there, or a new one.
    ///
    /// # Errors
    ///
    /// Some memory lies where the group cannot reach it, or the host refuses.
    pub(super) fn identity_table(&mut self, group: usize) -> Result<Arc<dyn IoPageTable>, HostError> {
        if let Some((memory, reserved)) = self.ram_in_reserved(group) {
            let action = format!("guest memory at {memory} lies in {reserved}, which is reserved for the group");
            return Err(HostError::new(HostErrorKind::Unmappable, action, None));
        }
        let host = Arc::clone(&self.group(group).host);
        // A group that is on one stays there, also if its tables cannot be shared: a new one would cut it off meanwhile.
        let can_use = |table: &&Arc<dyn IoPageTable>| self.group(group).uses(table) || host.can_share(table.as_ref());
        if let Some(table) = self.identity_tables.iter().find(can_use) {
            return Ok(Arc::clone(table));
        }
        let table = host.new_table()?;
        if !table.in_software() {
            for region in self.ram.regions() {
                table.map(region.addresses(), &[region.whole()], Access::READ_WRITE).map_err(HostError::from)?;
            }
        }
        self.identity_tables.push(Arc::clone(&table));
        Ok(table)
    }

    /// Whether guest memory lies where the group of an endpoint cannot reach it.
    pub(super) fn has_memory_in_reserved(&self, endpoint: EndpointId) -> bool {
        self.endpoints.get(&endpoint).is_some_and(|endpoint| self.ram_in_reserved(endpoint.group).is_some())
    }

    /// Guest memory that lies where an endpoint of the group cannot reach it, and the region that it lies in: bypass would not
    /// be what it says. The doorbell is left out: no memory is there on the machines that have one.
    fn ram_in_reserved(&self, group: usize) -> Option<(IovaRange, IovaRange)> {
        let views = self.group(group).members().iter().filter_map(|id| Some(&self.endpoints.get(id)?.view));
        let mut reserved = views
            .flat_map(EndpointView::reported)
            .filter(|region| region.kind == ReservedKind::Reserved)
            .map(|region| region.range);
        reserved.find_map(|range| {
            let memory = self.ram.regions().iter().find_map(|region| region.addresses().intersection(range))?;
            Some((memory, range))
        })
    }

    /// Takes the groups in bypass off tables of memory that is not what it was.
    pub(super) fn leave_identity_tables(&mut self) {
        for table in std::mem::take(&mut self.identity_tables) {
            for group in self.groups.iter_mut().filter(|group| group.uses(&table)) {
                group.block();
            }
        }
    }
}
