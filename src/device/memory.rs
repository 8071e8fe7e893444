// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that changes under live mappings.

use super::VirtioIommu;
use super::domain::Domain;
use super::map::unmap_exactly;
use crate::host::HostError;
use crate::id::DomainId;
use crate::mapping::Mapping;
use crate::memory::{GuestRam, HostSegment};

/// A mapping whose memory is not what it was.
struct Change {
    mapping: Mapping,
    before: Option<Vec<HostSegment>>,
    after: Option<Vec<HostSegment>>,
}

impl VirtioIommu {
    /// Tells the device what guest memory is. When this returns, no table of this device's reaches memory that is no
    /// longer the guest's; mappings into memory that stays are not disturbed, and those into memory that left stay in
    /// the domain and reach nothing until it is back. (Groups that are still as they were found are the VMM's to change.)
    ///
    /// The same part of the same file is the same memory, wherever in the process it is mapped. Whoever keeps host addresses, as a
    /// device in the host's kernel does, is told of others by whoever maps it anew.
    pub fn set_memory(&mut self, ram: GuestRam) {
        let unchanged = self.ram.is_same(&ram);
        let old = std::mem::replace(&mut self.ram, ram);
        if unchanged {
            // It may be the first that is told, and what is in no domain is left as it was found until then.
            self.settle_unattached_groups();
            return;
        }
        // A MAP then finds room for as many pieces as there can be.
        self.segments.reserve(self.ram.regions().len());
        let domains: Vec<DomainId> = self.domains.keys().copied().collect();
        for domain in domains {
            if let Err(error) = self.follow_memory(domain, &old) {
                self.bring_back_in_step(domain, &error);
            }
        }
        self.leave_identity_tables();
        for group in 0..self.groups.len() {
            self.group(group).host.memory_changed(&self.ram);
            self.settle_group(group);
        }
    }

    fn follow_memory(&self, domain: DomainId, old: &GuestRam) -> Result<(), HostError> {
        let Some(space) = self.domains.get(&domain).and_then(Domain::space) else {
            return Ok(());
        };
        for mapping in space.mappings.iter() {
            let change = Change { mapping, before: mapping.segments(old), after: mapping.segments(&self.ram) };
            if change.is_real() {
                for table in self.host_tables(domain) {
                    change.apply(table)?;
                }
            }
        }
        Ok(())
    }
}

impl Change {
    fn is_real(&self) -> bool {
        match (&self.before, &self.after) {
            // Together they are as long as the mapping: if one has more pieces, they differ before the other one ends.
            (Some(before), Some(after)) => !before.iter().zip(after).all(|(a, b)| a.is_same(b)),
            _ => true,
        }
    }

    fn apply(&self, table: &dyn crate::host::IoPageTable) -> Result<(), HostError> {
        if let Some(before) = &self.before {
            let bytes = before.iter().map(|segment| u128::from(segment.length())).sum();
            unmap_exactly(table, self.mapping.iova, bytes)?;
        }
        if let Some(after) = &self.after {
            table.map(self.mapping.iova, after, self.mapping.access).map_err(HostError::from)?;
        }
        Ok(())
    }
}
