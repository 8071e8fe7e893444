// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a backend knows: its device, what the frontend set, and where the request ring is.

use std::time::Instant;

use log::{Level, error, log, warn};
use vhost_user_backend::VringState;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::backend::Memory;
use super::restart::{Position, Start, has_history, judge};
use super::throttle::{Pass, Throttle};
use crate::device::VirtioIommu;
use crate::queue::{QueueError, Requests};

/// The device, and what is known of its frontend.
pub(super) struct State {
    pub device: VirtioIommu,
    /// The features that the frontend set last, without those of the protocol.
    pub features: u64,
    pub request_ring: RequestRing,
    throttle: Throttle,
    /// How many faults the listener was told of.
    pub faults_told: u64,
}

/// What is known of the request ring across stops.
#[derive(Default)]
pub(super) struct RequestRing {
    /// Where it was after the last batch.
    pub last: Option<Position>,
    /// Where it was when it was stopped, until it starts again.
    pub stopped: Option<Position>,
    /// The driver broke it: it is not looked at until it starts again.
    pub broken: bool,
    /// What it carries.
    pub requests: Requests,
}

impl State {
    pub fn new(device: VirtioIommu) -> Self {
        Self {
            device,
            features: 0,
            request_ring: RequestRing::default(),
            throttle: Throttle::new(Instant::now()),
            faults_told: 0,
        }
    }

    /// If the request ring was stopped and runs again: finds out whether the device was reset in between.
    pub fn start_if_stopped(&mut self, vring: &VringState<Memory>, memory: &GuestMemoryMmap) {
        let Some(stopped) = self.request_ring.stopped.take() else {
            return;
        };
        let queue = vring.get_queue();
        let (resets, level, what) =
            match judge(stopped, Position::of(queue), queue.next_used(), has_history(queue, memory)) {
                Start::Resume => (false, Level::Info, "the guest goes on"),
                Start::Reset => (true, Level::Info, "the guest reset the device"),
                Start::Unexpected => (
                    true,
                    Level::Warn,
                    "the frontend started the request ring elsewhere than it stopped it: taking it for a reset",
                ),
            };
        if self.may_log() {
            log!(level, "{what}");
        }
        if resets {
            self.reset();
        }
    }

    /// Resets the device. The features were set before the rings started, so they hold.
    pub fn reset(&mut self) {
        self.request_ring.requests.forget();
        self.device.reset();
        self.device.set_driver_features(self.features);
    }

    pub fn request_queue_broke(&mut self, error: &QueueError) {
        self.request_ring.broken = true;
        if self.may_log() {
            error!("the guest's driver broke the request queue, which waits until it is set up again: {error}");
        }
    }

    pub fn log_notices(&mut self) {
        while let Some(notice) = self.device.next_notice() {
            if self.may_log() {
                warn!("{notice}");
            }
        }
    }

    /// Whether another line may be logged that the guest or the frontend can cause.
    pub fn may_log(&mut self) -> bool {
        match self.throttle.ask(Instant::now()) {
            Pass::No => false,
            Pass::Yes { held_back } => {
                if held_back > 0 {
                    warn!("{held_back} messages were not logged");
                }
                true
            }
        }
    }
}
