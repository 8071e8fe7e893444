// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! ATTACH and DETACH. Where a host group is in consequence is `group.rs`'s.

use super::VirtioIommu;
use super::domain::{Domain, DomainKind};
use super::group::Agreement;
use crate::id::{DomainId, EndpointId};
use crate::range::RangeSet;
use crate::request::Status;
use crate::spec::feature;

impl VirtioIommu {
    pub(super) fn attach(&mut self, domain: DomainId, id: EndpointId, bypass: bool) -> Result<(), Status> {
        let group = self.check_attach(domain, id, bypass)?;
        self.domains.entry(domain).or_insert_with(|| Domain::new(bypass));
        match self.agreement(group, Some((id, domain))) {
            Agreement::Domain(_) => {
                let was_blocked = self.group(group).is_blocked();
                if let Err(status) = self.put_group_on(group, domain) {
                    if self.group(group).is_blocked() && !was_blocked {
                        self.report_blocked(group);
                    }
                    self.drop_domain_if_empty(domain);
                    return Err(status);
                }
            }
            // The host is not asked for a bypass that it would refuse.
            _ if bypass && self.has_memory_in_reserved(id) => {
                self.drop_domain_if_empty(domain);
                return Err(Status::Unsupported);
            }
            Agreement::Unattached | Agreement::Disagreement => self.group_mut(group).block(),
        }
        self.join_domain(domain, id);
        Ok(())
    }

    /// Attaches an endpoint to a bypass domain whose memory came, after the driver had attached it, to where the endpoint cannot
    /// reach it: its group is blocked.
    pub(super) fn attach_blocked(&mut self, domain: DomainId, id: EndpointId) -> Result<(), Status> {
        let group = self.check_attach(domain, id, true)?;
        self.domains.entry(domain).or_insert_with(|| Domain::new(true));
        self.group_mut(group).block();
        self.join_domain(domain, id);
        Ok(())
    }

    /// Whether an endpoint may be attached to a domain, as far as the guest's own view goes, and the group that it is in.
    fn check_attach(&mut self, domain: DomainId, id: EndpointId, bypass: bool) -> Result<usize, Status> {
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
        let group = self.endpoints.get(&id).ok_or(Status::NoEntry)?.group;
        self.recover_if_empty(domain);
        self.check_domain(domain, id, bypass)?;
        self.check_siblings(group, id, domain)?;
        Ok(group)
    }

    /// Writes an endpoint into a domain's books, and out of those of the domain that it was in.
    fn join_domain(&mut self, domain: DomainId, id: EndpointId) {
        let refused = self.refused_beside(id);
        let Some(endpoint) = self.endpoints.get_mut(&id) else { return };
        let previous = endpoint.domain.replace(domain);
        if let Some(domain) = self.domains.get_mut(&domain) {
            domain.endpoints.insert(id);
            domain.refused = domain.refused.union(&refused);
        }
        // 5.13.6.3.2: "the device SHOULD behave as if the driver issued a DETACH request with this endpoint,
        // followed by the ATTACH request."
        if let Some(previous) = previous.filter(|previous| *previous != domain) {
            self.leave_domain(previous, id);
        }
    }

    /// Whether a domain can take an endpoint.
    fn check_domain(&self, domain: DomainId, id: EndpointId, bypass: bool) -> Result<(), Status> {
        match self.domains.get(&domain) {
            // 5.13.6.3.2: "If the domain already exists and the VIRTIO_IOMMU_ATTACH_F_BYPASS flag is not consistent
            // with that domain, the device SHOULD reject the request and set status to VIRTIO_IOMMU_S_INVAL."
            Some(existing) if existing.is_bypass() != bypass => return Err(Status::Invalid),
            Some(existing) => {
                let refused = self.refused_beside(id);
                let conflict = existing.space().and_then(|space| space.mappings.overlapping_any(&refused));
                // 5.13.6.3.2: if the properties of the endpoint are not compatible "the device SHOULD reject the
                // request and set status to VIRTIO_IOMMU_S_UNSUPP".
                if conflict.is_some() {
                    return Err(Status::Unsupported);
                }
            }
            None if self.domains.len() - usize::from(self.is_alone(id)) >= self.settings.max_domains => {
                return Err(Status::NoMemory);
            }
            None => (),
        }
        Ok(())
    }

    /// Whether a domain ends when this endpoint leaves it.
    fn is_alone(&self, id: EndpointId) -> bool {
        let domain = self.endpoints.get(&id).and_then(|endpoint| self.domains.get(&endpoint.domain?));
        domain.is_some_and(|domain| domain.endpoints.len() == 1)
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
        // 5.13.6.3.2 names this status for an endpoint that cannot be attached beside others of its domain. Here others of
        // its host group are in the way.
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
        // mapping from that domain." Unless a sibling stays: it keeps the host group where it is, this endpoint with it.
        self.settle_group(group);
        self.leave_domain(domain, id);
        Ok(())
    }

    /// Strikes an endpoint off a domain.
    pub(super) fn leave_domain(&mut self, domain: DomainId, id: EndpointId) {
        if let Some(domain) = self.domains.get_mut(&domain) {
            domain.endpoints.remove(&id);
        }
        self.collect_refused_ranges(domain);
        self.drop_unused_tables();
        self.drop_domain_if_empty(domain);
    }

    /// What a domain must not map, now that another set of endpoints is in it.
    fn collect_refused_ranges(&mut self, domain: DomainId) {
        let endpoints = self.domains.get(&domain).map(|domain| &domain.endpoints);
        let refused: Vec<RangeSet> = endpoints.into_iter().flatten().map(|id| self.refused_beside(*id)).collect();
        if let Some(domain) = self.domains.get_mut(&domain) {
            domain.refused = refused.iter().flat_map(RangeSet::ranges).copied().collect();
        }
    }

    /// What must not be mapped for an endpoint: what is reserved for any member of its host group, as they all reach the same table.
    fn refused_beside(&self, id: EndpointId) -> RangeSet {
        let members = self.endpoints.get(&id).map_or(&[][..], |endpoint| self.group(endpoint.group).members());
        let views = members.iter().filter_map(|member| Some(self.endpoints.get(member)?.view.refused()));
        views.flat_map(RangeSet::ranges).copied().collect()
    }

    fn drop_domain_if_empty(&mut self, domain: DomainId) {
        // 5.13.6.4: "After all endpoints have been successfully detached from a domain, it ceases to exist and its ID can
        // be reused by the driver for another domain."
        if self.domains.get(&domain).is_some_and(|domain| domain.endpoints.is_empty())
            && let Some(DomainKind::Mapped(space)) = self.domains.remove(&domain).map(|domain| domain.kind)
        {
            self.mappings_in_all -= space.mappings.len();
        }
    }

    /// Takes every endpoint out of its domain and forgets the domains. The groups stay where they are.
    pub(super) fn detach_all(&mut self) {
        for endpoint in self.endpoints.values_mut() {
            endpoint.domain = None;
        }
        self.domains.clear();
        self.mappings_in_all = 0;
    }
}
