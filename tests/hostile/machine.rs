// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device over the model of a host, and a guest's driver that reaches it through a ring in guest memory.

use virtio_iommu::access::Access;
use virtio_iommu::device::{DeviceState, DomainState, Settings, VirtioIommu};
use virtio_iommu::host::fake::{Attachment, FakeHost, FakeMapping, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::queue::{Batch, QueueError, Requests};
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};
use virtio_queue::desc::split::{Descriptor, VirtqUsedElem};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub use crate::common::status::*;

pub type Memory = GuestMemoryMmap<()>;

/// Alone in its group.
pub const LONE: EndpointId = EndpointId(0x08);
/// Two in one group.
pub const LEFT: EndpointId = EndpointId(0x10);
pub const RIGHT: EndpointId = EndpointId(0x11);
pub const ALL: [EndpointId; 3] = [LONE, LEFT, RIGHT];

pub const READ: u32 = 1;
pub const WRITE: u32 = 2;

/// Guest memory, of which the driver's ring and buffers are the first part.
pub const RAM_SIZE: u64 = 0x100_0000;
/// What a PROBE reply has of properties.
pub const PROBE_SIZE: u32 = 64;
pub const RING_SIZE: u16 = 16;
const DRIVERS_PART: usize = 0x4_0000;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where the driver puts what the device reads.
pub const REQUEST: u64 = 0x4000;
/// Where it wants the answer. All around it is filled with [`FILL`].
pub const REPLY: u64 = 0x1_0000;
pub const FILL: u8 = 0xaa;

/// The flags of a descriptor.
pub const NEXT: u16 = 1;
pub const WRITABLE: u16 = 2;
pub const INDIRECT: u16 = 4;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u8,
    pub used: u32,
    /// Without the tail.
    pub body: Vec<u8>,
}

/// All that decides where DMA goes, in the device's books and on the host.
#[derive(Debug, PartialEq)]
pub struct View {
    domains: Vec<DomainState>,
    bypass: bool,
    host: Vec<(Attachment, Vec<FakeMapping>)>,
    tables: usize,
}

/// A ring in guest memory, and the driver's side of it.
#[derive(Debug)]
pub struct Ring {
    pub memory: Memory,
    pub queue: Queue,
    available: u16,
    used: u16,
}

pub struct Machine {
    pub host: FakeHost,
    pub device: VirtioIommu,
    pub ring: Ring,
    pub requests: Requests,
}

pub fn range(text: &str) -> IovaRange {
    text.parse().unwrap()
}

pub fn msi_view() -> EndpointView {
    EndpointView::new(vec![ReservedRegion { range: range("fee00000-feefffff"), kind: ReservedKind::Msi }]).unwrap()
}

/// What the host can map for every group.
pub fn usable() -> RangeSet {
    RangeSet::from(IovaRange::ALL).subtract(msi_view().refused())
}

pub fn settings() -> Settings {
    Settings { probe_size: PROBE_SIZE, ..Settings::new(range("0-ffffffffffff"), 0x1000) }
}

pub fn ram() -> GuestRam {
    GuestRam::in_software(&[(GuestAddress(0), RAM_SIZE)]).unwrap()
}

impl Ring {
    pub fn new() -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), DRIVERS_PART)]).unwrap();
        memory.write_slice(&vec![FILL; DRIVERS_PART - REPLY as usize], GuestAddress(REPLY)).unwrap();
        let mut queue = Queue::new(RING_SIZE).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&memory));
        Self { memory, queue, available: 0, used: 0 }
    }

    /// Writes descriptors into the table, from a place on.
    pub fn put(&self, at: u16, descriptors: &[Descriptor]) {
        for (index, descriptor) in (u64::from(at)..).zip(descriptors) {
            self.memory.write_obj(*descriptor, GuestAddress(DESCRIPTORS + 16 * index)).unwrap();
        }
    }

    /// Makes the chain available that starts with this descriptor.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % RING_SIZE);
        self.memory.write_obj(head.to_le(), GuestAddress(AVAILABLE + 4 + 2 * slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available.to_le(), GuestAddress(AVAILABLE + 2)).unwrap();
    }

    /// Takes the next chain that was returned: its head and its used length.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        if u16::from_le(index) == self.used {
            return None;
        }
        let slot = u64::from(self.used % RING_SIZE);
        let element: VirtqUsedElem = self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot)).unwrap();
        self.used = self.used.wrapping_add(1);
        Some((element.id(), element.len()))
    }

    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub fn write(&self, bytes: &[u8], address: u64) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Runs something that may write the used ring, and `written` bytes of guest memory from an address on. Nothing else of guest
    /// memory may change.
    pub fn writing_only<T>(&mut self, act: impl FnOnce(&mut Self) -> T, written: impl FnOnce(&T) -> (u64, u32)) -> T {
        let before = self.read(0, DRIVERS_PART);
        let result = act(self);
        let mut after = self.read(0, DRIVERS_PART);
        let (start, length) = written(&result);
        for (start, length) in [(start, u64::from(length)), (USED, 0x1000)] {
            let part = start as usize..(start + length) as usize;
            after[part.clone()].copy_from_slice(&before[part]);
        }
        assert!(before == after, "a byte was written that is not the device's to write");
        result
    }
}

impl Machine {
    pub fn new() -> Self {
        Self::with(Flavour::Iommufd, settings())
    }

    pub fn with(flavour: Flavour, settings: Settings) -> Self {
        let host = FakeHost::new(flavour);
        let groups = vec![host.group(&[LONE], usable()), host.group(&[LEFT, RIGHT], usable())];
        let endpoints = ALL.map(|id| (id, msi_view())).to_vec();
        let mut device = VirtioIommu::new(settings, endpoints, groups).unwrap();
        device.set_driver_features(device.features());
        device.set_memory(ram());
        Self { host, device, ring: Ring::new(), requests: Requests::default() }
    }

    pub fn process(&mut self, budget: usize) -> Result<Batch, QueueError> {
        self.requests.process(&mut self.device, &mut self.ring.queue, &self.ring.memory, budget)
    }

    /// Sends what the device reads and has room for what it writes, each in one descriptor. Checks that not a byte is written
    /// beyond the used length, and that the tail is whole.
    pub fn send(&mut self, readable: &[u8], writable: u32) -> Reply {
        let Self { device, ring, requests, .. } = self;
        ring.write(readable, REQUEST);
        ring.write(&vec![FILL; writable as usize], REPLY);
        ring.put(
            0,
            &[Descriptor::new(REQUEST, readable.len() as u32, NEXT, 1), Descriptor::new(REPLY, writable, WRITABLE, 0)],
        );
        ring.offer(0);
        let used = ring.writing_only(
            |ring| {
                while requests.process(device, &mut ring.queue, &ring.memory, 64).unwrap().more {}
                let (head, used) = ring.take().expect("it is returned");
                assert_eq!((head, ring.take()), (0, None), "it is returned once");
                used
            },
            |used| (REPLY, *used),
        );
        let mut body = ring.read(REPLY, writable as usize);
        let status = body.len().checked_sub(4).map_or(FILL, |at| body[at]);
        if used != 0 {
            assert_eq!((used, &body[body.len() - 3..]), (writable, &[0; 3][..]), "a reply is a full write");
        }
        body.truncate(body.len().saturating_sub(4));
        Reply { status, used, body }
    }

    /// Sends a request that is answered with a status. Checks that a refusal changes nothing, and that books and host agree.
    pub fn request(&mut self, bytes: &[u8]) -> u8 {
        let before = self.view();
        let reply = self.send(bytes, 4);
        assert_eq!((reply.used, reply.body.len()), (4, 0));
        if reply.status != OK {
            assert_eq!(self.view(), before, "a refusal changes nothing");
        }
        self.check_books();
        reply.status
    }

    pub fn view(&mut self) -> View {
        let DeviceState { domains, bypass, .. } = self.device.save();
        let host = ALL.map(|id| (self.host.attachment(id), self.host.mappings(id))).to_vec();
        View { domains, bypass, host, tables: self.host.table_count() }
    }

    pub fn reads(&self, endpoint: EndpointId, iova: u64) -> Option<u64> {
        self.host.dma(endpoint, iova, Access::READ)
    }

    pub fn writes(&self, endpoint: EndpointId, iova: u64) -> Option<u64> {
        self.host.dma(endpoint, iova, Access::WRITE)
    }

    pub fn is_blocked(&self, endpoint: EndpointId) -> bool {
        self.host.attachment(endpoint) == Attachment::Blocked
    }

    /// The host maps for each attached endpoint what its domain maps, with these permissions and to these addresses, or blocks it.
    pub fn check_books(&mut self) {
        for domain in self.device.save().domains.iter().filter(|domain| !domain.bypass) {
            let mappings = domain.mappings.iter().filter(|mapping| mapping.read || mapping.write);
            let wanted: Vec<FakeMapping> = mappings
                .map(|mapping| FakeMapping {
                    iova: IovaRange::new(mapping.first, mapping.last).unwrap(),
                    to: vec![(mapping.physical, mapping.last - mapping.first + 1)],
                    access: Access { read: mapping.read, write: mapping.write },
                })
                .collect();
            for endpoint in domain.endpoints.iter().copied().map(EndpointId) {
                let is_apart = self.is_blocked(endpoint);
                assert!(is_apart || self.host.mappings(endpoint) == wanted, "endpoint {endpoint}: not what is mapped");
            }
        }
    }
}

/// MAP by its last address, which may lie anywhere.
pub fn map_to(domain: u32, first: u64, last: u64, physical: u64, flags: u32) -> Vec<u8> {
    with_range(crate::common::map(domain, 0, 1, physical, flags), first, last)
}

/// UNMAP by its last address.
pub fn unmap_to(domain: u32, first: u64, last: u64) -> Vec<u8> {
    with_range(crate::common::unmap(domain, 0, 1), first, last)
}

fn with_range(mut bytes: Vec<u8>, first: u64, last: u64) -> Vec<u8> {
    bytes[8..16].copy_from_slice(&first.to_le_bytes());
    bytes[16..24].copy_from_slice(&last.to_le_bytes());
    bytes
}
