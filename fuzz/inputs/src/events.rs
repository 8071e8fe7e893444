// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fault events, and event queues of a driver that writes what it likes.

use std::collections::VecDeque;
use std::sync::Arc;

use virtio_iommu::access::Access;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::fake::{Failure, FakeHost, Flavour};
use virtio_iommu::host::{HostErrorKind, HostGroup};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::queue::deliver_faults;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::translate::{Limits, Translation, Translator};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemory, GuestMemoryMmap};

use crate::machine::{RAM, encode, input_range};
use crate::rings::{Image, Input, Layout, Memory, Model, ORDERLY, Outcome, Touch, Walked};
use crate::traced::TracedMemory;
use crate::wire::operations;

/// Emulated, and in no domain.
const ALONE: EndpointId = EndpointId(8);
/// Emulated, in a domain with one page that can be read.
const READER: EndpointId = EndpointId(9);
/// Behind a host that fails.
const FAILING: EndpointId = EndpointId(16);
/// What a group keeps until the device asks.
const KEPT_BY_GROUP: usize = 32;
/// What the device keeps until the driver has a buffer.
const KEPT_BY_DEVICE: usize = 256;

operations! {
    /// What happens.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Step {
        /// The driver writes to memory.
        Write { touch: Touch, },
        /// An emulated device accesses an address, so many times.
        Access { reader: bool, address: u64, write: bool, times: u8, },
        /// The host fails to map a page.
        Fail { page: u8, flags: u8, },
        /// The driver is given events.
        Deliver { budget: u8, },
        /// The driver resets the device, and sets the queue up anew.
        Reset { layout: Layout, },
    }
}

/// An event by the book, and its bytes.
type Event = [u8; 24];

/// What waits to be told: by each emulated endpoint's group, and by the device.
#[derive(Default)]
struct Waiting {
    groups: [VecDeque<Event>; 2],
    device: VecDeque<Event>,
    dropped: u64,
}

impl Waiting {
    fn push(queue: &mut VecDeque<Event>, most: usize, dropped: &mut u64, event: Event) {
        if queue.len() < most {
            queue.push_back(event);
        } else {
            *dropped += 1;
        }
    }

    /// The device asks the groups.
    fn collect(&mut self) {
        for group in &mut self.groups {
            for event in group.drain(..) {
                Self::push(&mut self.device, KEPT_BY_DEVICE, &mut self.dropped, event);
            }
        }
    }
}

/// `struct virtio_iommu_fault`, of an access to an address.
fn event(reason: u8, flags: u32, endpoint: EndpointId, address: u64) -> Event {
    const ADDRESS: u32 = 1 << 8;
    let mut event = [0; 24];
    event[0] = reason;
    event[4..8].copy_from_slice(&(flags | ADDRESS).to_le_bytes());
    event[8..12].copy_from_slice(&endpoint.0.to_le_bytes());
    event[16..].copy_from_slice(&address.to_le_bytes());
    event
}

struct Run {
    host: FakeHost,
    device: VirtioIommu,
    translators: [Translator; 2],
    waiting: Waiting,
    memory: Memory,
    traced: bool,
    layout: Layout,
    queue: Queue,
    /// `None` from where the book ends.
    model: Option<Model>,
}

impl Run {
    fn new(traced: bool, layout: Layout) -> Self {
        let memory: Memory =
            GuestMemoryMmap::from_ranges(&RAM.map(|(start, length)| (start, length as usize))).expect("memory");
        let translation = Translation::new(Limits { nodes: 64, ..Limits::default() });
        let emulated = [ALONE, READER].map(|id| Arc::new(translation.group(vec![id])));
        let translators = [0, 1].map(|at| emulated[at].translator([ALONE, READER][at]).expect("a member"));
        let host = FakeHost::new(Flavour::Iommufd);
        let failing = host.group(&[FAILING], RangeSet::from(IovaRange::ALL));
        let groups = emulated.into_iter().map(|group| group as Arc<dyn HostGroup>).chain([failing]).collect();
        let endpoints = [ALONE, READER, FAILING].map(|id| (id, EndpointView::default())).to_vec();
        let settings = Settings { boot_bypass: false, ..Settings::new(input_range(), 0x1000) };
        let mut device = VirtioIommu::new(settings, endpoints, groups).expect("they fit each other");
        device.set_memory(GuestRam::in_software(&RAM).expect("disjoint regions"));
        let (waiting, queue) = (Waiting::default(), layout.queue(&memory));
        let mut run = Self { host, device, translators, waiting, memory, traced, layout, queue, model: None };
        run.reset(layout);
        run
    }

    fn reset(&mut self, layout: Layout) {
        self.device.reset();
        self.waiting.collect();
        self.waiting.device.clear();
        self.device.set_driver_features(self.device.features());
        for request in
            [encode::attach(1, READER.0, 0), encode::map(1, 0x1000, 0x1fff, 0, 1), encode::attach(2, FAILING.0, 0)]
        {
            assert_eq!(self.send(&request), 0, "an orderly request is done");
        }
        self.layout = layout;
        self.queue = layout.queue(&self.memory);
        self.model = layout.is_orderly().then(|| Model::new(layout, &self.memory));
    }

    fn send(&mut self, request: &[u8]) -> u8 {
        let mut reply = [0xaa; 4];
        assert_eq!(self.device.handle(request, &mut reply), 4);
        reply[0]
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Write { touch } => touch.apply(self.layout, &self.memory),
            Step::Access { reader, address, write, times } => {
                (0..=*times % 64).for_each(|_| self.access(*reader, *address, *write));
            }
            Step::Fail { page, flags } => self.fail(u64::from(*page) << 12, u32::from(*flags % 3) + 1),
            Step::Deliver { budget } => self.deliver(usize::from(*budget)),
            Step::Reset { layout } => self.reset(*layout),
        }
        assert_eq!(self.device.statistics().faults_dropped, self.waiting.dropped, "other events are lost");
    }

    fn access(&mut self, reader: bool, address: u64, write: bool) {
        let translator = &self.translators[usize::from(reader)];
        let access = if write { Access::WRITE } else { Access::READ };
        let found = translator.with_translation(address, 1, access, |mut pieces| pieces.next());
        let allowed = reader && (0x1000..0x2000).contains(&address) && !write;
        assert_eq!(found.is_some_and(|piece| piece.is_ok()), allowed, "{address:#x} is let through, or is not");
        if !allowed {
            let flags = if write { 2 } else { 1 };
            let event = event(if reader { 2 } else { 1 }, flags, translator.endpoint(), address);
            let Waiting { groups, dropped, .. } = &mut self.waiting;
            Waiting::push(&mut groups[usize::from(reader)], KEPT_BY_GROUP, dropped, event);
        }
    }

    fn fail(&mut self, iova: u64, flags: u32) {
        self.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
        assert_ne!(self.send(&encode::map(2, iova, iova | 0xfff, 0, flags)), 0, "a failure is not told");
        let Waiting { device, dropped, .. } = &mut self.waiting;
        Waiting::push(device, KEPT_BY_DEVICE, dropped, event(2, flags, FAILING, iova));
    }

    fn deliver(&mut self, budget: usize) {
        if let Some(model) = &mut self.model {
            model.image = Image::of(&self.memory);
        }
        let result = if self.traced {
            deliver(&mut self.device, &mut self.queue, &TracedMemory::new(&self.memory, Vec::new()), budget)
        } else {
            deliver(&mut self.device, &mut self.queue, &self.memory, budget)
        };
        self.waiting.collect();
        match (self.model.take(), result) {
            (Some(model), result) => self.check_by_the_book(model, result, budget),
            // Which of them were told is for the driver to know: those that are left are the last of them.
            (None, _) => self.check_what_is_left(),
        }
        if result.is_none() {
            self.reset(ORDERLY);
        }
    }

    fn check_by_the_book(&mut self, mut model: Model, result: Option<(usize, bool)>, budget: usize) {
        struct Told<'w> {
            waiting: &'w mut VecDeque<Event>,
            left: usize,
        }
        let mut told = Told { waiting: &mut self.waiting.device, left: budget };
        let answer = |told: &mut Told<'_>, chain: Option<&Walked>| {
            told.left -= 1;
            let fits = chain.is_some_and(|chain| chain.room() >= size_of::<Event>());
            told.waiting.front().filter(|_| fits).map_or(Vec::new(), |event| event.to_vec())
        };
        let written = |told: &mut Told<'_>, length: usize| {
            if length != 0 {
                told.waiting.pop_front();
            }
        };
        let goes_on = |told: &Told<'_>| told.left != 0 && !told.waiting.is_empty();
        let outcome = model.serve(&mut told, goes_on, answer, written);
        let some_are_left = !told.waiting.is_empty();
        match outcome {
            Outcome::Wild => return self.check_what_is_left(),
            Outcome::Broken => assert_eq!(result, None, "a broken queue is served"),
            Outcome::Returned(returned) => {
                // With no budget at all, the index is looked at all the same.
                if result.is_none() {
                    assert_eq!((returned, budget), (0, 0), "an orderly queue is not served");
                    return self.check_what_is_left();
                }
                let (handled, more) = result.unwrap_or_default();
                assert_eq!(handled, returned, "other buffers are returned");
                assert!(!more || some_are_left, "there is more of nothing");
            }
        }
        model.compare(&self.memory);
        assert_eq!(self.queue.next_used(), model.next_used(), "the queue is elsewhere");
        self.model = Some(model);
        self.check_what_is_left();
    }

    /// The device keeps what was not told, in order.
    fn check_what_is_left(&mut self) {
        let faults = self.device.save().faults;
        let kept = faults.iter().map(|fault| {
            let flags = u32::from(fault.read) | u32::from(fault.write) << 1;
            event(fault.reason, flags, EndpointId(fault.endpoint), fault.address.expect("all have one"))
        });
        let kept: VecDeque<Event> = kept.collect();
        let told = self.waiting.device.len().checked_sub(kept.len()).expect("no more than there were");
        if self.model.is_some() {
            assert_eq!(told, 0, "events are lost, or told twice");
        }
        self.waiting.device.drain(..told);
        assert!(kept == self.waiting.device, "other events are left");
    }

    /// After all that, a driver that starts anew is told.
    fn finish(mut self) {
        use vm_memory::{Bytes, GuestAddress};
        self.reset(ORDERLY);
        self.step(&Step::Access { reader: false, address: 0x1234_5678, write: true, times: 0 });
        for touch in buffer(0, 0x5000, 24) {
            self.step(&Step::Write { touch });
        }
        self.step(&Step::Deliver { budget: 8 });
        let told: Event = self.memory.read_obj(GuestAddress(0x5000)).expect("memory");
        assert_eq!(told, event(1, 2, ALONE, 0x1234_5678), "an orderly driver is not told");
    }
}

/// How many buffers were returned, and whether there may be more events; `None` for a broken queue.
fn deliver<M: GuestMemory>(
    device: &mut VirtioIommu,
    queue: &mut Queue,
    memory: &M,
    budget: usize,
) -> Option<(usize, bool)> {
    let batch = deliver_faults(device, queue, memory, budget).ok()?;
    assert!(batch.handled <= budget, "the budget is exceeded");
    Some((batch.handled, batch.more))
}

/// A buffer of one descriptor, made available.
fn buffer(index: u8, address: u32, length: u32) -> [Touch; 2] {
    [Touch::Descriptor { index, address, length, flags: 2, next: 0 }, Touch::Available { head: index.into() }]
}

/// Lets happen what the bytes say.
pub fn check(bytes: &[u8]) {
    let Input { traced, layout, steps } = Input::<Step>::read(bytes);
    let mut run = Run::new(traced, layout);
    for step in &steps {
        run.step(step);
    }
    run.finish();
}

/// Buffers that are large enough, and some that are not; more events than can wait.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seed =
        |traced: bool, layout: Layout, steps: &[Vec<Step>]| Input { traced, layout, steps: steps.concat() }.bytes();
    let put = |index, address, length| buffer(index, address, length).map(|touch| Step::Write { touch }).to_vec();
    let access = |reader, address, times| vec![Step::Access { reader, address, write: true, times }];
    let deliver = |budget| vec![Step::Deliver { budget }];
    let no_event_idx = Layout { event_idx: false, start: 0xffff, ..ORDERLY };
    vec![
        ("told", seed(false, ORDERLY, &[access(true, 0x1000, 0), put(0, 0x5000, 24), put(1, 0x7ff0, 32), deliver(9)])),
        (
            "too-small",
            seed(true, ORDERLY, &[access(false, u64::MAX, 1), put(2, 0x5000, 23), put(3, 0x5000, 24), deliver(9)]),
        ),
        (
            "nowhere",
            seed(
                false,
                no_event_idx,
                &[vec![Step::Fail { page: 3, flags: 1 }], put(0, 0xa_0000, 24), deliver(1), deliver(1)],
            ),
        ),
        (
            "too-many",
            seed(
                false,
                ORDERLY,
                &[
                    std::iter::repeat_n([access(true, 0, 40), deliver(1)].concat(), 9).flatten().collect(),
                    put(0, 0x5000, 24),
                    deliver(3),
                ],
            ),
        ),
        ("broken", seed(false, ORDERLY, &[access(true, 0, 1), put(200, 0, 24), deliver(4)])),
    ]
}
