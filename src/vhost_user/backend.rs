// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device behind vhost-user messages and rings.

use std::fs::File;
use std::hint::spin_loop;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Instant;
use std::{fmt, io};

use log::{debug, error, info};
use parking_lot::{Mutex, MutexGuard};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost_user_backend::{VhostUserBackend, VringState, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

#[cfg(feature = "daemon")]
use super::daemon::RingsJob;
use super::meter::Meter;
use super::operator::FaultListener;
use super::restart::Position;
use super::state::{RequestRing, State};
use super::transfer::Transfer;
use super::vring::Vring;
use crate::device::{Statistics, VirtioIommu};
use crate::memory::GuestRam;
use crate::queue::{Batch, Polling, Watch, deliver_faults, has_requests};
use crate::spec;

/// The largest queue that a frontend may ask for.
const LARGEST_QUEUE: usize = 1024;
/// How many regions guest memory may have: what the library tells the frontend, and does not keep it to.
const MOST_REGIONS: usize = 509;
/// How many requests are handled before the rings' state is looked at again.
const BUDGET: usize = 256;
/// The event that continues a batch which used up its budget. The library keeps 0 to the number of queues.
pub(super) const CONTINUE_EVENT: u16 = spec::QUEUE_COUNT + 1;

pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// What happens when the frontend stops the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "daemon", derive(clap::ValueEnum))]
pub enum OnStop {
    /// Nothing, until they start again.
    Keep,
    /// The device is reset.
    Reset,
}

/// How the backend behaves where vhost-user leaves a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendOptions {
    /// What happens when the frontend stops the rings.
    pub on_stop: OnStop,
    /// Whether the request ring is watched after work, so that the next request needs no kick.
    pub polling: Polling,
}

/// A device as the vhost-user library drives it.
///
/// Two threads of the library's call it, one for the connection and one for the rings, and whoever removes endpoints or shuts the
/// device down. Locks are taken in this order, and none is waited for under a later one: `watch` (by the thread of the rings only), `transfer` (by
/// that of the connection only), the state, a ring, its event files; guest memory is exchanged under the state's. Under none of them is a file of the frontend's read or
/// written, so that none is held for longer than the host and guest memory take; what waits for devices that translate is done under
/// the state's, which none of them needs.
pub struct IommuBackend {
    pub(super) options: BackendOptions,
    /// Guest memory as the frontend offers it. The library changes it before this backend is asked.
    pub(super) offered: Memory,
    /// Guest memory as it was found in order.
    memory: Memory,
    /// Of the thread that serves the rings.
    watch: Mutex<Watch>,
    pub(super) state: Mutex<State>,
    /// The library's rings, once one of them was looked at.
    pub(super) rings: OnceLock<[Vring; 2]>,
    /// How long requests take, if that is of interest.
    pub(super) meter: OnceLock<Arc<Meter>>,
    /// The device's state on its way from or to another backend.
    pub(super) transfer: Mutex<Option<Transfer>>,
    /// What is told of faults.
    pub(super) fault_listener: OnceLock<FaultListener>,
    /// There is a daemon, or was.
    pub(super) has_daemon: AtomicBool,
    /// The library's event loop is to end.
    pub(super) loop_ends: AtomicBool,
    /// It was said that the frontend cannot be notified.
    unnotified: AtomicBool,
    pub(super) again: (EventConsumer, Arc<EventNotifier>),
    /// What the rings' thread is to do before it looks at them next.
    #[cfg(feature = "daemon")]
    pub(super) rings_job: Mutex<Option<RingsJob>>,
    /// It was looked at whether guest memory can be cut off.
    #[cfg(feature = "daemon")]
    looked_at_seals: AtomicBool,
}

impl IommuBackend {
    /// A backend for this device.
    ///
    /// # Errors
    ///
    /// No event descriptors can be had.
    pub fn new(device: VirtioIommu, options: BackendOptions) -> io::Result<Self> {
        let memory = || GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let (again, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        let again = (again, Arc::new(notifier));
        let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
        let watch = Mutex::new(Watch::new(options.polling, cpus));
        let (offered, memory) = (memory(), memory());
        Ok(Self {
            options,
            offered,
            memory,
            watch,
            state: Mutex::new(State::new(device)),
            rings: OnceLock::new(),
            meter: OnceLock::new(),
            transfer: Mutex::new(None),
            fault_listener: OnceLock::new(),
            has_daemon: AtomicBool::new(false),
            loop_ends: AtomicBool::new(false),
            unnotified: AtomicBool::new(false),
            again,
            #[cfg(feature = "daemon")]
            rings_job: Mutex::new(None),
            #[cfg(feature = "daemon")]
            looked_at_seals: AtomicBool::new(false),
        })
    }

    /// Guest memory as the frontend gave it last, for devices that are emulated in this process. To be loaded while translations
    /// are pinned, and not kept after: then nothing is written to memory that the frontend was told is no longer used.
    pub const fn memory(&self) -> &GuestMemoryAtomic<GuestMemoryMmap> {
        &self.memory
    }

    /// What to call, from any thread, when there are events for the guest that the device does not know of:
    /// `EmulatedGroup::on_refused` takes it.
    pub fn waker(&self) -> impl Fn() + Send + Sync + 'static {
        let notifier = Arc::clone(&self.again.1);
        move || {
            // It can only be full, and then the event loop is about to be woken.
            let _ = notifier.notify();
        }
    }

    /// Refuses all DMA of all endpoints and frees everything on the host. Returns what the device has done.
    pub fn shut_down(&self) -> Statistics {
        let mut state = self.state.lock();
        state.device.shut_down();
        state.log_notices();
        state.device.statistics()
    }

    /// Serves the rings until there is nothing to do, and goes on watching the request ring as long as that is worth it.
    fn serve_rings(&self, requests: &Vring, events: &Vring) {
        let mut watch = self.watch.lock();
        watch.woken(Instant::now());
        loop {
            let quietly = watch.is_on();
            if !self.serve_batch(requests, events, quietly) {
                return;
            }
            let until = watch.until(Instant::now());
            if until.is_some_and(|until| self.sees_request(requests, until)) {
                continue;
            }
            if quietly {
                // From here on the driver kicks; what came before that is served.
                self.serve_batch(requests, events, false);
            }
            return;
        }
    }

    /// Serves what is in the rings. Whether that was all; if not, it goes on from the event loop.
    fn serve_batch(&self, requests: &Vring, events: &Vring, quietly: bool) -> bool {
        let look = self.look();
        let mut state = self.state.lock();
        if let Some((meter, looked)) = look
            && !state.request_ring.requests.is_under_way()
        {
            meter.looked(looked);
        }
        let handled = self.serve_requests(&mut state, &mut requests.get_mut(), quietly);
        let delivered = self.serve_events(&mut state, &mut events.get_mut());
        state.log_notices();
        self.tell_of_faults(&mut state);
        // No file of the frontend's is touched under the lock: one that blocks must not keep the device from being shut
        // down. Between the steps of a large MAP whoever waits for the device has it first.
        MutexGuard::unlock_fair(state);
        if handled.notify {
            self.note_unnotified(requests.signal_used_queue());
        }
        if delivered.notify {
            self.note_unnotified(events.signal_used_queue());
        }
        let more = handled.more || delivered.more;
        if more {
            self.look_again();
        }
        !more
    }

    /// Watches the request ring until a request is there, or the time is over. Nothing is locked in between: the frontend can stop
    /// the ring, or change memory, at any moment.
    fn sees_request(&self, requests: &Vring, until: Instant) -> bool {
        loop {
            let vring = requests.get_ref();
            let queue = vring.get_queue();
            if !queue.ready() || !vring.is_enabled() {
                return false;
            }
            if has_requests(queue, &*self.memory.memory()) {
                return true;
            }
            drop(vring);
            if Instant::now() >= until {
                return false;
            }
            // Not a yield: the scheduler holds many of those against the thread when a kick wakes it, for milliseconds.
            spin_loop();
        }
    }

    /// Has the rings looked at again from the event loop.
    pub(super) fn look_again(&self) {
        if self.again.1.notify().is_err() {
            error!("cannot go on with what is left in the rings: waiting for the driver's next kick");
        }
    }

    /// Says once that the frontend cannot be notified: it can have that so for every batch.
    fn note_unnotified(&self, signalled: io::Result<()>) {
        if let Err(error) = signalled
            && !self.unnotified.swap(true, Ordering::Relaxed)
        {
            debug!("the frontend cannot be notified: {error}");
        }
    }

    /// To be called after whatever may have changed the device outside of a batch: says what there is to say, and has
    /// events delivered.
    pub(super) fn finish(&self, mut state: MutexGuard<'_, State>) {
        state.log_notices();
        self.tell_of_faults(&mut state);
        if state.device.first_fault().is_some() {
            self.look_again();
        }
    }

    fn serve_requests(&self, state: &mut State, vring: &mut VringState<Memory>, quietly: bool) -> Batch {
        if !vring.get_queue().ready() || !vring.is_enabled() {
            return Batch::default();
        }
        let memory = self.memory.memory();
        state.start_if_stopped(vring, &memory);
        if state.request_ring.broken {
            return Batch::default();
        }
        let State { device, request_ring, .. } = &mut *state;
        let (requests, queue) = (&mut request_ring.requests, vring.get_queue_mut());
        let result = if quietly {
            requests.process_quietly(device, queue, &*memory, BUDGET)
        } else {
            requests.process(device, queue, &*memory, BUDGET)
        };
        request_ring.last = Some(Position::of(vring.get_queue()));
        result.unwrap_or_else(|error| {
            state.request_queue_broke(&error);
            Batch::default()
        })
    }

    /// Completes the request that is under way, so that the ring stops where the frontend is told; whether the driver is to be
    /// notified.
    fn complete_request(&self, state: &mut State, vring: &Vring) -> bool {
        let memory = self.memory.memory();
        let State { device, request_ring, .. } = &mut *state;
        let result = request_ring.requests.complete(device, vring.get_mut().get_queue_mut(), &*memory);
        result.unwrap_or_else(|error| {
            state.request_queue_broke(&error);
            false
        })
    }

    fn serve_events(&self, state: &mut State, vring: &mut VringState<Memory>) -> Batch {
        if state.device.first_fault().is_none() || !vring.get_queue().ready() || !vring.is_enabled() {
            return Batch::default();
        }
        let memory = self.memory.memory();
        deliver_faults(&mut state.device, vring.get_queue_mut(), &*memory, BUDGET).unwrap_or_else(|error| {
            if state.may_log() {
                error!("the guest's driver broke the event queue, events wait: {error}");
            }
            Batch::default()
        })
    }
}

impl fmt::Debug for IommuBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IommuBackend").field("options", &self.options).finish_non_exhaustive()
    }
}

impl VhostUserBackend for IommuBackend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(spec::QUEUE_COUNT)
    }

    fn max_queue_size(&self) -> usize {
        LARGEST_QUEUE
    }

    fn features(&self) -> u64 {
        self.state.lock().device.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        let mut state = self.state.lock();
        state.features = features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = state.features;
        state.device.set_driver_features(features);
        self.finish(state);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::DEVICE_STATE
    }

    fn reset_device(&self) {
        let mut state = self.state.lock();
        if state.may_log() {
            info!("the frontend reset the device");
        }
        state.features = 0;
        state.request_ring = RequestRing::default();
        state.device.reset();
        self.finish(state);
    }

    // The rings are told by the library.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.state.lock().device.config();
        let (offset, size) = (offset as usize, size as usize);
        // The library takes an empty answer for an error, and says so to the frontend.
        config.get(offset..).and_then(|rest| rest.get(..size)).unwrap_or_default().to_vec()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock();
        state.device.write_config(offset as usize, bytes);
        self.finish(state);
        Ok(())
    }

    fn update_memory(&self, offered: Memory) -> io::Result<()> {
        let offered = offered.memory();
        // The library ends the connection if this fails, and what was mapped is reached until the device is shut down then.
        if offered.num_regions() > MOST_REGIONS {
            return Err(io::Error::other(format!("guest memory has more than {MOST_REGIONS} regions")));
        }
        let ram = GuestRam::from_mmap(&offered).map_err(io::Error::other)?;
        // Once, or a frontend that takes its memory away and gives it back could fill the log.
        #[cfg(feature = "daemon")]
        if offered.num_regions() > 0 && !self.looked_at_seals.swap(true, Ordering::Relaxed) {
            super::seals::say_if_unsealed(&offered);
        }
        // Under the lock: no step of a request is, and the frontend is answered only when no host page table reaches memory that
        // has left.
        let mut state = self.state.lock();
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).replace(GuestMemoryMmap::clone(&offered));
        state.device.set_memory(ram);
        // A ring that was out of memory may be back.
        state.request_ring.broken = false;
        self.look_again();
        self.finish(state);
        Ok(())
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Option<File>> {
        // There is no other phase.
        let VhostTransferStatePhase::STOPPED = phase;
        self.start_transfer(direction, file).map(|()| None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        self.finish_transfer()
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        vec![(1 << spec::QUEUE_COUNT) - 1]
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        // Waits for a batch that is under way.
        let mut state = self.state.lock();
        let mut to_notify = None;
        if queue_index == u32::from(spec::REQUEST_QUEUE) {
            to_notify = self.rings.get().map(|[requests, _]| requests);
            to_notify = to_notify.filter(|requests| self.complete_request(&mut state, requests));
            state.request_ring.broken = false;
            match self.options.on_stop {
                OnStop::Keep => state.request_ring.stopped = state.request_ring.last,
                OnStop::Reset => state.reset(),
            }
        }
        self.finish(state);
        if let Some(requests) = to_notify {
            self.note_unnotified(requests.signal_without_waiting());
        }
        Ok(())
    }

    /// Fails to end the library's thread, and for nothing else: the guest would wait for ever.
    fn handle_event(&self, event: u16, _set: EventSet, vrings: &[Vring], _thread_id: usize) -> io::Result<()> {
        let [requests, events] = vrings else {
            return Ok(());
        };
        self.rings.get_or_init(|| [requests.clone(), events.clone()]);
        if event == CONTINUE_EVENT {
            // Nothing to read means that it was read before.
            let _ = self.again.0.consume();
            #[cfg(feature = "daemon")]
            self.do_rings_job();
            if self.loop_ends.load(Ordering::Acquire) {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        self.serve_rings(requests, events);
        Ok(())
    }
}
