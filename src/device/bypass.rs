// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bypass: guest memory as it is, each address for itself.

use std::sync::Arc;

use super::VirtioIommu;
use super::endpoint::GroupTable;
use crate::access::Access;
use crate::host::{AfterFailure, HostError, HostErrorKind, HostGroup, IoPageTable};
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
        if let Err(error) = self.try_bypass(group) {
            self.group_mut(group).block();
            self.note_attach_failure(group, None, &error);
        }
    }

    fn try_bypass(&mut self, group: usize) -> Result<(), HostError> {
        if let Some(range) = self.ram_in_reserved(group) {
            let action = format!("guest memory at {range} lies in a region reserved for the group");
            return Err(HostError::new(HostErrorKind::Unmappable, action, None));
        }
        let host = Arc::clone(&self.group(group).host);
        let table = self.bypass_table(host.as_ref())?;
        match host.attach(&table) {
            Ok(()) => {
                self.group_mut(group).table = GroupTable::Bypass(table);
                Ok(())
            }
            Err(failure) => {
                if failure.after == AfterFailure::Blocked {
                    self.group_mut(group).table = GroupTable::Blocked;
                }
                Err(failure.error)
            }
        }
    }

    /// A table in which guest memory is mapped to itself: one that is there, or a new one.
    pub(super) fn bypass_table(&mut self, host: &dyn HostGroup) -> Result<Arc<dyn IoPageTable>, HostError> {
        if let Some(table) = self.bypass_tables.iter().find(|table| host.can_share(table.as_ref())) {
            return Ok(Arc::clone(table));
        }
        let table = host.new_table()?;
        if !table.in_software() {
            for region in self.ram.regions() {
                table.map(region.identity(), &[region.whole()], Access::READ_WRITE).map_err(HostError::from)?;
            }
        }
        self.bypass_tables.push(Arc::clone(&table));
        Ok(table)
    }

    /// Guest memory that lies where an endpoint of the group cannot reach it: bypass would not be what it says. The
    /// doorbell is left out: no memory is there on the machines that have one.
    pub(super) fn ram_in_reserved(&self, group: usize) -> Option<IovaRange> {
        let views = self.group(group).members().iter().filter_map(|id| Some(&self.endpoints.get(id)?.view));
        let mut reserved = views
            .flat_map(EndpointView::reported)
            .filter(|region| region.kind == ReservedKind::Reserved)
            .map(|region| region.range);
        reserved.find_map(|range| self.ram.regions().iter().find_map(|region| region.identity().intersection(range)))
    }

    pub(super) fn drop_unused_bypass_tables(&mut self) {
        let groups = &self.groups;
        self.bypass_tables.retain(|table| groups.iter().any(|group| group.uses(table)));
    }

    /// Gives the groups in bypass tables of the memory that there is now.
    pub(super) fn renew_bypass(&mut self) {
        let stale = std::mem::take(&mut self.bypass_tables);
        for index in 0..self.groups.len() {
            if !stale.iter().any(|table| self.group(index).uses(table)) {
                continue;
            }
            // Blocked in between: what the old table reaches may be gone.
            self.group_mut(index).block();
            self.settle_group(index);
        }
    }
}
