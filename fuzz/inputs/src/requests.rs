// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes of requests, each with a buffer for the reply, to a device that a driver has used a while.

use virtio_iommu::host::fake::Flavour;
use virtio_iommu::id::EndpointId;
use virtio_iommu::request::{RequestKind, Status};

use crate::machine::{GROUPS, LONE, Machine, PAIR, PROBE_SIZE, encode, view};
use crate::wire::{self, Field, record};

record! {
    /// A request, and how many bytes there are for the reply.
    #[derive(Debug, PartialEq, Eq)]
    struct Request {
        /// Bytes for the reply.
        pub writable: u16,
        /// The request.
        pub readable: Vec<u8>,
    }
}

/// Two devices that are told the same: one in buffers that hold other bytes before, with what is to be ignored set.
struct Twins([Machine; 2]);

/// What buffers hold before.
const BEFORE: [u8; 2] = [0xaa, 0x55];

/// What is answered: the used length, and the whole buffer, where it was written.
type Answer = (usize, Option<Vec<u8>>);

impl Twins {
    fn new(options: u8) -> Self {
        let flavour = if options & 1 == 0 { Flavour::Iommufd } else { Flavour::Type1 };
        let mut twins = Self([0, 1].map(|_| Machine::new(flavour, options & 2 == 0)));
        for warm in warm() {
            let (used, reply) = twins.send(&warm, 4);
            assert_eq!((used, reply), (4, Some(vec![0; 4])), "an orderly request is done");
        }
        twins
    }

    fn send(&mut self, readable: &[u8], writable: usize) -> Answer {
        let [first, second] = &mut self.0;
        let answer = send(first, readable, writable, BEFORE[0]);
        let other = send(second, &with_ignored_set(readable), writable, BEFORE[1]);
        assert_eq!(answer, other, "an answer depends on what does not matter");
        assert_eq!(
            first.snapshot(),
            second.snapshot(),
            "a request does something that depends on what does not matter"
        );
        answer
    }
}

/// A driver's first requests: a domain of two groups with a mapping in two regions of memory, and a domain for a part of a group.
fn warm() -> Vec<Vec<u8>> {
    vec![
        encode::attach(1, LONE.0, 0),
        encode::attach(1, PAIR[0].0, 0),
        encode::map(1, 0x4000, 0x9fff, 0x4000, 3),
        encode::map(1, 0x2_0000, 0x2_0fff, 0, 1),
        encode::map(1, 0x2_2000, 0x2_2fff, 0x1000, 0),
    ]
}

/// The same request to a device that ignores what it must: the head's reserved bytes, what follows the request.
fn with_ignored_set(readable: &[u8]) -> Vec<u8> {
    let mut bytes = readable.to_vec();
    if let Some(reserved) = bytes.get_mut(1..4) {
        reserved.fill(0xff);
    }
    match RequestKind::of(readable) {
        Some(kind) if readable.len() >= kind.size() => {
            if matches!(kind, RequestKind::Detach | RequestKind::Probe) {
                let named = if kind == RequestKind::Detach { 12 } else { 8 };
                bytes[named..kind.size()].fill(0xff);
            }
            bytes.extend([0xff; 9]);
        }
        _ => (),
    }
    bytes
}

fn send(machine: &mut Machine, readable: &[u8], writable: usize, before: u8) -> Answer {
    let snapshot = machine.snapshot();
    let mut reply = vec![before; writable];
    let used = machine.device.handle(readable, &mut reply);
    let kind = RequestKind::of(readable);
    if kind.is_none() || writable < 4 {
        assert_eq!(used, 0, "a request without a type or a tail has no answer");
        assert!(reply.iter().all(|byte| *byte == before), "an unused buffer was written");
        assert_eq!(machine.snapshot(), snapshot, "what has no answer changes nothing");
        return (0, None);
    }
    assert_eq!(used, writable, "an answer fills the buffer");
    let (body, tail) = reply.split_at(used - 4);
    assert!(tail[0] <= Status::NoMemory as u8 && tail[1..] == [0; 3], "a tail is {tail:?}");
    if tail[0] != 0 || kind == Some(RequestKind::Probe) {
        assert_eq!(machine.snapshot(), snapshot, "status {} changes nothing", tail[0]);
    }
    if kind.is_some_and(|kind| is_invalid(kind, readable)) {
        assert_eq!(tail[0], Status::Invalid as u8, "what must be rejected is answered with {}", tail[0]);
    }
    match kind {
        Some(RequestKind::Probe) if tail[0] == 0 => check_properties(readable, body),
        _ => assert!(body.iter().all(|byte| *byte == 0), "there is something before the tail"),
    }
    machine.check();
    (used, Some(reply))
}

/// Whether a request must be rejected whatever the state is: for its length, a reserved field or a flag.
fn is_invalid(kind: RequestKind, readable: &[u8]) -> bool {
    let (length, zero, flags): (_, &[usize], _) = match kind {
        RequestKind::Attach => (20, &[16, 17, 18, 19], Some((12, 1))),
        RequestKind::Detach => (20, &[], None),
        RequestKind::Map => (36, &[], Some((32, 3))),
        RequestKind::Unmap => (28, &[24, 25, 26, 27], None),
        RequestKind::Probe => (72, &[], None),
    };
    let unknown = |(at, known): (usize, u32)| u32::take(&mut &readable[at..]) & !known != 0;
    readable.len() < length || zero.iter().any(|at| readable[*at] != 0) || flags.is_some_and(unknown)
}

/// The properties are the endpoint's regions, one after the other, and zeroes.
fn check_properties(readable: &[u8], body: &[u8]) {
    assert!(body.len() >= PROBE_SIZE, "properties in a buffer that is too small");
    let endpoint = EndpointId(u32::take(&mut &readable[4..]));
    assert!(GROUPS.concat().contains(&endpoint), "properties of {endpoint}, which does not exist");
    let mut expected = Vec::new();
    for region in view(endpoint).reported() {
        expected.extend([1, 0, 20, 0, region.kind as u8, 0, 0, 0]);
        expected.extend(region.range.start().to_le_bytes());
        expected.extend(region.range.last().to_le_bytes());
    }
    expected.resize(body.len(), 0);
    assert_eq!(body, expected);
}

/// Sends the requests that the bytes stand for.
pub fn check(mut bytes: &[u8]) {
    let mut twins = Twins::new(u8::take(&mut bytes));
    for request in wire::all::<Request>(bytes) {
        // Of replies that are too large to be answered the queue takes care.
        twins.send(&request.readable, usize::from(request.writable) % 300);
    }
}

/// All requests as they should be, and each with something wrong.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seed = |options: u8, requests: &[(u16, Vec<u8>)]| {
        let request =
            |(writable, readable): &(u16, Vec<u8>)| Request { writable: *writable, readable: readable.clone() };
        let requests: Vec<Request> = requests.iter().map(request).collect();
        [vec![options], wire::bytes_of(&requests)].concat()
    };
    let [left, right] = PAIR.map(|id| id.0);
    vec![
        (
            "moving",
            seed(
                0,
                &[(4, encode::attach(2, right, 0)), (4, encode::attach(1, right, 0)), (4, encode::detach(1, LONE.0))],
            ),
        ),
        ("bypass", seed(3, &[(4, encode::attach(9, LONE.0, 1)), (4, encode::map(9, 0, 0xfff, 0, 3))])),
        (
            "mapping",
            seed(
                1,
                &[
                    (4, encode::map(1, 0xfee0_0000, 0xfee0_0fff, 0, 3)),
                    (4, encode::map(1, 0x1_8000, 0x1_8fff, 0, 3)),
                    (4, encode::map(1, 0x5000, 0x5fff, 0, 3)),
                    (4, encode::unmap(1, 0x4000, 0x8fff)),
                    (4, encode::unmap(1, 0, u64::MAX)),
                    (4, encode::map(1, 0, 0xffff, 0, 2)),
                ],
            ),
        ),
        (
            "probing",
            seed(
                0,
                &[
                    (68, encode::probe(LONE.0)),
                    (100, encode::probe(left)),
                    (67, encode::probe(left)),
                    (68, encode::probe(1)),
                ],
            ),
        ),
        (
            "framing",
            seed(
                2,
                &[
                    (3, encode::detach(1, left)),
                    (4, vec![1, 2, 3]),
                    (4, vec![6; 36]),
                    (4, encode::attach(5, left, 2)),
                    (8, encode::detach(1, left)),
                ],
            ),
        ),
    ]
}
