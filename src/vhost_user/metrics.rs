// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What has been counted and measured, in Prometheus' text format.

use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::counted::Counted;
use super::histogram::Histogram;
use super::meter::{RequestTimes, Times};
use crate::device::{Count, Statistics};
use crate::request::Status;

/// What all names begin with.
const PREFIX: &str = "virtio_iommu";

/// The text.
///
/// # Errors
///
/// None that there could be: the text is in memory, and takes everything.
pub(super) fn encode(counted: Counted) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Snapshot(counted)));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Snapshot(Counted);

/// A part of the time of requests, and what it is.
type Phase = (&'static str, &'static str, fn(&Times) -> &Histogram);

/// The parts that are measured.
const PHASES: [Phase; 3] = [
    ("request_waiting", "From the moment that the ring was looked at until the request was taken", |times| {
        &times.waiting
    }),
    ("request_own", "What requests took, but for the host's calls", |times| &times.own),
    ("request_host", "What the host's calls took", |times| &times.host),
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self(counted) = self;
        encode_requests(&mut encoder, &counted.statistics)?;
        if let Some(times) = &counted.times {
            for phase in PHASES {
                encode_phase(&mut encoder, times, phase)?;
            }
        }
        let Statistics { unreadable, faults_sent, faults_dropped, notices_dropped, .. } = counted.statistics;
        for (name, help, count) in [
            ("unreadable", "Buffers that could not be read as a request", unreadable),
            ("faults", "Faults of endpoints", counted.faults),
            ("faults_sent", "Fault events that the guest took", faults_sent),
            ("faults_dropped", "Fault events for which there was no room", faults_dropped),
            ("notices_dropped", "Messages to the log for which there was no room", notices_dropped),
        ] {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            metric.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        for (name, help, value) in [
            ("endpoints", "Endpoints that there are", counted.endpoints),
            ("groups", "Host groups that there are", counted.groups),
            ("groups_blocked", "Host groups of which all DMA is refused", counted.groups_blocked),
            ("domains", "Domains that there are", counted.domains),
            ("mappings", "Mappings that all domains have together", counted.mappings),
            ("bypass", "Whether endpoints in no domain reach guest memory as it is", u64::from(counted.bypass)),
        ] {
            encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)?;
        }
        Ok(())
    }
}

fn encode_requests(encoder: &mut DescriptorEncoder<'_>, statistics: &Statistics) -> fmt::Result {
    let Statistics { attach, detach, map, unmap, probe, .. } = statistics;
    let kinds: [(&str, &Count); 5] =
        [("attach", attach), ("detach", detach), ("map", map), ("unmap", unmap), ("probe", probe)];
    let help = "Requests by the status that they were answered with";
    let mut metric = encoder.encode_descriptor("requests", help, None, MetricType::Counter)?;
    for (kind, count) in kinds {
        for status in Status::ALL {
            let labels = [("kind", kind.to_owned()), ("status", status.to_string())];
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&count.of(status), None)?;
        }
    }
    Ok(())
}

fn encode_phase(encoder: &mut DescriptorEncoder<'_>, times: &RequestTimes, phase: Phase) -> fmt::Result {
    let (name, help, histogram) = phase;
    let RequestTimes { attach, detach, map, unmap, probe } = times;
    let kinds = [("attach", attach), ("detach", detach), ("map", map), ("unmap", unmap), ("probe", probe)];
    let mut metric = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for (kind, times) in kinds {
        let histogram = histogram(times);
        let end = |end: Option<Duration>| end.map_or(f64::INFINITY, |end| end.as_secs_f64());
        let buckets: Vec<_> = histogram.buckets().map(|(until, count)| (end(until), count)).collect();
        let sum = histogram.sum().as_secs_f64();
        metric.encode_family(&[("kind", kind)])?.encode_histogram::<NoLabelSet>(
            sum,
            histogram.count(),
            &buckets,
            None,
        )?;
    }
    Ok(())
}
