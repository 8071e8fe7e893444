// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long requests take, and a line of the log for some that are answered.
//!
//! The device takes no clock. A meter is told when a ring is looked at, and hears of each answer as it is given; how long the host
//! took is told by the host's groups. Requests of one look are handled one after the other, so that each is taken when the one before
//! was answered.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{Level, debug, log_enabled};
use parking_lot::Mutex;

use super::histogram::Histogram;
use super::throttle::{Pass, Throttle};
use crate::device::Exchange;
use crate::host::timed::HostTime;
use crate::request::RequestKind;

/// How long requests of one kind took, by what took it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// From the moment that the ring was looked at, after a kick or while it was watched, until the request was taken: the requests
    /// before it, and whatever else was done with the device.
    pub waiting: Histogram,
    /// Reading it, checking it, keeping the tables, and answering: all but the host's calls. (For a large MAP also what was let in
    /// between its steps.)
    pub own: Histogram,
    /// The host's calls.
    pub host: Histogram,
}

/// How long requests took, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestTimes {
    /// ATTACH requests.
    pub attach: Times,
    /// DETACH requests.
    pub detach: Times,
    /// MAP requests.
    pub map: Times,
    /// UNMAP requests.
    pub unmap: Times,
    /// PROBE requests.
    pub probe: Times,
}

impl RequestTimes {
    const fn of_mut(&mut self, kind: RequestKind) -> &mut Times {
        match kind {
            RequestKind::Attach => &mut self.attach,
            RequestKind::Detach => &mut self.detach,
            RequestKind::Map => &mut self.map,
            RequestKind::Unmap => &mut self.unmap,
            RequestKind::Probe => &mut self.probe,
        }
    }
}

/// Measures the requests of one device.
#[derive(Debug)]
pub(super) struct Meter {
    host_time: Arc<HostTime>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When the ring was looked at.
    looked: Instant,
    /// When the request that is handled was taken, and what the host had taken by then.
    taken: Instant,
    host_before: Duration,
    times: RequestTimes,
    throttle: Throttle,
}

impl Meter {
    pub fn new(host_time: Arc<HostTime>) -> Self {
        let now = Instant::now();
        let (times, throttle) = (RequestTimes::default(), Throttle::new(now));
        let state = State { looked: now, taken: now, host_before: Duration::ZERO, times, throttle };
        Self { host_time, state: Mutex::new(state) }
    }

    /// The time that the host's groups keep.
    pub const fn host_time(&self) -> &Arc<HostTime> {
        &self.host_time
    }

    /// The ring was looked at then, and the first request that is there is taken now.
    pub fn looked(&self, looked: Instant) {
        let mut state = self.state.lock();
        state.looked = looked;
        state.taken = Instant::now();
        state.host_before = self.host_time.spent();
    }

    /// Hears of what guest and device say to each other.
    pub fn hear(&self, exchange: &Exchange) {
        let now = Instant::now();
        match exchange {
            Exchange::Request { kind, .. } => {
                let [waiting, own, host] = self.answered(*kind, now);
                self.log(now, &format_args!("{exchange}; it waited {waiting:?}, took {own:?}, and the host {host:?}"));
            }
            Exchange::Fault(_) => self.log(now, &exchange),
        }
    }

    /// Keeps the times of a request that is answered now: its wait, its own, and the host's.
    fn answered(&self, kind: RequestKind, now: Instant) -> [Duration; 3] {
        let host_now = self.host_time.spent();
        let mut state = self.state.lock();
        let waiting = state.taken.saturating_duration_since(state.looked);
        let whole = now.saturating_duration_since(state.taken);
        let host = host_now.saturating_sub(state.host_before).min(whole);
        let own = whole.saturating_sub(host);
        let times = state.times.of_mut(kind);
        times.waiting.record(waiting);
        times.own.record(own);
        times.host.record(host);
        state.taken = now;
        state.host_before = host_now;
        [waiting, own, host]
    }

    /// Logs an exchange, unless there are too many: each is the guest's doing.
    fn log(&self, now: Instant, exchange: &dyn fmt::Display) {
        if !log_enabled!(target: TARGET, Level::Debug) {
            return;
        }
        if let Pass::Yes { held_back } = self.state.lock().throttle.ask(now) {
            if held_back > 0 {
                debug!(target: TARGET, "{held_back} exchanges were not logged");
            }
            debug!(target: TARGET, "{exchange}");
        }
    }

    pub fn times(&self) -> RequestTimes {
        self.state.lock().times
    }
}

/// What `RUST_LOG` calls the lines.
const TARGET: &str = "virtio_iommu::requests";
