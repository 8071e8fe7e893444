// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! PROBE, with room of any size.

use virtio_iommu::request::LARGEST_REPLY;
use virtio_iommu::spec::feature;
use virtio_queue::desc::split::Descriptor;

use crate::common::alone::{alone, peak_memory};
use crate::common::probe;
use crate::machine::{FILL, INVAL, LONE, Machine, NEXT, OK, PROBE_SIZE, REPLY, REQUEST, Reply, WRITABLE};

/// The one property there is: the MSI region.
fn property() -> Vec<u8> {
    let mut bytes = vec![1, 0, 20, 0, 1, 0, 0, 0];
    bytes.extend(0xfee0_0000u64.to_le_bytes());
    bytes.extend(0xfeef_ffffu64.to_le_bytes());
    bytes
}

#[test]
fn a_reply_of_every_length_is_written_to_its_end_and_no_further() {
    let mut machine = Machine::new();
    let before = machine.view();
    for writable in 0..=PROBE_SIZE + 12 {
        let reply = machine.send(&probe(LONE.0), writable);
        let room = writable.saturating_sub(4) as usize;
        let expected = match writable {
            0..4 => Reply { status: FILL, used: 0, body: Vec::new() },
            4..68 => Reply { status: INVAL, used: writable, body: vec![0; room] },
            _ => {
                let mut body = property();
                body.resize(room, 0);
                Reply { status: OK, used: writable, body }
            }
        };
        assert_eq!(reply, expected, "{writable} bytes");
    }
    assert_eq!(machine.view(), before);
}

#[test]
fn a_reply_of_four_gibibytes_is_not_made() {
    alone("probe::a_reply_of_four_gibibytes_is_not_made", || {
        let mut machine = Machine::new();
        let reply = machine.send(&probe(LONE.0), LARGEST_REPLY as u32);
        assert_eq!((reply.status, reply.used), (OK, LARGEST_REPLY as u32));
        let memory = peak_memory();
        for length in [LARGEST_REPLY as u32 + 1, u32::MAX - 72] {
            let Machine { device, ring, requests, .. } = &mut machine;
            ring.put(0, &[Descriptor::new(REQUEST, 72, NEXT, 1), Descriptor::new(REPLY, length, WRITABLE, 0)]);
            ring.offer(0);
            let returned = ring.writing_only(
                |ring| {
                    requests.process(device, &mut ring.queue, &ring.memory, 64).unwrap();
                    ring.take()
                },
                |_| (0, 0),
            );
            assert_eq!(returned, Some((0, 0)), "{length:#x} bytes");
        }
        assert!(peak_memory() - memory < 16 << 20, "a guest has memory allocated");
        assert_eq!(machine.send(&probe(LONE.0), PROBE_SIZE + 4).status, OK);
    });
}

#[test]
fn a_driver_that_did_not_accept_the_feature_is_answered_all_the_same() {
    let mut machine = Machine::new();
    assert!(machine.device.features() & feature::PROBE != 0, "it is always offered");
    let expected = machine.send(&probe(LONE.0), PROBE_SIZE + 4);
    machine.device.set_driver_features(machine.device.features() & !feature::PROBE);
    assert_eq!(machine.send(&probe(LONE.0), PROBE_SIZE + 4), expected);
}
