// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's driver: requests, in a queue in guest memory, and what came back.

use std::sync::atomic::Ordering;

use virtio_queue::desc::split::{Descriptor, VirtqUsedElem};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest memory.
pub type Memory = GuestMemoryMmap<()>;

/// The most requests of a batch: each has a descriptor to be read and one to be written.
pub const LARGEST_BATCH: usize = 256;
pub const QUEUE_SIZE: u16 = 2 * LARGEST_BATCH as u16;
/// How much memory the queue and its buffers need, in bytes.
pub const MEMORY_SIZE: usize = 1 << 20;

pub const DESCRIPTORS: u64 = 0;
pub const AVAILABLE: u64 = 0x4000;
pub const USED: u64 = 0x8000;
/// Each request of a batch has a buffer, and in it the reply behind the request.
const BUFFERS: u64 = 0x1_0000;
const BUFFER: u64 = 0x800;
const REPLY: u64 = 0x80;

const TAIL: u32 = 4;
/// What a reply has in place of a status before there is one.
const NO_STATUS: u8 = 0xff;
/// The status of a request that was done.
pub const OK: u8 = 0;
/// In a descriptor: another one follows; to be written.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// In the available ring: the driver watches the used index and wants no interrupts, as Linux's does.
const NO_INTERRUPT: u16 = 1;

/// A request and how many bytes its reply has.
pub struct Request {
    bytes: Vec<u8>,
    reply: u32,
}

impl Request {
    pub fn attach(domain: u32, endpoint: u32) -> Self {
        Self::new(1, domain, &[], &[endpoint, 0, 0])
    }

    pub fn map(domain: u32, first: u64, last: u64, physical: u64, flags: u32) -> Self {
        Self::new(3, domain, &[first, last, physical], &[flags])
    }

    pub fn unmap(domain: u32, first: u64, last: u64) -> Self {
        Self::new(4, domain, &[first, last], &[0])
    }

    /// A PROBE of an endpoint that has room for so many bytes of properties.
    pub fn probe(endpoint: u32, properties: u32) -> Self {
        let mut request = Self::new(5, endpoint, &[], &[]);
        request.bytes.resize(72, 0);
        request.reply += properties;
        request
    }

    fn new(kind: u32, first: u32, addresses: &[u64], fields: &[u32]) -> Self {
        let mut bytes = Vec::with_capacity(72);
        bytes.extend(kind.to_le_bytes());
        bytes.extend(first.to_le_bytes());
        bytes.extend(addresses.iter().flat_map(|address| address.to_le_bytes()));
        bytes.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
        Self { bytes, reply: TAIL }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A driver, and what it sent last.
pub struct Driver {
    pub memory: Memory,
    /// The available index, and the used index when all was answered.
    sent: u16,
    /// The lengths of the replies that the last batch has.
    replies: Vec<u32>,
}

impl Driver {
    /// A driver whose queue is in this memory.
    pub fn new(memory: Memory) -> Self {
        memory.write_obj(NO_INTERRUPT.to_le(), GuestAddress(AVAILABLE)).unwrap();
        Self { memory, sent: 0, replies: Vec::new() }
    }

    /// The device's side of the queue that every driver has.
    pub fn queue() -> Queue {
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_size(QUEUE_SIZE);
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        queue
    }

    /// Makes a batch of requests available. What it sent before has been answered.
    pub fn post(&mut self, requests: &[Request]) {
        self.replies.clear();
        for (index, request) in (0..).zip(requests) {
            let [buffer, reply] = [0, REPLY].map(|offset| BUFFERS + u64::from(index) * BUFFER + offset);
            self.write(&request.bytes, buffer);
            self.write(&[NO_STATUS; TAIL as usize], reply + u64::from(request.reply - TAIL));
            let head = 2 * index;
            let readable = Descriptor::new(buffer, request.bytes.len() as u32, NEXT, head + 1);
            let writable = Descriptor::new(reply, request.reply, WRITE, 0);
            for (place, descriptor) in (u64::from(head)..).zip([readable, writable]) {
                self.memory.write_obj(descriptor, GuestAddress(DESCRIPTORS + place * 16)).unwrap();
            }
            let place = u64::from(self.sent % QUEUE_SIZE);
            self.memory.write_obj(head.to_le(), GuestAddress(AVAILABLE + 4 + place * 2)).unwrap();
            self.sent = self.sent.wrapping_add(1);
            self.replies.push(request.reply);
        }
        self.memory.store(self.sent.to_le(), GuestAddress(AVAILABLE + 2), Ordering::Release).unwrap();
    }

    /// Whether all that it sent was answered.
    pub fn is_answered(&self) -> bool {
        let used: u16 = self.memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
        u16::from_le(used) == self.sent
    }

    /// The statuses of the last batch. Each of its buffers came back once, with the used length that its reply has.
    pub fn statuses(&self) -> Vec<u8> {
        assert!(self.is_answered(), "not all was answered");
        let count = self.replies.len();
        let mut heads = Vec::with_capacity(count);
        for index in 0..count as u16 {
            let place = u64::from(self.sent.wrapping_sub(index + 1) % QUEUE_SIZE);
            let used: VirtqUsedElem = self.memory.read_obj(GuestAddress(USED + 4 + place * 8)).unwrap();
            assert_eq!(used.len(), self.replies[used.id() as usize / 2], "a used length");
            heads.push(used.id());
        }
        heads.sort_unstable();
        assert!(heads.into_iter().eq((0..).step_by(2).take(count)), "a buffer came back twice");
        let tail = |(index, length): (u64, &u32)| BUFFERS + index * BUFFER + REPLY + u64::from(length - TAIL);
        let tails = (0..).zip(&self.replies).map(tail);
        tails.map(|tail| self.memory.read_obj(GuestAddress(tail)).unwrap()).collect()
    }

    /// Everything in the last batch was answered with OK.
    pub fn check(&self) {
        assert!(self.statuses().iter().all(|status| *status == OK), "a request failed: {:?}", self.statuses());
    }

    fn write(&self, bytes: &[u8], to: u64) {
        self.memory.write_slice(bytes, GuestAddress(to)).unwrap();
    }
}
