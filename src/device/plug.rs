// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Endpoints that come and go while the device works.
//!
//! What the guest was told at the start holds: input range, page sizes, probe size. A new endpoint's view is planned with
//! these ([`Policy`](crate::reserved::plan::Policy)'s `input_range` and `probe_size`), or it cannot be added.

use std::sync::Arc;

use super::group::Group;
use super::{SetupError, VirtioIommu, place_endpoints};
use crate::host::HostGroup;
use crate::host::refused::RefusedAccesses;
use crate::id::EndpointId;
use crate::reserved::EndpointView;

impl VirtioIommu {
    /// Adds a host group with its endpoints, none of which is attached then: it is in bypass as it was found, or blocked, as
    /// the configuration says. Devices that are bound only later are blocked by [`devices_were_bound`](Self::devices_were_bound).
    ///
    /// # Errors
    ///
    /// [`SetupError`]; nothing was changed.
    pub fn add_group(
        &mut self,
        group: Arc<dyn HostGroup>,
        endpoints: Vec<(EndpointId, EndpointView)>,
    ) -> Result<(), SetupError> {
        if let Some(member) = group.members().iter().find(|member| self.endpoints.contains_key(member)) {
            return Err(SetupError::EndpointTwice(*member));
        }
        let index = self.groups.len();
        let mut placed = place_endpoints(&self.settings, endpoints, std::slice::from_ref(&group))?;
        for endpoint in placed.values_mut() {
            endpoint.group = index;
        }
        self.endpoints.append(&mut placed);
        group.memory_changed(&self.ram);
        self.groups.push(Group::new(group));
        self.settle_group(index);
        Ok(())
    }

    /// Blocks once more what is to be blocked. To be called when somebody has bound devices that were added before: until then nothing
    /// could be detached from them, and who binds a device attaches it to a table of its own.
    pub fn devices_were_bound(&mut self) {
        self.settle_unattached_groups();
    }

    /// Takes an endpoint away: it leaves its domain, its device reaches nothing any more unless a sibling of its group does,
    /// and the host's files for it are closed when this returns. Requests that name it are answered with NOENT, and the ID can
    /// be used again. Whether there was one.
    pub fn remove_endpoint(&mut self, id: EndpointId) -> bool {
        let Some(endpoint) = self.endpoints.get_mut(&id) else {
            return false;
        };
        let (group, domain) = (endpoint.group, endpoint.domain.take());
        self.group_mut(group).remove(id);
        let is_last = self.group(group).members().is_empty();
        if is_last {
            self.group_mut(group).block();
        } else {
            self.settle_group(group);
        }
        self.group(group).host.release(id);
        self.endpoints.remove(&id);
        // What the host refused it before is no fault of whoever has the ID next.
        self.collect_refused_accesses();
        self.faults.forget(id);
        if let Some(domain) = domain {
            self.leave_domain(domain, id);
        }
        if is_last {
            self.remove_group(group);
        }
        true
    }

    fn remove_group(&mut self, index: usize) {
        let group = self.groups.remove(index);
        let dropped = group.host.refused_accesses().map_or(0, RefusedAccesses::dropped);
        self.statistics.faults_dropped = self.statistics.faults_dropped.saturating_add(dropped);
        for endpoint in self.endpoints.values_mut().filter(|endpoint| endpoint.group > index) {
            endpoint.group -= 1;
        }
        self.drop_unused_tables();
    }
}
