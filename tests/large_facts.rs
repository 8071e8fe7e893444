// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Facts of a host can be made up: planning for as many regions and windows as a file of them can have takes no more memory than
//! there are of them.

#![allow(clippy::unwrap_used)]

use std::alloc::System;

use cap::Cap;
use virtio_iommu::id::EndpointId;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::plan::{Inbound, Policy, plan};
use virtio_iommu::reserved::{Driver, HostFacts, HostRegion, HostRegionKind};

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

const ENDPOINT: EndpointId = EndpointId(8);
const WINDOWS: u64 = 4000;

/// Every other page.
fn pages(count: u64) -> RangeSet {
    (0..count).map(|at| IovaRange::new(at << 13, (at << 13) + 0xfff).unwrap()).collect()
}

/// One test in this file: the memory of the process is limited while it runs.
#[test]
fn planning_takes_memory_by_the_number_of_regions_and_not_by_its_square() {
    let region = |at: u64| HostRegion {
        range: IovaRange::new(0, (1 << 32) + (at << 12) + 0xfff).unwrap(),
        kind: HostRegionKind::Reserved,
    };
    let windows_in_regions = HostFacts {
        driver: Driver::ArmSmmuV3,
        reserved_regions: Some((0..500).map(region).collect()),
        windows: Some(pages(WINDOWS)),
        ..HostFacts::default()
    };
    let gaps_in_inbound = HostFacts { inbound: Some(pages(WINDOWS)), ..HostFacts::default() };
    let policy = Policy { inbound: Inbound::Withhold, ..Policy::default() };
    for facts in [windows_in_regions, gaps_in_inbound] {
        let endpoints = [(ENDPOINT, facts)];
        MEMORY.set_limit(MEMORY.allocated() + (8 << 20)).unwrap();
        let planned = plan(&policy, &endpoints);
        MEMORY.set_limit(usize::MAX).unwrap();
        assert_eq!(planned.unwrap().endpoints.remove(0).withheld.len() as u64, WINDOWS);
    }
}
