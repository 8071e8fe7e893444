// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a reserved region of the host really is: the rules, each a function named after it.
//!
//! Most of what a host reserves for a group is true: DMA there cannot reach memory. But from Linux 4.12 to 4.17 some hosts
//! showed the windows of their PCI host bridges as reserved regions too (`arm-smmu` and `arm-smmu-v3`, since commit
//! 273df9635385, until cd2c9fcf5c66). Those are no property of a group, and a guest that is told of them loses memory. The
//! rules look for evidence, and without it a region is taken for true.

use super::{Driver, HostFacts, HostRegion, HostRegionKind};
use crate::range::{IovaRange, RangeSet};

/// What a reserved region is taken for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// DMA there cannot reach memory: the guest is told.
    True,
    /// Mapped to itself only while firmware uses it: VFIO lets it be mapped.
    Relaxable,
    /// Of a kind that this version does not know: taken for true.
    UnknownType,
    /// A host bridge window that this kernel enforces all the same: true, to the guest.
    WindowEnforced,
    /// Wholly or in part a host bridge window, which the guest is not told; what is left is true.
    Window {
        /// What is withheld.
        withheld: RangeSet,
        /// Why it is taken for a window.
        reason: WithheldReason,
    },
}

/// Why a range is not reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WithheldReason {
    /// It is a known host bridge window that the host does not even show.
    WindowNotInSysfs,
    /// The host shows it, and it is a known host bridge window.
    WindowByMatch,
    /// The host shows it, and its kernel is of the time when nothing but windows was shown so.
    WindowByEra,
    /// The host shows it, windows are not known, and a device's BAR behind the same bridge lies in it.
    WindowByBars,
    /// Devices cannot reach memory there, and the operator chose not to tell.
    InboundByPolicy,
}

/// Finds out what a region is.
pub(super) fn classify(region: &HostRegion, facts: &HostFacts) -> Verdict {
    match region.kind {
        HostRegionKind::Msi | HostRegionKind::Direct => return Verdict::True,
        HostRegionKind::DirectRelaxable => return Verdict::Relaxable,
        HostRegionKind::Other(_) => return Verdict::UnknownType,
        HostRegionKind::Reserved => (),
    }
    let range = region.range;
    if r1_never_exported(facts) {
        return Verdict::True;
    }
    let none = RangeSet::new();
    let windows = facts.windows.as_ref().unwrap_or(&none);
    let whole = |reason| Verdict::Window { withheld: RangeSet::from(range), reason };
    let window = if r2_era(facts) {
        whole(WithheldReason::WindowByEra)
    } else if r3_match(range, windows) {
        whole(WithheldReason::WindowByMatch)
    } else if let Some(withheld) = r4_merged_neighbour(range, windows).filter(|_| !r0_enforced(range, facts)) {
        return Verdict::Window { withheld, reason: WithheldReason::WindowByMatch };
    } else if r5_bars(range, windows, facts) {
        whole(WithheldReason::WindowByBars)
    } else {
        return r6_true();
    };
    if r0_enforced(range, facts) { Verdict::WindowEnforced } else { window }
}

/// R0, of all others' evidence the strongest: the host does not let the region be mapped. A kernel that someone patched may
/// show windows and enforce them too; then a MAP there fails, whatever the region is, and the guest must know.
fn r0_enforced(range: IovaRange, facts: &HostFacts) -> bool {
    facts.usable.as_ref().is_some_and(|usable| usable.overlapping(range).is_none())
}

/// R1: the driver never showed windows, in any kernel.
fn r1_never_exported(facts: &HostFacts) -> bool {
    matches!(facts.driver, Driver::IntelVtd | Driver::AmdVi | Driver::S390 | Driver::Virtio)
}

/// R2: the kernel is older than any other source of `reserved` regions on this driver (device tree's `iommu-addresses`,
/// a5bf3cfce8cb, came with 6.3; 6.0 is taken to be on the safe side), so it can only be a window.
fn r2_era(facts: &HostFacts) -> bool {
    let is_arm = matches!(facts.driver, Driver::ArmSmmu | Driver::ArmSmmuV3);
    is_arm && facts.kernel_version().is_some_and(|version| version < (6, 0))
}

/// R3: the region is one of the known windows, or several that touch (the kernel merges regions that do).
fn r3_match(range: IovaRange, windows: &RangeSet) -> bool {
    windows.ranges().contains(&range)
}

/// R4: windows lie wholly in the region: the kernel merged them with a true neighbour. A window that only overlaps proves
/// nothing.
fn r4_merged_neighbour(range: IovaRange, windows: &RangeSet) -> Option<RangeSet> {
    let inside: RangeSet = windows.ranges().iter().copied().filter(|window| range.covers(*window)).collect();
    (!inside.is_empty()).then_some(inside)
}

/// R5: windows are not known, and a BAR behind the same bridge lies in the region: only a window has BARs in it.
fn r5_bars(range: IovaRange, windows: &RangeSet, facts: &HostFacts) -> bool {
    windows.is_empty() && facts.bars.iter().flatten().any(|bar| range.covers(*bar))
}

/// R6: when in doubt, it is true.
const fn r6_true() -> Verdict {
    Verdict::True
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: &str = "0xe0000000 0xf7feffff reserved";

    fn facts(driver: Driver, kernel: Option<&str>, windows: &[&str], usable: &[&str]) -> HostFacts {
        let set = |texts: &[&str]| texts.iter().map(|text| text.parse::<IovaRange>().unwrap()).collect::<RangeSet>();
        HostFacts {
            kernel: kernel.map(ToOwned::to_owned),
            driver,
            windows: (!windows.is_empty()).then(|| set(windows)),
            usable: (!usable.is_empty()).then(|| set(usable)),
            ..HostFacts::default()
        }
    }

    fn verdict(line: &str, facts: &HostFacts) -> Verdict {
        classify(&line.parse().unwrap(), facts)
    }

    fn withheld(verdict: &Verdict) -> (String, WithheldReason) {
        match verdict {
            Verdict::Window { withheld, reason } => (withheld.to_string(), *reason),
            other => panic!("{other:?}"),
        }
    }

    const SMMU: Driver = Driver::ArmSmmuV3;

    #[test]
    fn r0_what_the_host_enforces_is_told_whatever_it_is() {
        let outside = &["0-dfffffff", "f7ff0000-ffffffffffff"];
        for (kernel, windows) in [(Some("4.14"), &[][..]), (None, &["e0000000-f7feffff"][..])] {
            assert_eq!(verdict(WINDOW, &facts(SMMU, kernel, windows, outside)), Verdict::WindowEnforced);
            assert_ne!(verdict(WINDOW, &facts(SMMU, kernel, windows, &["0-ffffffffffff"])), Verdict::WindowEnforced);
        }
        assert_eq!(verdict(WINDOW, &facts(SMMU, None, &["e0000000-efffffff"], outside)), Verdict::True);
    }

    #[test]
    fn r1_x86_s390_and_virtio_never_showed_windows() {
        for driver in [Driver::IntelVtd, Driver::AmdVi, Driver::S390, Driver::Virtio] {
            let facts = facts(driver, Some("4.14"), &["e0000000-f7feffff"], &[]);
            assert_eq!(verdict(WINDOW, &facts), Verdict::True, "{driver:?}");
        }
    }

    #[test]
    fn r2_an_old_kernel_on_arm_had_nothing_else_to_show() {
        let by_era = ("0xe0000000-0xf7feffff".to_owned(), WithheldReason::WindowByEra);
        assert_eq!(withheld(&verdict(WINDOW, &facts(SMMU, Some("4.14.0-115.el7a.0.1.aarch64"), &[], &[]))), by_era);
        assert_eq!(withheld(&verdict(WINDOW, &facts(Driver::ArmSmmu, Some("5.19"), &[], &[]))), by_era);
        for (driver, kernel) in [(SMMU, Some("6.0")), (SMMU, None), (Driver::Unknown, Some("4.14"))] {
            assert_eq!(verdict(WINDOW, &facts(driver, kernel, &[], &[])), Verdict::True);
        }
    }

    #[test]
    fn r3_a_region_that_is_a_window_is_one() {
        let by_match = ("0xe0000000-0xf7feffff".to_owned(), WithheldReason::WindowByMatch);
        for windows in [&["e0000000-f7feffff"][..], &["e0000000-efffffff", "f0000000-f7feffff"]] {
            assert_eq!(withheld(&verdict(WINDOW, &facts(SMMU, None, windows, &[]))), by_match);
        }
        // Neither a part of one, nor one that only overlaps.
        for windows in [&["e0000000-ffffffff"][..], &["f0000000-ffffffff"], &["1000-1fff"]] {
            assert_eq!(verdict(WINDOW, &facts(SMMU, None, windows, &[])), Verdict::True, "{windows:?}");
        }
    }

    #[test]
    fn r4_windows_merged_with_a_true_neighbour_are_taken_out() {
        let windows = &["e1000000-e1ffffff", "e4000000-e4ffffff", "f7000000-ffffffff"];
        let (taken, reason) = withheld(&verdict(WINDOW, &facts(SMMU, None, windows, &[])));
        assert_eq!(
            (taken.as_str(), reason),
            ("0xe1000000-0xe1ffffff, 0xe4000000-0xe4ffffff", WithheldReason::WindowByMatch)
        );
    }

    #[test]
    fn r5_a_bar_in_the_region_shows_a_window_if_windows_are_not_known() {
        let bars = |windows: &[&str], bar: &str| {
            let mut facts = facts(SMMU, None, windows, &[]);
            facts.bars = Some(vec![bar.parse().unwrap()]);
            verdict(WINDOW, &facts)
        };
        assert_eq!(withheld(&bars(&[], "e0000000-e001ffff")).1, WithheldReason::WindowByBars);
        assert_eq!(bars(&[], "dffff000-e001ffff"), Verdict::True, "it reaches out");
        assert_eq!(bars(&["1000-1fff"], "e0000000-e001ffff"), Verdict::True, "windows are known, and it is none");
    }

    #[test]
    fn r6_without_evidence_it_is_true() {
        assert_eq!(verdict(WINDOW, &HostFacts::default()), Verdict::True);
    }
}
