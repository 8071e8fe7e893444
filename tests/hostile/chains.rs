// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Descriptor chains of every shape, and requests that change while they are read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use virtio_iommu::access::Access;
use virtio_iommu::device::{Exchange, Settings};
use virtio_iommu::host::fake::Flavour;
use virtio_iommu::request::{Request, RequestKind, Status};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use crate::common::{attach, detach, map, probe, unmap};
use crate::machine::{
    FILL, INDIRECT, LEFT, LONE, Machine, NEXT, OK, PROBE_SIZE, READ, REPLY, REQUEST, RING_SIZE, WRITABLE, settings,
};

/// Where the driver puts tables.
const TABLE: u64 = 0x8000;

impl Machine {
    /// Sends a chain; its used length. The reply is written to [`REPLY`], and nothing to anywhere else.
    fn send_chain(&mut self, descriptors: &[Descriptor]) -> u32 {
        let Self { device, ring, requests, .. } = self;
        ring.write(&[FILL; 0x1000], REPLY);
        ring.put(0, descriptors);
        ring.offer(0);
        ring.writing_only(
            |ring| {
                requests.process(device, &mut ring.queue, &ring.memory, 64).unwrap();
                let (head, used) = ring.take().expect("it is returned");
                assert_eq!((head, ring.take()), (0, None), "it is returned once");
                used
            },
            |used| (REPLY, *used),
        )
    }

    /// Sends a chain through an indirect table.
    fn send_table(&mut self, descriptors: &[Descriptor]) -> u32 {
        for (index, descriptor) in (0..).zip(descriptors) {
            self.ring.memory.write_obj(*descriptor, GuestAddress(TABLE + 16 * index)).unwrap();
        }
        self.send_chain(&[Descriptor::new(TABLE, 16 * descriptors.len() as u32, INDIRECT, 0)])
    }
}

/// Descriptors for so many bytes from an address on, each for a piece of this size, linked from place `first` on. An empty one
/// follows each, if so asked.
fn pieces(address: u64, length: u64, size: u64, flags: u16, first: usize, empty: bool) -> Vec<Descriptor> {
    let mut descriptors: Vec<Descriptor> = Vec::new();
    let mut put = |address, length: u64| {
        let next = (first + descriptors.len() + 1) as u16;
        descriptors.push(Descriptor::new(address, length as u32, flags | NEXT, next));
    };
    for offset in (0..length).step_by(size as usize) {
        put(address + offset, size.min(length - offset));
        if empty {
            put(address + offset, 0);
        }
    }
    descriptors
}

#[test]
fn requests_and_replies_in_pieces_of_every_size_are_whole() {
    let mut machine = Machine::new();
    let session = [
        (attach(1, LONE.0, 0), 4),
        (map(1, 0x5000, 0x1000, 0x8000, READ), 4),
        (unmap(1, 0x5000, 0x1000), 4),
        (probe(LONE.0), PROBE_SIZE + 4),
        (detach(1, LONE.0), 4),
    ];
    for readable_size in [1, 2, 3, 4, 7, 16, 72] {
        for (writable_size, empty) in [(1, false), (2, true), (3, true), (4, false), (64, false), (100, true)] {
            for (bytes, room) in &session {
                machine.ring.write(bytes, REQUEST);
                let mut chain = pieces(REQUEST, bytes.len() as u64, readable_size, 0, 0, empty);
                let more = pieces(REPLY, u64::from(*room), writable_size, WRITABLE, chain.len(), empty);
                chain.extend(more);
                let last = chain.pop().unwrap();
                chain.push(Descriptor::new(last.addr().0, last.len(), last.flags() & !NEXT, 0));
                assert_eq!(machine.send_table(&chain), *room, "type {} by {readable_size}, {writable_size}", bytes[0]);
                let tail = machine.ring.read(REPLY + u64::from(*room) - 4, 5);
                assert_eq!(tail, [OK, 0, 0, 0, FILL], "type {} by {readable_size}, {writable_size}", bytes[0]);
                machine.check_books();
            }
        }
    }
}

#[test]
fn a_chain_that_is_written_before_it_is_read_is_served_all_the_same() {
    let mut machine = Machine::new();
    machine.ring.write(&attach(1, LONE.0, 0), REQUEST);
    let chain = [
        Descriptor::new(REPLY, 2, WRITABLE | NEXT, 1),
        Descriptor::new(REQUEST, 8, NEXT, 2),
        Descriptor::new(REPLY + 2, 2, WRITABLE | NEXT, 3),
        Descriptor::new(REQUEST + 8, 12, 0, 0),
    ];
    assert_eq!(machine.send_chain(&chain), 4);
    assert_eq!(machine.ring.read(REPLY, 5), [OK, 0, 0, 0, FILL]);
    assert_eq!(machine.reads(LONE, 0x5000), None, "it is attached");
}

/// Each comes back untouched, once, and what follows it is served.
#[test]
fn chains_that_carry_no_request_come_back_untouched() {
    let readable = Descriptor::new(REQUEST, 20, NEXT, 1);
    let bad: [(&str, Vec<Descriptor>); 17] = [
        ("nothing to write", vec![Descriptor::new(REQUEST, 20, 0, 0)]),
        ("nothing to read", vec![Descriptor::new(REPLY, 4, WRITABLE, 0)]),
        ("all is empty", vec![Descriptor::new(REQUEST, 0, NEXT, 1), Descriptor::new(REPLY, 0, WRITABLE, 0)]),
        ("an empty tail", vec![readable, Descriptor::new(REPLY, 0, WRITABLE, 0)]),
        ("a tail that is short", vec![readable, Descriptor::new(REPLY, 3, WRITABLE, 0)]),
        ("a head that is short", vec![Descriptor::new(REQUEST, 3, NEXT, 1), Descriptor::new(REPLY, 4, WRITABLE, 0)]),
        ("it refers to itself", vec![Descriptor::new(REQUEST, 20, NEXT, 0)]),
        ("it loops", vec![readable, Descriptor::new(REPLY, 4, WRITABLE | NEXT, 0)]),
        ("the next one is out of the table", vec![Descriptor::new(REQUEST, 20, NEXT, RING_SIZE)]),
        ("the next one is far out of the table", vec![Descriptor::new(REQUEST, 20, NEXT, u16::MAX)]),
        (
            "what is to be read is not memory",
            vec![Descriptor::new(u64::MAX - 8, 20, NEXT, 1), Descriptor::new(REPLY, 4, WRITABLE, 0)],
        ),
        (
            "more than 2^32 bytes",
            vec![
                Descriptor::new(REQUEST, 72, NEXT, 1),
                Descriptor::new(REQUEST, u32::MAX, NEXT, 2),
                Descriptor::new(REPLY, 4, WRITABLE, 0),
            ],
        ),
        ("a table of no descriptor", vec![Descriptor::new(TABLE, 0, INDIRECT, 0)]),
        ("a table of less than one", vec![Descriptor::new(TABLE, 15, INDIRECT, 0)]),
        ("a table of one and a bit", vec![Descriptor::new(TABLE, 17, INDIRECT, 0)]),
        ("a table that is not memory", vec![Descriptor::new(u64::MAX - 0xff, 32, INDIRECT, 0)]),
        ("a table of tables", vec![Descriptor::new(TABLE + 16, 16, INDIRECT, 0)]),
    ];
    let mut machine = Machine::new();
    let before = machine.view();
    for (name, chain) in bad {
        machine.ring.write(&attach(1, LONE.0, 0), REQUEST);
        // One that could be served, and one that refers to it.
        let good = Descriptor::new(REQUEST, 20, 0, 0);
        machine.ring.memory.write_obj(good, GuestAddress(TABLE)).unwrap();
        machine.ring.memory.write_obj(Descriptor::new(TABLE, 16, INDIRECT, 0), GuestAddress(TABLE + 16)).unwrap();
        assert_eq!(machine.send_chain(&chain), 0, "{name}");
        assert_eq!(machine.view(), before, "{name}");
        assert_eq!(machine.send(&detach(1, LEFT.0), 4).used, 4, "after: {name}");
    }
    assert_eq!(machine.device.statistics().unreadable, 17);
}

#[test]
fn what_cannot_be_answered_is_done_and_said_to_be_unwritten() {
    let mut machine = Machine::new();
    machine.ring.write(&attach(1, LONE.0, 0), REQUEST);
    let chain = [Descriptor::new(REQUEST, 20, NEXT, 1), Descriptor::new(0x4_0000, 4, WRITABLE, 0)];
    assert_eq!(machine.send_chain(&chain), 0, "no memory is there");
    assert_eq!(machine.reads(LONE, 0x5000), None, "it is attached");
    assert_eq!(machine.request(&detach(1, LONE.0)), OK);
}

/// The bytes of a request.
fn bytes_of(request: Request) -> Vec<u8> {
    let flag = |is_set, flag| if is_set { flag } else { 0 };
    match request {
        Request::Attach { domain, endpoint, bypass } => attach(domain.0, endpoint.0, u32::from(bypass)),
        Request::Detach { domain, endpoint } => detach(domain.0, endpoint.0),
        Request::Map { domain, iova, physical, access: Access { read, write } } => {
            map(domain.0, iova.start(), iova.length().unwrap(), physical, flag(read, 1) | flag(write, 2))
        }
        Request::Unmap { domain, iova } => crate::machine::unmap_to(domain.0, iova.start(), iova.last()),
        Request::Probe { endpoint } => probe(endpoint.0),
    }
}

/// What a request was taken for, and its answer.
type Told = Arc<Mutex<Vec<(RequestKind, Option<Request>, Status)>>>;

/// Another thread writes over the request all the time. Whatever was read of it, what is checked, done and answered is the same one
/// request: a device that is sent that request, as it was read, does the same.
#[test]
fn a_request_that_changes_is_read_once() {
    // A MAP takes as many steps as it has pages.
    let machine = || Machine::with(Flavour::Iommufd, Settings { map_step: 0x1000, ..settings() });
    let (mut raced, mut calm) = (machine(), machine());
    let told = Told::default();
    let tell = Arc::clone(&told);
    raced.device.on_exchange(move |exchange| {
        if let Exchange::Request { kind, request, status } = *exchange {
            tell.lock().unwrap().push((kind, request, status));
        }
    });
    let memory = raced.ring.memory.clone();
    let ended = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&ended);
    let writer = std::thread::spawn(move || {
        let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(REQUEST + at)).unwrap();
        put(0, &map(1, 0x1000, 0x1000, 0x8000, READ));
        for turn in 0u32.. {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            // Type, domain or endpoint, endpoint or first address, last address, flags.
            put(0, &[(turn % 7) as u8]);
            put(4, &[if turn % 3 == 0 { 1 } else { 2 }]);
            put(8, &u64::to_le_bytes([LONE.0, LEFT.0, 0x1000, 0x3000][turn as usize % 4].into()));
            put(16, &u64::to_le_bytes([0, 0x1fff, 0x4fff, 0x3fff, 0x2ffe][turn as usize % 5]));
            put(32, &[(turn % 5) as u8]);
        }
    });
    let (mut count, mut answers) = ([0u32; 9], 0);
    let kinds = |count: &[u32; 9]| count.iter().filter(|count| **count > 0).count();
    // How often the writer comes in between is the scheduler's.
    while answers < 4000 || ((count[usize::from(OK)] < 100 || kinds(&count) < 4) && answers < 1_000_000) {
        let Machine { device, ring, requests, .. } = &mut raced;
        ring.write(&[FILL; 100], REPLY);
        ring.put(0, &[Descriptor::new(REQUEST, 72, NEXT, 1), Descriptor::new(REPLY, PROBE_SIZE + 4, WRITABLE, 0)]);
        ring.offer(0);
        while requests.process(device, &mut ring.queue, &ring.memory, 64).unwrap().more {}
        let (_, used) = ring.take().unwrap();
        let found = told.lock().unwrap().pop();
        let Some((kind, request, status)) = found else {
            assert_eq!((used, ring.read(REPLY, 100)), (0, vec![FILL; 100]), "an unknown type");
            continue;
        };
        assert_eq!(used, PROBE_SIZE + 4);
        let answer = ring.read(REPLY, used as usize);
        assert_eq!(answer[64..], [status as u8, 0, 0, 0]);
        answers += 1;
        count[status as usize] += 1;
        match request {
            Some(request) => {
                let reply = calm.send(&bytes_of(request), PROBE_SIZE + 4);
                assert_eq!((reply.status, &reply.body[..]), (status as u8, &answer[..64]), "{request}");
            }
            None => assert!(matches!(status, Status::Invalid | Status::Range), "{kind}: {status}"),
        }
        assert_eq!(raced.view(), calm.view());
    }
    ended.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    assert!(kinds(&count) >= 4, "the request changed: {count:?}");
}
