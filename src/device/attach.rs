// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! ATTACH and DETACH, and the rule that a host group is attached as one.
//!
//! The host moves all members of a group together. So a group is on the table of the domain on which all of its
//! attached members agree, and is blocked while they disagree.

use std::sync::Arc;

use super::domain::{AddressSpace, Domain, DomainKind};
use super::endpoint::{Group, GroupTable};
use super::notice::describe;
use super::{Notice, VirtioIommu};
use crate::host::{AfterFailure, HostError, HostErrorKind, HostGroup, IoPageTable};
use crate::id::{DomainId, EndpointId};
use crate::memory::GuestRam;
use crate::range::RangeSet;
use crate::request::Status;
use crate::spec::feature;

/// What the attached members of a group, as the guest sees them, ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Agreement {
    /// No member is attached.
    Unattached,
    /// All that are attached are in this domain.
    Domain(DomainId),
    /// They are in different domains.
    None,
}

impl VirtioIommu {
    pub(super) fn attach(&mut self, domain: DomainId, id: EndpointId, bypass: bool) -> Result<(), Status> {
        // 5.13.6.3: the flag exists "when the VIRTIO_IOMMU_F_BYPASS_CONFIG is negotiated".
        if bypass && self.driver_features & feature::BYPASS_CONFIG == 0 {
            return Err(Status::Invalid);
        }
        // 5.13.6: "domain_range describes the values supported in a domain field."
        if !self.settings.domain_range.contains(&domain.0) {
            return Err(Status::Invalid);
        }
        // 5.13.6.3.2: "If the endpoint identified by endpoint doesn't exist, the device MUST reject the request and
        // set status to VIRTIO_IOMMU_S_NOENT."
        let endpoint = self.endpoints.get(&id).ok_or(Status::NoEntry)?;
        let (group, previous) = (endpoint.group, endpoint.domain);
        self.check_domain(domain, id, bypass)?;
        self.check_siblings(group, id, domain)?;

        self.domains.entry(domain).or_insert_with(|| Domain::new(bypass));
        match self.agreement(group, Some((id, domain))) {
            Agreement::Domain(_) => {
                if let Err(status) = self.put_group_on(group, domain) {
                    self.drop_domain_if_empty(domain);
                    return Err(status);
                }
            }
            Agreement::Unattached | Agreement::None => self.group_mut(group).block(),
        }
        if let Some(endpoint) = self.endpoints.get_mut(&id) {
            endpoint.domain = Some(domain);
        }
        if let Some(domain) = self.domains.get_mut(&domain) {
            domain.endpoints.insert(id);
        }
        // 5.13.6.3.2: "the device SHOULD behave as if the driver issued a DETACH request with this endpoint,
        // followed by the ATTACH request."
        if let Some(previous) = previous.filter(|previous| *previous != domain) {
            self.leave_domain(previous, id);
        }
        Ok(())
    }

    /// Whether an endpoint may join a domain, as far as the guest's own view goes.
    fn check_domain(&self, domain: DomainId, id: EndpointId, bypass: bool) -> Result<(), Status> {
        match self.domains.get(&domain) {
            // 5.13.6.3.2: "If the domain already exists and the VIRTIO_IOMMU_ATTACH_F_BYPASS flag is not consistent
            // with that domain, the device SHOULD reject the request and set status to VIRTIO_IOMMU_S_INVAL."
            Some(existing) if existing.is_bypass() != bypass => return Err(Status::Invalid),
            Some(existing) => {
                let refused = self.endpoints.get(&id).map(|endpoint| endpoint.view.refused());
                let conflict =
                    existing.space().zip(refused).and_then(|(space, refused)| space.mappings.overlapping_any(refused));
                // 5.13.6.3.2: if the properties of the endpoint are not compatible "the device SHOULD reject the
                // request and set status to VIRTIO_IOMMU_S_UNSUPP".
                if conflict.is_some() {
                    return Err(Status::Unsupported);
                }
            }
            None if self.domains.len() >= self.settings.max_domains => return Err(Status::NoMemory),
            None => (),
        }
        Ok(())
    }

    /// An endpoint that is in no domain can only join one that a sibling is in, if any sibling is attached. One that
    /// moves away from its siblings is let go: that is how a driver moves a group, one member after the other.
    fn check_siblings(&self, group: usize, id: EndpointId, domain: DomainId) -> Result<(), Status> {
        let domain_of = |id: &EndpointId| self.endpoints.get(id).and_then(|endpoint| endpoint.domain);
        if domain_of(&id).is_some() {
            return Ok(());
        }
        let mut attached = self.group(group).members().iter().filter_map(domain_of).peekable();
        if attached.peek().is_none() || attached.any(|sibling| sibling == domain) {
            return Ok(());
        }
        // 5.13.6.3.2: "If it cannot do so, the device MUST reject the request and set status to
        // VIRTIO_IOMMU_S_UNSUPP."
        Err(Status::Unsupported)
    }

    pub(super) fn detach(&mut self, domain: DomainId, id: EndpointId) -> Result<(), Status> {
        // 5.13.6.4.2: "If the endpoint identified by endpoint doesn't exist, then the device MUST reject the request
        // and set status to VIRTIO_IOMMU_S_NOENT."
        let endpoint = self.endpoints.get_mut(&id).ok_or(Status::NoEntry)?;
        // 5.13.6.4.2: "If the domain identified by domain doesn't exist, or if the endpoint identified by endpoint
        // isn't attached to this domain, then the device MAY set the request status to VIRTIO_IOMMU_S_INVAL."
        if endpoint.domain != Some(domain) {
            return Err(Status::Invalid);
        }
        endpoint.domain = None;
        let group = endpoint.group;
        // 5.13.6.4.2: "The device MUST ensure that after being detached from a domain, the endpoint cannot access any
        // mapping from that domain." A sibling that stays keeps the group where it is, and with it this endpoint.
        self.settle_group(group);
        self.leave_domain(domain, id);
        Ok(())
    }

    /// Strikes an endpoint off a domain. "After all endpoints have been successfully detached from a domain, it
    /// ceases to exist" (5.13.6.4).
    fn leave_domain(&mut self, domain: DomainId, id: EndpointId) {
        if let Some(domain) = self.domains.get_mut(&domain) {
            domain.endpoints.remove(&id);
        }
        self.drop_unused_tables(domain);
        self.drop_domain_if_empty(domain);
    }

    fn drop_domain_if_empty(&mut self, domain: DomainId) {
        if self.domains.get(&domain).is_some_and(|domain| domain.endpoints.is_empty()) {
            self.domains.remove(&domain);
        }
    }

    /// Takes every endpoint out of its domain and forgets the domains. The groups stay where they are.
    pub(super) fn detach_all(&mut self) {
        for endpoint in self.endpoints.values_mut() {
            endpoint.domain = None;
        }
        self.domains.clear();
    }

    /// What the attached members of a group agree on, as if one of them were in another domain already.
    fn agreement(&self, group: usize, moving: Option<(EndpointId, DomainId)>) -> Agreement {
        let mut agreement = Agreement::Unattached;
        for member in self.group(group).members() {
            let moved = moving.filter(|(id, _)| id == member).map(|(_, domain)| domain);
            let current = self.endpoints.get(member).and_then(|endpoint| endpoint.domain);
            agreement = match (agreement, moved.or(current)) {
                (agreement, None) => agreement,
                (Agreement::Unattached, Some(domain)) => Agreement::Domain(domain),
                (Agreement::Domain(agreed), Some(domain)) if agreed == domain => agreement,
                (_, Some(_)) => Agreement::None,
            };
        }
        agreement
    }

    /// Brings a group to where its members' domains say. If the host refuses, the group is blocked.
    pub(super) fn settle_group(&mut self, group: usize) {
        match self.agreement(group, None) {
            Agreement::Domain(domain) => {
                if self.put_group_on(group, domain).is_err() {
                    self.group_mut(group).block();
                }
            }
            Agreement::Unattached if self.bypass => self.put_group_in_bypass(group),
            Agreement::Unattached | Agreement::None => self.group_mut(group).block(),
        }
        self.drop_unused_bypass_tables();
    }

    /// Brings every group of which no member is attached to where the configuration's `bypass` says.
    pub(super) fn settle_unattached_groups(&mut self) {
        for group in 0..self.groups.len() {
            if self.agreement(group, None) == Agreement::Unattached {
                self.settle_group(group);
            }
        }
    }

    /// Whether the members of a group that are attached are all in this domain.
    pub(super) fn should_be_on(&self, group: usize, domain: DomainId) -> bool {
        self.agreement(group, None) == Agreement::Domain(domain)
    }

    /// Attaches a group to a table of a domain.
    ///
    /// # Errors
    ///
    /// The status to answer with; the group is where it was, or blocked.
    pub(super) fn put_group_on(&mut self, group: usize, domain: DomainId) -> Result<(), Status> {
        if self.group(group).is_on(domain) {
            return Ok(());
        }
        let result = self.table_for(group, domain).and_then(|table| self.attach_group(group, domain, table));
        self.drop_unused_tables(domain);
        self.drop_unused_bypass_tables();
        result
    }

    /// A table of the domain that the group can use: one that is there, or a new one with the same mappings.
    fn table_for(&mut self, group: usize, domain: DomainId) -> Result<Arc<dyn IoPageTable>, Status> {
        let host = Arc::clone(&self.group(group).host);
        let ram = self.ram.clone();
        let found = match self.domains.get_mut(&domain).map(|domain| &mut domain.kind) {
            None => return Err(Status::NoEntry),
            Some(DomainKind::Bypass) => {
                if self.ram_in_reserved(group).is_some() {
                    return Err(Status::Unsupported);
                }
                self.bypass_table(host.as_ref())
            }
            Some(DomainKind::Mapped(space)) if space.poisoned => return Err(Status::DeviceError),
            Some(DomainKind::Mapped(space)) => space.table_for(host.as_ref(), &ram),
        };
        found.map_err(|error| {
            let status = attach_status(error.kind);
            self.note_attach_failure(group, Some(domain), &error);
            status
        })
    }

    fn attach_group(&mut self, group: usize, domain: DomainId, table: Arc<dyn IoPageTable>) -> Result<(), Status> {
        if let Err(failure) = self.group(group).host.attach(&table) {
            if failure.after == AfterFailure::Blocked {
                self.group_mut(group).table = GroupTable::Blocked;
            }
            self.note_attach_failure(group, Some(domain), &failure.error);
            return Err(attach_status(failure.error.kind));
        }
        let broken = self.broken_promise(group, table.as_ref());
        self.group_mut(group).table = GroupTable::Domain(domain, table);
        if let Some(notice) = broken {
            self.group_mut(group).block();
            self.notices.push(notice);
            return Err(Status::Unsupported);
        }
        Ok(())
    }

    /// Compares what the host can map, now that it is attached, with what the guest was told.
    fn broken_promise(&self, group: usize, table: &dyn IoPageTable) -> Option<Notice> {
        let members = self.group(group).members();
        let endpoint = *members.first()?;
        let constraints = match table.constraints() {
            Ok(constraints) => constraints,
            Err(error) => {
                let error = describe(&error);
                return Some(Notice::AttachFailed { endpoint, domain: None, error, blocked: true });
            }
        };
        if constraints.granule > self.settings.granule {
            return Some(Notice::CoarserThanPromised { endpoint, granule: constraints.granule });
        }
        members.iter().find_map(|member| {
            let refused = self.endpoints.get(member)?.view.refused();
            let promised = RangeSet::from(self.settings.input_range).subtract(refused);
            let missing = promised.subtract(&constraints.usable);
            (!missing.is_empty()).then_some(Notice::NarrowerThanPromised { endpoint: *member, missing })
        })
    }

    pub(super) fn note_attach_failure(&mut self, group: usize, domain: Option<DomainId>, error: &HostError) {
        let group = self.group(group);
        if let Some(endpoint) = group.members().first().copied() {
            let blocked = matches!(group.table, GroupTable::Blocked);
            self.notices.push(Notice::AttachFailed { endpoint, domain, error: describe(error), blocked });
        }
    }

    /// Frees the tables of a domain that no group is attached to.
    fn drop_unused_tables(&mut self, domain: DomainId) {
        let groups = &self.groups;
        if let Some(space) = self.domains.get_mut(&domain).and_then(Domain::space_mut) {
            space.tables.retain(|table| groups.iter().any(|group| group.uses(table)));
        }
    }

    pub(super) fn group(&self, index: usize) -> &Group {
        #[expect(clippy::indexing_slicing, reason = "endpoints only hold indices of groups that were given with them")]
        &self.groups[index]
    }

    pub(super) fn group_mut(&mut self, index: usize) -> &mut Group {
        #[expect(clippy::indexing_slicing, reason = "endpoints only hold indices of groups that were given with them")]
        &mut self.groups[index]
    }
}

impl AddressSpace {
    /// A table that the group can use: one that is there, or a new one with the same mappings.
    fn table_for(&mut self, host: &dyn HostGroup, ram: &GuestRam) -> Result<Arc<dyn IoPageTable>, HostError> {
        if let Some(table) = self.tables.iter().find(|table| host.can_share(table.as_ref())) {
            return Ok(Arc::clone(table));
        }
        let table = host.new_table()?;
        if !table.in_software() {
            for mapping in self.mappings.iter() {
                if let Some(segments) = mapping.segments(ram) {
                    // A table that fails half-way is dropped, and what it mapped with it.
                    table.map(mapping.iova, &segments, mapping.access).map_err(HostError::from)?;
                }
            }
        }
        self.tables.push(Arc::clone(&table));
        Ok(table)
    }
}

/// What an attach that the host refused is answered with.
fn attach_status(kind: HostErrorKind) -> Status {
    match kind {
        HostErrorKind::NoMemory => Status::NoMemory,
        HostErrorKind::ReservedConflict | HostErrorKind::Incompatible | HostErrorKind::Unmappable => {
            Status::Unsupported
        }
        HostErrorKind::Gone => Status::NoEntry,
        HostErrorKind::AlreadyMapped
        | HostErrorKind::BadAddress
        | HostErrorKind::NotBound
        | HostErrorKind::Busy
        | HostErrorKind::Other => Status::DeviceError,
    }
}
