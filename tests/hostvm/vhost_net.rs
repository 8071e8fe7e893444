// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host kernel's vhost-net behind the IOMMU, with a tap: it finds rings and packets by I/O virtual addresses only, and none that
//! the guest has taken away. This process is VMM and guest.

use std::fs::{self, File};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tappers::{AddAddressV4, DeviceState, Tap};
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_iommu::access::Access;
use virtio_iommu::device::{Fault, FaultReason, Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::translate::vhost::{VhostIotlb, WithIotlb};
use virtio_iommu::translate::{Limits, Translation};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::common::status::OK;
use crate::common::{Memory, attach, detach, guest_memory, map, unmap};

const ENDPOINT: EndpointId = EndpointId(8);
const READ: u32 = 1;
const WRITE: u32 = 2;
const PAGE: u64 = 0x1000;
const RING_SIZE: u16 = 16;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

// Guest memory, by guest-physical address: for each queue its three parts by a page each, then packets.
const RINGS: u64 = 0x1_0000;
const SENT: u64 = 0x2_0000;
const RECEIVED: u64 = 0x3_0000;
const RECEIVED_LATER: u64 = 0x4_0000;
/// What the I/O virtual address of each is above its guest-physical one.
const DISTANCE: u64 = 0x70_0000_0000;

// VIRTIO_F_VERSION_1, VIRTIO_F_ACCESS_PLATFORM, and VHOST_NET_F_VIRTIO_NET_HDR: the tap has no headers, vhost has them.
const FEATURES: u64 = 1 << 32 | 1 << 33 | 1 << 27;
/// The header of a packet (5.1.6).
const HEADER: usize = 12;

const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const EVERYBODY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 255);

type NetIotlb = VhostIotlb<WithIotlb<Net<Arc<Memory>>>, Arc<Memory>>;

struct Vmm {
    device: VirtioIommu,
    memory: Memory,
    iotlb: Arc<NetIotlb>,
    kicks: [EventFd; 2],
    /// How many buffers the driver has made available, by queue.
    available: [u16; 2],
    tap: Tap,
    socket: UdpSocket,
    done: Arc<AtomicBool>,
    answering: Option<JoinHandle<()>>,
}

impl Vmm {
    fn new() -> Self {
        let memory = guest_memory(0x10_0000);
        let group = Arc::new(Translation::new(Limits::default()).group(vec![ENDPOINT]));
        let settings = Settings { boot_bypass: false, ..Settings::new("0-ffffffffffff".parse().unwrap(), PAGE) };
        let endpoints = vec![(ENDPOINT, EndpointView::default())];
        let groups = vec![Arc::clone(&group) as Arc<dyn HostGroup>];
        let mut device = VirtioIommu::new(settings, endpoints, groups).unwrap();
        device.set_memory(GuestRam::from_mmap(&memory).unwrap());
        device.set_driver_features(device.features());

        let mut tap = Tap::new().unwrap();
        let mut address = AddAddressV4::new(HOST);
        address.set_broadcast(EVERYBODY);
        address.set_netmask(24);
        tap.add_addr(address).unwrap();
        tap.set_state(DeviceState::Up).unwrap();
        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        socket.set_broadcast(true).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();

        let shared = Arc::new(memory.clone());
        let net = WithIotlb::new(Net::new(Arc::clone(&shared)).unwrap());
        net.set_owner().unwrap();
        assert_eq!(net.get_features().unwrap() & FEATURES, FEATURES);
        net.set_features(FEATURES).unwrap();
        let regions: Vec<_> =
            memory.iter().map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()).collect();
        net.set_mem_table(&regions).unwrap();
        let iotlb = VhostIotlb::new(&group, ENDPOINT, net, shared, || panic!("the kernel does not forget")).unwrap();

        let done = Arc::new(AtomicBool::new(false));
        let answering = std::thread::spawn({
            let (iotlb, done) = (Arc::clone(&iotlb), Arc::clone(&done));
            move || answer(&iotlb, &done)
        });
        let kicks = [0, 1].map(|_| EventFd::new(0).unwrap());
        Self { device, memory, iotlb, kicks, available: [0; 2], tap, socket, done, answering: Some(answering) }
    }

    /// Starts both queues, whose rings are mapped.
    fn start(&self) {
        let net = self.iotlb.device();
        let tap = File::from(self.tap.as_fd().try_clone_to_owned().unwrap());
        for queue in [RECEIVE, TRANSMIT] {
            net.set_vring_num(queue, RING_SIZE).unwrap();
            net.set_vring_base(queue, 0).unwrap();
            let at = |part: u64| DISTANCE + ring(queue, part).0;
            let config = VringConfigData {
                queue_max_size: RING_SIZE,
                queue_size: RING_SIZE,
                desc_table_addr: at(0),
                avail_ring_addr: at(1),
                used_ring_addr: at(2),
                ..VringConfigData::default()
            };
            net.set_vring_addr(queue, &config).unwrap();
            net.set_vring_kick(queue, &self.kicks[queue]).unwrap();
            net.set_vring_call(queue, &EventFd::new(0).unwrap()).unwrap();
            self.iotlb.tell(at(2), Access::WRITE).unwrap();
            net.device().set_backend(queue, Some(&tap)).unwrap();
        }
    }

    fn send(&mut self, request: &[u8]) -> u8 {
        let mut reply = [0xaa; 4];
        assert_eq!(self.device.handle(request, &mut reply), 4);
        reply[0]
    }

    /// Maps guest memory where this guest has it.
    fn map(&mut self, physical: u64, length: u64, flags: u32) -> u8 {
        let iova = DISTANCE + physical;
        self.send(&map(1, iova, length, physical, flags))
    }

    fn unmap(&mut self, physical: u64, length: u64) -> u8 {
        let iova = DISTANCE + physical;
        self.send(&unmap(1, iova, length))
    }

    /// Makes a buffer of a page available.
    fn add_buffer(&mut self, queue: usize, physical: u64, length: u32) {
        let index = self.available[queue];
        let slot = u64::from(index % RING_SIZE);
        let flags = if queue == RECEIVE { 2 } else { 0 };
        let descriptor = Descriptor::new(DISTANCE + physical, length, flags, 0);
        let [descriptors, available, _] = [0, 1, 2].map(|part| ring(queue, part));
        self.memory.write_obj(descriptor, GuestAddress(descriptors.0 + slot * 16)).unwrap();
        self.memory.write_obj(slot as u16, GuestAddress(available.0 + 4 + slot * 2)).unwrap();
        self.available[queue] = index + 1;
        self.memory.store(index + 1, GuestAddress(available.0 + 2), Ordering::Release).unwrap();
        self.kick(queue);
    }

    fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    fn used(&self, queue: usize) -> u16 {
        self.memory.load(GuestAddress(ring(queue, 2).0 + 2), Ordering::Acquire).unwrap()
    }

    /// The guest sends a datagram to the host.
    fn transmit(&mut self, payload: &[u8]) {
        let packet = datagram(&self.tap, self.socket.local_addr().unwrap().port(), payload);
        self.memory.write_slice(&packet, GuestAddress(SENT)).unwrap();
        self.add_buffer(TRANSMIT, SENT, packet.len() as u32);
    }

    /// What the host got, if it did within half a second.
    fn arrived(&self) -> Option<Vec<u8>> {
        let mut bytes = [0; 256];
        let length = self.socket.recv(&mut bytes).ok()?;
        Some(bytes[..length].to_vec())
    }

    /// The host sends a datagram to everybody behind the tap.
    fn broadcast(&self, payload: &[u8]) {
        self.socket.send_to(payload, (EVERYBODY, 9)).unwrap();
    }

    /// Waits until a packet with this payload is in guest memory. What else the host sends comes there before.
    fn receive(&mut self, physical: u64, payload: &[u8]) {
        for _ in 0..16 {
            let available = self.available[RECEIVE];
            eventually("packet in guest memory", || self.used(RECEIVE) == available);
            if self.has(physical, payload) {
                return;
            }
            self.add_buffer(RECEIVE, RECEIVED, PAGE as u32);
        }
        panic!("the packet is not in guest memory");
    }

    /// Whether a packet with this payload is in guest memory.
    fn has(&self, physical: u64, payload: &[u8]) -> bool {
        let mut page = [0; PAGE as usize];
        self.memory.read_slice(&mut page, GuestAddress(physical)).unwrap();
        page.windows(payload.len()).any(|window| window == payload)
    }

    fn fault(&mut self) -> Fault {
        let mut fault = None;
        eventually("fault event", || {
            fault = self.device.take_fault();
            fault.is_some()
        });
        fault.unwrap()
    }

    /// Nobody has been told of a fault.
    fn assert_no_fault(&mut self) {
        assert_eq!(self.device.take_fault(), None);
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.done.store(true, Ordering::SeqCst);
        if let Some(thread) = self.answering.take() {
            let _ = thread.join();
        }
    }
}

/// Answers vhost-net, as a VMM's event loop would.
fn answer(iotlb: &NetIotlb, done: &AtomicBool) {
    let timeout = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    while !done.load(Ordering::SeqCst) {
        let file = iotlb.as_fd();
        if poll(&mut [PollFd::new(&file, PollFlags::IN)], Some(&timeout)).unwrap() != 0 {
            while iotlb.on_readable(16).unwrap() {}
        }
    }
}

/// Where a part of a queue's ring is: descriptors, available, used.
fn ring(queue: usize, part: u64) -> GuestAddress {
    GuestAddress(RINGS + (queue as u64 * 4 + part) * PAGE)
}

/// A UDP datagram from the guest to a port of the host, in IPv4, in Ethernet, behind a virtio-net header.
fn datagram(tap: &Tap, port: u16, payload: &[u8]) -> Vec<u8> {
    let address =
        fs::read_to_string(format!("/sys/class/net/{}/address", tap.name().unwrap().name().to_string_lossy()));
    let address: Vec<u8> =
        address.unwrap().trim().split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let length = (20 + 8 + payload.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(length.to_be_bytes());
    // No fragments; 64 hops; UDP; then a checksum.
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(GUEST.octets());
    ip.extend(HOST.octets());
    let sum: u32 = ip.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut packet = vec![0; HEADER];
    packet.extend(address);
    packet.extend([2, 0, 0, 0, 0, 2, 0x08, 0x00]);
    packet.extend(ip);
    packet.extend([7u16.to_be_bytes(), port.to_be_bytes(), (length - 20).to_be_bytes(), [0, 0]].as_flattened());
    packet.extend(payload);
    packet
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "there is no {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[ignore = "runs in the host VM"]
fn vhost_net_reaches_what_the_guest_has_mapped_and_nothing_else() {
    let mut vmm = Vmm::new();
    assert_eq!(vmm.send(&attach(1, ENDPOINT.0, 0)), OK);
    assert_eq!(vmm.map(RINGS, 8 * PAGE, READ | WRITE), OK);
    vmm.start();
    assert_eq!(vmm.map(SENT, PAGE, READ), OK);
    assert_eq!(vmm.map(RECEIVED, PAGE, WRITE), OK);

    vmm.transmit(b"the guest's first");
    assert_eq!(vmm.arrived().as_deref(), Some(&b"the guest's first"[..]));
    vmm.add_buffer(RECEIVE, RECEIVED, PAGE as u32);
    vmm.broadcast(b"the host's first");
    vmm.receive(RECEIVED, b"the host's first");
    vmm.assert_no_fault();

    // What is unmapped is not read any more, though the kernel had its translation.
    assert_eq!(vmm.unmap(SENT, PAGE), OK);
    vmm.transmit(b"the guest's second");
    let fault = vmm.fault();
    assert_eq!((fault.reason, fault.endpoint), (FaultReason::Mapping, ENDPOINT));
    assert_eq!(fault.address.map(|address| address & !(PAGE - 1)), Some(DISTANCE + SENT));
    assert_eq!(vmm.arrived(), None);
    // Once it is mapped again, the queue goes on.
    assert_eq!(vmm.map(SENT, PAGE, READ), OK);
    assert_eq!(vmm.arrived().as_deref(), Some(&b"the guest's second"[..]));

    // Nor written.
    assert_eq!(vmm.unmap(RECEIVED, PAGE), OK);
    let used = vmm.used(RECEIVE);
    vmm.memory.write_slice(&[0x55; PAGE as usize], GuestAddress(RECEIVED)).unwrap();
    vmm.add_buffer(RECEIVE, RECEIVED, PAGE as u32);
    vmm.broadcast(b"the host's second");
    let fault = vmm.fault();
    assert_eq!(fault.address.map(|address| address & !(PAGE - 1)), Some(DISTANCE + RECEIVED));
    assert_eq!(vmm.used(RECEIVE), used);
    // The same address leads to another page now.
    let iova = DISTANCE + RECEIVED;
    assert_eq!(vmm.send(&map(1, iova, PAGE, RECEIVED_LATER, WRITE)), OK);
    vmm.receive(RECEIVED_LATER, b"the host's second");
    let mut page = [0; PAGE as usize];
    vmm.memory.read_slice(&mut page, GuestAddress(RECEIVED)).unwrap();
    assert_eq!(page, [0x55; PAGE as usize], "the page that was taken away is as it was");

    // Without a domain not even the rings are found.
    while vmm.device.take_fault().is_some() {}
    assert_eq!(vmm.send(&detach(1, ENDPOINT.0)), OK);
    let used = vmm.used(TRANSMIT);
    vmm.transmit(b"the guest's third");
    assert_eq!(vmm.fault().reason, FaultReason::Domain);
    assert_eq!(vmm.arrived(), None);
    assert_eq!(vmm.used(TRANSMIT), used);
}
