// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fault events for guests that do not take them, and more of them than any guest takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_iommu::access::Access;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::Failure;
use virtio_iommu::id::EndpointId;
use virtio_iommu::queue::{Batch, deliver_faults};
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::translate::{Limits, Translation};
use virtio_queue::desc::split::Descriptor;

use crate::common::alone::Ends;
use crate::common::{attach, map};
use crate::machine::{
    FILL, LONE, Machine, NEXT, NOMEM, OK, READ, REPLY, REQUEST, Ring, WRITABLE, WRITE, ram, settings,
};

/// How many events wait at most.
const WAITING: u64 = 256;
/// How many refused accesses wait before they are events.
const REFUSED: u64 = 32;

/// `struct virtio_iommu_fault` of a MAP that the host refused.
fn event(address: u64, access: u32) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[0] = 2;
    bytes[4..8].copy_from_slice(&(access | 0x100).to_le_bytes());
    bytes[8..12].copy_from_slice(&LONE.0.to_le_bytes());
    bytes[16..].copy_from_slice(&address.to_le_bytes());
    bytes
}

impl Machine {
    fn attached() -> Self {
        let mut machine = Self::new();
        assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
        machine
    }

    /// A MAP that the host refuses, which makes an event.
    fn fail_map(&mut self, iova: u64, flags: u32) {
        self.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
        assert_eq!(self.send(&map(1, iova, 0x1000, 0x8000, flags), 4).status, NOMEM);
        while self.device.next_notice().is_some() {}
    }
}

#[test]
fn events_that_nobody_takes_are_dropped_and_counted_and_hold_nothing_up() {
    const FAULTS: u64 = 1000;
    let mut machine = Machine::attached();
    // No buffer: another ring, which is empty.
    let mut events = Ring::new();
    for turn in 0..FAULTS {
        machine.fail_map(turn << 12, READ);
        let Machine { device, .. } = &mut machine;
        let batch = events
            .writing_only(|events| deliver_faults(device, &mut events.queue, &events.memory, 64).unwrap(), |_| (0, 0));
        assert_eq!(batch, Batch::default());
    }
    assert_eq!(machine.device.statistics().faults_dropped, FAULTS - WAITING);
    assert_eq!(machine.request(&map(1, 0, 0x1000, 0x8000, READ)), OK, "requests are served");
    // Buffers come: the oldest are there, in their order.
    for turn in 0..WAITING {
        events.put(0, &[Descriptor::new(REPLY, 24, WRITABLE, 0)]);
        events.offer(0);
        let batch = deliver_faults(&mut machine.device, &mut events.queue, &events.memory, 64).unwrap();
        assert_eq!((batch.handled, events.take()), (1, Some((0, 24))));
        assert_eq!(events.read(REPLY, 24), event(turn << 12, 1), "event {turn}");
    }
    assert_eq!(machine.device.first_fault(), None);
}

#[test]
fn an_event_is_in_one_buffer_that_is_large_enough_and_nowhere_else() {
    let event_is_in = |buffer: &[Descriptor], is_in: Option<&[(u64, usize)]>| {
        let mut machine = Machine::attached();
        machine.fail_map(0x1234_5000, WRITE);
        let mut events = Ring::new();
        // The buffer, and one that is as it should be.
        let good = buffer.len() as u16;
        events.put(0, buffer);
        events.put(good, &[Descriptor::new(REPLY + 0x800, 24, WRITABLE, 0)]);
        events.offer(0);
        events.offer(good);
        let Machine { device, .. } = &mut machine;
        // The two places are in one page, of which all else stays as it was.
        events.writing_only(
            |events| deliver_faults(device, &mut events.queue, &events.memory, 64).unwrap(),
            |_| (REPLY, 0x1000),
        );
        assert_eq!(device.first_fault(), None);
        let mut expected = vec![FILL; 0x1000];
        let good_place = [(REPLY + 0x800, 24)];
        let bytes = event(0x1234_5000, 2);
        let mut written = 0;
        for (start, length) in is_in.unwrap_or(&good_place) {
            let start = (start - REPLY) as usize;
            expected[start..start + length].copy_from_slice(&bytes[written..written + length]);
            written += length;
        }
        assert_eq!(events.read(REPLY, 0x1000), expected, "{buffer:?}");
        let returned = [events.take(), events.take()];
        let used = if is_in.is_some() { [Some((0, 24)), None] } else { [Some((0, 0)), Some((u32::from(good), 24))] };
        assert_eq!(returned, used, "{buffer:?}");
    };
    // Too small, by one byte and by all; not to be written; not memory.
    event_is_in(&[Descriptor::new(REPLY, 23, WRITABLE, 0)], None);
    event_is_in(&[Descriptor::new(REPLY, 0, WRITABLE, 0)], None);
    event_is_in(&[Descriptor::new(REPLY, 24, 0, 0)], None);
    event_is_in(&[Descriptor::new(u64::MAX - 30, 24, WRITABLE, 0)], None);
    event_is_in(
        &[Descriptor::new(REPLY, 12, WRITABLE | NEXT, 1), Descriptor::new(REPLY + 0x100, 11, WRITABLE, 0)],
        None,
    );
    event_is_in(&[Descriptor::new(REPLY, 24, WRITABLE | NEXT, 0)], None);
    // One that is larger is written no further; one in parts, of which some are read, is one buffer.
    event_is_in(&[Descriptor::new(REPLY, 4096, WRITABLE, 0)], Some(&[(REPLY, 24)]));
    let parts = [
        Descriptor::new(REQUEST, 8, NEXT, 1),
        Descriptor::new(REPLY + 0x100, 5, WRITABLE | NEXT, 2),
        Descriptor::new(REPLY, 40, WRITABLE, 0),
    ];
    event_is_in(&parts, Some(&[(REPLY + 0x100, 5), (REPLY, 19)]));
}

#[test]
fn a_flood_of_refused_accesses_holds_no_request_up() {
    const DEVICE: EndpointId = EndpointId(0x20);
    const REQUESTS: u32 = 2000;
    let group = Arc::new(Translation::new(Limits::default()).group(vec![DEVICE]));
    let translator = group.translator(DEVICE).unwrap();
    let settings = Settings { boot_bypass: false, ..settings() };
    let views = vec![(DEVICE, EndpointView::default())];
    let device = VirtioIommu::new(settings, views, vec![Arc::clone(&group) as _]).unwrap();
    let mut machine = Machine { device, ..Machine::new() };
    machine.device.set_memory(ram());
    let ended = AtomicBool::new(false);
    let flood = || {
        let mut accesses = 0;
        // Some at least, however late this begins.
        while accesses < 10_000 || !ended.load(Ordering::Acquire) {
            translator.with_translation(accesses << 12, 8, Access::WRITE, |mut segments| {
                assert!(segments.next().unwrap().is_err(), "nothing allows that");
            });
            accesses += 1;
        }
        accesses
    };
    let accesses = std::thread::scope(|scope| {
        let flooding = scope.spawn(flood);
        let _ends = Ends(&ended);
        for request in 0..REQUESTS {
            // From one domain to another, neither of which maps anything.
            assert_eq!(machine.send(&attach(request % 2, DEVICE.0, 0), 4).status, OK);
            // As whoever delivers events does.
            let _ = machine.device.first_fault();
        }
        ended.store(true, Ordering::Release);
        flooding.join().unwrap()
    });
    // What came after the last of them.
    let _ = machine.device.first_fault();
    // Of all accesses, some wait, and the others are counted.
    let waiting = machine.device.save().faults.len() as u64;
    assert!(waiting <= WAITING, "{waiting}");
    assert_eq!(machine.device.statistics().faults_dropped, accesses - waiting);
    assert!(waiting > REFUSED, "those that a group keeps were collected");
}
