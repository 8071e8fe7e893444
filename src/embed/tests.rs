// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as a transport and a loop see it.

use std::sync::Mutex;

use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use super::*;
use crate::device::Settings;
use crate::host::HostErrorKind;
use crate::host::HostGroup;
use crate::host::fake::{Attachment, Failure, FakeHost, Flavour};
use crate::id::EndpointId;
use crate::memory::GuestRam;
use crate::range::{IovaRange, RangeSet};
use crate::reserved::EndpointView;

const ENDPOINT: EndpointId = EndpointId(8);
const REPLY: u64 = 0x2_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

type Memory = GuestMemoryMmap<()>;

#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Transport for Told {
    fn buffers_used(&self, queue: u16) {
        self.0.lock().unwrap().push(format!("used {queue}"));
    }

    fn needs_reset(&self, reason: &QueueError) {
        self.0.lock().unwrap().push(format!("reset: {reason}"));
    }
}

impl Told {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

struct Machine {
    host: FakeHost,
    memory: Memory,
    told: Arc<Told>,
    iommu: EmbeddedIommu<GuestMemoryAtomic<Memory>>,
}

impl Machine {
    fn new() -> Self {
        let host = FakeHost::new(Flavour::Iommufd);
        let group: Arc<dyn HostGroup> = host.group(&[ENDPOINT], RangeSet::from(IovaRange::ALL));
        let settings = Settings::new("0-ffffffff".parse().unwrap(), 0x1000);
        let endpoints = vec![(ENDPOINT, EndpointView::default())];
        let mut device = VirtioIommu::new(settings, endpoints, vec![group]).unwrap();
        device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 0x8000_0000)]).unwrap());
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let told = Arc::new(Told::default());
        let space = GuestMemoryAtomic::new(memory.clone());
        let iommu = EmbeddedIommu::new(device, space, Arc::clone(&told) as Arc<dyn Transport>).unwrap();
        Self { host, memory, told, iommu }
    }

    fn accept_features(&mut self) {
        for page in 0..3 {
            let offered = self.iommu.features_page(page);
            // Without EVENT_IDX.
            self.iommu.acknowledge_features(page, if page == 0 { offered & !(1 << 29) } else { offered });
        }
    }

    /// The queues of a driver with these requests, and buffers for two events.
    fn queues(&self, requests: &[Vec<u8>]) -> [Queue; 2] {
        let mock = MockSplitQueue::create(&self.memory, GuestAddress(0), 16);
        let mut descriptors: Vec<RawDescriptor> = Vec::new();
        for (index, request) in (0u16..).zip(requests) {
            let offset = u64::from(index) * 0x100;
            self.memory.write_slice(request, GuestAddress(0x1_0000 + offset)).unwrap();
            let readable = Descriptor::new(0x1_0000 + offset, request.len() as u32, NEXT, index * 2 + 1);
            descriptors.push(readable.into());
            descriptors.push(Descriptor::new(REPLY + offset, 4, WRITE, 0).into());
        }
        if !descriptors.is_empty() {
            mock.build_multiple_desc_chains(&descriptors).unwrap();
        }
        let events = MockSplitQueue::create(&self.memory, GuestAddress(0x8000), 16);
        let buffers = [0, 1].map(|index| Descriptor::new(0x3_0000 + index * 0x100, 24, WRITE, 0).into());
        events.build_multiple_desc_chains(&buffers).unwrap();
        [mock.create_queue().unwrap(), events.create_queue().unwrap()]
    }

    fn started(requests: &[Vec<u8>]) -> Self {
        let mut machine = Self::new();
        machine.accept_features();
        let queues = machine.queues(requests);
        machine.iommu.start(queues).unwrap();
        machine
    }

    fn status(&self, request: u64) -> u8 {
        self.memory.read_obj(GuestAddress(REPLY + request * 0x100)).unwrap()
    }

    /// Whether the loop would wake up for a file.
    fn is_readable(&self, which: usize) -> bool {
        let files = [&self.iommu.kicks[0], &self.iommu.kicks[1], self.iommu.wake.as_ref()];
        assert_eq!(self.iommu.fds()[which], files[which].as_raw_fd());
        files[which].read().is_ok_and(|count| files[which].write(count).is_ok())
    }
}

fn words(fields: &[u32]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

fn attach() -> Vec<u8> {
    words(&[1, 1, ENDPOINT.0, 0, 0])
}

/// A MAP of so many GiB, each of which is a step.
fn map(gibibytes: u32) -> Vec<u8> {
    words(&[3, 1, 0, 0, (gibibytes << 30) - 1, 0, 0, 0, 1])
}

#[test]
fn features_and_configuration_are_read_and_written_in_pieces() {
    let mut machine = Machine::new();
    let features = machine.iommu.device_mut().features();
    let pages = [0, 1, 2, u32::MAX].map(|page| machine.iommu.features_page(page));
    assert_eq!(pages, [features as u32, (features >> 32) as u32, 0, 0]);
    let mut whole = [0xff; 48];
    machine.iommu.read_config(0, &mut whole);
    assert_eq!((&whole[..40], &whole[40..]), (&machine.iommu.device_mut().config()[..], &[0; 8][..]));
    let mut part = [0xff; 4];
    machine.iommu.read_config(36, &mut part);
    assert_eq!(part, [1, 0, 0, 0]);
    for offset in [40, 1 << 40, u64::MAX] {
        machine.iommu.read_config(offset, &mut part);
        assert_eq!(part, [0; 4]);
        machine.iommu.write_config(offset, &[0; 4]);
    }
    assert_eq!(machine.iommu.device_mut().config()[36], 1);
    machine.iommu.write_config(36, &[0]);
    assert_eq!(machine.iommu.device_mut().config()[36], 0);
    assert_eq!(machine.host.attachment(ENDPOINT), Attachment::Blocked);
}

#[test]
fn what_a_driver_did_not_set_up_is_not_started() {
    let mut machine = Machine::new();
    let queues = machine.queues(&[]);
    machine.iommu.acknowledge_features(0, u32::MAX);
    machine.iommu.acknowledge_features(7, u32::MAX);
    assert!(matches!(machine.iommu.start(queues), Err(StartError::Legacy)));
    machine.accept_features();
    for index in 0..2u16 {
        let mut queues = machine.queues(&[]);
        queues[usize::from(index)].set_ready(false);
        assert!(matches!(machine.iommu.start(queues), Err(StartError::Queue(found)) if found == index));
        assert!(machine.iommu.pause().is_none());
    }
    machine.iommu.on_request_kick(64);
    machine.iommu.on_event_kick(64);
    machine.iommu.on_wake(64);
    assert_eq!(machine.told.take(), [""; 0]);
}

#[test]
fn requests_are_answered_and_events_delivered() {
    let mut machine = Machine::started(&[attach(), map(1)]);
    assert!(machine.is_readable(0), "the driver may have kicked before");
    machine.host.fail_after(3, Failure::Error(HostErrorKind::NoMemory));
    machine.iommu.on_request_kick(64);
    assert_eq!((machine.status(0), machine.status(1)), (0, 8));
    assert!(!machine.is_readable(0));
    assert_eq!(machine.told.take(), ["used 0", "used 1"], "the host refused: there is an event");
    let event: [u8; 24] = machine.memory.read_obj(GuestAddress(0x3_0000)).unwrap();
    assert_eq!((event[0], event[8]), (2, 8));
}

#[test]
fn what_the_budget_leaves_is_handled_in_the_next_turn() {
    let mut machine = Machine::started(&[attach(), attach(), attach()]);
    for (turn, more) in [(0, true), (1, true), (2, false)] {
        machine.memory.write_slice(&[0xaa; 0x300], GuestAddress(REPLY)).unwrap();
        machine.iommu.on_request_kick(1);
        assert_eq!(machine.is_readable(0), more, "turn {turn}");
        assert_eq!(machine.status(turn), 0);
    }
}

#[test]
fn a_pause_completes_what_is_under_way_and_a_start_goes_on() {
    let mut machine = Machine::started(&[attach(), map(2), attach()]);
    machine.iommu.on_request_kick(64);
    assert_eq!(machine.host.mappings(ENDPOINT).len(), 1, "a step of the MAP");
    assert!(machine.is_readable(0));
    machine.told.take();
    let queues = machine.iommu.pause().unwrap();
    assert_eq!((machine.told.take(), queues[0].next_avail()), (vec!["used 0".to_owned()], 2));
    assert_eq!((machine.status(1), machine.host.mappings(ENDPOINT).len()), (0, 2));
    machine.memory.write_slice(&[0xaa; 4], GuestAddress(REPLY + 0x200)).unwrap();
    machine.iommu.on_request_kick(64);
    assert_eq!(machine.status(2), 0xaa, "nothing is handled while it is paused");
    machine.iommu.start(queues).unwrap();
    machine.iommu.on_request_kick(64);
    assert_eq!(machine.status(2), 0);
}

#[test]
fn a_reset_forgets_and_a_system_reset_restores_bypass_too() {
    let mut machine = Machine::started(&[attach(), map(2)]);
    machine.iommu.on_request_kick(64);
    machine.iommu.write_config(36, &[0]);
    machine.iommu.reset();
    assert!(machine.iommu.pause().is_none());
    assert_eq!(machine.host.attachment(ENDPOINT), Attachment::Blocked, "bypass stays what it is");
    let queues = machine.queues(&[]);
    assert!(matches!(machine.iommu.start(queues), Err(StartError::Legacy)), "features are negotiated anew");
    machine.iommu.system_reset();
    assert_eq!(machine.host.dma(ENDPOINT, 0x1234, crate::access::Access::READ), Some(0x1234));
    machine.accept_features();
    let queues = machine.queues(&[attach()]);
    machine.iommu.start(queues).unwrap();
    machine.iommu.on_request_kick(64);
    assert_eq!(machine.status(0), 0);
}

#[test]
fn a_broken_queue_needs_a_reset() {
    let mut machine = Machine::started(&[attach()]);
    machine.memory.write_obj(1000u16, GuestAddress(16 * 16 + 2)).unwrap();
    machine.iommu.on_request_kick(64);
    let told = machine.told.take();
    assert!(matches!(&told[..], [reset] if reset.starts_with("reset: the driver made 1000")), "{told:?}");
    machine.iommu.on_request_kick(64);
    assert_eq!(machine.told.take(), [""; 0], "it is said once");
    assert!(machine.iommu.pause().is_none());
}

#[cfg(feature = "translate")]
#[test]
fn an_access_that_another_thread_was_refused_wakes_the_loop() {
    use crate::translate::{Limits, Translation};
    let group = Translation::new(Limits::default()).group(vec![EndpointId(9)]);
    let mut machine = Machine::started(&[]);
    machine.iommu.on_request_kick(64);
    group.on_refused(machine.iommu.waker());
    let translator = group.translator(EndpointId(9)).unwrap();
    let group: Arc<dyn HostGroup> = Arc::new(group);
    let endpoints = vec![(EndpointId(9), EndpointView::default())];
    machine.iommu.device_mut().add_group(group, endpoints).unwrap();
    assert!(!machine.is_readable(2));
    let thread = std::thread::spawn(move || {
        let write = crate::access::Access::WRITE;
        translator.with_translation(0xf000_0000, 8, write, |mut pieces| assert!(pieces.next().unwrap().is_err()));
    });
    thread.join().unwrap();
    assert!(machine.is_readable(2));
    machine.iommu.on_wake(64);
    assert_eq!(machine.told.take(), ["used 1"]);
    let event: [u8; 24] = machine.memory.read_obj(GuestAddress(0x3_0000)).unwrap();
    assert_eq!((event[0], event[8], &event[16..20]), (2, 9, &[0, 0, 0, 0xf0][..]));
    assert!(!machine.is_readable(2));
}

#[cfg(feature = "event-manager")]
#[test]
fn event_managers_loop_drives_it() {
    use event_manager::{EventManager, SubscriberOps};
    let mut machine = Machine::new();
    machine.accept_features();
    let queues = machine.queues(&[attach(), map(2)]);
    machine.iommu.start(queues).unwrap();
    let Machine { host, memory, told, iommu } = machine;
    let mut manager = EventManager::new().unwrap();
    manager.add_subscriber(iommu);
    // The start, then the second step of the MAP.
    while memory.read_obj::<u8>(GuestAddress(REPLY + 0x100)).unwrap() != 0 || host.mappings(ENDPOINT).len() < 2 {
        assert_ne!(manager.run_with_timeout(2000).unwrap(), 0, "{:?}", told.take());
    }
    assert_eq!(manager.run_with_timeout(0).unwrap(), 0, "nothing is left to do");
}

/// A driver that makes its next request available when it is told that one was answered, and does not kick.
struct Eager {
    memory: Memory,
    left: Mutex<u16>,
}

impl Transport for Eager {
    fn buffers_used(&self, _queue: u16) {
        let mut left = self.left.lock().unwrap();
        if *left > 0 {
            *left -= 1;
            let index = GuestAddress(16 * 16 + 2);
            let available: u16 = self.memory.read_obj(index).unwrap();
            self.memory.write_obj(available + 1, index).unwrap();
        }
    }

    fn needs_reset(&self, reason: &QueueError) {
        panic!("{reason}");
    }
}

#[test]
fn requests_that_come_while_the_queue_is_watched_need_no_kick() {
    let handled = |polling: Polling| {
        let mut machine = Machine::new();
        let eager = Arc::new(Eager { memory: machine.memory.clone(), left: Mutex::new(7) });
        machine.iommu.transport = eager;
        machine.accept_features();
        let queues = machine.queues(&vec![words(&[1, 1, ENDPOINT.0, 0, 0]); 8]);
        machine.memory.write_obj(1u16, GuestAddress(16 * 16 + 2)).unwrap();
        machine.iommu.start(queues).unwrap();
        machine.iommu.set_polling(polling);
        machine.iommu.on_request_kick(64);
        machine.iommu.device_mut().statistics().attach.ok()
    };
    assert_eq!(handled(Polling::Off), 1);
    // One may come when the time is over. A thread that does not get to run has watched for too long already.
    let most = (0..20).map(|_| handled(Polling::For(Polling::LONGEST))).max();
    assert_eq!(most, Some(8));
}
