// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host groups, and which table each is on.
//!
//! The host moves all members of a group together. So a group is on the table of the domain on which all of its attached
//! members agree, and is blocked while they disagree. A group without an attached member is where the configuration's
//! `bypass` says.

use std::sync::Arc;

use super::domain::{Domain, DomainKind};
use super::{Fault, FaultReason, Notice, VirtioIommu};
use crate::access::Access;
use crate::causes::with_causes;
use crate::host::{AfterFailure, HostError, HostErrorKind, HostGroup, IoPageTable};
use crate::id::{DomainId, EndpointId};
use crate::range::RangeSet;
use crate::request::Status;

/// A host group and what it is attached to.
#[derive(Debug)]
pub(super) struct Group {
    pub host: Arc<dyn HostGroup>,
    /// The members that are still endpoints. The host's list keeps those that were removed, whose IDs may be another group's now.
    members: Vec<EndpointId>,
    pub table: GroupTable,
}

/// What translates the DMA of a group.
#[derive(Debug)]
pub(super) enum GroupTable {
    /// What whoever started the VM left there: by convention guest memory, each address for itself.
    AsFound,
    /// Nothing: the host was told to refuse all DMA.
    Blocked,
    /// Guest memory, each address for itself, for a group without an attached member.
    Bypass(Arc<dyn IoPageTable>),
    /// A table of this domain.
    Domain(DomainId, Arc<dyn IoPageTable>),
}

/// What the attached members of a group, as the guest sees them, ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Agreement {
    /// No member is attached.
    Unattached,
    /// All that are attached are in this domain.
    Domain(DomainId),
    /// They are in different domains.
    Disagreement,
}

impl Group {
    pub fn new(host: Arc<dyn HostGroup>) -> Self {
        let table = if host.is_found_blocked() { GroupTable::Blocked } else { GroupTable::AsFound };
        Self { members: host.members().to_vec(), host, table }
    }

    pub fn members(&self) -> &[EndpointId] {
        &self.members
    }

    /// Strikes an endpoint off.
    pub fn remove(&mut self, member: EndpointId) {
        self.members.retain(|id| *id != member);
    }

    /// Refuses all DMA of the group. The host is told each time: a device that nobody had bound when it was told before
    /// may have been bound and attached since.
    pub fn block(&mut self) {
        self.host.block();
        self.table = GroupTable::Blocked;
    }

    pub const fn is_blocked(&self) -> bool {
        matches!(self.table, GroupTable::Blocked)
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

impl VirtioIommu {
    /// What the attached members of a group agree on, as if one of them were in another domain already.
    pub(super) fn agreement(&self, group: usize, moving: Option<(EndpointId, DomainId)>) -> Agreement {
        let mut agreement = Agreement::Unattached;
        for member in self.group(group).members() {
            let moved = moving.filter(|(id, _)| id == member).map(|(_, domain)| domain);
            let current = self.endpoints.get(member).and_then(|endpoint| endpoint.domain);
            agreement = match (agreement, moved.or(current)) {
                (agreement, None) => agreement,
                (Agreement::Unattached, Some(domain)) => Agreement::Domain(domain),
                (Agreement::Domain(agreed), Some(domain)) if agreed == domain => agreement,
                (_, Some(_)) => Agreement::Disagreement,
            };
        }
        agreement
    }

    /// Brings a group to where its members' domains say. If the host refuses, the group is blocked, and its attached
    /// members have an event for the guest.
    pub(super) fn settle_group(&mut self, group: usize) {
        match self.agreement(group, None) {
            _ if self.ended => self.group_mut(group).block(),
            Agreement::Domain(domain) => {
                if self.put_group_on(group, domain).is_err() {
                    self.group_mut(group).block();
                    self.report_blocked(group);
                }
            }
            Agreement::Unattached if self.bypass => self.put_group_in_bypass(group),
            Agreement::Unattached | Agreement::Disagreement => self.group_mut(group).block(),
        }
        self.drop_unused_tables();
    }

    /// Settles every group of which no member is attached.
    pub(super) fn settle_unattached_groups(&mut self) {
        for group in 0..self.groups.len() {
            if self.agreement(group, None) == Agreement::Unattached {
                self.settle_group(group);
            }
        }
    }

    /// Attaches a group to a table of a domain.
    ///
    /// # Errors
    ///
    /// The status to answer with; the group is where it was, or blocked.
    pub(super) fn put_group_on(&mut self, group: usize, domain: DomainId) -> Result<(), Status> {
        if self.ended {
            return Err(Status::DeviceError);
        }
        if self.group(group).is_on(domain) {
            return Ok(());
        }
        let table = self.table_of_domain(group, domain);
        let result = table.and_then(|table| self.attach_group(group, Some(domain), &table));
        self.drop_unused_tables();
        result
    }

    /// A table of the domain that the group can use: one that is there, or a new one with the same mappings.
    fn table_of_domain(&mut self, group: usize, domain: DomainId) -> Result<Arc<dyn IoPageTable>, Status> {
        let host = Arc::clone(&self.group(group).host);
        let ram = self.ram.clone();
        let found = match self.domains.get_mut(&domain).map(|domain| &mut domain.kind) {
            None => return Err(Status::NoEntry),
            Some(DomainKind::Bypass) => self.identity_table(group),
            Some(DomainKind::Mapped(space)) if space.poisoned => return Err(Status::DeviceError),
            Some(DomainKind::Mapped(space)) => space.table_for(host.as_ref(), &ram),
        };
        found.map_err(|error| self.attach_failed(group, Some(domain), &error))
    }

    /// Attaches a group to a table, of a domain or of none, and makes sure that the host keeps what the guest was
    /// promised.
    pub(super) fn attach_group(
        &mut self,
        group: usize,
        domain: Option<DomainId>,
        table: &Arc<dyn IoPageTable>,
    ) -> Result<(), Status> {
        if let Err(failure) = self.group(group).host.attach(table) {
            if failure.after == AfterFailure::Blocked {
                self.group_mut(group).table = GroupTable::Blocked;
            }
            return Err(self.attach_failed(group, domain, &failure.error));
        }
        self.group_mut(group).table = match domain {
            Some(domain) => GroupTable::Domain(domain, Arc::clone(table)),
            None => GroupTable::Bypass(Arc::clone(table)),
        };
        // Bypass maps guest memory once and for all: what else could be mapped does not matter.
        let mapped = domain.is_some_and(|domain| self.domains.get(&domain).is_some_and(|domain| !domain.is_bypass()));
        if mapped && let Some(notice) = self.broken_promise(group, domain, table) {
            // With any other table the promise would be broken too: the group stays blocked, wherever it was before.
            self.group_mut(group).block();
            self.notices.push(notice);
            return Err(Status::Unsupported);
        }
        Ok(())
    }

    /// Compares what the host can map in a table, now that a group is attached, with what the guest was told of all the
    /// groups on it.
    fn broken_promise(&self, group: usize, domain: Option<DomainId>, table: &Arc<dyn IoPageTable>) -> Option<Notice> {
        let endpoint = *self.group(group).members().first()?;
        let constraints = match table.constraints() {
            Ok(constraints) => constraints,
            Err(error) => {
                let error = with_causes(&error);
                return Some(Notice::AttachFailed { endpoint, domain, error, blocked: true });
            }
        };
        if constraints.granule > self.settings.granule {
            return Some(Notice::CoarserThanPromised { endpoint, granule: constraints.granule });
        }
        let members = self.groups.iter().filter(|group| group.uses(table)).flat_map(Group::members);
        let refused = members
            .filter_map(|member| Some(self.endpoints.get(member)?.view.refused()))
            .fold(RangeSet::new(), |all, refused| all.union(refused));
        let promised = RangeSet::from(self.settings.input_range).subtract(&refused);
        let missing = promised.subtract(&constraints.usable);
        (!missing.is_empty()).then_some(Notice::NarrowerThanPromised { endpoint, missing })
    }

    /// Tells the operator of an attach that the host refused; the status to answer with.
    pub(super) fn attach_failed(&mut self, group: usize, domain: Option<DomainId>, error: &HostError) -> Status {
        let group = self.group(group);
        if let Some(endpoint) = group.members().first().copied() {
            // In no domain, a group that cannot be in bypass is blocked.
            let blocked = domain.is_none() || group.is_blocked();
            self.notices.push(Notice::AttachFailed { endpoint, domain, error: with_causes(error), blocked });
        }
        attach_status(error.kind)
    }

    /// Tells the guest that the DMA of a group's attached members is refused, for a reason that is none of the guest's.
    pub(super) fn report_blocked(&mut self, group: usize) {
        for endpoint in self.group(group).members().to_vec() {
            if self.endpoints.get(&endpoint).is_some_and(|endpoint| endpoint.domain.is_some()) {
                self.faults.push(Fault { reason: FaultReason::Unknown, endpoint, address: None, access: Access::NONE });
            }
        }
    }

    /// Frees the tables that no group is attached to.
    pub(super) fn drop_unused_tables(&mut self) {
        let groups = &self.groups;
        let is_used = |table: &Arc<dyn IoPageTable>| groups.iter().any(|group| group.uses(table));
        for space in self.domains.values_mut().filter_map(Domain::space_mut) {
            space.tables.retain(is_used);
        }
        self.identity_tables.retain(is_used);
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

/// What an attach that the host refused is answered with. For a domain with other endpoints, and for an endpoint that was
/// in another domain, 5.13.6.3.2 names `VIRTIO_IOMMU_S_UNSUPP` only; that is kept for what will never work, so that a
/// driver can tell it from what may work later.
fn attach_status(kind: HostErrorKind) -> Status {
    match kind {
        HostErrorKind::NoMemory => Status::NoMemory,
        HostErrorKind::ReservedConflict
        | HostErrorKind::Incompatible
        | HostErrorKind::Unmappable
        | HostErrorKind::Unsupported => Status::Unsupported,
        HostErrorKind::Gone => Status::NoEntry,
        HostErrorKind::AlreadyMapped
        | HostErrorKind::BadAddress
        | HostErrorKind::NotBound
        | HostErrorKind::Misuse
        | HostErrorKind::Busy
        | HostErrorKind::Other => Status::DeviceError,
    }
}
