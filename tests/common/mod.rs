// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a VMM and a guest's driver do, for tests that play both: guest memory, a vhost-user front end, a request ring.

#![allow(dead_code, reason = "not every test uses everything")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::split::{Descriptor, VirtqUsedElem};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use processes::{PATIENCE, wait_until};

pub mod alone;
#[cfg(target_arch = "x86_64")]
pub mod confined;
#[cfg(target_arch = "x86_64")]
pub mod inject;
pub mod left_out;
pub mod logged;
pub mod processes;
mod requests;
pub mod status;

pub use requests::*;

/// Guest memory, all in one file.
pub type Memory = GuestMemoryMmap<()>;

/// Where the driver keeps its ring and buffers: the last 64 KiB of the first MiB.
pub const RINGS: u64 = 0xf_0000;
const RING_SIZE: u16 = 16;
const DESCRIPTORS: u64 = RINGS;
const AVAILABLE: u64 = RINGS + 0x1000;
const USED: u64 = RINGS + 0x2000;
const REQUEST: u64 = RINGS + 0x3000;
const REPLY: u64 = RINGS + 0x4000;
/// The event ring: descriptors, available and used ring, and the one buffer, a page each.
const EVENTS: u64 = RINGS + 0x8000;
const EVENT_USED: u64 = EVENTS + 0x2000;
const EVENT: u64 = EVENTS + 0x3000;
const EVENT_SIZE: usize = 24;

/// What should not happen is waited for so long.
const SHORT: Duration = Duration::from_secs(2);

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Guest memory of this many bytes from address 0 on, in a memfd.
pub fn guest_memory(size: usize) -> Memory {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    file.set_len(size as u64).unwrap();
    Memory::from_ranges_with_files([(GuestAddress(0), size, Some(FileOffset::new(file, 0)))]).unwrap()
}

/// The answer to a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u8,
    pub used: u32,
    pub body: Vec<u8>,
}

impl Reply {
    /// A reply that is a status and nothing else.
    pub fn only(status: u8) -> Self {
        Self { status, used: 4, body: Vec::new() }
    }
}

/// A front end with a guest's driver in it.
pub struct Machine {
    pub memory: Memory,
    pub frontend: Frontend,
    /// One for each ring: the backend reads them, and waits if there is nothing to read.
    kicks: [EventFd; 2],
    call: EventFd,
    available: u16,
    used: u16,
}

impl Machine {
    /// Connects to a socket and negotiates everything that is offered.
    pub fn connect(path: &Path, memory: Memory) -> Self {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => panic!("nobody listens on {}: {error}", path.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        Self::over(stream, memory)
    }

    /// Negotiates over a connection.
    pub fn over(stream: UnixStream, memory: Memory) -> Self {
        let mut frontend = Frontend::from_stream(stream, 2);
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        assert!(features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0);
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::RESET_DEVICE));
        frontend.set_protocol_features(protocol & !VhostUserProtocolFeatures::REPLY_ACK).unwrap();
        let event = || EventFd::new(0).unwrap();
        Self { memory, frontend, kicks: [event(), event()], call: event(), available: 0, used: 0 }
    }

    /// The same guest, of which another front end has the memory too now, over a connection to another backend.
    pub fn moved(&self, stream: UnixStream) -> Self {
        let Self { available, used, .. } = *self;
        Self { available, used, ..Self::over(stream, self.memory.clone()) }
    }

    /// Sets features, memory and the request ring, and starts it from the driver's place.
    pub fn start(&mut self) {
        self.start_from(self.available);
    }

    /// Sets features, memory and the request ring, and starts it at a base.
    pub fn start_from(&mut self, base: u16) {
        // Without EVENT_IDX: this driver does not write used_event.
        let features = self.frontend.get_features().unwrap() & !(1 << 29);
        self.frontend.set_features(features).unwrap();
        self.set_memory();
        self.start_ring(base);
    }

    /// Gives the backend the guest's memory.
    pub fn set_memory(&mut self) {
        let regions: Vec<_> =
            self.memory.iter().map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()).collect();
        self.frontend.set_mem_table(&regions).unwrap();
    }

    /// Starts the request ring at a base.
    pub fn start_ring(&mut self, base: u16) {
        self.start_ring_at(0, base, DESCRIPTORS);
    }

    /// Starts a ring whose three parts are in consecutive pages.
    fn start_ring_at(&mut self, index: usize, base: u16, descriptors: u64) {
        let address = |guest| self.memory.get_host_address(GuestAddress(guest)).unwrap() as u64;
        let ring = VringConfigData {
            queue_max_size: RING_SIZE,
            queue_size: RING_SIZE,
            flags: 0,
            desc_table_addr: address(descriptors),
            used_ring_addr: address(descriptors + 0x2000),
            avail_ring_addr: address(descriptors + 0x1000),
            log_addr: None,
        };
        self.frontend.set_vring_num(index, RING_SIZE).unwrap();
        self.frontend.set_vring_base(index, base).unwrap();
        self.frontend.set_vring_addr(index, &ring).unwrap();
        self.frontend.set_vring_call(index, &self.call).unwrap();
        self.frontend.set_vring_kick(index, &self.kicks[index]).unwrap();
        self.frontend.set_vring_enable(index, true).unwrap();
    }

    /// Starts the event ring, with a buffer for one event.
    pub fn start_event_ring(&mut self) {
        let buffer = Descriptor::new(EVENT, EVENT_SIZE as u32, WRITE, 0);
        self.memory.write_obj(buffer, GuestAddress(EVENTS)).unwrap();
        self.memory.write_obj(1u16.to_le(), GuestAddress(EVENTS + 0x1002)).unwrap();
        self.start_ring_at(1, 0, EVENTS);
    }

    /// Waits for the event.
    pub fn wait_for_event(&self) -> [u8; EVENT_SIZE] {
        let order = std::sync::atomic::Ordering::Acquire;
        let index = || self.memory.load::<u16>(GuestAddress(EVENT_USED + 2), order).unwrap();
        wait_until("there is no event", || index() != 0);
        self.memory.read_obj(GuestAddress(EVENT)).unwrap()
    }

    /// Stops the request ring; the base to start it with again.
    pub fn stop_ring(&mut self) -> u16 {
        self.frontend.set_vring_enable(0, false).unwrap();
        u16::try_from(self.frontend.get_vring_base(0).unwrap()).unwrap()
    }

    /// The driver forgets its ring, as one that starts anew.
    pub fn forget_ring(&mut self) {
        self.memory.write_slice(&[0; 0x3000], GuestAddress(RINGS)).unwrap();
        (self.available, self.used) = (0, 0);
    }

    /// The driver stops its ring and starts anew.
    pub fn restart(&mut self) {
        self.stop_ring();
        self.forget_ring();
        self.start();
    }

    /// That, and nothing but the ring is set up again.
    pub fn restart_ring(&mut self) {
        self.stop_ring();
        self.forget_ring();
        self.start_ring(0);
    }

    /// Makes the available index a number of the driver's choosing, and lets the backend see it.
    pub fn break_ring(&mut self, index: u16) {
        self.memory.write_obj(index.to_le(), GuestAddress(AVAILABLE + 2)).unwrap();
        self.kicks[0].write(1).unwrap();
        self.wait_for_kick_taken();
    }

    /// Waits until the backend took the kick, and a while for it to look at the ring.
    pub fn wait_for_kick_taken(&self) {
        // A kick that was taken is counted no more.
        let info = format!("/proc/self/fdinfo/{}", self.kicks[0].as_raw_fd());
        let is_taken = |text: String| text.lines().any(|line| line.split_whitespace().eq(["eventfd-count:", "0"]));
        wait_until("the kick is not taken", || is_taken(std::fs::read_to_string(&info).unwrap()));
        std::thread::sleep(Duration::from_millis(50));
    }

    /// The whole configuration space.
    pub fn config(&mut self) -> Vec<u8> {
        self.frontend.get_config(0, 40, VhostUserConfigFlags::empty(), &[0; 40]).unwrap().1
    }

    /// Sends a request and waits for its answer.
    pub fn ask(&mut self, request: &[u8], writable: u32) -> Reply {
        self.post(request, writable);
        self.wait_for_used(writable)
    }

    /// Sends a request.
    pub fn post(&mut self, request: &[u8], writable: u32) {
        self.post_quietly(request, writable);
        self.kick();
    }

    pub fn kick(&self) {
        self.kicks[0].write(1).unwrap();
    }

    /// Sends two requests that are answered with a status each, by one kick. Of the answers only the last is read.
    pub fn post_two(&mut self, first: &[u8], second: &[u8]) {
        self.post_at(0x800, first, 4);
        self.post_quietly(second, 4);
        self.kick();
    }

    /// Makes a request available without a kick.
    pub fn post_quietly(&mut self, request: &[u8], writable: u32) {
        self.post_at(0, request, writable);
    }

    /// Makes a request available whose buffers are so far from where they usually are.
    fn post_at(&mut self, offset: u64, request: &[u8], writable: u32) {
        let (to, from) = (REQUEST + offset, REPLY + offset);
        self.memory.write_slice(request, GuestAddress(to)).unwrap();
        self.memory.write_slice(&vec![0xaa; writable as usize], GuestAddress(from)).unwrap();
        let head: u16 = if offset == 0 { 0 } else { 2 };
        let descriptors =
            [Descriptor::new(to, request.len() as u32, NEXT, head + 1), Descriptor::new(from, writable, WRITE, 0)];
        for (index, descriptor) in (u64::from(head)..).zip(descriptors) {
            self.memory.write_obj(descriptor, GuestAddress(DESCRIPTORS + 16 * index)).unwrap();
        }
        let slot = u64::from(self.available % RING_SIZE);
        self.memory.write_obj(head.to_le(), GuestAddress(AVAILABLE + 4 + 2 * slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        let order = std::sync::atomic::Ordering::Release;
        self.memory.store(self.available.to_le(), GuestAddress(AVAILABLE + 2), order).unwrap();
    }

    /// Waits for the answer to a request.
    pub fn wait_for_used(&mut self, writable: u32) -> Reply {
        self.used_within(PATIENCE, writable).expect("a request is answered")
    }

    /// The answer to a request that should have none, or may have none; `None` if it has none for two seconds.
    pub fn used_after_all(&mut self, writable: u32) -> Option<Reply> {
        self.used_within(SHORT, writable)
    }

    fn used_within(&mut self, patience: Duration, writable: u32) -> Option<Reply> {
        let deadline = Instant::now() + patience;
        loop {
            let order = std::sync::atomic::Ordering::Acquire;
            let index = u16::from_le(self.memory.load(GuestAddress(USED + 2), order).unwrap());
            if index != self.used {
                break;
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        let slot = u64::from(self.used % RING_SIZE);
        let element: VirtqUsedElem = self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot)).unwrap();
        self.used = self.used.wrapping_add(1);
        let mut body = vec![0; writable as usize];
        self.memory.read_slice(&mut body, GuestAddress(REPLY)).unwrap();
        let status = body.len().checked_sub(4).map_or(0xaa, |at| body[at]);
        body.truncate((writable as usize).saturating_sub(4));
        Some(Reply { status, used: element.len(), body })
    }

    /// Sends a request that is answered with a status only; the status.
    pub fn send(&mut self, request: &[u8]) -> u8 {
        let reply = self.ask(request, 4);
        assert_eq!(reply, Reply::only(reply.status));
        reply.status
    }
}
