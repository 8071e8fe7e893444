// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From what the host shows to what the guest is told.

use std::collections::BTreeMap;

pub use super::advisory::{Advisory, AdvisoryKind};
use super::policy::{Verdict, WithheldReason, classify};
use super::widen::widen;
use super::withheld::{Withheld, withheld};
use super::{Driver, EndpointView, HostFacts, HostRegion, HostRegionKind};
use crate::id::EndpointId;
use crate::range::{IovaRange, RangeSet};
use crate::spec;

/// Where x86 decodes message-signalled interrupts, in hardware: the doorbell that x86 guests expect.
pub const X86_MSI: IovaRange = constant(0xfee0_0000, 0xfeef_ffff);

/// Where Linux puts the doorbell if the IOMMU's hardware has none (`MSI_IOVA_BASE`).
const SOFTWARE_MSI: IovaRange = constant(0x0800_0000, 0x080f_ffff);

/// A range that is known when this is compiled: one that is none does not compile.
const fn constant(start: u64, last: u64) -> IovaRange {
    match IovaRange::new(start, last) {
        Some(range) => range,
        None => panic!("the first address is behind the last one"),
    }
}

/// What the operator chose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Whether the guest is told of regions that VFIO lets be mapped.
    pub relaxable: Relaxable,
    /// Whether the guest is told where devices cannot reach memory, when that is known.
    pub inbound: Inbound,
    /// What is done about BARs that a device without isolation would reach instead of memory.
    pub peer_to_peer: PeerToPeer,
    /// How many bits of address the guest is offered at most.
    pub max_address_width: Option<u8>,
    /// The addresses that the guest is offered, as far as `max_address_width` goes; `None` to take what the endpoints' facts
    /// allow. A device that has been set up keeps what it has: an endpoint that is added later is planned for with its input
    /// range and probe size.
    pub input_range: Option<IovaRange>,
    /// How many bytes of properties a PROBE may be answered with; `None` for as many as needed. Where they are too few,
    /// reserved regions are widened until they fit, never over guest memory.
    pub probe_size: Option<u32>,
    /// The MSI doorbell of the guest's machine; `None` if it has none at a fixed address.
    pub guest_msi: Option<IovaRange>,
    /// The guest's memory, as far as it is known.
    pub guest_ram: Vec<IovaRange>,
}

/// Regions that must be mapped to themselves only while firmware uses them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "daemon", derive(clap::ValueEnum, serde::Deserialize), serde(rename_all = "kebab-case"))]
pub enum Relaxable {
    /// They are the guest's to map.
    #[default]
    Ignore,
    /// The guest is told.
    Report,
}

/// Addresses at which devices cannot reach memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "daemon", derive(clap::ValueEnum, serde::Deserialize), serde(rename_all = "kebab-case"))]
pub enum Inbound {
    /// The guest is told.
    #[default]
    Report,
    /// The guest is not told.
    Withhold,
}

/// BARs of devices that the host does not isolate from each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "daemon", derive(clap::ValueEnum, serde::Deserialize), serde(rename_all = "kebab-case"))]
pub enum PeerToPeer {
    /// The operator is told.
    #[default]
    Warn,
    /// The guest is told that the BARs' addresses are reserved.
    CarveBars,
}

/// What the guest is told of the device and of each endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The addresses that can be mapped at all.
    pub input_range: IovaRange,
    /// One for each endpoint, in the order of the facts.
    pub endpoints: Vec<EndpointPlan>,
}

/// What the guest is told of an endpoint, what it is not, and what the operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPlan {
    /// The endpoint.
    pub id: EndpointId,
    /// What PROBE reports and MAP refuses.
    pub view: EndpointView,
    /// What is not reported though something speaks for it; ascending, disjoint.
    pub withheld: Vec<Withheld>,
    /// What the operator should know; ascending.
    pub advisories: Vec<Advisory>,
    /// The (lowest) region for which VFIO refuses the device, if there is one.
    pub direct: Option<IovaRange>,
    /// Guest memory that lies in reported regions, the doorbell apart: with any, the endpoint cannot be in bypass.
    pub bypass_refused: RangeSet,
}

/// Facts from which nothing can be planned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No address is left.
    #[error("endpoint {endpoint}: no address in {input_range} can be mapped")]
    NothingUsable {
        /// The endpoint.
        endpoint: EndpointId,
        /// The addresses looked at.
        input_range: IovaRange,
    },
    /// There is no endpoint to take an input range from.
    #[error("without an endpoint, an input range must be given: give endpoints, or an input range")]
    NoEndpoint,
    /// There is no room for its regions, and they cannot be widened.
    #[error(
        "endpoint {endpoint}: its {regions} reserved regions do not fit {probe_size} bytes of properties, and guest memory lies between them"
    )]
    ProbeSize {
        /// The endpoint.
        endpoint: EndpointId,
        /// How many regions it has.
        regions: usize,
        /// How many bytes there are.
        probe_size: u32,
    },
}

/// What the facts of one endpoint come to.
struct Findings {
    /// What the host can map for the group, and the operator wants to offer.
    usable: RangeSet,
    /// What is reserved, and is no window.
    reserved: RangeSet,
    /// Ranges that the host shows and that are windows.
    windows_shown: BTreeMap<WithheldReason, RangeSet>,
    advisories: Vec<Advisory>,
}

/// Plans what the guest is told, from the facts of each endpoint's group.
///
/// # Errors
///
/// [`PlanError`]
pub fn plan(policy: &Policy, endpoints: &[(EndpointId, HostFacts)]) -> Result<Plan, PlanError> {
    let findings: Vec<Findings> = endpoints.iter().map(|(_, facts)| look_at(facts, policy)).collect();
    for ((endpoint, _), found) in endpoints.iter().zip(&findings) {
        if found.usable.is_empty() {
            return Err(PlanError::NothingUsable { endpoint: *endpoint, input_range: IovaRange::ALL });
        }
    }
    let input_range = input_range(policy, &findings).ok_or_else(|| match endpoints.first() {
        // All that any of them can use is wider than the operator wants.
        Some((endpoint, _)) => PlanError::NothingUsable { endpoint: *endpoint, input_range: widest(policy) },
        None => PlanError::NoEndpoint,
    })?;
    let planned = endpoints.iter().zip(&findings);
    let endpoints = planned.map(|((id, facts), found)| plan_endpoint(*id, facts, found, policy, input_range));
    Ok(Plan { input_range, endpoints: endpoints.collect::<Result<_, _>>()? })
}

/// Classifies every region, and takes away what cannot be mapped.
fn look_at(facts: &HostFacts, policy: &Policy) -> Findings {
    let mut reserved: Vec<IovaRange> = Vec::new();
    // A set, because each of many regions can leave something between each of many windows.
    let mut beside_windows = RangeSet::default();
    let mut windows_shown = BTreeMap::<WithheldReason, RangeSet>::new();
    let mut advisories = Vec::new();
    for region in facts.reserved_regions.iter().flatten() {
        let range = region.range;
        let advise = |kind| Advisory { range, kind };
        match classify(region, facts) {
            Verdict::True => reserved.push(range),
            Verdict::Relaxable => {
                advisories.push(advise(AdvisoryKind::Relaxable));
                if policy.relaxable == Relaxable::Report {
                    reserved.push(range);
                }
            }
            Verdict::UnknownType => {
                advisories.push(advise(AdvisoryKind::UnknownType));
                reserved.push(range);
            }
            Verdict::WindowEnforced => {
                advisories.push(advise(AdvisoryKind::WindowEnforced));
                reserved.push(range);
            }
            Verdict::Window { withheld, reason } => {
                beside_windows = beside_windows.union(&RangeSet::from(range).subtract(&withheld));
                let shown = windows_shown.entry(reason).or_default();
                *shown = shown.union(&withheld);
            }
        }
        if is_software_msi(region, facts.driver)
            && let Some(inbound) = &facts.inbound
            && !inbound.covers(range)
        {
            advisories.push(advise(AdvisoryKind::SwMsiOutsideInbound));
        }
    }
    let reserved = beside_windows.union(&reserved.into_iter().collect());
    let mut usable = RangeSet::from(facts.aperture.unwrap_or(IovaRange::ALL)).subtract(&reserved);
    if let Some(known) = &facts.usable {
        usable = usable.intersect(known);
    }
    if let Some(inbound) = facts.inbound.as_ref().filter(|_| policy.inbound == Inbound::Report) {
        usable = usable.intersect(inbound);
    }
    // Only where the host does not keep devices apart does a BAR's address lead to the BAR.
    if policy.peer_to_peer == PeerToPeer::CarveBars && facts.acs_isolated == Some(false) {
        usable = usable.subtract(&facts.bars.iter().flatten().copied().collect());
    }
    Findings { usable, reserved, windows_shown, advisories }
}

/// Whether a region is where Linux maps the doorbell by software.
pub(crate) fn is_software_msi(region: &HostRegion, driver: Driver) -> bool {
    region.kind == HostRegionKind::Msi
        && region.range == SOFTWARE_MSI
        && matches!(driver, Driver::ArmSmmu | Driver::ArmSmmuV3 | Driver::Virtio)
}

/// From the lowest to the highest address that any endpoint can use, unless the operator says otherwise; in any case no wider
/// than the operator wants.
fn input_range(policy: &Policy, findings: &[Findings]) -> Option<IovaRange> {
    if let Some(range) = policy.input_range {
        return range.intersection(widest(policy));
    }
    let start = findings.iter().filter_map(|found| found.usable.first()).map(IovaRange::start).min()?;
    let last = findings.iter().filter_map(|found| found.usable.last()).map(IovaRange::last).max()?;
    IovaRange::new(start, last.min(widest(policy).last()))
}

/// What the operator wants to offer at most.
pub(crate) fn widest(policy: &Policy) -> IovaRange {
    let last = match policy.max_address_width {
        Some(width) if width < 64 => (1 << width) - 1,
        _ => u64::MAX,
    };
    IovaRange::new(0, last).unwrap_or(IovaRange::ALL)
}

fn plan_endpoint(
    id: EndpointId,
    facts: &HostFacts,
    found: &Findings,
    policy: &Policy,
    input_range: IovaRange,
) -> Result<EndpointPlan, PlanError> {
    let offered = RangeSet::from(input_range);
    if found.usable.intersect(&offered).is_empty() {
        return Err(PlanError::NothingUsable { endpoint: id, input_range });
    }
    let mut advisories = found.advisories.clone();
    let msi = policy.guest_msi.filter(|msi| {
        let inside = input_range.covers(*msi);
        if !inside {
            advisories.push(Advisory { range: *msi, kind: AdvisoryKind::MsiOutsideRange });
        }
        inside
    });
    // All of the input range that is not usable, with the guest's doorbell cut out and shown as what it is.
    let mut reserved = offered.subtract(&found.usable).subtract(&msi.into_iter().collect());
    let fits = fit(&reserved, msi, policy);
    reserved = fits.map_err(|(regions, probe_size)| PlanError::ProbeSize { endpoint: id, regions, probe_size })?;
    let mut advise_on = |ranges: &[IovaRange], kind| {
        let hit = reserved.intersect(&ranges.iter().copied().collect());
        advisories.extend(hit.ranges().iter().map(|range| Advisory { range: *range, kind }));
        hit
    };
    let bypass_refused = advise_on(&policy.guest_ram, AdvisoryKind::RamInReserved);
    advise_on(facts.bars.as_deref().unwrap_or_default(), AdvisoryKind::BarInReserved);
    advisories.sort_by_key(|advisory| (advisory.range, advisory.kind));
    advisories.dedup();

    let view = EndpointView::of(&reserved, msi);
    // Regions that were widened, or the doorbell, may take all that could be mapped.
    if offered.subtract(view.refused()).is_empty() {
        return Err(PlanError::NothingUsable { endpoint: id, input_range });
    }
    let withheld = withheld(facts, &found.windows_shown, policy, found.reserved.union(view.refused()));
    let all = facts.reserved_regions.iter().flatten();
    let direct = all.filter(|region| region.kind == HostRegionKind::Direct).map(|region| region.range).min();
    Ok(EndpointPlan { id, view, withheld, advisories, direct, bypass_refused })
}

/// Widens regions until there is room to report them beside the doorbell. If that is not possible: how many there are, and
/// how many bytes.
fn fit(reserved: &RangeSet, msi: Option<IovaRange>, policy: &Policy) -> Result<RangeSet, (usize, u32)> {
    let Some(probe_size) = policy.probe_size else {
        return Ok(reserved.clone());
    };
    let doorbells = usize::from(msi.is_some());
    let room = probe_size as usize / spec::RESV_MEM_SIZE;
    let free = policy.guest_ram.iter().copied().chain(msi).collect();
    let widened = room.checked_sub(doorbells).and_then(|most| widen(reserved, most, &free));
    widened.ok_or((reserved.ranges().len() + doorbells, probe_size))
}

#[cfg(test)]
mod tests {
    use proptest::option::of;
    use proptest::prelude::*;

    use super::*;
    use crate::reserved::ReservedKind;

    fn regions() -> impl Strategy<Value = Vec<HostRegion>> {
        let kind = prop_oneof![
            Just(HostRegionKind::Direct),
            Just(HostRegionKind::DirectRelaxable),
            Just(HostRegionKind::Reserved),
            Just(HostRegionKind::Reserved),
            Just(HostRegionKind::Msi),
            Just(HostRegionKind::Other("translated-foo".to_owned())),
        ];
        proptest::collection::vec((range(), kind).prop_map(|(range, kind)| HostRegion { range, kind }), 0..5)
    }

    /// Ranges of a few pages in a small space, so that they meet.
    fn range() -> impl Strategy<Value = IovaRange> {
        (0..24u64, 0..6u64)
            .prop_map(|(start, more)| IovaRange::new(start << 12, ((start + more + 1) << 12) - 1).unwrap())
    }

    fn set() -> impl Strategy<Value = RangeSet> {
        proptest::collection::vec(range(), 0..5).prop_map(|ranges| ranges.into_iter().collect())
    }

    fn facts() -> impl Strategy<Value = HostFacts> {
        let driver = prop_oneof![
            Just(Driver::IntelVtd),
            Just(Driver::AmdVi),
            Just(Driver::ArmSmmuV3),
            Just(Driver::Riscv),
            Just(Driver::Unknown),
        ];
        let kernel = of(prop_oneof![Just("4.14".to_owned()), Just("6.12".to_owned())]);
        let parts = (kernel, driver, regions(), of(set()), of(set()), of(proptest::collection::vec(range(), 0..3)));
        (parts, of(set()), of(any::<bool>())).prop_map(
            |((kernel, driver, list, usable, windows, bars), inbound, acs)| HostFacts {
                kernel,
                driver,
                reserved_regions: Some(list),
                usable,
                aperture: IovaRange::new(0, 0x2_ffff),
                windows,
                bars,
                inbound,
                acs_isolated: acs,
                sources: std::collections::BTreeMap::new(),
            },
        )
    }

    fn policy() -> impl Strategy<Value = Policy> {
        (any::<[bool; 3]>(), of(range()), proptest::collection::vec(range(), 0..3)).prop_map(
            |([report, withhold, carve], guest_msi, guest_ram)| Policy {
                relaxable: if report { Relaxable::Report } else { Relaxable::Ignore },
                inbound: if withhold { Inbound::Withhold } else { Inbound::Report },
                peer_to_peer: if carve { PeerToPeer::CarveBars } else { PeerToPeer::Warn },
                guest_msi,
                guest_ram,
                ..Policy::default()
            },
        )
    }

    const ID: EndpointId = EndpointId(0x18);

    fn one(policy: &Policy, facts: &HostFacts) -> Option<(IovaRange, EndpointPlan)> {
        let mut plan = plan(policy, &[(ID, facts.clone())]).ok()?;
        Some((plan.input_range, plan.endpoints.remove(0)))
    }

    /// Thousands of windows as a file of facts can have them, all in each of many regions: with work by the cube of their number
    /// this would not end.
    #[test]
    fn many_windows_in_many_regions_are_planned() {
        let windows = (0..4000u64).map(|at| IovaRange::new(at << 13, (at << 13) + 0xfff).unwrap());
        let region = |at: u64| HostRegion {
            range: IovaRange::new(0, (1 << 32) + (at << 12) + 0xfff).unwrap(),
            kind: HostRegionKind::Reserved,
        };
        let facts = HostFacts {
            driver: Driver::ArmSmmuV3,
            reserved_regions: Some((0..500).map(region).collect()),
            windows: Some(windows.collect()),
            ..HostFacts::default()
        };
        let (_, planned) = one(&Policy::default(), &facts).unwrap();
        assert_eq!(planned.withheld.len(), 4000);
    }

    #[test]
    fn the_doorbell_is_one_of_the_regions_that_do_not_fit() {
        let facts = HostFacts {
            usable: Some(["0-ffff", "20000-fffff"].iter().map(|text| text.parse::<IovaRange>().unwrap()).collect()),
            ..HostFacts::default()
        };
        let policy = Policy { guest_msi: "30000-30fff".parse().ok(), probe_size: Some(24), ..Policy::default() };
        let refused = PlanError::ProbeSize { endpoint: ID, regions: 2, probe_size: 24 };
        assert_eq!(plan(&policy, &[(ID, facts)]), Err(refused));
    }

    proptest! {
        #[test]
        fn what_is_told_is_sorted_disjoint_and_inside(policy in policy(), facts in facts()) {
            let Some((input_range, planned)) = one(&policy, &facts) else { return Ok(()) };
            let reported = planned.view.reported();
            prop_assert!(reported.windows(2).all(|pair| pair[0].range.last() < pair[1].range.start()));
            prop_assert!(reported.iter().all(|region| input_range.covers(region.range)));
            prop_assert!(planned.withheld.windows(2).all(|pair| pair[0].range.last() < pair[1].range.start()));
            // I17 of docs/invariants.md: no withheld range is refused.
            prop_assert!(planned.withheld.iter().all(|w| planned.view.refused().overlapping(w.range).is_none()));
            let msi = reported.iter().filter(|region| region.kind == ReservedKind::Msi).count();
            prop_assert_eq!(msi, usize::from(policy.guest_msi.is_some_and(|msi| input_range.covers(msi))));
        }

        #[test]
        fn what_the_host_cannot_map_is_always_told(policy in policy(), facts in facts()) {
            let Some((input_range, planned)) = one(&policy, &facts) else { return Ok(()) };
            if let Some(usable) = &facts.usable {
                for range in RangeSet::from(input_range).subtract(usable).ranges() {
                    prop_assert!(planned.view.refused().covers(*range));
                }
            }
        }

        #[test]
        fn where_windows_were_never_shown_they_and_bars_change_nothing(
            facts in facts(), windows in set(), bar in range(), policy in policy(),
        ) {
            let policy = Policy { peer_to_peer: PeerToPeer::Warn, ..policy };
            let facts = HostFacts { driver: Driver::AmdVi, ..facts };
            let other = HostFacts { windows: Some(windows), bars: Some(vec![bar]), ..facts.clone() };
            let view = |facts| one(&policy, facts).map(|(range, planned)| (range, planned.view));
            prop_assert_eq!(view(&facts), view(&other));
        }

        #[test]
        fn elsewhere_a_window_only_changes_what_the_host_calls_reserved(
            facts in facts(), windows in set(), policy in policy(),
        ) {
            // The same input range, so that only the regions differ.
            let policy = Policy { input_range: facts.aperture, guest_msi: None, ..policy };
            let other = HostFacts { windows: Some(windows), ..facts.clone() };
            let (Some((_, a)), Some((_, b))) = (one(&policy, &facts), one(&policy, &other)) else { return Ok(()) };
            let (a, b) = (a.view.refused(), b.view.refused());
            let changed = a.subtract(b).union(&b.subtract(a));
            let shown = facts.reserved_regions.iter().flatten();
            let reserved: RangeSet = shown.filter(|r| r.kind == HostRegionKind::Reserved).map(|r| r.range).collect();
            prop_assert!(changed.subtract(&reserved).is_empty());
        }

        #[test]
        fn the_order_of_facts_does_not_matter(policy in policy(), facts in facts(), other in facts()) {
            let mut turned = facts.clone();
            turned.reserved_regions.as_mut().unwrap().reverse();
            turned.bars.iter_mut().for_each(|bars| bars.reverse());
            prop_assert_eq!(one(&policy, &facts), one(&policy, &turned));
            let both = [(EndpointId(1), facts), (EndpointId(2), other)];
            let [first, second] = both.clone();
            let (there, back) = (plan(&policy, &both), plan(&policy, &[second, first]));
            if let (Ok(there), Ok(mut back)) = (there, back) {
                back.endpoints.reverse();
                prop_assert_eq!(there, back);
            }
        }
    }
}
