// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device is made of, and what cannot be made one of.

use std::ops::RangeInclusive;

use crate::id::EndpointId;
use crate::mapping::SMALLEST_PAGE;
use crate::range::IovaRange;
use crate::request::{LARGEST_REPLY, probe_reply_size};

/// What a device offers and how much it may use. Fixed for the life of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The virtual addresses that can be mapped.
    pub input_range: IovaRange,
    /// The smallest page, in bytes: a power of two from 4 KiB to 2 MiB. The guest is also told of 2 MiB and 1 GiB.
    pub granule: u64,
    /// The domain IDs that can be used, both ends included; all by default.
    pub domain_range: RangeInclusive<u32>,
    /// How many bytes of properties PROBE answers with; room for 64 regions by default.
    pub probe_size: u32,
    /// Whether endpoints that are in no domain reach guest memory as it is, until the driver says otherwise; so by default.
    pub boot_bypass: bool,
    /// Whether to offer `VIRTIO_F_ACCESS_PLATFORM`, for machines that translate or restrict the device's own
    /// accesses to guest memory; not by default.
    pub access_platform: bool,
    /// How many domains there may be; 4096 by default.
    pub max_domains: usize,
    /// How many mappings a domain may have; 2^20 by default.
    pub max_mappings: usize,
    /// How many mappings all domains may have together; 2^22 by default.
    pub max_mappings_in_all: usize,
    /// How much the host maps in one step, in bytes: a power of two from the granule on, 1 GiB by default. A MAP of more is cut at
    /// its multiples, so that it does not hold up everything else ([`VirtioIommu::begin`](super::VirtioIommu::begin)).
    pub map_step: u64,
}

impl Settings {
    /// Room for 64 properties.
    const DEFAULT_PROBE_SIZE: u32 = 1536;
    /// How many domains there may be, if nothing else is chosen.
    pub const DEFAULT_MAX_DOMAINS: usize = 4096;
    /// How many mappings a domain may have, if nothing else is chosen.
    pub const DEFAULT_MAX_MAPPINGS: usize = 1 << 20;
    /// How many mappings all domains may have together, if nothing else is chosen.
    pub const DEFAULT_MAX_MAPPINGS_IN_ALL: usize = 1 << 22;

    /// Defaults for a device that can map these addresses in pages of `granule` bytes, a power of two.
    pub const fn new(input_range: IovaRange, granule: u64) -> Self {
        Self {
            input_range,
            granule,
            domain_range: 0..=u32::MAX,
            probe_size: Self::DEFAULT_PROBE_SIZE,
            boot_bypass: true,
            access_platform: false,
            max_domains: Self::DEFAULT_MAX_DOMAINS,
            max_mappings: Self::DEFAULT_MAX_MAPPINGS,
            max_mappings_in_all: Self::DEFAULT_MAX_MAPPINGS_IN_ALL,
            map_step: 1 << 30,
        }
    }

    /// The page sizes that are worth using: granule, 2 MiB, 1 GiB. Linux splits its mappings by this mask, so every
    /// further bit would cost it requests.
    pub(crate) const fn page_size_mask(&self) -> u64 {
        self.granule | 1 << 21 | 1 << 30
    }

    /// Whether a device can be made of them.
    pub(super) fn check(&self) -> Result<(), SetupError> {
        let Self { granule, input_range, probe_size, .. } = *self;
        if !granule.is_power_of_two()
            || !(SMALLEST_PAGE..=1 << 21).contains(&granule)
            || !input_range.is_aligned(granule)
        {
            return Err(SetupError::Granule { granule, input_range });
        }
        if !self.map_step.is_power_of_two() || self.map_step < granule {
            return Err(SetupError::MapStep(self.map_step));
        }
        if self.domain_range.is_empty() {
            return Err(SetupError::DomainRange(self.domain_range.clone()));
        }
        if probe_reply_size(probe_size) > LARGEST_REPLY {
            return Err(SetupError::ReplySize(probe_size));
        }
        Ok(())
    }
}

/// Endpoints, groups and settings that do not fit each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// An endpoint is given twice.
    #[error("endpoint {0} is given twice")]
    EndpointTwice(EndpointId),
    /// An endpoint is in two groups, or twice in one.
    #[error("endpoint {0} is in more than one host group")]
    GroupTwice(EndpointId),
    /// A group has a member that is no endpoint of this device.
    #[error("a host group has the member {0}, which is no endpoint")]
    UnknownMember(EndpointId),
    /// An endpoint is in no group.
    #[error("endpoint {0} is in no host group")]
    NoGroup(EndpointId),
    /// The granule is not a power of two from 4 KiB to 2 MiB, or the input range is not a multiple of it.
    #[error("a granule of {granule:#x} bytes does not fit the input range {input_range}")]
    Granule {
        /// The granule.
        granule: u64,
        /// The input range.
        input_range: IovaRange,
    },
    /// The step of a large MAP is no power of two from the granule on.
    #[error("a MAP cannot be done in steps of {0:#x} bytes: a power of two from the granule on can")]
    MapStep(u64),
    /// The range of domain IDs ends before it starts.
    #[error("the domain range {0:?} is empty")]
    DomainRange(RangeInclusive<u32>),
    /// A PROBE reply of this size would be larger than any reply.
    #[error("{0} bytes of properties are more than a reply may have")]
    ReplySize(u32),
    /// The regions of an endpoint do not fit a PROBE reply.
    #[error("the {regions} reserved regions of endpoint {endpoint} do not fit {probe_size} bytes of properties")]
    ProbeSize {
        /// The endpoint.
        endpoint: EndpointId,
        /// How many regions it has.
        regions: usize,
        /// How many bytes there are.
        probe_size: u32,
    },
}
