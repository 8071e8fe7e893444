// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device in a VMM: between a transport (virtio over MMIO or PCI) and an event loop, whichever they are.
//!
//! The transport gives register accesses to the methods of [`EmbeddedIommu`] and is told through [`Transport`]; the loop waits for
//! the files of [`fds`](EmbeddedIommu::fds) and calls what is behind each. With feature `event-manager` it is a
//! subscriber of that crate's loop.
//!
//! # What a VMM owes the guest
//!
//! | | |
//! |---|---|
//! | device ID | [`spec::DEVICE_ID`]; on PCI [`spec::PCI_DEVICE_ID`], vendor 0x1af4, on the root bus where the VIOT says; on MMIO an ACPI device (or a node of the device tree) with the registers and the interrupt |
//! | queues | [`spec::QUEUE_COUNT`], of up to [`EmbeddedIommu::LARGEST_QUEUE`] entries |
//! | features | [`features_page`](EmbeddedIommu::features_page) and [`acknowledge_features`](EmbeddedIommu::acknowledge_features), by pages of 32 |
//! | `DRIVER_OK` | [`start`](EmbeddedIommu::start) |
//! | status 0 | [`reset`](EmbeddedIommu::reset); when the whole machine is reset, [`system_reset`](EmbeddedIommu::system_reset), after all devices that are behind it |
//! | `DEVICE_NEEDS_RESET` | set in [`Transport::needs_reset`], with a configuration interrupt |
//! | guest memory | told to [`device_mut`](EmbeddedIommu::device_mut) (`set_memory`) before anything is started, and whenever it changes |
//! | whatever [`device_mut`](EmbeddedIommu::device_mut) was used for | [`on_wake`](EmbeddedIommu::on_wake) after it: there may be events for the guest |
//! | what an operator should hear of | [`next_notice`](VirtioIommu::next_notice), now and then, until there is none: only the oldest are kept |
//! | topology | a VIOT that covers the endpoints ([`crate::topology`]), or `iommu-map` without the device's own ID |
//! | devices behind it | offer `VIRTIO_F_ACCESS_PLATFORM` if they are virtio devices, and translate ([`crate::translate`]) |
//! | VFIO | the files of assigned devices are given to KVM's VFIO device, as without this one |
//!
//! # Example
//!
//! The device between a transport and a loop, and an emulated device behind it. `examples/microvm` is a whole VMM around the same:
//! it boots Linux on KVM, with virtio over MMIO, event-manager's loop, and a disk behind the IOMMU.
//!
#![cfg_attr(feature = "translate", doc = "```")]
#![cfg_attr(not(feature = "translate"), doc = "```ignore")]
//! use std::sync::Arc;
//!
//! use virtio_iommu::device::{Settings, VirtioIommu};
//! use virtio_iommu::embed::{EmbeddedIommu, Transport};
//! use virtio_iommu::host::HostGroup;
//! use virtio_iommu::id::EndpointId;
//! use virtio_iommu::memory::GuestRam;
//! use virtio_iommu::queue::QueueError;
//! use virtio_iommu::reserved::EndpointView;
//! use virtio_iommu::translate::{Limits, Translation};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! struct Registers;
//!
//! impl Transport for Registers {
//!     fn buffers_used(&self, _queue: u16) {
//!         // Raise an interrupt.
//!     }
//!
//!     fn needs_reset(&self, _reason: &QueueError) {
//!         // Set DEVICE_NEEDS_RESET, and raise a configuration interrupt.
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
//! let endpoint: EndpointId = "00:03.0".parse()?;
//! let group = Arc::new(Translation::new(Limits::default()).group(vec![endpoint]));
//! let settings = Settings { boot_bypass: false, ..Settings::new("0-ffffffffffff".parse()?, 0x1000) };
//! let endpoints = vec![(endpoint, EndpointView::default())];
//! let mut device = VirtioIommu::new(settings, endpoints, vec![Arc::clone(&group) as Arc<dyn HostGroup>])?;
//! device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 0x10_0000)])?);
//!
//! let mut iommu = EmbeddedIommu::new(device, Arc::new(memory.clone()), Arc::new(Registers))?;
//! // The loop waits for iommu.fds(); KVM writes kicks to iommu.kick(0) and iommu.kick(1).
//! group.on_refused(iommu.waker());
//!
//! // The driver starts the device, and its requests come by the queue; here they come by hand: ATTACH to domain 1, and MAP of
//! // 0x4000-0x4fff to 0x8000, for writing.
//! let mut reply = [0xff; 4];
//! let attach = [1, 1, endpoint.0, 0, 0].map(u32::to_le_bytes);
//! iommu.device_mut().handle(attach.as_flattened(), &mut reply);
//! assert_eq!(reply, [0; 4]);
//! let map = [3, 1, 0x4000, 0, 0x4fff, 0, 0x8000, 0, 2].map(u32::to_le_bytes);
//! iommu.device_mut().handle(map.as_flattened(), &mut reply);
//! assert_eq!(reply, [0; 4]);
//!
//! // The emulated device's DMA: virtqueues, descriptors and buffers, all through this.
//! let translator = group.translator(endpoint).ok_or("it is in the group")?;
//! translator.memory(&memory).write_obj(7u32, GuestAddress(0x4010))?;
//! assert_eq!(memory.read_obj::<u32>(GuestAddress(0x8010))?, 7);
//! assert!(translator.memory(&memory).write_obj(7u32, GuestAddress(0x8010)).is_err());
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

use std::fmt;
use std::hint::spin_loop;
use std::io;
use std::num::NonZero;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::VirtioIommu;
use crate::queue::{Batch, Polling, QueueError, Requests, Watch, deliver_faults, has_requests};
use crate::spec::{self, config};

#[cfg(feature = "event-manager")]
mod subscriber;
#[cfg(test)]
mod tests;

/// What the device tells its transport. Called from the thread that calls the device.
pub trait Transport: Send + Sync {
    /// Buffers of a queue were used, and the driver wants to know: an interrupt.
    fn buffers_used(&self, queue: u16);

    /// The driver broke a queue: neither is served until the device is reset.
    fn needs_reset(&self, reason: &QueueError);
}

/// The queues cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The driver has not accepted that the device is a modern one.
    #[error("the driver did not accept VIRTIO_F_VERSION_1")]
    Legacy,
    /// A queue is not ready, or does not lie in guest memory.
    #[error("the driver did not set up queue {0}")]
    Queue(u16),
}

/// A device with its queues, for one thread at a time: a VMM keeps it behind a lock.
pub struct EmbeddedIommu<M> {
    device: VirtioIommu,
    memory: M,
    transport: Arc<dyn Transport>,
    kicks: [EventFd; spec::QUEUE_COUNT as usize],
    wake: Arc<EventFd>,
    /// What the driver accepted since the last reset.
    acknowledged: u64,
    queues: Option<[Queue; spec::QUEUE_COUNT as usize]>,
    requests: Requests,
    watch: Watch,
}

impl<M: GuestAddressSpace> EmbeddedIommu<M> {
    /// The largest queue that a driver may set up.
    pub const LARGEST_QUEUE: u16 = 256;

    /// Puts a device behind a transport. `memory` is where its queues are.
    ///
    /// # Errors
    ///
    /// No event files can be had.
    pub fn new(device: VirtioIommu, memory: M, transport: Arc<dyn Transport>) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let (kicks, wake) = ([event()?, event()?], Arc::new(event()?));
        let (requests, watch) = (Requests::default(), Watch::new(Polling::Off, 1));
        Ok(Self { device, memory, transport, kicks, wake, acknowledged: 0, queues: None, requests, watch })
    }

    /// Has the request queue watched after work, so that the next request needs no kick; it is not, by default. A kick then takes the
    /// loop's thread, and whatever lock the VMM keeps this behind, for up to ten times as long as the queue is watched.
    pub fn set_polling(&mut self, polling: Polling) {
        let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
        self.watch = Watch::new(polling, cpus);
    }

    /// The device itself: to tell it of memory, to add and remove endpoints, to save and restore it.
    pub const fn device_mut(&mut self) -> &mut VirtioIommu {
        &mut self.device
    }

    /// The file that a kick of a queue is to be written to, for an ioeventfd; `None` if there is no such queue.
    pub fn kick(&self, queue: u16) -> Option<&EventFd> {
        self.kicks.get(usize::from(queue))
    }

    /// The files to wait for reading from, and what to call then: [`on_request_kick`](Self::on_request_kick),
    /// [`on_event_kick`](Self::on_event_kick), [`on_wake`](Self::on_wake).
    pub fn fds(&self) -> [RawFd; 3] {
        let [requests, events] = &self.kicks;
        [requests.as_raw_fd(), events.as_raw_fd(), self.wake.as_raw_fd()]
    }

    /// What to call, from any thread, when there are events for the guest that the device does not know of:
    /// `EmulatedGroup::on_refused` takes it.
    pub fn waker(&self) -> impl Fn() + Send + Sync + 'static {
        let wake = Arc::clone(&self.wake);
        move || {
            // It can only be full, and then the loop is about to be woken.
            let _ = wake.write(1);
        }
    }

    /// The feature bits to offer, 32 at a time; 0 where there is none.
    #[expect(clippy::cast_possible_truncation, reason = "a page is 32 of the bits")]
    pub const fn features_page(&self, page: u32) -> u32 {
        match page {
            0 => self.device.features() as u32,
            1 => (self.device.features() >> 32) as u32,
            _ => 0,
        }
    }

    /// Takes note of feature bits that the driver accepts, 32 at a time. Those that are not offered are ignored. They hold from
    /// [`start`](Self::start) on.
    pub fn acknowledge_features(&mut self, page: u32, value: u32) {
        let shift = match page {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let others = self.acknowledged & !(u64::from(u32::MAX) << shift);
        self.acknowledged = others | ((u64::from(value) << shift) & self.device.features());
    }

    /// Reads from the configuration space; zeroes behind its end.
    pub fn read_config(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let space: [u8; config::SIZE] = self.device.config();
        let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
        for (to, from) in bytes.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    /// Writes to the configuration space; what cannot be written is ignored.
    pub fn write_config(&mut self, offset: u64, bytes: &[u8]) {
        if let Ok(offset) = usize::try_from(offset) {
            self.device.write_config(offset, bytes);
        }
    }

    /// Starts the queues, as the driver has set them up: for the first time, or where they were paused. For a device that was
    /// restored, the features that its driver accepted are acknowledged before, as the driver had done.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing was started.
    pub fn start(&mut self, mut queues: [Queue; spec::QUEUE_COUNT as usize]) -> Result<(), StartError> {
        if self.acknowledged & spec::feature::VERSION_1 == 0 {
            return Err(StartError::Legacy);
        }
        let memory = self.memory.memory();
        for (index, queue) in (0..).zip(&mut queues) {
            if !queue.is_valid(&*memory) {
                return Err(StartError::Queue(index));
            }
            queue.set_event_idx(self.acknowledged & spec::feature::RING_EVENT_IDX != 0);
        }
        self.device.set_driver_features(self.acknowledged);
        self.queues = Some(queues);
        // The driver may have kicked before.
        self.look_again();
        Ok(())
    }

    /// Stops the queues, with no request under way, and returns them as they are; `None` if they do not run. The device keeps its
    /// state. A request that cannot be completed is told to [`Transport::needs_reset`], and the queues are returned all the same.
    pub fn pause(&mut self) -> Option<[Queue; spec::QUEUE_COUNT as usize]> {
        let mut queues = self.queues.take()?;
        let memory = self.memory.memory();
        let [requests, _] = &mut queues;
        match self.requests.complete(&mut self.device, requests, &*memory) {
            Ok(true) => self.transport.buffers_used(spec::REQUEST_QUEUE),
            Ok(false) => (),
            Err(error) => self.transport.needs_reset(&error),
        }
        Some(queues)
    }

    /// The driver reset the device.
    pub fn reset(&mut self) {
        self.stop();
        self.device.reset();
    }

    /// The machine is reset. To be called after all devices that are behind this one were: until then they may write.
    pub fn system_reset(&mut self) {
        self.stop();
        self.device.system_reset();
    }

    fn stop(&mut self) {
        self.queues = None;
        self.requests.forget();
        self.acknowledged = 0;
    }

    /// The request queue was kicked. Handles up to `budget` requests at a time; for the rest, the file is readable again.
    pub fn on_request_kick(&mut self, budget: usize) {
        let [requests, _] = &self.kicks;
        // Nothing to read means that it was read before.
        let _ = requests.read();
        self.watch.woken(Instant::now());
        loop {
            let quietly = self.watch.is_on();
            if self.serve_requests(budget, quietly) {
                self.look_again();
                break;
            }
            if self.watch.until(Instant::now()).is_some_and(|until| self.sees_request(until)) {
                continue;
            }
            // From here on the driver kicks; what came before that is served.
            if quietly && self.serve_requests(budget, false) {
                self.look_again();
            }
            break;
        }
        self.deliver_events(budget);
    }

    /// Handles requests; whether there are more.
    fn serve_requests(&mut self, budget: usize, quietly: bool) -> bool {
        let memory = self.memory.memory();
        let Some([queue, _]) = &mut self.queues else { return false };
        let result = if quietly {
            self.requests.process_quietly(&mut self.device, queue, &*memory, budget)
        } else {
            self.requests.process(&mut self.device, queue, &*memory, budget)
        };
        self.conclude(spec::REQUEST_QUEUE, result)
    }

    /// Watches the request queue until a request is there, or the time is over.
    fn sees_request(&self, until: Instant) -> bool {
        let Some([queue, _]) = &self.queues else { return false };
        let memory = self.memory.memory();
        while !has_requests(queue, &*memory) {
            if Instant::now() >= until {
                return false;
            }
            // Not a yield: the scheduler holds many of those against the thread when a kick wakes it, for milliseconds.
            spin_loop();
        }
        true
    }

    /// The event queue was kicked. (Linux does not for its first buffers: they are looked for when there is an event.)
    pub fn on_event_kick(&mut self, budget: usize) {
        let [_, events] = &self.kicks;
        let _ = events.read();
        self.deliver_events(budget);
    }

    /// An event was made by another thread.
    pub fn on_wake(&mut self, budget: usize) {
        let _ = self.wake.read();
        self.deliver_events(budget);
    }

    fn deliver_events(&mut self, budget: usize) {
        let memory = self.memory.memory();
        if let Some([_, queue]) = &mut self.queues {
            let result = deliver_faults(&mut self.device, queue, &*memory, budget);
            if self.conclude(spec::EVENT_QUEUE, result) {
                let _ = self.wake.write(1);
            }
        }
    }

    /// Has the request queue looked at from the loop.
    fn look_again(&self) {
        let [requests, _] = &self.kicks;
        // It can only be full, and then it is readable.
        let _ = requests.write(1);
    }

    /// Tells the transport what a batch came to; whether there is more to do.
    fn conclude(&mut self, queue: u16, result: Result<Batch, QueueError>) -> bool {
        match result {
            Ok(batch) => {
                if batch.notify {
                    self.transport.buffers_used(queue);
                }
                batch.more
            }
            Err(error) => {
                self.queues = None;
                self.transport.needs_reset(&error);
                false
            }
        }
    }
}

impl<M> fmt::Debug for EmbeddedIommu<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedIommu").field("device", &self.device).finish_non_exhaustive()
    }
}
