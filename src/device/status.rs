// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an operator may ask of a device that works. Nothing here changes it.

use vm_memory::GuestAddress;

use super::domain::{Domain, DomainKind};
use super::fault::RecordedFault;
use super::group::GroupTable;
use super::{Settings, VirtioIommu};
use crate::access::Access;
use crate::id::{DomainId, EndpointId};
use crate::range::IovaRange;
use crate::reserved::EndpointView;

/// An endpoint, where the guest has it, and what its DMA goes through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointStatus {
    /// The endpoint.
    pub id: EndpointId,
    /// The domain that the guest has attached it to.
    pub domain: Option<DomainId>,
    /// What translates the DMA of its host group.
    pub translation: Translation,
    /// The other endpoints of its host group, ascending.
    pub siblings: Vec<EndpointId>,
}

/// What translates the DMA of a host group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// What whoever started the VM left there: by convention guest memory, each address for itself.
    AsFound,
    /// Nothing: all DMA is refused.
    Blocked,
    /// A table with guest memory, each address for itself.
    Bypass,
    /// A table of this domain.
    Domain(DomainId),
}

/// A domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainStatus {
    /// Its number.
    pub id: DomainId,
    /// The endpoints that are attached, ascending.
    pub endpoints: Vec<EndpointId>,
    /// How many mappings it has; `None` for a bypass domain, where every address means itself.
    pub mappings: Option<usize>,
    /// The host could not be brought in step with the mappings: DMA is refused until the domain is emptied.
    pub poisoned: bool,
}

/// A mapping of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// The virtual addresses.
    pub iova: IovaRange,
    /// Where the first of them leads in guest memory.
    pub physical: GuestAddress,
    /// What is allowed.
    pub access: Access,
}

/// Host groups, counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupCounts {
    /// All that have an endpoint.
    pub groups: usize,
    /// Those of which all DMA is refused.
    pub blocked: usize,
}

impl VirtioIommu {
    /// What the device offers and may use.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether endpoints that are in no domain reach guest memory as it is: field `bypass` of the configuration.
    pub const fn bypass(&self) -> bool {
        self.bypass
    }

    /// Every endpoint, ascending.
    pub fn endpoints(&self) -> impl Iterator<Item = EndpointStatus> {
        self.endpoints.iter().map(|(id, endpoint)| {
            let group = self.group(endpoint.group);
            let is_sibling = |member: &&EndpointId| *member != id;
            let mut siblings: Vec<_> = group.members().iter().filter(is_sibling).copied().collect();
            siblings.sort_unstable();
            let translation = match &group.table {
                GroupTable::AsFound => Translation::AsFound,
                GroupTable::Blocked => Translation::Blocked,
                GroupTable::Bypass(_) => Translation::Bypass,
                GroupTable::Domain(domain, _) => Translation::Domain(*domain),
            };
            EndpointStatus { id: *id, domain: endpoint.domain, translation, siblings }
        })
    }

    /// What the guest is told of an endpoint; `None` if there is no such endpoint.
    pub fn view(&self, endpoint: EndpointId) -> Option<&EndpointView> {
        Some(&self.endpoints.get(&endpoint)?.view)
    }

    /// An endpoint with which the guest cannot go on on another host ([`HostGroup::can_migrate`](crate::host::HostGroup::can_migrate)),
    /// if there is one.
    pub fn unmigratable_endpoint(&self) -> Option<EndpointId> {
        let mut unmigratable = self.groups.iter().filter(|group| !group.host.can_migrate());
        unmigratable.find_map(|group| group.members().first().copied())
    }

    /// How many host groups there are.
    pub fn group_counts(&self) -> GroupCounts {
        let blocked = self.groups.iter().filter(|group| group.is_blocked()).count();
        GroupCounts { groups: self.groups.len(), blocked }
    }

    /// Every domain, ascending.
    pub fn domains(&self) -> impl Iterator<Item = DomainStatus> {
        self.domains.iter().map(|(id, domain)| status(*id, domain))
    }

    /// A domain.
    pub fn domain(&self, id: DomainId) -> Option<DomainStatus> {
        self.domains.get(&id).map(|domain| status(id, domain))
    }

    /// The mappings of a domain that reach to an address or start behind it, ascending; `None` if there is no such domain. A bypass
    /// domain has none.
    pub fn mappings(&self, domain: DomainId, from: u64) -> Option<impl Iterator<Item = MappedRange>> {
        let space = self.domains.get(&domain)?.space();
        let mappings = space.into_iter().flat_map(move |space| space.mappings.from(from));
        Some(mappings.map(|mapping| MappedRange {
            iova: mapping.iova,
            physical: mapping.physical,
            access: mapping.access,
        }))
    }

    /// How many faults there were since the device was made: the number of the last one.
    pub const fn faults_recorded(&self) -> u64 {
        self.faults.recorded()
    }

    /// The faults with a higher number than this that are remembered, whether or not the guest has been told of them, in their
    /// order. The last 256 are, but those of endpoints that were removed.
    pub fn recorded_faults(&self, after: u64) -> impl Iterator<Item = &RecordedFault> {
        self.faults.recent().filter(move |fault| fault.number > after)
    }
}

fn status(id: DomainId, domain: &Domain) -> DomainStatus {
    let (mappings, poisoned) = match &domain.kind {
        DomainKind::Bypass => (None, false),
        DomainKind::Mapped(space) => (Some(space.mappings.len()), space.poisoned),
    };
    DomainStatus { id, endpoints: domain.endpoints.iter().copied().collect(), mappings, poisoned }
}
