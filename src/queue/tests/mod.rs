// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Queues of a driver, good and bad.

use std::sync::Arc;

use virtio_queue::Queue;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::ring::AVAIL_F_NO_INTERRUPT;
use super::*;
use crate::device::Settings;
use crate::host::fake::{Failure, FakeHost, Flavour};
use crate::host::{HostErrorKind, HostGroup};
use crate::id::EndpointId;
use crate::memory::GuestRam;
use crate::range::{IovaRange, RangeSet};
use crate::reserved::EndpointView;

mod batches;
mod chains;
mod meddling;
mod notifications;

const SIZE: u16 = 16;
const REQUESTS: u64 = 0x1_0000;
const REPLIES: u64 = 0x2_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

type Memory = GuestMemoryMmap<()>;

fn memory() -> Memory {
    let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    memory.write_slice(&[0xaa; 0x1000], GuestAddress(REPLIES)).unwrap();
    memory
}

fn device() -> (FakeHost, VirtioIommu) {
    let host = FakeHost::new(Flavour::Iommufd);
    let input_range = IovaRange::new(0, 0xffff_ffff).unwrap();
    let group: Arc<dyn HostGroup> = host.group(&[EndpointId(8)], RangeSet::from(IovaRange::ALL));
    let endpoints = vec![(EndpointId(8), EndpointView::default())];
    let mut device = VirtioIommu::new(Settings::new(input_range, 0x1000), endpoints, vec![group]).unwrap();
    device.set_driver_features(device.features());
    device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 0x10_0000)]).unwrap());
    (host, device)
}

fn attach_bytes(endpoint: u32) -> Vec<u8> {
    [1u32, 1, endpoint, 0, 0].iter().flat_map(|field| field.to_le_bytes()).collect()
}

fn map_bytes() -> Vec<u8> {
    let mut bytes: Vec<u8> = [3u32, 1].iter().flat_map(|field| field.to_le_bytes()).collect();
    bytes.extend([0x5000u64, 0x5fff, 0x1000].iter().flat_map(|field| field.to_le_bytes()));
    bytes.extend(1u32.to_le_bytes());
    bytes
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> RawDescriptor {
    RawDescriptor::from(Descriptor::new(address, length, flags, next))
}

/// Request `index` in two descriptors, at its own place in memory.
fn request(memory: &Memory, index: u16, bytes: &[u8], writable: u32) -> [RawDescriptor; 2] {
    let offset = u64::from(index) * 0x100;
    memory.write_slice(bytes, GuestAddress(REQUESTS + offset)).unwrap();
    [
        descriptor(REQUESTS + offset, bytes.len() as u32, NEXT, index * 2 + 1),
        descriptor(REPLIES + offset, writable, WRITE, 0),
    ]
}

fn reply(memory: &Memory, index: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(REPLIES + index * 0x100)).unwrap();
    bytes
}

/// A device, its host, and the driver's side of a queue.
struct Bench<'a> {
    memory: &'a Memory,
    host: FakeHost,
    device: VirtioIommu,
    mock: MockSplitQueue<'a, Memory>,
    queue: Queue,
    requests: Requests,
}

impl<'a> Bench<'a> {
    fn new(memory: &'a Memory) -> Self {
        Self::of_size(memory, SIZE)
    }

    fn of_size(memory: &'a Memory, size: u16) -> Self {
        let (host, device) = device();
        let mock = MockSplitQueue::new(memory, size);
        let queue = mock.create_queue().unwrap();
        Self { memory, host, device, mock, queue, requests: Requests::default() }
    }

    /// With as many requests in the queue, each of which attaches the endpoint to the same domain.
    fn with_requests(memory: &'a Memory, count: u16) -> Self {
        let bench = Self::new(memory);
        bench.put_requests(count);
        bench
    }

    fn put_requests(&self, count: u16) {
        let descriptors: Vec<_> =
            (0..count).flat_map(|index| request(self.memory, index, &attach_bytes(8), 4)).collect();
        self.mock.build_multiple_desc_chains(&descriptors).unwrap();
    }

    /// Makes chains available that start with these descriptors, in the first slots of the ring.
    fn make_available(&self, heads: &[u16]) {
        for (slot, head) in heads.iter().enumerate() {
            self.mock.avail().ring().ref_at(slot).unwrap().store(head.to_le());
        }
        self.mock.avail().idx().store((heads.len() as u16).to_le());
    }

    fn process(&mut self) -> Result<Batch, QueueError> {
        self.process_up_to(64)
    }

    fn process_up_to(&mut self, budget: usize) -> Result<Batch, QueueError> {
        self.requests.process(&mut self.device, &mut self.queue, self.memory, budget)
    }

    fn process_quietly(&mut self) -> Result<Batch, QueueError> {
        self.requests.process_quietly(&mut self.device, &mut self.queue, self.memory, 64)
    }

    fn deliver_faults(&mut self, budget: usize) -> Result<Batch, QueueError> {
        deliver_faults(&mut self.device, &mut self.queue, self.memory, budget)
    }

    fn complete(&mut self) -> Result<bool, QueueError> {
        self.requests.complete(&mut self.device, &mut self.queue, self.memory)
    }

    fn used(&self) -> Vec<(u32, u32)> {
        let (count, ring) = (self.mock.used().idx().load(), self.mock.used().ring());
        let elements = (0..count).map(|at| ring.ref_at(usize::from(at)).unwrap().load());
        elements.map(|element| (element.id(), element.len())).collect()
    }
}
