// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is aimed at.

use serde_json::{Value, json};

/// What a figure of a case should be.
pub struct Target {
    pub case: &'static str,
    /// The figure's name in the summary.
    pub figure: &'static str,
    bound: Bound,
}

enum Bound {
    AtMost(f64),
    Exactly(f64),
}

use Bound::{AtMost, Exactly};

pub const TARGETS: [Target; 14] = [
    target("request/map/dense", "ir", AtMost(1150.0)),
    target("request/map/sparse", "ir", AtMost(1050.0)),
    target("request/unmap/dense", "ir", AtMost(1700.0)),
    target(GROWTH, "ratio", AtMost(2.0)),
    target("request/unmap_range", "ir", AtMost(35.0)),
    target("attach/replay", "ir", AtMost(8.0)),
    target("attach/host_calls_iommufd", "calls", Exactly(1.0)),
    target("store/bytes_per_mapping", "bytes", AtMost(36.0)),
    target("store/bytes_per_mapping/shuffled", "bytes", AtMost(36.0)),
    target("store/bytes_per_mapping/sparse", "bytes", AtMost(36.0)),
    target("translate/bytes_per_mapping/dense", "bytes", AtMost(45.0)),
    target("translate/dense", "ir", AtMost(120.0)),
    target("translate/sparse", "ir", AtMost(120.0)),
    target("guest_memory/u64", "ir", AtMost(400.0)),
];

const fn target(case: &'static str, figure: &'static str, bound: Bound) -> Target {
    Target { case, figure, bound }
}

impl Target {
    /// The target of a case, if there is one.
    pub fn of(case: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.case == case)
    }

    /// Whether a case's figures meet it; the case has such a figure.
    pub fn is_met_by(&self, figures: &Value) -> bool {
        let value = figures[self.figure].as_f64().expect("a figure for the target");
        match self.bound {
            AtMost(bound) => value <= bound,
            Exactly(bound) => value.total_cmp(&bound).is_eq(),
        }
    }

    pub fn describe(&self) -> String {
        match self.bound {
            AtMost(bound) => format!("<= {bound}"),
            Exactly(bound) => format!("= {bound}"),
        }
    }

    /// For the summary.
    pub fn bound(&self) -> f64 {
        let (AtMost(bound) | Exactly(bound)) = self.bound;
        bound
    }
}

/// How the cost of an UNMAP grows with the number of mappings.
const GROWTH: &str = "request/unmap/growth_64k_to_1k";

/// The same, from what was measured.
pub fn growth(figure_of: impl Fn(&str) -> Option<f64>) -> Vec<(String, Value)> {
    let prefixes = ["", "yardstick/"].into_iter();
    let ratio = |prefix| {
        let [many, few] = ["", "@1k"].map(|mappings| figure_of(&format!("{prefix}request/unmap/dense{mappings}")));
        Some((format!("{prefix}{GROWTH}"), json!({ "ratio": many? / few? })))
    };
    prefixes.filter_map(ratio).collect()
}
