// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MAP and UNMAP, and what happens when the host does not follow.
//!
//! The guest's mappings are the truth and every host call's result counts. A failed MAP is taken back everywhere. A
//! failed UNMAP cannot be: Linux never looks at its status and reuses the memory. So the domain's groups are blocked
//! before the request returns, then put on fresh page tables; if that fails too, they stay blocked.

use std::mem;

use vm_memory::GuestAddress;

use super::domain::{AddressSpace, Domain};
use super::group::Agreement;
use super::{Fault, FaultReason, Notice, VirtioIommu};
use crate::access::Access;
use crate::causes::with_causes;
use crate::host::{HostError, HostErrorKind, IoPageTable, MapError};
use crate::id::DomainId;
use crate::mapping::{Mapping, WouldSplit};
use crate::memory::HostSegment;
use crate::range::IovaRange;
use crate::request::{Request, Status};

/// How a map over all tables of a domain went wrong.
struct MapFailure {
    error: HostError,
    /// Some table still has what was to be taken back.
    out_of_step: bool,
}

/// A MAP request that is not answered yet: the host maps a large range in steps, so that something else can be done in
/// between. What was mapped so far is a mapping of the domain like any other.
#[derive(Debug)]
pub struct UnfinishedMap {
    domain: DomainId,
    /// All that the request asks for.
    whole: Mapping,
    /// What has been mapped, from the start of it.
    done: Option<IovaRange>,
}

impl UnfinishedMap {
    /// The request that it is.
    pub(super) const fn request(&self) -> Request {
        let Mapping { iova, physical, access } = self.whole;
        Request::Map { domain: self.domain, iova, physical: physical.0, access }
    }
}

impl VirtioIommu {
    /// The first step of a MAP; what is left of it.
    pub(super) fn map(
        &mut self,
        domain: DomainId,
        iova: IovaRange,
        physical: u64,
        access: Access,
    ) -> Result<Option<UnfinishedMap>, Status> {
        self.recover_if_empty(domain);
        let space = self.check_map(domain, iova, physical)?;
        let (has_host_table, has_room) = (space.has_host_table(), space.mappings.has_room());
        let whole = Mapping { iova, physical: GuestAddress(physical), access };
        // 5.13.6.5: "the range defined by phys_start and phys_end should be within the guest-physical address space".
        // No status is named for one that is not; this one says that an address cannot be reached.
        let length = iova.length().ok_or(Status::Range)?;
        if !self.ram.covers(whole.physical, length) {
            return Err(Status::Fault);
        }
        if !has_room {
            self.make_room(domain)?;
        }
        if has_host_table {
            return self.map_step(UnfinishedMap { domain, whole, done: None });
        }
        self.keep_mapping(domain, whole);
        Ok(None)
    }

    /// One more step of a MAP; what is left of it. If there is an error, nothing of it stays mapped.
    pub(super) fn map_step(&mut self, mut map: UnfinishedMap) -> Result<Option<UnfinishedMap>, Status> {
        let result = self.map_next_part(&map);
        match result {
            Ok(done) if done == map.whole.iova => Ok(None),
            Ok(done) => {
                map.done = Some(done);
                Ok(Some(map))
            }
            Err(status) => {
                if let Some(done) = map.done {
                    // If the domain is gone, so is the mapping.
                    let _ = self.unmap(map.domain, done);
                }
                Err(status)
            }
        }
    }

    /// Maps the next part, up to a multiple of the step; all that is mapped then.
    fn map_next_part(&mut self, map: &UnfinishedMap) -> Result<IovaRange, Status> {
        let UnfinishedMap { domain, whole, done } = *map;
        let space = self.domains.get(&domain).and_then(Domain::space).ok_or(Status::NoEntry)?;
        let so_far = done.map(|iova| Mapping { iova, ..whole });
        // Something else may have been done since the last step.
        if space.poisoned || so_far.is_some_and(|mapping| space.mappings.overlapping(whole.iova) != Some(mapping)) {
            return Err(Status::DeviceError);
        }
        let start = done.map_or(whole.iova.start(), |done| done.last() + 1);
        let step_ends = start | (self.settings.map_step - 1);
        let last = if whole.access.is_none() { whole.iova.last() } else { whole.iova.last().min(step_ends) };
        let part = IovaRange::new(start, last).ok_or(Status::DeviceError)?;
        let physical = GuestAddress(whole.physical.0 + (start - whole.iova.start()));
        let mut segments = mem::take(&mut self.segments);
        let is_ram = part.length().is_some_and(|length| self.ram.put_segments(physical, length, &mut segments));
        let mapped = if is_ram && !whole.access.is_none() {
            self.map_on_host(domain, part, &segments, whole.access)
        } else {
            Ok(())
        };
        // They keep guest memory mapped.
        segments.clear();
        self.segments = segments;
        if !is_ram {
            return Err(Status::Fault);
        }
        if let Err(failure) = mapped {
            return Err(self.map_failed(domain, whole.iova, whole.access, &failure));
        }
        let done = IovaRange::new(whole.iova.start(), last).ok_or(Status::DeviceError)?;
        self.keep_mapping(domain, Mapping { iova: done, ..whole });
        Ok(done)
    }

    /// Takes the memory that keeping one more mapping needs, while nothing has been done yet: mappings are what a guest can make
    /// a million of.
    pub(super) fn make_room(&mut self, domain: DomainId) -> Result<(), Status> {
        let space = self.domains.get_mut(&domain).and_then(Domain::space_mut);
        space.map_or(Ok(()), |space| space.mappings.make_room()).map_err(|_| Status::NoMemory)
    }

    /// Takes a mapping into a domain's table, or lets it grow.
    pub(super) fn keep_mapping(&mut self, domain: DomainId, mapping: Mapping) {
        if let Some(space) = self.domains.get_mut(&domain).and_then(Domain::space_mut) {
            self.mappings_in_all += usize::from(space.mappings.insert(mapping));
        }
    }

    /// Whether a domain can take a mapping; where to.
    pub(super) fn check_map(&self, id: DomainId, iova: IovaRange, physical: u64) -> Result<&AddressSpace, Status> {
        let domain = self.find_domain(id)?;
        // 5.13.6.5.2: "If the domain is a bypass domain, the device SHOULD reject the request and set status to
        // VIRTIO_IOMMU_S_INVAL."
        let space = domain.space().ok_or(Status::Invalid)?;
        // 5.13.6.5.2: "If virt_start, phys_start or (virt_end + 1) is not aligned on the page granularity, the device
        // SHOULD reject the request and set status to VIRTIO_IOMMU_S_RANGE."
        let granule = self.settings.granule;
        if !iova.is_aligned(granule) || physical & (granule - 1) != 0 {
            return Err(Status::Range);
        }
        // 5.13.6: "Any mapping request to virtual addresses outside of this range fails."
        if !self.settings.input_range.covers(iova) {
            return Err(Status::Range);
        }
        // 5.13.6.5.2: "If a mapping already exists in the requested range, the device SHOULD reject the request and
        // set status to VIRTIO_IOMMU_S_INVAL."
        if space.mappings.overlapping(iova).is_some() {
            return Err(Status::Invalid);
        }
        // 5.13.6.8.1.2: "The device SHOULD reject a MAP request that overlaps a RESV_MEM region."
        if domain.refused.overlapping(iova).is_some() {
            return Err(Status::Invalid);
        }
        if space.poisoned {
            return Err(Status::DeviceError);
        }
        let settings = &self.settings;
        if space.mappings.len() >= settings.max_mappings || self.mappings_in_all >= settings.max_mappings_in_all {
            return Err(Status::NoMemory);
        }
        Ok(space)
    }

    pub(super) fn unmap(&mut self, domain: DomainId, iova: IovaRange) -> Result<(), Status> {
        let on_host = self.check_unmap(domain, iova)?;
        let failure = on_host.and_then(|(hull, bytes)| self.unmap_on_host(domain, hull, bytes).err());
        if let Some(space) = self.domains.get_mut(&domain).and_then(Domain::space_mut) {
            self.mappings_in_all -= space.mappings.remove(iova);
        }
        match failure {
            Some(error) if !self.bring_back_in_step(domain, &error) => Err(Status::DeviceError),
            _ => {
                self.recover_if_empty(domain);
                Ok(())
            }
        }
    }

    /// Whether a range can be unmapped. What there is to remove from the host: the range from its first mapping to its last, and
    /// how many bytes of that are mapped. One call removes them all, as whatever lies in between is not mapped.
    fn check_unmap(&self, domain: DomainId, iova: IovaRange) -> Result<Option<(IovaRange, u128)>, Status> {
        // 5.13.6.6.2: "If the domain is a bypass domain, the device SHOULD reject the request and set status to
        // VIRTIO_IOMMU_S_INVAL."
        let space = self.find_domain(domain)?.space().ok_or(Status::Invalid)?;
        // 5.13.6.6.2: if "the UNMAP request would split the mapping, then the device SHOULD set the request status to
        // VIRTIO_IOMMU_S_RANGE, and SHOULD NOT remove any mapping".
        let covered = space.mappings.covered(iova).map_err(|WouldSplit| Status::Range)?;
        // 5.13.6.6.2: "If part of the range or the full range is not covered by an existing mapping, then the device
        // SHOULD remove all mappings affected by the range and set the request status to VIRTIO_IOMMU_S_OK."
        let mut on_host: Option<(IovaRange, u128)> = None;
        if space.has_host_table() {
            for mapping in covered {
                if let Some(bytes) = mapping.bytes_on_host(&self.ram) {
                    let (start, before) = on_host.map_or((mapping.iova.start(), 0), |(hull, sum)| (hull.start(), sum));
                    on_host = IovaRange::new(start, mapping.iova.last()).map(|hull| (hull, before + u128::from(bytes)));
                }
            }
        }
        Ok(on_host)
    }

    /// A domain that could not be brought back in step, and has no mapping any more, starts afresh.
    pub(super) fn recover_if_empty(&mut self, domain: DomainId) {
        let space = self.domains.get(&domain).and_then(Domain::space);
        if space.is_some_and(|space| space.poisoned && space.mappings.is_empty()) {
            // If it fails again, the domain is as it was.
            self.rebuild(domain);
        }
    }

    /// The domain of a MAP or UNMAP.
    fn find_domain(&self, domain: DomainId) -> Result<&Domain, Status> {
        if !self.settings.domain_range.contains(&domain.0) {
            return Err(Status::Invalid);
        }
        // 5.13.6.5.2 and 5.13.6.6.2: "If domain does not exist, the device SHOULD" set "status to
        // VIRTIO_IOMMU_S_NOENT."
        self.domains.get(&domain).ok_or(Status::NoEntry)
    }

    /// Maps in every table of the domain, or in none.
    fn map_on_host(
        &self,
        domain: DomainId,
        iova: IovaRange,
        segments: &[HostSegment],
        access: Access,
    ) -> Result<(), MapFailure> {
        for (index, table) in self.host_tables(domain).enumerate() {
            let Err(error) = table.map(iova, segments, access) else { continue };
            let mut done = self.host_tables(domain).take(index);
            let undone = done.all(|table| unmap_exactly(table, iova, iova.size()).is_ok());
            let out_of_step = !undone || matches!(error, MapError::LeftBehind(_));
            return Err(MapFailure { error: error.into(), out_of_step });
        }
        Ok(())
    }

    /// Unmaps from every table of the domain, and does not stop at one that fails.
    fn unmap_on_host(&self, domain: DomainId, iova: IovaRange, bytes: u128) -> Result<(), HostError> {
        let mut result = Ok(());
        for table in self.host_tables(domain) {
            result = result.and(unmap_exactly(table, iova, bytes));
        }
        result
    }

    /// The tables of a domain that a host translates by.
    pub(super) fn host_tables(&self, domain: DomainId) -> impl Iterator<Item = &dyn IoPageTable> {
        self.domains.get(&domain).and_then(Domain::space).into_iter().flat_map(AddressSpace::host_tables)
    }

    /// Tells guest and operator of a MAP that the host refused.
    fn map_failed(&mut self, domain: DomainId, iova: IovaRange, access: Access, failure: &MapFailure) -> Status {
        let error = with_causes(&failure.error);
        self.notices.push(Notice::MapFailed { domain, iova, error });
        let endpoint = self.domains.get(&domain).and_then(|domain| domain.endpoints.first().copied());
        if let Some(endpoint) = endpoint {
            let reason = FaultReason::Mapping;
            self.faults.push(Fault { reason, endpoint, address: Some(iova.start()), access });
        }
        if failure.out_of_step {
            self.bring_back_in_step(domain, &failure.error);
        }
        map_status(failure.error.kind)
    }

    /// The host's tables of a domain may have what the guest's mappings do not: blocks the domain's groups, and
    /// rebuilds. Whether that worked; if not, the groups stay blocked and the domain is poisoned.
    pub(super) fn bring_back_in_step(&mut self, domain: DomainId, error: &HostError) -> bool {
        let rebuilt = self.rebuild(domain);
        self.notices.push(Notice::OutOfStep { domain, error: with_causes(error), rebuilt });
        let endpoints = self.domains.get(&domain).map(|domain| &domain.endpoints);
        for endpoint in endpoints.into_iter().flatten() {
            let (reason, access) = (FaultReason::Unknown, Access::NONE);
            self.faults.push(Fault { reason, endpoint: *endpoint, address: None, access });
        }
        rebuilt
    }

    /// Blocks all groups of a domain and puts them on fresh tables; whether that worked. If not, they stay blocked.
    fn rebuild(&mut self, domain: DomainId) -> bool {
        let all = 0..self.groups.len();
        let groups: Vec<usize> =
            all.filter(|group| self.agreement(*group, None) == Agreement::Domain(domain)).collect();
        for group in &groups {
            self.group_mut(*group).block();
        }
        self.forget_tables(domain, false);
        let rebuilt = groups.iter().all(|group| self.put_group_on(*group, domain).is_ok());
        if !rebuilt {
            for group in groups {
                self.group_mut(group).block();
            }
            self.forget_tables(domain, true);
        }
        rebuilt
    }

    fn forget_tables(&mut self, domain: DomainId, poisoned: bool) {
        if let Some(space) = self.domains.get_mut(&domain).and_then(Domain::space_mut) {
            space.tables.clear();
            space.poisoned = poisoned;
        }
    }
}

/// Unmaps, and takes any other number of bytes than expected for a failure.
pub(super) fn unmap_exactly(table: &dyn IoPageTable, iova: IovaRange, bytes: u128) -> Result<(), HostError> {
    match table.unmap(iova) {
        Ok(gone) if u128::from(gone) == bytes => Ok(()),
        Ok(gone) => {
            let action = format!("unmapping {iova} removed {gone:#x} bytes instead of {bytes:#x}");
            Err(HostError::new(HostErrorKind::Other, action, None))
        }
        Err(error) => Err(error),
    }
}

/// What a MAP that the host refused is answered with.
fn map_status(kind: HostErrorKind) -> Status {
    match kind {
        HostErrorKind::Unmappable | HostErrorKind::AlreadyMapped => Status::Invalid,
        HostErrorKind::NoMemory => Status::NoMemory,
        HostErrorKind::BadAddress => Status::Fault,
        HostErrorKind::Unsupported => Status::Unsupported,
        HostErrorKind::ReservedConflict
        | HostErrorKind::NotBound
        | HostErrorKind::Misuse
        | HostErrorKind::Incompatible
        | HostErrorKind::Busy
        | HostErrorKind::Gone
        | HostErrorKind::Other => Status::DeviceError,
    }
}
