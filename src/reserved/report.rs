// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A plan as JSON: what `viommuctl plan` prints. Addresses are hexadecimal, ranges inclusive.

use log::{info, warn};
use serde::Serialize;

use super::WithheldReason;
use super::facts::{Facts, FactsFile};
use super::plan::{Advisory, AdvisoryKind, EndpointPlan, Plan};
use crate::range::IovaRange;

#[derive(Serialize)]
struct Document {
    input_range: [String; 2],
    endpoints: Vec<Endpoint>,
}

#[derive(Serialize)]
struct Endpoint {
    id: String,
    resv: Vec<Reserved>,
    withheld: Vec<Withheld>,
    advisories: Vec<Advice>,
    attachable: Answer<Refusal>,
    bypass: Answer<RamRefusal>,
    #[serde(skip_serializing_if = "Option::is_none")]
    facts: Option<Facts>,
}

#[derive(Serialize)]
struct Reserved {
    start: String,
    end: String,
    subtype: String,
}

#[derive(Serialize)]
struct Withheld {
    start: String,
    end: String,
    reason: &'static str,
}

#[derive(Serialize)]
struct Advice {
    kind: &'static str,
    start: String,
    end: String,
    text: String,
}

/// `true`, or why not.
#[derive(Serialize)]
#[serde(untagged)]
enum Answer<T> {
    Yes(bool),
    No(T),
}

#[derive(Serialize)]
struct Refusal {
    refused: &'static str,
    start: String,
    end: String,
}

#[derive(Serialize)]
struct RamRefusal {
    refused: Vec<[String; 2]>,
}

fn ends(range: IovaRange) -> [String; 2] {
    [range.start(), range.last()].map(|address| format!("{address:#x}"))
}

/// The name of a reason.
pub(crate) const fn reason_name(reason: WithheldReason) -> &'static str {
    match reason {
        WithheldReason::WindowNotInSysfs => "window-not-in-sysfs",
        WithheldReason::WindowByMatch => "window-by-match",
        WithheldReason::WindowByEra => "window-by-era",
        WithheldReason::WindowByBars => "window-by-bars",
        WithheldReason::InboundByPolicy => "inbound-by-policy",
    }
}

/// The name of a kind of advisory.
const fn advisory_name(kind: AdvisoryKind) -> &'static str {
    match kind {
        AdvisoryKind::Relaxable => "relaxable",
        AdvisoryKind::UnknownType => "unknown-type",
        AdvisoryKind::WindowEnforced => "window-enforced",
        AdvisoryKind::SwMsiOutsideInbound => "sw-msi-outside-inbound",
        AdvisoryKind::RamInReserved => "ram-in-reserved",
        AdvisoryKind::BarInReserved => "bar-in-reserved",
        AdvisoryKind::MsiOutsideRange => "msi-outside-range",
    }
}

impl From<&Advisory> for Advice {
    fn from(advisory: &Advisory) -> Self {
        let [start, end] = ends(advisory.range);
        Self { kind: advisory_name(advisory.kind), start, end, text: advisory.kind.to_string() }
    }
}

impl From<&EndpointPlan> for Endpoint {
    fn from(plan: &EndpointPlan) -> Self {
        let resv = plan.view.reported().iter().map(|region| {
            let [start, end] = ends(region.range);
            Reserved { start, end, subtype: region.kind.to_string() }
        });
        let withheld = plan.withheld.iter().map(|withheld| {
            let [start, end] = ends(withheld.range);
            Withheld { start, end, reason: reason_name(withheld.reason) }
        });
        let attachable = plan.direct.map_or(Answer::Yes(true), |direct| {
            let [start, end] = ends(direct);
            Answer::No(Refusal { refused: "direct", start, end })
        });
        let refused: Vec<_> = plan.bypass_refused.ranges().iter().map(|range| ends(*range)).collect();
        Self {
            id: plan.id.to_string(),
            resv: resv.collect(),
            withheld: withheld.collect(),
            advisories: plan.advisories.iter().map(Advice::from).collect(),
            attachable,
            bypass: if refused.is_empty() { Answer::Yes(true) } else { Answer::No(RamRefusal { refused }) },
            facts: None,
        }
    }
}

impl EndpointPlan {
    /// Logs what the guest is told of the endpoint, what it is not and why, and what the operator should know.
    pub fn log(&self) {
        let id = self.id;
        for region in self.view.reported() {
            info!("endpoint {id}: {} is reported as {}", region.range, region.kind);
        }
        for withheld in &self.withheld {
            let (range, reason) = (withheld.range, reason_name(withheld.reason));
            info!("endpoint {id}: {range} is not reported ({reason}: {})", withheld.evidence);
        }
        for advisory in &self.advisories {
            warn!("endpoint {id}: {}: {}", advisory.range, advisory.kind);
        }
    }
}

impl From<&Plan> for Document {
    fn from(plan: &Plan) -> Self {
        Self { input_range: ends(plan.input_range), endpoints: plan.endpoints.iter().map(Endpoint::from).collect() }
    }
}

impl Document {
    fn to_text(&self) -> String {
        // Strings, lists and truth values: nothing that JSON cannot say.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }
}

/// The plan's text.
pub fn to_json(plan: &Plan) -> String {
    Document::from(plan).to_text()
}

/// The plan as a value, to be a part of something else.
pub fn to_value(plan: &Plan) -> serde_json::Value {
    // As above.
    serde_json::to_value(Document::from(plan)).unwrap_or_default()
}

/// The plan's text, with the facts that each endpoint's part follows from.
pub fn to_json_with_facts(plan: &Plan, file: &FactsFile) -> String {
    let mut document = Document::from(plan);
    for (endpoint, (_, facts)) in document.endpoints.iter_mut().zip(&file.devices) {
        endpoint.facts = Some(facts.into());
    }
    document.to_text()
}
