// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What has been counted and measured, as clients are told.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device;
use crate::request::Status;
use crate::vhost_user::{self, Counted, Histogram};

/// What has been counted since the daemon started, and what there is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Stats {
    /// ATTACH requests.
    pub attach: Count,
    /// DETACH requests.
    pub detach: Count,
    /// MAP requests.
    pub map: Count,
    /// UNMAP requests.
    pub unmap: Count,
    /// PROBE requests.
    pub probe: Count,
    /// Buffers that could not be read as a request.
    pub unreadable: u64,
    /// Faults.
    pub faults: u64,
    /// Fault events that the guest took.
    #[serde(default)]
    pub faults_sent: u64,
    /// Fault events for which there was no room.
    pub faults_dropped: u64,
    /// Messages to the log for which there was no room.
    pub notices_dropped: u64,
    /// Endpoints that there are.
    pub endpoints: u64,
    /// Host groups that there are.
    #[serde(default)]
    pub groups: u64,
    /// Of how many of them all DMA is refused.
    #[serde(default)]
    pub groups_blocked: u64,
    /// Domains that there are.
    pub domains: u64,
    /// Mappings that all of them have together.
    pub mappings: u64,
    /// Whether endpoints in no domain reach guest memory as it is.
    pub bypass: bool,
}

/// Requests of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Count {
    /// Answered with OK.
    pub ok: u64,
    /// Answered with anything else.
    pub failed: u64,
    /// How many with what, by the name of the status, without those that there were none of, and without OK.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub statuses: BTreeMap<String, u64>,
    /// How long they took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<Times>,
}

/// How long requests took, by what took it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Times {
    /// From the moment that the ring was looked at until the request was taken.
    pub waiting: Durations,
    /// All but that and the host's calls.
    pub own: Durations,
    /// The host's calls.
    pub host: Durations,
}

/// Durations.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Durations {
    /// How many.
    pub count: u64,
    /// All together, in nanoseconds.
    pub sum_ns: u64,
    /// How many were how long, ascending, without those that there were none of.
    pub buckets: Vec<Bucket>,
}

/// Durations of about the same length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Bucket {
    /// How long they are at most, in nanoseconds; `None` if there is no bucket for longer ones.
    pub up_to_ns: Option<u64>,
    /// How many there are.
    pub count: u64,
}

impl Durations {
    /// How long so many per cent are at most, to the next power of two; `None` if there are none, or one of them is longer than can
    /// be said.
    pub fn percentile(&self, percent: u8) -> Option<Duration> {
        let wanted = (u128::from(self.count) * u128::from(percent)).div_ceil(100).max(1);
        let mut seen = 0;
        let bucket = self.buckets.iter().find(|bucket| {
            seen += u128::from(bucket.count);
            seen >= wanted
        })?;
        bucket.up_to_ns.map(Duration::from_nanos)
    }
}

impl Count {
    fn new(count: &device::Count, times: Option<&vhost_user::Times>) -> Self {
        let failed = Status::ALL.into_iter().filter(|status| *status != Status::Ok && count.of(*status) > 0);
        Self {
            ok: count.ok(),
            failed: count.failed(),
            statuses: failed.map(|status| (status.to_string(), count.of(status))).collect(),
            times: times.map(Times::from),
        }
    }
}

impl From<&vhost_user::Times> for Times {
    fn from(times: &vhost_user::Times) -> Self {
        let vhost_user::Times { waiting, own, host } = times;
        Self { waiting: waiting.into(), own: own.into(), host: host.into() }
    }
}

impl From<&Histogram> for Durations {
    fn from(histogram: &Histogram) -> Self {
        let buckets = histogram.buckets().filter(|(_, count)| *count > 0);
        let buckets = buckets.map(|(end, count)| Bucket { up_to_ns: end.map(nanoseconds), count }).collect();
        Self { count: histogram.count(), sum_ns: nanoseconds(histogram.sum()), buckets }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl From<&Counted> for Stats {
    fn from(counted: &Counted) -> Self {
        let Counted { statistics, times, .. } = counted;
        let times = times.as_deref();
        Self {
            attach: Count::new(&statistics.attach, times.map(|times| &times.attach)),
            detach: Count::new(&statistics.detach, times.map(|times| &times.detach)),
            map: Count::new(&statistics.map, times.map(|times| &times.map)),
            unmap: Count::new(&statistics.unmap, times.map(|times| &times.unmap)),
            probe: Count::new(&statistics.probe, times.map(|times| &times.probe)),
            unreadable: statistics.unreadable,
            faults: counted.faults,
            faults_sent: statistics.faults_sent,
            faults_dropped: statistics.faults_dropped,
            notices_dropped: statistics.notices_dropped,
            endpoints: counted.endpoints,
            groups: counted.groups,
            groups_blocked: counted.groups_blocked,
            domains: counted.domains,
            mappings: counted.mappings,
            bypass: counted.bypass,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_end_of_its_bucket() {
        let bucket = |up_to_ns, count| Bucket { up_to_ns, count };
        let buckets = vec![bucket(Some(256), 2), bucket(Some(1024), 1), bucket(None, 1)];
        let durations = Durations { count: 4, sum_ns: 0, buckets };
        let percentiles = [1, 50, 51, 75, 76, 100].map(|percent| durations.percentile(percent));
        let [short, long] = [256, 1024].map(|end| Some(Duration::from_nanos(end)));
        assert_eq!(percentiles, [short, short, long, long, None, None]);
        assert_eq!(Durations { count: 0, sum_ns: 0, buckets: Vec::new() }.percentile(50), None);
    }
}
