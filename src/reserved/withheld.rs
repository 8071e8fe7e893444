// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is known of a host and not reported, each range with its reason and the evidence for it.

use std::collections::BTreeMap;
use std::fmt;

use super::plan::{Inbound, Policy};
use super::{Fact, HostFacts, Source, WithheldReason};
use crate::range::{IovaRange, RangeSet};

/// A range that is not reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Withheld {
    /// The addresses.
    pub range: IovaRange,
    /// Why.
    pub reason: WithheldReason,
    /// What speaks for that.
    pub evidence: Evidence,
}

/// What speaks for withholding a range. Displayed, it is half a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// These windows of the host bridge.
    Windows(RangeSet, Option<Source>),
    /// A kernel of this release, in which nothing but windows was shown so.
    Kernel(String),
    /// These BARs lie in it.
    Bars(RangeSet, Option<Source>),
    /// Devices reach memory at other addresses, of which these are next to it.
    Inbound(RangeSet, Option<Source>),
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = match self {
            Self::Windows(windows, source) => {
                write!(f, "host bridge window {windows}")?;
                source
            }
            Self::Kernel(release) => {
                return write!(f, "Linux {release} shows nothing but host bridge windows as `reserved` on this IOMMU");
            }
            Self::Bars(bars, source) => {
                write!(f, "in it lies the BAR {bars}")?;
                source
            }
            Self::Inbound(beside, source) => {
                f.write_str("devices reach no memory here")?;
                if !beside.is_empty() {
                    write!(f, ", but at {beside}")?;
                }
                source
            }
        };
        match source {
            Some(source) => write!(f, " ({source})"),
            None => Ok(()),
        }
    }
}

impl Evidence {
    fn of(range: IovaRange, reason: WithheldReason, facts: &HostFacts) -> Self {
        let source = |fact| facts.sources.get(&fact).copied();
        match reason {
            WithheldReason::WindowNotInSysfs | WithheldReason::WindowByMatch => {
                let windows = facts.windows.iter().flat_map(RangeSet::ranges).copied();
                Self::Windows(windows.filter(|window| window.overlaps(range)).collect(), source(Fact::Windows))
            }
            WithheldReason::WindowByEra => Self::Kernel(facts.kernel.clone().unwrap_or_default()),
            WithheldReason::WindowByBars => {
                let bars = facts.bars.iter().flatten().copied();
                Self::Bars(bars.filter(|bar| range.covers(*bar)).collect(), source(Fact::Bars))
            }
            WithheldReason::InboundByPolicy => Self::Inbound(
                facts.inbound.as_ref().map(|all| beside(range, all)).unwrap_or_default(),
                source(Fact::Inbound),
            ),
        }
    }
}

/// Of a set that has no address of a range, what is next to it: at most one range below and one above.
fn beside(range: IovaRange, all: &RangeSet) -> RangeSet {
    let above = all.ranges().partition_point(|other| other.start() < range.start());
    let (lower, upper) = all.ranges().split_at(above);
    lower.last().into_iter().chain(upper.first()).copied().collect()
}

/// Everything known that is not reported: windows that the host shows, windows that it does not, and what devices cannot
/// reach, each once and for the first of these reasons. What is `told` to be reserved, or would be if it was in the input range, is
/// not withheld, window or not. Ascending, disjoint.
pub(super) fn withheld(
    facts: &HostFacts,
    windows_shown: &BTreeMap<WithheldReason, RangeSet>,
    policy: &Policy,
    told: RangeSet,
) -> Vec<Withheld> {
    let mut candidates = windows_shown.clone();
    if let Some(windows) = &facts.windows {
        candidates.insert(WithheldReason::WindowNotInSysfs, windows.clone());
    }
    if let Some(inbound) = facts.inbound.as_ref().filter(|_| policy.inbound == Inbound::Withhold) {
        candidates.insert(WithheldReason::InboundByPolicy, RangeSet::from(IovaRange::ALL).subtract(inbound));
    }
    let mut accounted = told;
    let mut withheld: Vec<Withheld> = Vec::new();
    for reason in [
        WithheldReason::WindowByMatch,
        WithheldReason::WindowByEra,
        WithheldReason::WindowByBars,
        WithheldReason::WindowNotInSysfs,
        WithheldReason::InboundByPolicy,
    ] {
        let Some(all) = candidates.get(&reason).map(|all| all.subtract(&accounted)) else { continue };
        let found = all.ranges().iter().copied();
        withheld.extend(found.map(|range| Withheld { range, reason, evidence: Evidence::of(range, reason, facts) }));
        accounted = accounted.union(&all);
    }
    withheld.sort_by_key(|withheld| withheld.range);
    withheld
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> RangeSet {
        RangeSet::from(text.parse::<IovaRange>().unwrap())
    }

    #[test]
    fn evidence_names_what_was_seen_and_where() {
        let facts = HostFacts {
            kernel: Some("4.14.0".to_owned()),
            windows: Some(set("1000-1fff").union(&set("8000-8fff"))),
            bars: Some(vec!["2000-20ff".parse().unwrap(), "9000-90ff".parse().unwrap()]),
            inbound: Some(set("0-fff").union(&set("8000-ffff")).union(&set("20000-2ffff")).union(&set("50000-5ffff"))),
            sources: [(Fact::Windows, Source::ProcIomem), (Fact::Bars, Source::PciConfig)].into(),
            ..HostFacts::default()
        };
        let says = |range: &str, reason| Evidence::of(range.parse().unwrap(), reason, &facts).to_string();
        let windows = "host bridge window 0x1000-0x1fff (proc-iomem)";
        assert_eq!(says("1000-1fff", WithheldReason::WindowByMatch), windows);
        assert_eq!(says("1800-1fff", WithheldReason::WindowNotInSysfs), windows);
        assert_eq!(
            says("1000-1fff", WithheldReason::WindowByEra),
            "Linux 4.14.0 shows nothing but host bridge windows as `reserved` on this IOMMU"
        );
        let bar = "in it lies the BAR 0x2000-0x20ff (pci-config)";
        assert_eq!(says("2000-2fff", WithheldReason::WindowByBars), bar);
        for (range, says_of_inbound) in [
            ("10000-1ffff", "devices reach no memory here, but at 0x8000-0xffff, 0x20000-0x2ffff"),
            ("60000-6ffff", "devices reach no memory here, but at 0x50000-0x5ffff"),
        ] {
            assert_eq!(says(range, WithheldReason::InboundByPolicy), says_of_inbound);
        }
        let nowhere = HostFacts { inbound: Some(RangeSet::default()), ..HostFacts::default() };
        let evidence = Evidence::of(IovaRange::ALL, WithheldReason::InboundByPolicy, &nowhere);
        assert_eq!(evidence.to_string(), "devices reach no memory here");
    }
}
