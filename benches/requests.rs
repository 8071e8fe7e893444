// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests over a queue in guest memory, and the same requests to the yardstick. What the driver does, and what it checks after each
//! batch, is not measured.

use virtio_iommu::device::Settings;
use virtio_iommu::range::IovaRange;
use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};

use crate::case::{Case, Layout, MAPPINGS, PAGE, Random, Work};
use crate::driver::Request;
use crate::machine::{DOMAIN, Device, ENDPOINT, LAST_INPUT, Machine, Ours, map, software_group, unmap, yardstick};

/// How many requests the driver sends with one kick, where a case does not say otherwise.
const BATCH: usize = 64;
/// How many requests are measured.
const ROUNDS: u64 = 4096;
/// As many as there are mappings in the smallest domain.
const FEW_ROUNDS: u64 = 512;
const FEW: u64 = 1024;
const MANY: u64 = 1 << 20;

/// Requests that are measured, in batches, to a device with these mappings, of which so many are there in the end.
fn batches<D: Device + 'static>(
    device: D,
    mapped: &[u64],
    requests: Vec<Request>,
    batch: usize,
    mappings_after: u64,
) -> Work {
    let mut machine = Machine::with(device, mapped);
    Box::new(move |meter| {
        for requests in requests.chunks(batch) {
            machine.measure(requests, meter);
        }
        // An UNMAP of nothing is answered with OK too.
        assert_eq!(machine.device.mappings() as u64, mappings_after, "what is mapped after all requests");
    })
}

/// MAPs, the last of which brings the mappings to the full number.
fn maps<D: Device + 'static>(device: D, layout: Layout, mappings: u64, rounds: u64, batch: usize) -> Work {
    let pages = layout.pages(mappings);
    let (before, measured) = pages.split_at((mappings - rounds) as usize);
    batches(device, before, measured.iter().map(|page| map(*page)).collect(), batch, mappings)
}

/// UNMAPs of one page each, in another order than they were mapped in unless that is ascending.
fn unmaps<D: Device + 'static>(device: D, layout: Layout, mappings: u64, rounds: u64, batch: usize) -> Work {
    let pages = layout.pages(mappings);
    let mut chosen = pages.clone();
    if layout != Layout::Sequential {
        Random(1).shuffle(&mut chosen);
    }
    let requests = chosen[..rounds as usize].iter().map(|page| unmap(*page)).collect();
    batches(device, &pages, requests, batch, mappings - rounds)
}

/// A MAP and an UNMAP in turn: the number of mappings stays.
fn mixed<D: Device + 'static>(device: D, layout: Layout) -> Work {
    let pages = layout.pages(MAPPINGS + ROUNDS / 2);
    let (before, new) = pages.split_at(MAPPINGS as usize);
    let mut old = before.to_vec();
    Random(1).shuffle(&mut old);
    let requests = new.iter().zip(&old).flat_map(|(new, old)| [map(*new), unmap(*old)]).collect();
    batches(device, before, requests, BATCH, MAPPINGS)
}

/// One UNMAP of everything.
fn unmap_range<D: Device + 'static>(device: D, layout: Layout) -> Work {
    batches(device, &layout.pages(MAPPINGS), vec![Request::unmap(DOMAIN, 0, LAST_INPUT)], 1, 0)
}

/// PROBEs of an endpoint with the regions that one on x86 has.
fn probes() -> Work {
    let regions = [("fee00000-feefffff", ReservedKind::Msi), ("fd00000000-ffffffffff", ReservedKind::Reserved)];
    let regions = regions.map(|(range, kind)| ReservedRegion { range: range.parse().unwrap(), kind });
    let device = Ours::with_views(vec![(EndpointView::new(regions.to_vec()).unwrap(), software_group(ENDPOINT))]);
    let properties = Settings::new(IovaRange::ALL, PAGE).probe_size;
    batches(device, &[], (0..ROUNDS).map(|_| Request::probe(ENDPOINT, properties)).collect(), BATCH, 0)
}

/// The cases that the yardstick is measured by too.
fn compared<D: Device + 'static>(prefix: &'static str, device: fn() -> D) -> Vec<Case> {
    use Layout::{Dense, Sequential, Sparse};
    let case = |name: &str, rounds, set_up: Box<dyn Fn() -> Work>| Case::new(format!("{prefix}{name}"), rounds, set_up);
    let map = |name, layout, mappings, rounds, batch| {
        case(name, rounds, Box::new(move || maps(device(), layout, mappings, rounds, batch)))
    };
    let unmap = |name, layout, mappings, rounds, batch| {
        case(name, rounds, Box::new(move || unmaps(device(), layout, mappings, rounds, batch)))
    };
    vec![
        map("request/map/dense", Dense, MAPPINGS, ROUNDS, BATCH),
        map("request/map/dense/batch1", Dense, MAPPINGS, ROUNDS, 1),
        map("request/map/dense/batch256", Dense, MAPPINGS, ROUNDS, 256),
        map("request/map/dense@1k", Dense, FEW, FEW_ROUNDS, BATCH),
        map("request/map/dense@1m", Dense, MANY, ROUNDS, BATCH).runs(3),
        map("request/map/sequential", Sequential, MAPPINGS, ROUNDS, BATCH),
        map("request/map/sparse", Sparse, MAPPINGS, ROUNDS, BATCH),
        unmap("request/unmap/dense", Dense, MAPPINGS, ROUNDS, BATCH),
        unmap("request/unmap/dense/batch1", Dense, MAPPINGS, ROUNDS, 1),
        unmap("request/unmap/dense/batch256", Dense, MAPPINGS, ROUNDS, 256),
        unmap("request/unmap/dense@1k", Dense, FEW, FEW_ROUNDS, BATCH),
        unmap("request/unmap/dense@1m", Dense, MANY, ROUNDS, BATCH).runs(3),
        unmap("request/unmap/sequential", Sequential, MAPPINGS, ROUNDS, BATCH),
        unmap("request/unmap/sparse", Sparse, MAPPINGS, ROUNDS, BATCH),
        case("request/unmap_range", MAPPINGS, Box::new(move || unmap_range(device(), Dense))),
        case("request/unmap_range/sparse", MAPPINGS, Box::new(move || unmap_range(device(), Sparse))),
        case("request/mixed/dense", ROUNDS, Box::new(move || mixed(device(), Dense))),
        case("request/mixed/sparse", ROUNDS, Box::new(move || mixed(device(), Sparse))),
    ]
}

pub fn cases() -> Vec<Case> {
    let ours = compared("", Ours::in_software).into_iter();
    ours.chain(compared("yardstick/", yardstick)).chain([Case::new("request/probe", ROUNDS, probes)]).collect()
}
