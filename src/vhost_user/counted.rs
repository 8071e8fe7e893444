// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a backend has counted and measured.

use std::sync::Arc;
use std::time::Instant;

use super::backend::IommuBackend;
use super::meter::{Meter, RequestTimes};
use crate::device::{GroupCounts, Statistics};
use crate::host::timed::HostTime;

/// What has been counted since the backend was made, and what there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// What the device has done.
    pub statistics: Statistics,
    /// How long requests took, since [`IommuBackend::measure`]; `None` without it.
    pub times: Option<Box<RequestTimes>>,
    /// Faults that there were.
    pub faults: u64,
    /// Endpoints that there are.
    pub endpoints: u64,
    /// Host groups that there are.
    pub groups: u64,
    /// Of how many of them all DMA is refused.
    pub groups_blocked: u64,
    /// Domains that there are.
    pub domains: u64,
    /// Mappings that all of them have together.
    pub mappings: u64,
    /// Whether endpoints in no domain reach guest memory as it is.
    pub bypass: bool,
}

impl IommuBackend {
    /// Measures how long requests take from here on, and has the log say so of up to ten in a second (level debug). What the host takes of that is
    /// known of groups that are [timed](crate::host::timed::TimedGroup) with this time; those that are
    /// [added](Self::add_group) are. Takes the place of the device's
    /// [`on_exchange()`](crate::device::VirtioIommu::on_exchange). Once only: whether it was the first time.
    pub fn measure(&self, host_time: Arc<HostTime>) -> bool {
        let meter = Arc::new(Meter::new(host_time));
        let is_first = self.meter.set(Arc::clone(&meter)).is_ok();
        if is_first {
            self.state.lock().device.on_exchange(move |exchange| meter.hear(exchange));
        }
        is_first
    }

    /// What has been counted, and what there is. The request queue waits meanwhile.
    pub fn counted(&self) -> Counted {
        let state = self.state.lock();
        let device = &state.device;
        let GroupCounts { groups, blocked } = device.group_counts();
        Counted {
            statistics: device.statistics(),
            times: self.meter.get().map(|meter| Box::new(meter.times())),
            faults: device.faults_recorded(),
            endpoints: device.endpoints().count() as u64,
            groups: groups as u64,
            groups_blocked: blocked as u64,
            domains: device.domains().count() as u64,
            mappings: device.domains().filter_map(|domain| domain.mappings).sum::<usize>() as u64,
            bypass: device.bypass(),
        }
    }

    /// When the ring is looked at, if that is of interest.
    pub(super) fn look(&self) -> Option<(&Meter, Instant)> {
        self.meter.get().map(|meter| (meter.as_ref(), Instant::now()))
    }
}
