// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A domain and its mappings.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::host::{HostError, HostGroup, IoPageTable};
use crate::id::EndpointId;
use crate::mapping::MappingTable;
use crate::memory::GuestRam;
use crate::range::RangeSet;

/// An I/O address space of the guest.
#[derive(Debug)]
pub(super) struct Domain {
    /// The endpoints that are attached; never empty between two requests.
    pub endpoints: BTreeSet<EndpointId>,
    /// What any of them must not have mapped.
    pub refused: RangeSet,
    /// How addresses are translated.
    pub kind: DomainKind,
}

/// How the addresses of a domain are translated.
#[derive(Debug)]
pub(super) enum DomainKind {
    /// Every address means itself.
    Bypass,
    /// By mappings.
    Mapped(AddressSpace),
}

/// The mappings of a domain and the page tables that follow them.
#[derive(Debug, Default)]
pub(super) struct AddressSpace {
    /// What the guest mapped: the truth.
    pub mappings: MappingTable,
    /// The host's tables, each in step with `mappings` unless the space is poisoned.
    pub tables: Vec<Arc<dyn IoPageTable>>,
    /// The host could not be brought back in step: the groups are blocked and there are no tables.
    pub poisoned: bool,
}

impl Domain {
    pub fn new(bypass: bool) -> Self {
        let kind = if bypass { DomainKind::Bypass } else { DomainKind::Mapped(AddressSpace::default()) };
        Self { endpoints: BTreeSet::new(), refused: RangeSet::default(), kind }
    }

    pub const fn is_bypass(&self) -> bool {
        matches!(self.kind, DomainKind::Bypass)
    }

    /// The mappings and tables, unless it is a bypass domain.
    pub const fn space(&self) -> Option<&AddressSpace> {
        match &self.kind {
            DomainKind::Bypass => None,
            DomainKind::Mapped(space) => Some(space),
        }
    }

    pub const fn space_mut(&mut self) -> Option<&mut AddressSpace> {
        match &mut self.kind {
            DomainKind::Bypass => None,
            DomainKind::Mapped(space) => Some(space),
        }
    }
}

impl AddressSpace {
    /// The tables that a host translates by.
    pub fn host_tables(&self) -> impl Iterator<Item = &dyn IoPageTable> {
        self.tables.iter().map(AsRef::as_ref).filter(|table: &&dyn IoPageTable| !table.in_software())
    }

    /// Whether a host translates by any table of it.
    pub fn has_host_table(&self) -> bool {
        self.host_tables().next().is_some()
    }

    /// A table that the group can use: one that is there, or a new one with the same mappings.
    pub fn table_for(&mut self, host: &dyn HostGroup, ram: &GuestRam) -> Result<Arc<dyn IoPageTable>, HostError> {
        if let Some(table) = self.tables.iter().find(|table| host.can_share(table.as_ref())) {
            return Ok(Arc::clone(table));
        }
        let table = host.new_table()?;
        if !table.in_software() {
            let mut segments = Vec::new();
            for mapping in self.mappings.iter() {
                if mapping.put_segments(ram, &mut segments) {
                    // A table that fails half-way is dropped, and what it mapped with it.
                    table.map(mapping.iova, &segments, mapping.access).map_err(HostError::from)?;
                }
            }
        }
        self.tables.push(Arc::clone(&table));
        Ok(table)
    }
}
