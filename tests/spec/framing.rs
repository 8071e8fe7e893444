// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Descriptor chains.

use virtio_iommu::host::fake::Flavour;
use virtio_iommu::queue::{Batch, Requests};

use crate::bench::{Bench, INVAL, LONE, OK, PAGE, PROBE_SIZE, READ, UNWRITTEN};
use crate::requests::{attach, detach, map, probe, unmap};
use crate::ring::{Piece, Returned, request, serve};

/// Sends chains; what came back, in order.
fn send(bench: &mut Bench, chains: &[Vec<Piece>]) -> Vec<Returned> {
    let device = &mut bench.device;
    let (batch, returned) =
        serve(chains, |queue, memory| Requests::default().process(device, queue, memory, 64).unwrap());
    assert_eq!(batch, Batch { handled: chains.len(), more: false, notify: true });
    returned
}

/// A request in pieces of a byte each.
fn bytewise(readable: &[u8], writable: usize) -> Vec<Piece> {
    let readable = readable.iter().map(|byte| Piece::Readable(vec![*byte]));
    readable.chain(vec![Piece::Writable(1); writable]).collect()
}

fn table(pieces: Vec<Piece>) -> Vec<Piece> {
    vec![Piece::Table { pieces, writable: false }]
}

/// The same request, arranged in every way.
fn arrangements(readable: &[u8], writable: usize) -> Vec<Vec<Piece>> {
    let (head, rest) = readable.split_at(4);
    let mut uneven = vec![Piece::Readable(head.to_vec()), Piece::Readable(vec![]), Piece::Readable(rest.to_vec())];
    uneven.extend([Piece::Writable(0), Piece::Writable(writable - 3), Piece::Writable(3)]);
    let plain = request(readable, writable);
    vec![plain.clone(), uneven.clone(), table(plain), table(uneven), table(bytewise(readable, writable))]
}

/// Requests that succeed in this order, and how much room their replies need.
fn every_kind() -> [(Vec<u8>, usize); 5] {
    [
        (attach(1, LONE, 0), 4),
        (map(1, 0x5000, PAGE, 0x1000, READ), 4),
        (probe(LONE), PROBE_SIZE + 4),
        (unmap(1, 0x5000, PAGE), 4),
        (detach(1, LONE), 4),
    ]
}

/// Statement (2.7.4.1, MUST NOT): "The device MUST NOT make assumptions about the particular arrangement of descriptors."
/// Statement (2.7.5.1, MUST NOT): "A device MUST NOT write to a device-readable buffer"
/// Answer: Every request is answered the same in one descriptor or in one for each byte, in the ring's table or another.
/// Otherwise: cloud-hypervisor, which wants two descriptors of exact sizes.
#[test]
fn the_arrangement_of_descriptors_must_not_matter() {
    let ways = arrangements(&probe(LONE), PROBE_SIZE + 4).len();
    for way in 0..ways {
        let (mut arranged, mut plain) = (Bench::new(Flavour::Iommufd), Bench::new(Flavour::Iommufd));
        for (readable, writable) in every_kind() {
            let expected = plain.send(&readable, writable);
            assert_eq!((expected.used, expected.bytes[writable - 4]), (writable, OK));
            let chain = arrangements(&readable, writable).swap_remove(way);
            let returned = send(&mut arranged, &[chain]);
            assert_eq!(returned, [Returned { chain: 0, used: writable as u32, bytes: expected.bytes }], "way {way}");
            assert!(arranged.picture() == plain.picture(), "way {way}: {readable:x?}");
        }
    }
}

/// Statement (2.7.4.1, MAY): "The device MAY have a reasonable limit of descriptors it will allow in a chain."
/// Answer: 256; a longer chain comes back unwritten.
#[test]
fn a_chain_may_have_256_descriptors() {
    for (count, used) in [(256, 4), (257, 0)] {
        let mut bench = Bench::new(Flavour::Iommufd);
        let mut pieces = vec![Piece::Readable(vec![]); count - 2];
        pieces.extend(request(&attach(1, LONE, 0), 4));
        let returned = send(&mut bench, &[table(pieces)]);
        let bytes = if used == 0 { vec![UNWRITTEN; 4] } else { vec![OK, 0, 0, 0] };
        assert_eq!(returned, [Returned { chain: 0, used, bytes }], "{count}");
        assert_eq!(bench.status(&detach(1, LONE)), if used == 0 { INVAL } else { OK });
    }
}

/// Statement (2.7.5.3.2, MUST): "The device MUST ignore the write-only flag (flags&VIRTQ_DESC_F_WRITE) in the descriptor that refers
/// to an indirect table."
/// Answer: Not looked at.
#[test]
fn the_write_flag_of_a_table_must_be_ignored() {
    let mut bench = Bench::new(Flavour::Iommufd);
    let pieces = request(&attach(1, LONE, 0), 4);
    let returned = send(&mut bench, &[vec![Piece::Table { pieces, writable: true }]]);
    assert_eq!(returned, [Returned { chain: 0, used: 4, bytes: vec![OK, 0, 0, 0] }]);
}

/// Statement (2.7.5.3.2, MUST): "The device MUST handle the case of zero or more normal chained descriptors followed by a single
/// descriptor with flags&VIRTQ_DESC_F_INDIRECT."
/// Answer: It does.
#[test]
fn a_table_after_other_descriptors_must_be_handled() {
    let readable = attach(1, LONE, 0);
    for cut in 0..=readable.len() {
        let mut bench = Bench::new(Flavour::Iommufd);
        let (before, after) = readable.split_at(cut);
        let mut chain = vec![Piece::Readable(before.to_vec())];
        chain.extend(table(request(after, 4)));
        let returned = send(&mut bench, &[chain]);
        assert_eq!(returned, [Returned { chain: 0, used: 4, bytes: vec![OK, 0, 0, 0] }], "{cut}");
    }
}

/// Driver (2.7.4.2, MUST): "The driver MUST place any device-writable descriptor elements after any device-readable descriptor
/// elements."
/// Answer: In any other order it is answered the same.
#[test]
fn what_can_be_written_may_come_first() {
    let mut bench = Bench::new(Flavour::Iommufd);
    let mut chain = request(&attach(1, LONE, 0), 4);
    chain.reverse();
    let returned = send(&mut bench, &[chain]);
    assert_eq!(returned, [Returned { chain: 0, used: 4, bytes: vec![OK, 0, 0, 0] }]);
    assert_eq!(bench.status(&detach(1, LONE)), OK);
}

/// Driver (2.7.5.3.1, MUST NOT): "The driver MUST NOT set the VIRTQ_DESC_F_INDIRECT flag within an indirect descriptor (ie. only one
/// table per descriptor)."
/// Answer: The chain comes back unwritten, and the next one is answered.
#[test]
fn a_table_in_a_table_comes_back_unwritten() {
    let mut bench = Bench::new(Flavour::Iommufd);
    let before = bench.picture();
    let nested = table(table(request(&attach(1, LONE, 0), 4)));
    let returned = send(&mut bench, std::slice::from_ref(&nested));
    assert_eq!(returned, [Returned { chain: 0, used: 0, bytes: vec![UNWRITTEN; 4] }]);
    assert!(bench.picture() == before);
    let returned = send(&mut bench, &[nested, request(&attach(1, LONE, 0), 4)]);
    assert_eq!(returned[1], Returned { chain: 1, used: 4, bytes: vec![OK, 0, 0, 0] });
}
