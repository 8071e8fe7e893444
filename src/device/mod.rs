// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the device decides: a state machine without files, threads or a clock.
//!
//! [`VirtioIommu::handle`] takes the bytes of one request and writes the bytes of its reply. Everything that reaches
//! the host goes through the traits of [`crate::host`].

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::host::refused::RefusedAccesses;
use crate::host::{HostGroup, IoPageTable};
use crate::id::{DomainId, EndpointId};
use crate::memory::{GuestRam, HostSegment};
use crate::request::{Request, RequestKind, Status, probe_reply_size, write_reply};
use crate::reserved::EndpointView;
use crate::spec::{self, config, feature};

mod attach;
mod domain;
mod endpoint;
mod fault;
mod group;
mod identity;
mod map;
mod memory;
mod notice;
mod plug;
mod settings;
mod state;
mod statistics;
mod status;
#[cfg(test)]
mod tests;
mod trace;

use domain::Domain;
use endpoint::Endpoint;
use fault::FaultQueue;
use group::{Group, GroupTable};
use notice::NoticeQueue;
use trace::Tracer;

pub use fault::{Fault, FaultReason, RecordedFault};
pub use map::UnfinishedMap;
pub use notice::Notice;
pub use settings::{Settings, SetupError};
pub use state::{DeviceState, DomainState, FaultState, MappingState, RestoreError};
pub use statistics::{Count, Statistics};
pub use status::{DomainStatus, EndpointStatus, GroupCounts, MappedRange, Translation};
pub use trace::Exchange;

/// What is offered always.
// 5.13.3.2: "New devices SHOULD NOT offer VIRTIO_IOMMU_F_BYPASS." MMIO is not offered either: nothing but guest memory can be mapped.
const FEATURES: u64 = feature::INPUT_RANGE
    | feature::DOMAIN_RANGE
    | feature::MAP_UNMAP
    | feature::PROBE
    | feature::BYPASS_CONFIG
    | feature::RING_INDIRECT_DESC
    | feature::RING_EVENT_IDX
    | feature::VERSION_1;

/// How far a request got.
#[derive(Debug)]
#[must_use]
pub enum Progress {
    /// It is answered.
    Answered {
        /// How many bytes of the reply were written.
        used: usize,
    },
    /// It is a large MAP, and not all of it is mapped yet.
    Unfinished(UnfinishedMap),
}

/// A virtio-iommu device.
#[derive(Debug)]
pub struct VirtioIommu {
    settings: Settings,
    /// Field `bypass` of the configuration.
    bypass: bool,
    driver_features: u64,
    ram: GuestRam,
    endpoints: BTreeMap<EndpointId, Endpoint>,
    groups: Vec<Group>,
    domains: BTreeMap<DomainId, Domain>,
    /// How many mappings the domains have together.
    mappings_in_all: usize,
    /// Room for the pieces of guest memory that a MAP reaches; empty between two steps.
    segments: Vec<HostSegment>,
    /// Tables in which guest memory is mapped to itself.
    identity_tables: Vec<Arc<dyn IoPageTable>>,
    /// Nothing is attached any more, whatever comes.
    ended: bool,
    faults: FaultQueue,
    notices: NoticeQueue,
    statistics: Statistics,
    tracer: Tracer,
}

impl VirtioIommu {
    /// A device with these endpoints, of which every one is in exactly one host group.
    ///
    /// What the groups are attached to is left as it is until the driver or a reset asks for something else; without
    /// `boot_bypass`, until memory or features are set. Memory comes first ([`set_memory`](Self::set_memory)): without any,
    /// every MAP is answered with FAULT.
    ///
    /// # Errors
    ///
    /// [`SetupError`]
    pub fn new(
        settings: Settings,
        endpoints: Vec<(EndpointId, EndpointView)>,
        groups: Vec<Arc<dyn HostGroup>>,
    ) -> Result<Self, SetupError> {
        settings.check()?;
        let endpoints = place_endpoints(&settings, endpoints, &groups)?;
        let groups = groups.into_iter().map(Group::new).collect();
        Ok(Self {
            bypass: settings.boot_bypass,
            settings,
            driver_features: 0,
            ram: GuestRam::default(),
            endpoints,
            groups,
            domains: BTreeMap::new(),
            mappings_in_all: 0,
            segments: Vec::new(),
            identity_tables: Vec::new(),
            ended: false,
            faults: FaultQueue::default(),
            notices: NoticeQueue::default(),
            statistics: Statistics::default(),
            tracer: Tracer::default(),
        })
    }

    /// The feature bits to offer.
    pub const fn features(&self) -> u64 {
        if self.settings.access_platform { FEATURES | feature::ACCESS_PLATFORM } else { FEATURES }
    }

    /// Takes note of the features that the driver accepted. If `bypass` is 0, endpoints in no domain are blocked from here on
    /// at the latest.
    pub fn set_driver_features(&mut self, features: u64) {
        self.driver_features = features & self.features();
        self.settle_unattached_groups();
    }

    /// `struct virtio_iommu_config`.
    pub fn config(&self) -> [u8; config::SIZE] {
        let settings = &self.settings;
        let mut bytes = [0; config::SIZE];
        let mut put = |offset: usize, field: &[u8]| {
            for (to, from) in bytes.iter_mut().skip(offset).zip(field) {
                *to = *from;
            }
        };
        put(config::PAGE_SIZE_MASK, &settings.page_size_mask().to_le_bytes());
        put(config::INPUT_RANGE_START, &settings.input_range.start().to_le_bytes());
        put(config::INPUT_RANGE_END, &settings.input_range.last().to_le_bytes());
        put(config::DOMAIN_RANGE_START, &settings.domain_range.start().to_le_bytes());
        put(config::DOMAIN_RANGE_END, &settings.domain_range.end().to_le_bytes());
        put(config::PROBE_SIZE, &settings.probe_size.to_le_bytes());
        // 5.13.4.2: "The device MUST NOT present a value different than 0 or 1 in bypass."
        put(config::BYPASS, &[u8::from(self.bypass)]);
        bytes
    }

    /// Takes a write to the configuration. Only `bypass` can be written, and only 0 or 1; the rest is ignored,
    /// so a transport that writes the whole structure does no harm.
    pub fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        let written = config::BYPASS.checked_sub(offset).and_then(|at| bytes.get(at));
        let bypass = match written {
            Some(0) => false,
            Some(1) => true,
            _ => return,
        };
        if self.bypass != bypass {
            self.bypass = bypass;
            self.settle_unattached_groups();
        }
    }

    /// Handles one request: reads it from the device-readable bytes of its descriptor chain, writes the reply over
    /// all of the device-writable ones, and returns the used length.
    ///
    /// The used length is zero, and nothing is written, if the type is unknown or there is no room for a status.
    pub fn handle(&mut self, readable: &[u8], writable: &mut [u8]) -> usize {
        let mut progress = self.begin(readable, writable);
        loop {
            match progress {
                Progress::Answered { used } => return used,
                Progress::Unfinished(map) => progress = self.go_on(map, writable),
            }
        }
    }

    /// Like [`handle`](Self::handle), but does no more than one step of a large MAP. Before the next one
    /// ([`go_on`](Self::go_on)) anything can be done with the device, except to begin another request, to save or to restore.
    pub fn begin(&mut self, readable: &[u8], writable: &mut [u8]) -> Progress {
        // 5.13.6.2: "If a request type is not recognized, the device SHOULD NOT write the buffer and SHOULD set
        // the used length to zero."
        let Some(kind) = RequestKind::of(readable) else {
            self.statistics.unreadable += 1;
            return Progress::Answered { used: 0 };
        };
        // 5.13.6, of a buffer without room for a tail: "In that case, it returns the buffers without writing to them."
        if writable.len() < spec::TAIL_SIZE {
            self.statistics.unreadable += 1;
            return Progress::Answered { used: 0 };
        }
        let parsed = Request::parse(kind, readable);
        let result = parsed.and_then(|request| match request {
            Request::Attach { domain, endpoint, bypass } => self.attach(domain, endpoint, bypass).map(|()| None),
            Request::Detach { domain, endpoint } => self.detach(domain, endpoint).map(|()| None),
            Request::Map { domain, iova, physical, access } => self.map(domain, iova, physical, access),
            Request::Unmap { domain, iova } => self.unmap(domain, iova).map(|()| None),
            Request::Probe { endpoint } => self.check_probe(endpoint, writable.len()).map(|()| None),
        });
        match result {
            Ok(Some(map)) => Progress::Unfinished(map),
            Ok(None) => self.answer(kind, parsed.ok(), Status::Ok, writable),
            Err(status) => self.answer(kind, parsed.ok(), status, writable),
        }
    }

    /// Takes one more step of a MAP. The reply goes to the same device-writable bytes.
    ///
    /// If something done in between took away what had been mapped, say a reset, the answer is an error.
    pub fn go_on(&mut self, map: UnfinishedMap, writable: &mut [u8]) -> Progress {
        let request = map.request();
        match self.map_step(map) {
            Ok(Some(map)) => Progress::Unfinished(map),
            Ok(None) => self.answer(RequestKind::Map, Some(request), Status::Ok, writable),
            Err(status) => self.answer(RequestKind::Map, Some(request), status, writable),
        }
    }

    fn answer(&mut self, kind: RequestKind, request: Option<Request>, status: Status, writable: &mut [u8]) -> Progress {
        self.statistics.count(kind, status);
        self.tracer.tell(&Exchange::Request { kind, request, status });
        let properties = match request {
            Some(Request::Probe { endpoint }) if status == Status::Ok => self.endpoints.get(&endpoint),
            _ => None,
        };
        let properties = properties.map_or(&[][..], |endpoint| endpoint.view.reported());
        Progress::Answered { used: write_reply(writable, status, properties) }
    }

    fn check_probe(&self, endpoint: EndpointId, writable: usize) -> Result<(), Status> {
        // 5.13.6.7.2: "If the properties list is smaller than probe_size, the device SHOULD NOT write any property.
        // It SHOULD reject the request and set status to VIRTIO_IOMMU_S_INVAL."
        if writable < probe_reply_size(self.settings.probe_size) {
            return Err(Status::Invalid);
        }
        // 5.13.6.7.2: "If the endpoint identified by endpoint doesn't exist, then the device SHOULD reject the
        // request and set status to VIRTIO_IOMMU_S_NOENT."
        if self.endpoints.contains_key(&endpoint) { Ok(()) } else { Err(Status::NoEntry) }
    }

    /// Resets the device: no endpoint is attached, no domain and no event is left. `bypass` keeps its value
    /// (5.13.4.2: it "SHOULD NOT change on device reset").
    pub fn reset(&mut self) {
        self.driver_features = 0;
        self.collect_refused_accesses();
        self.faults.clear();
        self.detach_all();
        self.settle_unattached_groups();
    }

    /// Resets the device as the machine around it is reset: as [`reset`](Self::reset), and `bypass` gets its initial value
    /// (5.13.4.2: it "SHOULD be restored to its initial value on system reset").
    pub fn system_reset(&mut self) {
        self.bypass = self.settings.boot_bypass;
        self.reset();
    }

    /// Ends the device's work for good: refuses all DMA of all endpoints, those included that are still as they were
    /// found, and frees every page table.
    pub fn shut_down(&mut self) {
        self.ended = true;
        for group in &mut self.groups {
            group.block();
        }
        self.detach_all();
        self.drop_unused_tables();
    }

    /// The oldest fault event that waits for the guest.
    pub fn first_fault(&mut self) -> Option<&Fault> {
        self.collect_refused_accesses();
        self.faults.first()
    }

    /// Takes the oldest fault event that waits for the guest.
    pub fn take_fault(&mut self) -> Option<Fault> {
        self.collect_refused_accesses();
        let fault = self.faults.pop()?;
        self.statistics.faults_sent += 1;
        self.tracer.tell(&Exchange::Fault(fault));
        Some(fault)
    }

    /// Takes the oldest notice for the operator.
    pub fn next_notice(&mut self) -> Option<Notice> {
        self.notices.pop()
    }

    /// What has been counted since the device was made.
    pub fn statistics(&self) -> Statistics {
        let mut statistics = self.statistics;
        let by_hosts =
            self.groups.iter().filter_map(|group| group.host.refused_accesses()).map(RefusedAccesses::dropped);
        // What is counted here was dropped by groups that are gone.
        let of_own = self.faults.dropped().saturating_add(self.statistics.faults_dropped);
        statistics.faults_dropped = by_hosts.fold(of_own, u64::saturating_add);
        statistics.notices_dropped = self.notices.dropped();
        statistics
    }
}

impl Drop for VirtioIommu {
    /// A device that is gone translates nothing. What it never touched, it leaves alone: a device may be made and found
    /// wanting while a VM runs.
    fn drop(&mut self) {
        for group in &mut self.groups {
            if !matches!(group.table, GroupTable::AsFound) {
                group.block();
            }
        }
    }
}

fn place_endpoints(
    settings: &Settings,
    endpoints: Vec<(EndpointId, EndpointView)>,
    groups: &[Arc<dyn HostGroup>],
) -> Result<BTreeMap<EndpointId, Endpoint>, SetupError> {
    let mut group_of = BTreeMap::new();
    for (index, group) in groups.iter().enumerate() {
        for member in group.members() {
            if group_of.insert(*member, index).is_some() {
                return Err(SetupError::GroupTwice(*member));
            }
        }
    }
    let mut placed = BTreeMap::new();
    for (id, view) in endpoints {
        let (probe_size, regions) = (settings.probe_size, view.reported().len());
        if regions * spec::RESV_MEM_SIZE > probe_size as usize {
            return Err(SetupError::ProbeSize { endpoint: id, regions, probe_size });
        }
        if placed.contains_key(&id) {
            return Err(SetupError::EndpointTwice(id));
        }
        let group = group_of.remove(&id).ok_or(SetupError::NoGroup(id))?;
        placed.insert(id, Endpoint { view, group, domain: None });
    }
    match group_of.keys().next() {
        Some(member) => Err(SetupError::UnknownMember(*member)),
        None => Ok(placed),
    }
}
