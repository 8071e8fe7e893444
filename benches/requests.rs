// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests over a queue in guest memory, to a device behind which nothing is mapped for anybody, and the same to the yardstick.
//! What the driver does, and what it checks after each batch, is not measured.

use std::sync::Arc;

use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::software::SoftwareGroup;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::queue::Requests;
use virtio_iommu::range::IovaRange;
use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};
use virtio_queue::Queue;
use vm_memory::GuestAddress;

use crate::case::{Case, Layout, MAPPINGS, Meter, PAGE, Random, Work};
use crate::driver::{Driver, LARGEST_BATCH, MEMORY_SIZE, Memory, Request};
use crate::yardstick::Yardstick;

pub const ENDPOINT: u32 = 0;
/// A second endpoint, in a group of its own, where there is one.
pub const OTHER_ENDPOINT: u32 = 1;
pub const DOMAIN: u32 = 1;
/// Guest memory that can be mapped, in bytes; it is mapped over and over.
pub const RAM: u64 = 64 << 20;
/// The last address that can be mapped.
pub const LAST_INPUT: u64 = (1 << 48) - 1;
const READ_WRITE: u32 = 3;

/// How many requests the driver sends with one kick, where a case does not say otherwise.
const BATCH: usize = 64;
/// How many requests are measured.
const ROUNDS: u64 = 4096;
/// As many as there are mappings in the smallest domain.
const FEW_ROUNDS: u64 = 512;
const FEW: u64 = 1024;
const MANY: u64 = 1 << 20;
/// How many requests the device may handle before it comes back.
const BUDGET: usize = 256;

/// What handles requests.
pub trait Device {
    /// Handles all that is available.
    fn process(&mut self, queue: &mut Queue, memory: &Memory);
}

/// The device of this crate.
pub struct Ours {
    pub device: VirtioIommu,
    requests: Requests,
}

impl Ours {
    /// A device with one endpoint for each group, of which none has reported regions.
    pub fn new(groups: Vec<Arc<dyn HostGroup>>) -> Self {
        Self::with_views(groups.into_iter().map(|group| (EndpointView::default(), group)).collect())
    }

    fn with_views(endpoints: Vec<(EndpointView, Arc<dyn HostGroup>)>) -> Self {
        let settings = Settings::new(IovaRange::new(0, LAST_INPUT).unwrap(), PAGE);
        let (views, groups) =
            (ENDPOINT..).map(EndpointId).zip(endpoints).map(|(id, (view, group))| ((id, view), group)).unzip();
        let mut device = VirtioIommu::new(settings, views, groups).unwrap();
        device.set_memory(GuestRam::in_software(&[(GuestAddress(0), RAM)]).unwrap());
        device.set_driver_features(device.features());
        Self { device, requests: Requests::default() }
    }

    pub fn in_software() -> Self {
        Self::new(vec![software_group(ENDPOINT)])
    }
}

/// A group of one endpoint without a host.
pub fn software_group(endpoint: u32) -> Arc<dyn HostGroup> {
    Arc::new(SoftwareGroup::new(vec![EndpointId(endpoint)], PAGE))
}

impl Device for Ours {
    fn process(&mut self, queue: &mut Queue, memory: &Memory) {
        while self.requests.process(&mut self.device, queue, memory, BUDGET).unwrap().more {}
    }
}

/// A device, and the driver of a guest that has one endpoint in domain 1.
pub struct Machine<D> {
    pub device: D,
    queue: Queue,
    driver: Driver,
}

impl<D: Device> Machine<D> {
    pub fn new(device: D) -> Self {
        let driver = Driver::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap());
        let mut machine = Self { device, queue: driver.queue(), driver };
        machine.send(&[Request::attach(DOMAIN, ENDPOINT)]);
        machine
    }

    pub fn with(device: D, pages: &[u64]) -> Self {
        let mut machine = Self::new(device);
        machine.map_all(pages);
        machine
    }

    /// Maps these pages.
    pub fn map_all(&mut self, pages: &[u64]) {
        for batch in pages.chunks(LARGEST_BATCH) {
            self.send(&batch.iter().map(|page| map(*page)).collect::<Vec<_>>());
        }
    }

    /// Sends requests, none of which fails.
    pub fn send(&mut self, requests: &[Request]) {
        self.driver.post(requests);
        self.device.process(&mut self.queue, &self.driver.memory);
        self.driver.check();
    }

    /// The same, measured.
    fn measure(&mut self, requests: &[Request], meter: &mut Meter) {
        let Self { device, queue, driver } = self;
        driver.post(requests);
        meter.measure(|| device.process(queue, &driver.memory));
        driver.check();
    }

    /// Sends requests, of which each may fail; their statuses.
    pub fn statuses(&mut self, requests: &[Request]) -> Vec<u8> {
        self.driver.post(requests);
        self.device.process(&mut self.queue, &self.driver.memory);
        self.driver.statuses()
    }
}

/// MAP of one page.
pub fn map(page: u64) -> Request {
    Request::map(DOMAIN, page * PAGE, page * PAGE + (PAGE - 1), physical(page), READ_WRITE)
}

/// The guest-physical address that a page is mapped to.
pub const fn physical(page: u64) -> u64 {
    page * PAGE % RAM
}

/// UNMAP of one page.
pub fn unmap(page: u64) -> Request {
    Request::unmap(DOMAIN, page * PAGE, page * PAGE + (PAGE - 1))
}

/// Requests of which each is measured, in batches, to a device with these mappings.
fn batches<D: Device + 'static>(device: D, mapped: &[u64], requests: Vec<Request>, batch: usize) -> Work {
    let mut machine = Machine::with(device, mapped);
    Box::new(move |meter| {
        for requests in requests.chunks(batch) {
            machine.measure(requests, meter);
        }
    })
}

/// MAPs, the last of which brings the mappings to the full number.
fn maps<D: Device + 'static>(device: D, layout: Layout, mappings: u64, rounds: u64, batch: usize) -> Work {
    let pages = layout.pages(mappings);
    let (before, measured) = pages.split_at((mappings - rounds) as usize);
    batches(device, before, measured.iter().map(|page| map(*page)).collect(), batch)
}

/// UNMAPs of one page each, in another order than they were mapped in unless that is ascending.
fn unmaps<D: Device + 'static>(device: D, layout: Layout, mappings: u64, rounds: u64, batch: usize) -> Work {
    let pages = layout.pages(mappings);
    let mut chosen = pages.clone();
    if layout != Layout::Sequential {
        Random(1).shuffle(&mut chosen);
    }
    batches(device, &pages, chosen[..rounds as usize].iter().map(|page| unmap(*page)).collect(), batch)
}

/// A MAP and an UNMAP in turn: the number of mappings stays.
fn mixed<D: Device + 'static>(device: D, layout: Layout) -> Work {
    let pages = layout.pages(MAPPINGS + ROUNDS / 2);
    let (before, new) = pages.split_at(MAPPINGS as usize);
    let mut old = before.to_vec();
    Random(1).shuffle(&mut old);
    batches(device, before, new.iter().zip(&old).flat_map(|(new, old)| [map(*new), unmap(*old)]).collect(), BATCH)
}

/// One UNMAP of everything.
fn unmap_range<D: Device + 'static>(device: D, layout: Layout) -> Work {
    batches(device, &layout.pages(MAPPINGS), vec![Request::unmap(DOMAIN, 0, LAST_INPUT)], 1)
}

/// PROBEs of an endpoint with the regions that one on x86 has.
fn probes() -> Work {
    let regions = [("fee00000-feefffff", ReservedKind::Msi), ("fd00000000-ffffffffff", ReservedKind::Reserved)];
    let regions = regions.map(|(range, kind)| ReservedRegion { range: range.parse().unwrap(), kind });
    let device = Ours::with_views(vec![(EndpointView::new(regions.to_vec()).unwrap(), software_group(ENDPOINT))]);
    let properties = Settings::new(IovaRange::ALL, PAGE).probe_size;
    batches(device, &[], (0..ROUNDS).map(|_| Request::probe(ENDPOINT, properties)).collect(), BATCH)
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

/// A yardstick for the same endpoint and memory.
pub const fn yardstick() -> Yardstick {
    Yardstick::new(ENDPOINT, LAST_INPUT, RAM)
}

pub fn cases() -> Vec<Case> {
    let ours = compared("", Ours::in_software).into_iter();
    ours.chain(compared("yardstick/", yardstick)).chain([Case::new("request/probe", ROUNDS, probes)]).collect()
}
