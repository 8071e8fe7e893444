// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fault events.

use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::{Failure, Flavour};
use virtio_iommu::queue::{Batch, deliver_faults};

use crate::bench::{Bench, FLAVOURS, LEFT, NOMEM, OK, PAGE, READ, Reply, UNWRITTEN, WRITE};
use crate::requests::{attach, map, unmap};
use crate::ring::{Piece, Returned, serve};

const SIZE: usize = 24;
const R_UNKNOWN: u8 = 0;
const R_MAPPING: u8 = 2;
const F_READ: u32 = 1 << 0;
const F_WRITE: u32 = 1 << 1;
const F_ADDRESS: u32 = 1 << 8;

/// Has the host refuse a MAP in domain 1, of which the guest is told.
fn refuse_map(bench: &mut Bench, iova: u64, flags: u32) {
    bench.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    let reply = bench.send(&map(1, iova, PAGE, 0x1000, flags), 4);
    assert_eq!(reply, Reply { used: 4, bytes: vec![NOMEM, 0, 0, 0] });
}

/// A device with [`LEFT`] in domain 1.
fn bench(flavour: Flavour) -> Bench {
    let mut bench = Bench::new(flavour);
    assert_eq!(bench.status(&attach(1, LEFT, 0)), OK);
    bench
}

/// A device that has an event of each kind for the guest: with an address and without.
fn bench_with_two_events(flavour: Flavour) -> Bench {
    let mut bench = bench(flavour);
    refuse_map(&mut bench, 0x7000, READ | WRITE);
    assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
    bench.host.fail_after(0, Failure::Error(HostErrorKind::Other));
    let reply = bench.send(&unmap(1, 0x5000, PAGE), 4);
    assert_eq!(reply, Reply { used: 4, bytes: vec![OK, 0, 0, 0] });
    assert_eq!(bench.read(LEFT, 0x5000), None);
    bench
}

/// Gives the device buffers for events; what came back.
fn deliver(bench: &mut Bench, buffers: &[Vec<Piece>]) -> (Batch, Vec<Returned>) {
    let device = &mut bench.device;
    serve(buffers, |queue, memory| deliver_faults(device, queue, memory, 64).unwrap())
}

/// The events that the guest gets in buffers of the right size.
fn events(bench: &mut Bench) -> Vec<Vec<u8>> {
    let (_, returned) = deliver(bench, &vec![vec![Piece::Writable(SIZE)]; 8]);
    assert!(returned.iter().all(|buffer| buffer.used == SIZE as u32));
    returned.into_iter().map(|buffer| buffer.bytes).collect()
}

fn flags(event: &[u8]) -> u32 {
    u32::from_le_bytes(event[4..8].try_into().unwrap())
}

/// Statement 49 (5.13.6.9.2, SHOULD): "The device SHOULD set reserved and reserved1 to zero."
/// Answer: Zero.
/// Otherwise: cloud-hypervisor and crosvm send no events at all, which the specification allows.
#[test]
fn the_reserved_fields_should_be_zero() {
    for flavour in FLAVOURS {
        let events = events(&mut bench_with_two_events(flavour));
        assert_eq!(events.len(), 2);
        for event in events {
            assert_eq!((&event[1..4], &event[12..16]), (&[0; 3][..], &[0; 4][..]));
        }
    }
}

/// Statement 50 (5.13.6.9.2, SHOULD): "The device SHOULD set undefined flags to zero."
/// Answer: READ, WRITE and ADDRESS, as they are known; nothing else.
#[test]
fn undefined_flags_should_be_zero() {
    for access in [READ, WRITE, READ | WRITE] {
        let mut bench = bench(Flavour::Iommufd);
        refuse_map(&mut bench, 0x7000, access);
        let events = events(&mut bench);
        let read = if access & READ == 0 { 0 } else { F_READ };
        let write = if access & WRITE == 0 { 0 } else { F_WRITE };
        assert_eq!(events.iter().map(|event| flags(event)).collect::<Vec<_>>(), [F_ADDRESS | read | write]);
    }
}

/// Statement 51 (5.13.6.9.2, SHOULD): "The device SHOULD write a valid endpoint ID in endpoint."
/// Answer: An endpoint of the guest's, in the domain that the event is about.
#[test]
fn the_endpoint_should_be_valid() {
    for flavour in FLAVOURS {
        for event in events(&mut bench_with_two_events(flavour)) {
            assert_eq!(event[8..12], LEFT.to_le_bytes());
        }
    }
}

/// Statement 52 (5.13.6.9.2, MAY): "The device MAY omit setting VIRTIO_IOMMU_FAULT_F_ADDRESS and writing address in any fault report,
/// regardless of the reason."
/// Answer: A virtual address that is known is written, with the flag; otherwise both are zero. Addresses of the host are never
/// written.
#[test]
fn the_address_is_omitted_if_it_is_not_known() {
    for flavour in FLAVOURS {
        let events = events(&mut bench_with_two_events(flavour));
        let read = |event: &Vec<u8>| (event[0], flags(event), u64::from_le_bytes(event[16..24].try_into().unwrap()));
        let found: Vec<_> = events.iter().map(read).collect();
        assert_eq!(found, [(R_MAPPING, F_READ | F_WRITE | F_ADDRESS, 0x7000), (R_UNKNOWN, 0, 0)]);
    }
}

/// Statement 53 (5.13.6.9.2, SHOULD NOT): "If a buffer is too small to contain the fault report, the device SHOULD NOT use multiple
/// buffers to describe it."
/// Answer: The buffer comes back unwritten, and the event is in the next one that has room.
/// Otherwise: kvmtool, which cuts the event off.
#[test]
fn a_buffer_that_is_too_small_should_come_back_unwritten() {
    for size in 0..SIZE {
        let mut bench = bench(Flavour::Iommufd);
        refuse_map(&mut bench, 0x7000, READ);
        let buffers = [vec![Piece::Writable(size)], vec![Piece::Writable(SIZE + 8)]];
        let (batch, returned) = deliver(&mut bench, &buffers);
        assert_eq!(batch, Batch { handled: 2, more: false, notify: true });
        assert_eq!(returned[0], Returned { chain: 0, used: 0, bytes: vec![UNWRITTEN; size] });
        assert_eq!((returned[1].chain, returned[1].used), (1, SIZE as u32));
        assert_eq!((returned[1].bytes[0], &returned[1].bytes[SIZE..]), (R_MAPPING, &[UNWRITTEN; 8][..]));
    }
}

/// Statement (5.13.6.9, text): "If no buffer is available, the device can either wait for one to be consumed, or drop the event."
/// Answer: Events wait, the oldest first; when 256 wait, further ones are dropped and counted.
/// Otherwise: QEMU drops an event for which there is no buffer, which the specification allows.
#[test]
fn an_event_waits_for_a_buffer() {
    let mut bench = bench(Flavour::Iommufd);
    for page in 0..260 {
        refuse_map(&mut bench, page * PAGE, READ);
    }
    assert_eq!(deliver(&mut bench, &[]), (Batch::default(), vec![]));
    assert_eq!(bench.device.statistics().faults_dropped, 4);
    for page in 0..256 {
        let (batch, returned) = deliver(&mut bench, &[vec![Piece::Writable(SIZE)]]);
        assert_eq!(batch, Batch { handled: 1, more: false, notify: true });
        assert_eq!(returned[0].bytes[16..24], (page * PAGE).to_le_bytes());
    }
    assert_eq!(deliver(&mut bench, &[vec![Piece::Writable(SIZE)]]), (Batch::default(), vec![]), "none is left");
}

/// Driver (5.13.6.9, text): "The driver initially populates the queue with device-writeable buffers."
/// Answer: One that cannot be written comes back, and the event waits. Where in the chain the room is does not matter.
#[test]
fn a_buffer_that_cannot_be_written_comes_back() {
    let mut bench = bench(Flavour::Iommufd);
    refuse_map(&mut bench, 0x7000, READ);
    let (_, returned) = deliver(&mut bench, &[vec![Piece::Readable(vec![0; SIZE])]]);
    assert_eq!(returned, [Returned { chain: 0, used: 0, bytes: vec![] }]);
    let split = vec![Piece::Readable(vec![0; 5]), Piece::Writable(1), Piece::Writable(SIZE - 1)];
    let (_, returned) = deliver(&mut bench, &[split]);
    assert_eq!((returned[0].used, returned[0].bytes[0]), (SIZE as u32, R_MAPPING));
}
