// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device knows, to be kept while a VM is not running, and given to another device.
//!
//! A state is what the guest made: which endpoints are in which domains, what these map, what waits to be told. What the guest was
//! told at the start (endpoints, regions, settings) is not in it: whoever makes the other device sees to that. A state may come from
//! anywhere; it goes through the checks of the requests that would lead to it, on a device without a host first.

use std::collections::BTreeMap;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::endpoint::Endpoint;
use super::{Fault, FaultReason, VirtioIommu, domain::Domain};
use crate::access::Access;
use crate::host::HostGroup;
use crate::host::software::SoftwareGroup;
use crate::id::{DomainId, EndpointId};
use crate::mapping::Mapping;
use crate::range::IovaRange;
use crate::request::Status;

/// The state of a device, in numbers. Made by [`VirtioIommu::save`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct DeviceState {
    /// [`DeviceState::VERSION`].
    pub version: u32,
    /// The features that the driver accepted.
    pub driver_features: u64,
    /// Field `bypass` of the configuration.
    pub bypass: bool,
    /// The domains, by ascending ID.
    pub domains: Vec<DomainState>,
    /// Fault events that wait for a buffer of the guest's, the oldest first.
    pub faults: Vec<FaultState>,
}

/// A domain.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct DomainState {
    /// Its ID.
    pub id: u32,
    /// Whether it is a bypass domain, which has no mappings.
    pub bypass: bool,
    /// The IDs of the endpoints in it, of which there is at least one, ascending.
    pub endpoints: Vec<u32>,
    /// Its mappings, ascending.
    pub mappings: Vec<MappingState>,
}

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct MappingState {
    /// The first virtual address.
    pub first: u64,
    /// The last one, inclusive.
    pub last: u64,
    /// The guest-physical address of the first.
    pub physical: u64,
    /// Whether an endpoint may read.
    pub read: bool,
    /// Whether an endpoint may write.
    pub write: bool,
}

/// A fault event that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct FaultState {
    /// `VIRTIO_IOMMU_FAULT_R_*`.
    pub reason: u8,
    /// Whose access it was.
    pub endpoint: u32,
    /// The virtual address, if one is known.
    pub address: Option<u64>,
    /// Whether it was a read.
    pub read: bool,
    /// Whether it was a write.
    pub write: bool,
}

impl DeviceState {
    /// The version that is written, and the only one that is read.
    pub const VERSION: u32 = 1;
}

/// A state that a device cannot be in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// It is of another version.
    #[error("a device state of version {0} cannot be read, only version {version}", version = DeviceState::VERSION)]
    Version(u32),
    /// The device has domains already.
    #[error("the device is in use: a state can only be restored into a new one")]
    InUse,
    /// The driver accepted features that this device does not offer.
    #[error("the driver accepted the features {0:#x}, which this device does not offer")]
    Features(u64),
    /// A domain appears twice, or has no endpoint.
    #[error("domain {0} is there twice, or has no endpoint")]
    Domain(DomainId),
    /// An endpoint is in two domains.
    #[error("endpoint {0} is in more than one domain")]
    EndpointTwice(EndpointId),
    /// An endpoint cannot be in its domain.
    #[error("endpoint {endpoint} cannot be in domain {domain}: {status}")]
    Endpoint {
        /// The endpoint.
        endpoint: EndpointId,
        /// The domain.
        domain: DomainId,
        /// What a guest's ATTACH would be answered with.
        status: Status,
    },
    /// A mapping cannot be in its domain.
    #[error("domain {domain} cannot map {first:#x} to {last:#x}: {status}")]
    Mapping {
        /// The domain.
        domain: DomainId,
        /// The first virtual address.
        first: u64,
        /// The last one, inclusive.
        last: u64,
        /// What a guest's MAP would be answered with.
        status: Status,
    },
    /// A fault event has a reason that there is not.
    #[error("there is no fault reason {0}")]
    FaultReason(u8),
    /// A fault event is of an endpoint that there is not.
    #[error("a fault event is of endpoint {0}, which this device does not have")]
    FaultEndpoint(EndpointId),
}

impl VirtioIommu {
    /// The state of the device. No request is under way then.
    pub fn save(&mut self) -> DeviceState {
        self.collect_refused_accesses();
        DeviceState {
            version: DeviceState::VERSION,
            driver_features: self.driver_features,
            bypass: self.bypass,
            domains: self.domains.iter().map(|(id, domain)| DomainState::of(*id, domain)).collect(),
            faults: self.faults.iter().map(FaultState::of).collect(),
        }
    }

    /// Brings a new device, which was told of guest memory, into a state that another one was in.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]. If it is the state's own fault, no host was asked for anything. If a host refuses, the device is as after a
    /// reset, and `bypass` is what it was before.
    pub fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if state.version != DeviceState::VERSION {
            return Err(RestoreError::Version(state.version));
        }
        if !self.domains.is_empty() || self.ended {
            return Err(RestoreError::InUse);
        }
        self.without_host().take_on(state)?;
        let bypass = self.bypass;
        self.take_on(state).inspect_err(|_| {
            self.bypass = bypass;
            self.reset();
        })
    }

    /// The same device, as it is made, without any host.
    fn without_host(&self) -> Self {
        let group = |members: &[EndpointId]| -> Arc<dyn HostGroup> {
            Arc::new(SoftwareGroup::new(members.to_vec(), self.settings.granule))
        };
        let endpoints = self.endpoints.iter().map(|(id, endpoint)| {
            let Endpoint { view, group, .. } = endpoint;
            (*id, Endpoint { view: view.clone(), group: *group, domain: None })
        });
        let groups = self.groups.iter().map(|own| super::group::Group::new(group(own.members())));
        Self {
            bypass: self.bypass,
            settings: self.settings.clone(),
            driver_features: 0,
            ram: self.ram.clone(),
            endpoints: endpoints.collect(),
            groups: groups.collect(),
            domains: BTreeMap::new(),
            mappings_in_all: 0,
            segments: Vec::new(),
            identity_tables: Vec::new(),
            ended: false,
            faults: super::FaultQueue::default(),
            notices: super::NoticeQueue::default(),
            statistics: super::Statistics::default(),
            tracer: super::Tracer::default(),
        }
    }

    fn take_on(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let unknown = state.driver_features & !self.features();
        if unknown != 0 {
            return Err(RestoreError::Features(unknown));
        }
        self.bypass = state.bypass;
        self.settle_unattached_groups();
        // What is there was asked for with features that may have been set anew since.
        self.driver_features = self.features();
        self.take_on_domains(&state.domains)?;
        self.driver_features = state.driver_features;
        for domain in &state.domains {
            for mapping in &domain.mappings {
                let refused = |status| {
                    let MappingState { first, last, .. } = *mapping;
                    RestoreError::Mapping { domain: DomainId(domain.id), first, last, status }
                };
                self.take_on_mapping(DomainId(domain.id), mapping).map_err(refused)?;
            }
        }
        for fault in &state.faults {
            let fault = fault.to_fault()?;
            // 5.13.6.9.2: "The device SHOULD write a valid endpoint ID in endpoint."
            if !self.endpoints.contains_key(&fault.endpoint) {
                return Err(RestoreError::FaultEndpoint(fault.endpoint));
            }
            self.faults.push(fault);
        }
        Ok(())
    }

    /// Attaches every endpoint to its domain, in an order that a driver could have taken.
    fn take_on_domains(&mut self, domains: &[DomainState]) -> Result<(), RestoreError> {
        let mut domain_of: BTreeMap<EndpointId, &DomainState> = BTreeMap::new();
        for (domain, before) in domains.iter().zip(std::iter::once(None).chain(domains.iter().map(Some))) {
            if domain.endpoints.is_empty() || before.is_some_and(|before| domain.id <= before.id) {
                return Err(RestoreError::Domain(DomainId(domain.id)));
            }
            for endpoint in &domain.endpoints {
                if domain_of.insert(EndpointId(*endpoint), domain).is_some() {
                    return Err(RestoreError::EndpointTwice(EndpointId(*endpoint)));
                }
            }
        }
        // Siblings join the domain of the first of them, and leave it for their own then: none goes elsewhere at once.
        let first_of_group = |id: &EndpointId| {
            let group = self.endpoints.get(id)?.group;
            self.group(group).members().iter().find_map(|sibling| domain_of.get(sibling).copied())
        };
        let together: Vec<_> = domain_of.iter().map(|(id, own)| (*id, first_of_group(id).unwrap_or(own))).collect();
        let apart = domain_of.iter().map(|(id, own)| (*id, *own));
        for (endpoint, domain) in together.into_iter().chain(apart) {
            let id = DomainId(domain.id);
            let result = if domain.bypass && self.has_memory_in_reserved(endpoint) {
                self.attach_blocked(id, endpoint)
            } else {
                self.attach(id, endpoint, domain.bypass)
            };
            result.map_err(|status| RestoreError::Endpoint { endpoint, domain: id, status })?;
        }
        Ok(())
    }

    fn take_on_mapping(&mut self, domain: DomainId, state: &MappingState) -> Result<(), Status> {
        let MappingState { first, last, physical, read, write } = *state;
        let iova = IovaRange::new(first, last).ok_or(Status::Range)?;
        let access = Access { read, write };
        let length = iova.length().ok_or(Status::Range)?;
        if !self.ram.covers(GuestAddress(physical), length) {
            // Its memory had left before it was saved, and may come back.
            self.check_map(domain, iova, physical)?;
            physical.checked_add(length - 1).ok_or(Status::Range)?;
            self.make_room(domain)?;
            self.keep_mapping(domain, Mapping { iova, physical: GuestAddress(physical), access });
            return Ok(());
        }
        let mut left = self.map(domain, iova, physical, access)?;
        while let Some(map) = left {
            left = self.map_step(map)?;
        }
        Ok(())
    }
}

impl DomainState {
    fn of(id: DomainId, domain: &Domain) -> Self {
        let mappings = domain.space().into_iter().flat_map(|space| space.mappings.iter());
        Self {
            id: id.0,
            bypass: domain.is_bypass(),
            endpoints: domain.endpoints.iter().map(|id| id.0).collect(),
            mappings: mappings.map(MappingState::of).collect(),
        }
    }
}

impl MappingState {
    const fn of(mapping: Mapping) -> Self {
        let Mapping { iova, physical, access } = mapping;
        Self { first: iova.start(), last: iova.last(), physical: physical.0, read: access.read, write: access.write }
    }
}

impl FaultState {
    const fn of(fault: &Fault) -> Self {
        let Fault { reason, endpoint, address, access } = *fault;
        Self { reason: reason as u8, endpoint: endpoint.0, address, read: access.read, write: access.write }
    }

    fn to_fault(&self) -> Result<Fault, RestoreError> {
        let reasons = [FaultReason::Unknown, FaultReason::Domain, FaultReason::Mapping];
        let reason = reasons.into_iter().find(|reason| *reason as u8 == self.reason);
        let reason = reason.ok_or(RestoreError::FaultReason(self.reason))?;
        let access = Access { read: self.read, write: self.write };
        Ok(Fault { reason, endpoint: EndpointId(self.endpoint), address: self.address, access })
    }
}
