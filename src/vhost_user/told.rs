// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest was told of the device, and believes for as long as it runs.
//!
//! Its driver reads the configuration and probes endpoints once. A backend that the guest comes to must be what it was told.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::device::VirtioIommu;
use crate::id::EndpointId;
use crate::reserved::{ReservedKind, ReservedRegion};

/// The configuration, but for `bypass`, which is the guest's own, and the endpoints, ascending.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Told {
    page_size_mask: u64,
    input_range: [u64; 2],
    domain_range: [u32; 2],
    probe_size: u32,
    endpoints: Vec<ToldEndpoint>,
}

/// An endpoint.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ToldEndpoint {
    id: u32,
    /// Its reserved regions, ascending.
    regions: Vec<ToldRegion>,
}

/// A reserved region: the first and the last address, and whether it is the doorbell of interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ToldRegion {
    first: u64,
    last: u64,
    msi: bool,
}

/// The guest was told what is not so here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ToldError {
    /// A field of the configuration.
    #[error(
        "the guest was told of the {field} {told}, and here it is {here}: start this backend as the other one was started"
    )]
    Field { field: &'static str, told: String, here: String },
    /// An endpoint.
    #[error("the guest has endpoint {0}, and this backend has not: give it the same endpoints")]
    Endpoint(EndpointId),
    /// What an endpoint cannot map.
    #[error(
        "the guest was told of {told} for endpoint {endpoint}, and here it is {here}: only a host with the same reserved regions can \
         take it"
    )]
    Regions { endpoint: EndpointId, told: String, here: String },
}

impl Told {
    /// What a device tells.
    pub fn by(device: &VirtioIommu) -> Self {
        let settings = device.settings();
        let endpoints = device.endpoints().map(|endpoint| ToldEndpoint {
            id: endpoint.id.0,
            regions: regions(device, endpoint.id).unwrap_or_default(),
        });
        Self {
            page_size_mask: settings.page_size_mask(),
            input_range: [settings.input_range.start(), settings.input_range.last()],
            domain_range: [*settings.domain_range.start(), *settings.domain_range.end()],
            probe_size: settings.probe_size,
            endpoints: endpoints.collect(),
        }
    }

    /// Whether a device tells the same. It may have endpoints that the guest does not know of yet.
    ///
    /// # Errors
    ///
    /// The first that differs.
    pub fn check(&self, device: &VirtioIommu) -> Result<(), ToldError> {
        let here = Self::by(device);
        let range = |[first, last]: [u64; 2]| format!("{first:#x}-{last:#x}");
        let fields = [
            ("page sizes", [&self, &&here].map(|told| format!("{:#x}", told.page_size_mask))),
            ("input range", [&self, &&here].map(|told| range(told.input_range))),
            ("domain range", [&self, &&here].map(|told| range(told.domain_range.map(u64::from)))),
            ("probe size", [&self, &&here].map(|told| told.probe_size.to_string())),
        ];
        for (field, [told, here]) in fields {
            if told != here {
                return Err(ToldError::Field { field, told, here });
            }
        }
        for endpoint in &self.endpoints {
            let id = EndpointId(endpoint.id);
            let here = regions(device, id).ok_or(ToldError::Endpoint(id))?;
            if endpoint.regions != here {
                let [told, here] = [&endpoint.regions[..], &here].map(|regions| Listed(regions).to_string());
                return Err(ToldError::Regions { endpoint: id, told, here });
            }
        }
        Ok(())
    }
}

/// The reserved regions of an endpoint, if there is such an endpoint.
fn regions(device: &VirtioIommu, endpoint: EndpointId) -> Option<Vec<ToldRegion>> {
    Some(device.view(endpoint)?.reported().iter().map(ToldRegion::from).collect())
}

impl From<&ReservedRegion> for ToldRegion {
    fn from(region: &ReservedRegion) -> Self {
        let ReservedRegion { range, kind } = region;
        Self { first: range.start(), last: range.last(), msi: *kind == ReservedKind::Msi }
    }
}

/// Regions as they are shown: `0xfee00000-0xfeefffff (msi)`. No more than the first few: they may be a frontend's invention.
struct Listed<'a>(&'a [ToldRegion]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 8;
        if self.0.is_empty() {
            return write!(f, "no reserved region");
        }
        for (index, ToldRegion { first, last, msi }) in self.0.iter().take(MOST).enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            let kind = if *msi { "msi" } else { "reserved" };
            write!(f, "{separator}{first:#x}-{last:#x} ({kind})")?;
        }
        let more = self.0.len().saturating_sub(MOST);
        if more == 0 { Ok(()) } else { write!(f, " and {more} more") }
    }
}
