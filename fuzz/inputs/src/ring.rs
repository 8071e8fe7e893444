// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Request queues of a driver that writes what it likes, when it likes, with a second device that gets what the first one read.

use std::collections::VecDeque;

use virtio_iommu::device::VirtioIommu;
use virtio_iommu::host::fake::Flavour;
use virtio_iommu::queue::{Batch, QueueError, Requests};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use crate::machine::{LONE, Machine, PAIR, RAM, encode};
use crate::rings::{Image, Input, Layout, Memory, Model, ORDERLY, Outcome, Touch, Walked, walk};
use crate::traced::{Access, Race, TracedMemory};
use crate::wire::operations;

operations! {
    /// What happens.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Step {
        /// The driver writes to memory.
        Write { touch: Touch, },
        /// The driver writes a request to memory, as it should be.
        Request { at: u16, kind: u8, domain: u8, number: u8, },
        /// The device has a look at the queue until nothing is left.
        Process { budget: u8, quietly: bool, },
        /// The driver will write this at an access of the device's.
        Race { after: u8, at: u16, bytes: Vec<u8>, },
        /// The driver resets the device, and sets the queue up anew.
        Reset { layout: Layout, },
    }
}

/// A device that reads a queue, and another one that is told what was in it.
struct Run {
    machine: Machine,
    twin: Machine,
    memory: Memory,
    requests: Requests,
    queue: Queue,
    layout: Layout,
    /// The queue by the book; `None` from where the book ends.
    model: Option<Model>,
    /// Whether the twin was told of everything.
    twin_knows: bool,
    races: Vec<Race>,
    traced: bool,
}

impl Run {
    fn new(traced: bool, layout: Layout) -> Self {
        let memory =
            GuestMemoryMmap::from_ranges(&RAM.map(|(start, length)| (start, length as usize))).expect("memory");
        let [machine, twin] = [0, 1].map(|_| Machine::new(Flavour::Iommufd, true));
        let queue = layout.queue(&memory);
        let requests = Requests::default();
        let (model, twin_knows, races) = (None, true, Vec::new());
        let mut run = Self { machine, twin, memory, requests, queue, layout, model, twin_knows, races, traced };
        run.reset(layout);
        run
    }

    fn reset(&mut self, layout: Layout) {
        for device in [&mut self.machine.device, &mut self.twin.device] {
            device.reset();
            device.set_driver_features(device.features());
        }
        self.requests.forget();
        self.layout = layout;
        self.queue = layout.queue(&self.memory);
        self.model = layout.is_orderly().then(|| Model::new(layout, &self.memory));
        self.twin_knows = true;
        self.races.clear();
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Write { touch } => touch.apply(self.layout, &self.memory),
            Step::Request { at, kind, domain, number } => {
                let bytes = request(*kind, *domain, *number);
                let _ = self.memory.write(&bytes, GuestAddress(u64::from(*at)));
            }
            Step::Process { budget, quietly } => self.process(usize::from(*budget % 64) + 1, *quietly),
            Step::Race { after, at, bytes } => {
                let (after, at, bytes) = (usize::from(*after), u64::from(*at), bytes.clone());
                self.races.push(Race { after, at, bytes });
            }
            Step::Reset { layout } => self.reset(*layout),
        }
    }

    fn process(&mut self, budget: usize, quietly: bool) {
        let before = Image::of(&self.memory);
        if let Some(model) = &mut self.model {
            model.image = before.clone();
        }
        let races = std::mem::take(&mut self.races);
        let (requests, device, queue) = (&mut self.requests, &mut self.machine.device, &mut self.queue);
        let result = if self.traced {
            let traced = TracedMemory::new(&self.memory, races.clone());
            let result = serve(requests, device, queue, &traced, (budget, quietly));
            let log = traced.into_log();
            self.check_writes(&before, &races, &log);
            if !races.is_empty() {
                self.model = None;
            }
            if self.model.is_none() && self.twin_knows {
                self.check_as_read(&log, result.as_ref().ok().copied());
            }
            result
        } else {
            serve(requests, device, queue, &self.memory, (budget, quietly))
        };
        self.machine.check();
        self.check_by_the_book(result.as_ref().ok().copied(), quietly);
        if result.is_err() {
            self.reset(ORDERLY);
        }
    }

    /// What was in memory before came to what the book says.
    fn check_by_the_book(&mut self, handled: Option<usize>, quietly: bool) {
        let Some(mut model) = self.model.take() else { return };
        let answer = |twin: &mut Machine, chain: Option<&Walked>| {
            let mut reply = vec![0; chain.map_or(0, Walked::room)];
            let used = chain.map_or(0, |chain| twin.device.handle(&chain.request, &mut reply));
            reply.truncate(used);
            reply
        };
        let outcome = model.serve(&mut self.twin, |_| true, answer, |_, _| ());
        match outcome {
            Outcome::Wild => {
                self.twin_knows = false;
                return;
            }
            Outcome::Broken => assert_eq!(handled, None, "a broken queue is served"),
            Outcome::Returned(returned) => assert_eq!(handled, Some(returned), "other chains are returned"),
        }
        model.compare(&self.memory);
        let indices = (self.queue.next_avail(), self.queue.next_used());
        assert_eq!(indices, (model.next_available(), model.next_used()), "the queue is elsewhere");
        assert_eq!(self.machine.device.save(), self.twin.device.save(), "the requests did something else");
        if outcome != Outcome::Broken && !quietly {
            self.check_kicks();
        }
        self.model = Some(model);
    }

    /// The driver is asked for a kick at the next chain.
    fn check_kicks(&self) {
        let [_, _, (used, length)] = self.layout.parts();
        let at = |address| self.memory.read_obj::<u16>(GuestAddress(address)).expect("an orderly queue");
        if self.layout.event_idx {
            assert_eq!(at(used + length - 2), self.queue.next_avail(), "no kick is asked for");
        } else {
            assert_eq!(at(used), 0, "no kick is asked for");
        }
    }

    /// I11 of docs/invariants.md: nothing is written but the used ring and what a descriptor that was read says.
    fn check_writes(&self, before: &Image, races: &[Race], log: &[Access]) {
        let [_, _, used] = self.layout.parts();
        let mut allowed = vec![used];
        allowed.extend(races.iter().map(|race| (race.at, race.bytes.len() as u64)));
        for access in log {
            if let Access::Read(_, bytes) = access
                && let Ok([address @ .., l0, l1, l2, l3, flags, _, _, _]) = <[u8; 16]>::try_from(&bytes[..])
                && flags & 2 != 0
            {
                allowed.push((u64::from_le_bytes(address), u32::from_le_bytes([l0, l1, l2, l3]).into()));
            }
        }
        let covered = |at: u64| allowed.iter().any(|(start, length)| at.wrapping_sub(*start) < *length);
        let after = Image::of(&self.memory);
        assert_eq!(before.differences(&after).find(|at| !covered(*at)), None, "what is not the device's was written");
    }

    /// I12: what was done is what follows from what was read, each thing once.
    fn check_as_read(&mut self, log: &[Access], handled: Option<usize>) {
        let [_, (available, _), _] = self.layout.parts();
        let entries = available + 4..available + 4 + u64::from(self.layout.size()) * 2;
        let mut log: VecDeque<_> = log.iter().collect();
        let mut taken = 0;
        while let Some(access) = log.pop_front() {
            let Access::Read(at, bytes) = access else { continue };
            let [low, high] = bytes[..] else { continue };
            let head = u16::from_le_bytes([low, high]);
            if !entries.contains(at) || head >= self.layout.size() {
                continue;
            }
            taken += 1;
            // The walk asks for things in the order in which a chain has them; each must have been read once, and next.
            let chain = walk(self.layout, head, &mut |at, length| match log.pop_front() {
                Some(Access::Read(address, bytes)) if *address == at => {
                    assert!(bytes.len() <= length, "{} bytes at {at:#x} are read, of {length}", bytes.len());
                    (bytes.len() == length).then(|| bytes.clone())
                }
                other => panic!("{length} bytes at {at:#x} are to be read, not {other:?}"),
            });
            if let Some(chain) = chain {
                self.twin.device.handle(&chain.request, &mut vec![0; chain.room()]);
            }
        }
        assert!(handled.is_none_or(|handled| handled == taken), "{handled:?} chains of {taken} are returned");
        assert_eq!(self.machine.device.save(), self.twin.device.save(), "what was done is not what was read");
    }

    /// After all that, a driver that starts anew is served.
    fn finish(mut self) {
        self.reset(ORDERLY);
        for step in orderly(0x4000, 0x5000, &encode::attach(1, LONE.0, 0)) {
            self.step(&step);
        }
        self.process(1, false);
        let reply: [u8; 4] = self.memory.read_obj(GuestAddress(0x5000)).expect("memory");
        assert_eq!((reply, self.queue.next_used()), ([0; 4], 1), "an orderly driver is not served");
    }
}

/// Serves a queue until nothing is left; how many chains that were. It comes to an end.
fn serve<M: GuestMemory>(
    requests: &mut Requests,
    device: &mut VirtioIommu,
    queue: &mut Queue,
    memory: &M,
    (budget, quietly): (usize, bool),
) -> Result<usize, QueueError> {
    // No chain takes more steps than the largest MAP has; then, as often as a race has moved the index.
    const MOST_CALLS: usize = 256 * 8 + 512;
    let mut handled = 0;
    for _ in 0..MOST_CALLS {
        let before = queue.next_used();
        let batch = if quietly {
            requests.process_quietly(device, queue, memory, budget)
        } else {
            requests.process(device, queue, memory, budget)
        }?;
        let Batch { handled: now, more, notify } = batch;
        assert!(now <= budget, "the budget is exceeded");
        assert_eq!(usize::from(queue.next_used().wrapping_sub(before)), now, "other chains are shown");
        assert!(!notify || now != 0, "the driver is notified of nothing");
        handled += now;
        if !more {
            return Ok(handled);
        }
    }
    panic!("a queue is served for ever");
}

/// A request as it should be, about few things.
fn request(kind: u8, domain: u8, number: u8) -> Vec<u8> {
    let domain = u32::from(domain % 3);
    let endpoint = [LONE.0, PAIR[0].0, PAIR[1].0, 5][usize::from(number % 4)];
    let (page, pages) = (u64::from(number % 16), u64::from(number / 16));
    let (first, last) = (page << 12, ((page + pages) << 12) | 0xfff);
    match kind % 6 {
        0 => encode::attach(domain, endpoint, 0),
        1 => encode::attach(domain, endpoint, 1),
        2 => encode::detach(domain, endpoint),
        3 => encode::map(domain, first, last, 0, 3),
        4 => encode::unmap(domain, first, last),
        _ => encode::probe(endpoint),
    }
}

/// A request in a chain of two descriptors, made available.
fn orderly(request: u32, reply: u32, bytes: &[u8]) -> Vec<Step> {
    let length = bytes.len() as u32;
    let touches = [
        Touch::Bytes { at: request, bytes: bytes.to_vec() },
        Touch::Descriptor { index: 0, address: request, length, flags: 1, next: 1 },
        Touch::Descriptor { index: 1, address: reply, length: 4, flags: 2, next: 0 },
        Touch::Available { head: 0 },
    ];
    touches.into_iter().map(|touch| Step::Write { touch }).collect()
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

/// Orderly queues, and some that are not.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seed =
        |traced: bool, layout: Layout, steps: &[Vec<Step>]| Input { traced, layout, steps: steps.concat() }.bytes();
    let process = || vec![Step::Process { budget: 7, quietly: false }];
    let write = |touch| vec![Step::Write { touch }];
    let attach = || orderly(0x4000, 0x5000, &encode::attach(1, LONE.0, 0));
    let map = || orderly(0x4100, 0x5100, &encode::map(1, 0, 0xffff, 0, 3));
    let split = Layout { order: 8, event_idx: false, table: 0x7f8, available: 0x2100, used: 0x1fff, start: 0xfffe };
    let indirect = |index, address, length, flags| {
        write(Touch::Indirect { table: 0x600, index, address, length, flags, next: index + 1 })
    };
    vec![
        ("orderly", seed(false, ORDERLY, &[attach(), process(), map(), process()])),
        ("across-regions", seed(true, split, &[attach(), process(), map(), process()])),
        (
            "indirect",
            seed(
                false,
                ORDERLY,
                &[
                    attach(),
                    indirect(0, 0x4000, 7, 1),
                    indirect(1, 0x4007, 13, 1),
                    indirect(2, 0x8_0000, 0, 3),
                    indirect(3, 0x7ffe, 4, 2),
                    write(Touch::Descriptor { index: 3, address: 0x6000, length: 64, flags: 4, next: 0 }),
                    write(Touch::Available { head: 3 }),
                    process(),
                ],
            ),
        ),
        (
            "racing",
            seed(
                true,
                ORDERLY,
                &[attach(), process(), map(), vec![Step::Race { after: 7, at: 0x4100, bytes: vec![4; 8] }], process()],
            ),
        ),
        (
            "nested",
            seed(
                false,
                ORDERLY,
                &[
                    attach(),
                    process(),
                    indirect(0, 0x6100, 32, 4),
                    write(Touch::Indirect { table: 0x610, index: 0, address: 0x4000, length: 20, flags: 1, next: 1 }),
                    write(Touch::Indirect { table: 0x610, index: 1, address: 0x5100, length: 4, flags: 2, next: 0 }),
                    write(Touch::Descriptor { index: 3, address: 0x6000, length: 16, flags: 4, next: 0 }),
                    write(Touch::Available { head: 3 }),
                    process(),
                ],
            ),
        ),
        (
            "broken",
            seed(false, ORDERLY, &[attach(), write(Touch::Index { value: 300 }), process(), attach(), process()]),
        ),
        (
            "loop",
            seed(
                false,
                ORDERLY,
                &[
                    attach(),
                    write(Touch::Descriptor { index: 0, address: 0x4000, length: 1, flags: 1, next: 0 }),
                    process(),
                ],
            ),
        ),
    ]
}
