// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From what the host shows to what the guest is told.

use super::{EndpointView, HostFacts, HostRegion, HostRegionKind, ReservedKind, ReservedRegion, ViewError};
use crate::id::EndpointId;
use crate::range::{IovaRange, RangeSet};

/// Where x86 decodes message-signalled interrupts, in hardware: the doorbell that x86 guests expect.
pub const X86_MSI: IovaRange = match IovaRange::new(0xfee0_0000, 0xfeef_ffff) {
    Some(range) => range,
    None => IovaRange::ALL,
};

/// What the operator chose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The addresses that the guest is offered; `None` to take what the endpoints' facts allow.
    pub input_range: Option<IovaRange>,
    /// The MSI doorbell of the guest's machine; `None` if it has none at a fixed address.
    pub guest_msi: Option<IovaRange>,
}

/// What the guest is told of the device and of each endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The addresses that can be mapped at all.
    pub input_range: IovaRange,
    /// One view for each endpoint, in the order of the facts.
    pub views: Vec<EndpointView>,
}

/// Facts from which nothing can be planned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The group must keep an identity mapping.
    #[error(
        "endpoint {endpoint}: the host must keep {range} mapped to itself for this device (a `direct` region), so \
         VFIO refuses it: ask the platform's vendor, or assign another device"
    )]
    Direct {
        /// The endpoint.
        endpoint: EndpointId,
        /// The region.
        range: IovaRange,
    },
    /// No address is left.
    #[error("endpoint {endpoint}: no address in {input_range} can be mapped")]
    NothingUsable {
        /// The endpoint.
        endpoint: EndpointId,
        /// The addresses looked at.
        input_range: IovaRange,
    },
    /// Neither the facts nor the operator say how far addresses go.
    #[error(
        "endpoint {endpoint}: how far its addresses go is not known: give its facts (viommuctl inspect --facts-out) \
         or an input range"
    )]
    UnknownWidth {
        /// The endpoint.
        endpoint: EndpointId,
    },
    /// There is no endpoint to take an input range from.
    #[error("without an endpoint, an input range must be given")]
    NoEndpoint,
    /// The regions cannot be reported together.
    #[error("endpoint {endpoint}")]
    View {
        /// The endpoint.
        endpoint: EndpointId,
        /// What is wrong.
        source: ViewError,
    },
}

/// Plans what the guest is told, from the facts of each endpoint's group.
///
/// # Errors
///
/// [`PlanError`] if an endpoint cannot be offered.
pub fn plan(policy: &Policy, endpoints: &[(EndpointId, HostFacts)]) -> Result<Plan, PlanError> {
    let mut usable = Vec::with_capacity(endpoints.len());
    for (endpoint, facts) in endpoints {
        check_attachable(*endpoint, facts)?;
        usable.push(usable_addresses(facts));
    }
    let input_range = match policy.input_range {
        Some(range) => range,
        None => common_input_range(endpoints, &usable)?,
    };
    let view = |((endpoint, _), usable): (&(EndpointId, HostFacts), &RangeSet)| {
        view_of(*endpoint, usable, input_range, policy.guest_msi)
    };
    let views = endpoints.iter().zip(&usable).map(view).collect::<Result<_, _>>()?;
    Ok(Plan { input_range, views })
}

fn check_attachable(endpoint: EndpointId, facts: &HostFacts) -> Result<(), PlanError> {
    let mut regions = facts.reserved_regions.iter().flatten();
    match regions.find(|region| region.kind == HostRegionKind::Direct) {
        Some(direct) => Err(PlanError::Direct { endpoint, range: direct.range }),
        None => Ok(()),
    }
}

/// The addresses that the host can map for this group.
fn usable_addresses(facts: &HostFacts) -> RangeSet {
    let regions = facts.reserved_regions.iter().flatten();
    let reserved: RangeSet = regions.filter(|region| is_reserved(region)).map(|region| region.range).collect();
    let mut usable = RangeSet::from(facts.aperture.unwrap_or(IovaRange::ALL)).subtract(&reserved);
    if let Some(known) = &facts.usable {
        usable = usable.intersect(known);
    }
    usable
}

/// Whether the host refuses mappings in a region of its group. VFIO and iommufd let relaxable regions be mapped.
fn is_reserved(region: &HostRegion) -> bool {
    region.kind != HostRegionKind::DirectRelaxable
}

/// From the lowest to the highest address that any endpoint can use.
fn common_input_range(endpoints: &[(EndpointId, HostFacts)], usable: &[RangeSet]) -> Result<IovaRange, PlanError> {
    for (endpoint, facts) in endpoints {
        if facts.usable.is_none() && facts.aperture.is_none() {
            return Err(PlanError::UnknownWidth { endpoint: *endpoint });
        }
    }
    let start = usable.iter().filter_map(RangeSet::first).map(IovaRange::start).min();
    let last = usable.iter().filter_map(RangeSet::last).map(IovaRange::last).max();
    match (start.zip(last).and_then(|(start, last)| IovaRange::new(start, last)), endpoints.first()) {
        (Some(range), _) => Ok(range),
        (None, Some((endpoint, _))) => {
            Err(PlanError::NothingUsable { endpoint: *endpoint, input_range: IovaRange::ALL })
        }
        (None, None) => Err(PlanError::NoEndpoint),
    }
}

/// All of the input range that is not usable, with the guest's doorbell cut out and shown as what it is.
fn view_of(
    endpoint: EndpointId,
    usable: &RangeSet,
    input_range: IovaRange,
    guest_msi: Option<IovaRange>,
) -> Result<EndpointView, PlanError> {
    let offered = RangeSet::from(input_range);
    if usable.intersect(&offered).is_empty() {
        return Err(PlanError::NothingUsable { endpoint, input_range });
    }
    let msi = guest_msi.filter(|msi| input_range.covers(*msi));
    let mut reserved = offered.subtract(usable);
    if let Some(msi) = msi {
        reserved = reserved.subtract(&RangeSet::from(msi));
    }
    let reserved = reserved.ranges().iter().map(|range| ReservedRegion { range: *range, kind: ReservedKind::Reserved });
    let msi = msi.map(|range| ReservedRegion { range, kind: ReservedKind::Msi });
    EndpointView::new(reserved.chain(msi).collect()).map_err(|source| PlanError::View { endpoint, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDPOINT: EndpointId = EndpointId(0x18);

    fn facts(lines: &[&str], usable: &[&str]) -> HostFacts {
        HostFacts {
            reserved_regions: Some(lines.iter().map(|line| line.parse().unwrap()).collect()),
            usable: (!usable.is_empty())
                .then(|| usable.iter().map(|range| range.parse::<IovaRange>().unwrap()).collect()),
            ..HostFacts::default()
        }
    }

    fn x86() -> Policy {
        Policy { input_range: None, guest_msi: Some(X86_MSI) }
    }

    fn reported(view: &EndpointView) -> Vec<String> {
        view.reported().iter().map(|region| format!("{} {:?}", region.range, region.kind)).collect()
    }

    const MSI_LINE: &str = "0x00000000fee00000 0x00000000feefffff msi";
    const MSI_REPORTED: &str = "0xfee00000-0xfeefffff Msi";

    #[test]
    fn intel_48_bit_reports_one_msi_region() {
        let facts = facts(&[MSI_LINE], &["0-fedfffff", "fef00000-ffffffffffff"]);
        let plan = plan(&x86(), &[(ENDPOINT, facts)]).unwrap();
        assert_eq!(plan.input_range.to_string(), "0x0-0xffffffffffff");
        assert_eq!(reported(&plan.views[0]), [MSI_REPORTED]);
    }

    #[test]
    fn amd_reports_the_hypertransport_hole() {
        let lines = [MSI_LINE, "0x000000fd00000000 0x000000ffffffffff reserved"];
        let usable = ["0-fedfffff", "fef00000-fcffffffff", "10000000000-ffffffffffff"];
        let plan = plan(&x86(), &[(ENDPOINT, facts(&lines, &usable))]).unwrap();
        assert_eq!(reported(&plan.views[0]), [MSI_REPORTED, "0xfd00000000-0xffffffffff Reserved"]);
    }

    #[test]
    fn a_narrower_endpoint_gets_a_reserved_tail() {
        let narrow = facts(&[MSI_LINE], &["0-fedfffff", "fef00000-7fffffffff"]);
        let wide = facts(&[MSI_LINE], &["0-fedfffff", "fef00000-ffffffffffff"]);
        let plan = plan(&x86(), &[(EndpointId(1), narrow), (EndpointId(2), wide)]).unwrap();
        assert_eq!(plan.input_range.to_string(), "0x0-0xffffffffffff");
        assert_eq!(reported(&plan.views[0]), [MSI_REPORTED, "0x8000000000-0xffffffffffff Reserved"]);
        assert_eq!(reported(&plan.views[1]), [MSI_REPORTED]);
    }

    #[test]
    fn the_guest_doorbell_is_cut_out_of_a_host_region() {
        let facts = facts(&["0x08000000 0x080fffff msi"], &["0-7ffffff", "8100000-ffffffffffff"]);
        let policy = Policy { input_range: None, guest_msi: Some("8090000-809ffff".parse().unwrap()) };
        let plan = plan(&policy, &[(ENDPOINT, facts)]).unwrap();
        let expected = ["0x8000000-0x808ffff Reserved", "0x8090000-0x809ffff Msi", "0x80a0000-0x80fffff Reserved"];
        assert_eq!(reported(&plan.views[0]), expected);
    }

    #[test]
    fn relaxable_is_ignored_and_direct_refused() {
        let relaxable = "0x8b800000 0x8f9fffff direct-relaxable";
        let plan_of = |lines: &[&str]| plan(&x86(), &[(ENDPOINT, facts(lines, &["0-ffffffffffff"]))]);
        assert_eq!(reported(&plan_of(&[MSI_LINE, relaxable]).unwrap().views[0]), [MSI_REPORTED]);
        let direct = "0xbdffd000 0xbdffffff direct";
        let range = "bdffd000-bdffffff".parse().unwrap();
        assert_eq!(plan_of(&[MSI_LINE, direct]), Err(PlanError::Direct { endpoint: ENDPOINT, range }));
    }

    #[test]
    fn an_unknown_kind_is_taken_for_reserved() {
        let facts = facts(&["0x1000 0x1fff translated-foo"], &["0-ffffffff"]);
        let plan = plan(&Policy::default(), &[(ENDPOINT, facts)]).unwrap();
        assert_eq!(reported(&plan.views[0]), ["0x1000-0x1fff Reserved"]);
    }

    #[test]
    fn without_usable_ranges_the_operator_must_say_how_far() {
        let endpoints = [(ENDPOINT, facts(&[MSI_LINE], &[]))];
        assert_eq!(plan(&x86(), &endpoints), Err(PlanError::UnknownWidth { endpoint: ENDPOINT }));
        let policy = Policy { input_range: Some("0-7fffffffff".parse().unwrap()), ..x86() };
        assert_eq!(reported(&plan(&policy, &endpoints).unwrap().views[0]), [MSI_REPORTED]);
    }

    #[test]
    fn nothing_usable_is_an_error_and_never_one_big_region() {
        let endpoints = [(ENDPOINT, facts(&["0x0 0xffff reserved"], &["0-ffff"]))];
        assert!(matches!(plan(&x86(), &endpoints), Err(PlanError::NothingUsable { .. })));
        let policy = Policy { input_range: Some("0-ffff".parse().unwrap()), ..x86() };
        assert!(matches!(plan(&policy, &endpoints), Err(PlanError::NothingUsable { .. })));
    }

    #[test]
    fn a_doorbell_outside_the_input_range_is_not_reported() {
        let policy = Policy { input_range: Some("0-ffffff".parse().unwrap()), ..x86() };
        let plan = plan(&policy, &[(ENDPOINT, facts(&[MSI_LINE], &[]))]).unwrap();
        assert!(plan.views[0].reported().is_empty());
    }
}
