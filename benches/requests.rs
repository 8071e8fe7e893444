// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests over a ring in guest memory, to a device behind which nothing is mapped for anybody. What the driver does is left out.

use std::sync::Arc;

use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::software::SoftwareGroup;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::queue::Requests;
use virtio_iommu::reserved::EndpointView;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::translation::{MAPPINGS, PAGE};
use crate::{Case, Random, Work, pages};

const ENDPOINT: EndpointId = EndpointId(0);
const QUEUE_SIZE: u16 = 256;
/// How many requests the driver sends with one kick: each has a descriptor to be read and one to be written.
const BATCH: usize = 64;
/// How many requests are measured.
const ROUNDS: u64 = 4096;

const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x4000;
const BUFFERS: u64 = 0x1_0000;
const BUFFER: u64 = 64;
const REPLY: u64 = 48;

pub fn cases() -> Vec<Case> {
    let case = |name, rounds, set_up, without| Case { name, rounds, set_up, without: Some(without) };
    vec![
        case("request/map/dense", ROUNDS, || map(false, true), || map(false, false)),
        case("request/map/sparse", ROUNDS, || map(true, true), || map(true, false)),
        case("request/unmap/dense", ROUNDS, || unmap(MAPPINGS, true), || unmap(MAPPINGS, false)),
        case("request/unmap/dense@1k", 512, || unmap(1024, true), || unmap(1024, false)),
        case("request/unmap_range", MAPPINGS, || unmap_range(true), || unmap_range(false)),
    ]
}

/// A driver and its device, with one endpoint in domain 1.
struct Machine {
    device: VirtioIommu,
    requests: Requests,
    queue: Queue,
    memory: GuestMemoryMmap,
    sent: u16,
    /// Whether the device gets what is sent.
    handles: bool,
}

impl Machine {
    fn with(pages: &[u64]) -> Self {
        let group: Arc<dyn HostGroup> = Arc::new(SoftwareGroup::new(vec![ENDPOINT], PAGE));
        let settings = Settings::new("0-ffffffffffff".parse().unwrap(), PAGE);
        let mut device = VirtioIommu::new(settings, vec![(ENDPOINT, EndpointView::default())], vec![group]).unwrap();
        device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 64 << 20)]).unwrap());
        device.set_driver_features(device.features());
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        for index in 0..BATCH as u16 {
            let [request, reply] = [0, REPLY].map(|offset| BUFFERS + u64::from(index) * BUFFER + offset);
            let readable = Descriptor::new(request, REPLY as u32, 1, 2 * index + 1);
            let writable = Descriptor::new(reply, 4, 2, 0);
            for (slot, descriptor) in [(2 * index, readable), (2 * index + 1, writable)] {
                memory.write_obj(descriptor, GuestAddress(DESCRIPTORS + u64::from(slot) * 16)).unwrap();
            }
        }
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_size(QUEUE_SIZE);
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        let mut machine = Self { device, requests: Requests::default(), queue, memory, sent: 0, handles: true };
        machine.send(&[words(&[1, 1, ENDPOINT.0])]);
        for batch in pages.chunks(BATCH) {
            machine.map(batch);
        }
        machine
    }

    /// Sends up to [`BATCH`] requests, and kicks.
    fn send(&mut self, requests: &[[u8; REPLY as usize]]) {
        for (index, request) in (0..).zip(requests) {
            self.memory.write_slice(request, GuestAddress(BUFFERS + index * BUFFER)).unwrap();
            let slot = u64::from(self.sent % QUEUE_SIZE);
            self.memory.write_obj(2 * index as u16, GuestAddress(AVAILABLE + 4 + slot * 2)).unwrap();
            self.sent = self.sent.wrapping_add(1);
        }
        self.memory.write_obj(self.sent, GuestAddress(AVAILABLE + 2)).unwrap();
        if self.handles {
            let batch = self.requests.process(&mut self.device, &mut self.queue, &self.memory, 256).unwrap();
            assert_eq!(batch.handled, requests.len());
        }
    }

    fn map(&mut self, pages: &[u64]) {
        let requests = pages.iter().map(|page| {
            let [iova, physical] = [page * PAGE, page * PAGE % (32 << 20)];
            let addresses = [iova, iova + PAGE - 1, physical].map(|address| [address as u32, (address >> 32) as u32]);
            let [first, last, target] = addresses;
            words(&[3, 1, first[0], first[1], last[0], last[1], target[0], target[1], 3])
        });
        self.send(&requests.collect::<Vec<_>>());
    }

    fn unmap(&mut self, first_pages: &[u64], length: u64) {
        let requests = first_pages.iter().map(|page| {
            let addresses = [page * PAGE, page * PAGE + (length - 1)];
            let [first, last] = addresses.map(|address| [address as u32, (address >> 32) as u32]);
            words(&[4, 1, first[0], first[1], last[0], last[1]])
        });
        self.send(&requests.collect::<Vec<_>>());
    }

    fn check(&self) {
        let statistics = self.device.statistics();
        assert_eq!([statistics.map.failed, statistics.unmap.failed, statistics.unreadable], [0; 3]);
    }
}

fn words(words: &[u32]) -> [u8; REPLY as usize] {
    let mut bytes = [0; REPLY as usize];
    for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Those that bring the mappings to the full number.
fn map(sparse: bool, handles: bool) -> Work {
    let pages = pages(sparse, MAPPINGS);
    let (before, measured) = pages.split_at((MAPPINGS - ROUNDS) as usize);
    let mut machine = Machine::with(before);
    machine.handles = handles;
    let measured = measured.to_vec();
    Box::new(move |rounds| {
        for batch in measured[..rounds as usize].chunks(BATCH) {
            machine.map(batch);
        }
        machine.check();
    })
}

/// One page after the other, in no order, from so many.
fn unmap(mappings: u64, handles: bool) -> Work {
    let mut pages = pages(false, mappings);
    let mut machine = Machine::with(&pages);
    machine.handles = handles;
    Random(1).shuffle(&mut pages);
    Box::new(move |rounds| {
        for batch in pages[..rounds as usize].chunks(BATCH) {
            machine.unmap(batch, PAGE);
        }
        machine.check();
    })
}

/// All of them at once: each round is a mapping.
fn unmap_range(handles: bool) -> Work {
    let mut machine = Machine::with(&pages(false, MAPPINGS));
    machine.handles = handles;
    Box::new(move |rounds| {
        if rounds != 0 {
            machine.unmap(&[0], MAPPINGS * PAGE);
        }
        machine.check();
    })
}
