// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An endpoint that goes while requests for it wait.

use virtio_queue::desc::split::Descriptor;

use crate::common::{attach, map, unmap};
use crate::machine::{
    LEFT, LONE, Machine, NEXT, NOENT, OK, READ, REPLY, REQUEST, RING_SIZE, WRITABLE, msi_view, usable,
};

#[test]
fn requests_that_wait_for_an_endpoint_that_goes_are_noent_and_its_successor_inherits_nothing() {
    let mut machine = Machine::new();
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    assert_eq!(machine.request(&map(1, 0x5000, 0x1000, 0x8000, READ)), OK);
    assert_eq!(machine.request(&attach(2, LEFT.0, 0)), OK);
    assert_eq!(machine.request(&map(2, 0x5000, 0x1000, 0x9000, READ)), OK);
    // In one kick.
    let requests = [
        map(1, 0x6000, 0x1000, 0x8000, READ),
        map(1, 0x7000, 0x1000, 0x8000, READ),
        unmap(1, 0x5000, 0x1000),
        attach(3, LONE.0, 0),
        map(2, 0x6000, 0x1000, 0x9000, READ),
    ];
    assert!(requests.len() * 2 <= usize::from(RING_SIZE));
    for (index, bytes) in (0u16..).zip(&requests) {
        let offset = u64::from(index) * 0x100;
        machine.ring.write(bytes, REQUEST + offset);
        machine.ring.put(
            index * 2,
            &[
                Descriptor::new(REQUEST + offset, bytes.len() as u32, NEXT, index * 2 + 1),
                Descriptor::new(REPLY + offset, 4, WRITABLE, 0),
            ],
        );
        machine.ring.offer(index * 2);
    }
    // One is answered, then the device goes.
    assert!(machine.process(1).unwrap().more);
    assert_eq!(machine.reads(LONE, 0x6000), Some(0x8000));
    assert!(machine.device.remove_endpoint(LONE));
    assert!(machine.is_blocked(LONE));
    assert_eq!(machine.host.released(), [LONE]);
    assert!(!machine.process(64).unwrap().more);
    for (index, status) in (0u32..).zip([OK, NOENT, NOENT, NOENT, OK]) {
        assert_eq!(machine.ring.take(), Some((index * 2, 4)));
        assert_eq!(machine.ring.read(REPLY + u64::from(index) * 0x100, 5), [status, 0, 0, 0, 0xaa], "request {index}");
    }
    assert!(machine.is_blocked(LONE));
    assert_eq!(machine.reads(LEFT, 0x6000), Some(0x9000), "others are served");
    // Another device with the same ID.
    let group = machine.host.regroup(&[LONE], usable());
    machine.device.add_group(group, vec![(LONE, msi_view())]).unwrap();
    assert_eq!(machine.request(&unmap(1, 0x5000, 0x1000)), NOENT, "its domain is gone");
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    for iova in [0x5000, 0x6000, 0x7000] {
        assert_eq!(machine.reads(LONE, iova), None, "{iova:#x}");
    }
}
