// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device behind which nothing is mapped for anybody, and the driver of a guest in front of it.

use std::sync::Arc;

use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::software::SoftwareGroup;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::queue::Requests;
use virtio_iommu::range::IovaRange;
use virtio_iommu::reserved::EndpointView;
use virtio_queue::Queue;
use vm_memory::GuestAddress;

use crate::case::{Meter, PAGE};
use crate::driver::{Driver, MEMORY_SIZE, Memory, OK, Request};
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
/// How many requests the device may handle before it comes back.
const BUDGET: usize = 256;

/// What handles requests.
pub trait Device {
    /// Handles all that is available.
    fn process(&mut self, queue: &mut Queue, memory: &Memory);

    /// Handles a request without a queue; its status. For what is not measured, where there is much of it.
    fn handle(&mut self, request: &[u8]) -> u8;

    /// How many mappings its domain has.
    fn mappings(&mut self) -> usize;
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

    pub fn with_views(endpoints: Vec<(EndpointView, Arc<dyn HostGroup>)>) -> Self {
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

    fn handle(&mut self, request: &[u8]) -> u8 {
        let mut reply = [0xff; 4];
        self.device.handle(request, &mut reply);
        reply[0]
    }

    fn mappings(&mut self) -> usize {
        self.device.save().domains[0].mappings.len()
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
        let mut machine = Self { device, queue: Driver::queue(), driver };
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
        for page in pages {
            assert_eq!(self.device.handle(map(*page).bytes()), OK, "page {page:#x} is mapped");
        }
    }

    /// Sends requests, none of which fails.
    pub fn send(&mut self, requests: &[Request]) {
        self.driver.post(requests);
        self.device.process(&mut self.queue, &self.driver.memory);
        self.driver.check();
    }

    /// The same, measured.
    pub fn measure(&mut self, requests: &[Request], meter: &mut Meter) {
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

/// A yardstick for the same endpoint and memory.
pub const fn yardstick() -> Yardstick {
    Yardstick::new(ENDPOINT, LAST_INPUT, RAM)
}
