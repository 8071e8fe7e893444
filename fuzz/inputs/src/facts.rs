// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a host says of itself, as text, as an answer of its kernel, or as values, and what the guest is told in consequence.

use std::path::Path;

use virtio_iommu::host::type1::{self, Type1Info};
use virtio_iommu::id::EndpointId;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::facts::FactsFile;
use virtio_iommu::reserved::plan::{EndpointPlan, Inbound, PeerToPeer, Plan, PlanError, Policy, Relaxable, plan};
use virtio_iommu::reserved::sysfs::{self, SysfsError};
use virtio_iommu::reserved::{
    Driver, EndpointView, HostFacts, HostRegion, HostRegionKind, ReservedKind, WithheldReason, report,
};

use crate::wire::{self, Field, operations, record};

record! {
    /// A range of addresses near those that matter.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Span {
        /// Near what.
        pub near: u8,
        /// How many pages behind it.
        pub page: u8,
        /// How many pages more than one.
        pub pages: u16,
        /// How much more or less at either end: not all are made of pages.
        pub uneven: u8,
    }
}

/// The ends of the address space, doorbells, the windows of a bridge, and what 32 bits reach.
const NEAR: [u64; 7] = [0, 0x0800_0000, 0xe000_0000, 0xfee0_0000, 1 << 32, 1 << 39, u64::MAX - 0x1f_ffff];

operations! {
    /// Something that is known of the last device, or chosen.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Known {
        /// A device, all else unknown.
        Device { driver: u8, kernel: u8, isolated: u8, },
        /// A reserved region.
        Region { span: Span, kind: u8, },
        /// What can be mapped.
        Usable { span: Span, },
        /// What the IOMMU can translate.
        Aperture { span: Span, },
        /// A window of the host bridge.
        Window { span: Span, },
        /// A BAR.
        Bar { span: Span, },
        /// Where devices reach memory.
        Inbound { span: Span, },
        /// The guest's doorbell.
        Msi { span: Span, },
        /// Guest memory.
        Ram { span: Span, },
        /// What the guest is offered.
        Offer { span: Span, },
        /// How much room there is for regions, and how wide addresses may be.
        Limits { probe_size: u16, width: u8, },
        /// The rest of the policy.
        Choices { bits: u8, },
    }
}

impl Span {
    fn range(self) -> IovaRange {
        let start = NEAR[usize::from(self.near) % NEAR.len()] + (u64::from(self.page) << 12);
        let start = start + u64::from(self.uneven & 1);
        let last = start.saturating_add(((u64::from(self.pages) + 1) << 12) - 1);
        let last = last - u64::from(self.uneven >> 1 & 1);
        IovaRange::new(start, last).expect("it has a page")
    }
}

/// The facts and choices that values come to.
fn assemble(values: &[Known]) -> FactsFile {
    const DRIVERS: [Driver; 5] =
        [Driver::Unknown, Driver::IntelVtd, Driver::ArmSmmu, Driver::ArmSmmuV3, Driver::Virtio];
    let (mut policy, mut devices) = (Policy::default(), vec![(EndpointId(0), HostFacts::default())]);
    for value in values {
        let (id, facts) = devices.last_mut().expect("there is one");
        let add = |set: &mut Option<RangeSet>, span: &Span| set.get_or_insert_default().insert(span.range());
        match value {
            Known::Device { driver, kernel, isolated } => {
                let id = EndpointId(id.0 + 1);
                let driver = DRIVERS[usize::from(*driver) % DRIVERS.len()];
                let kernel = [None, Some("4.14.0"), Some("6.12.48"), Some("next")][usize::from(kernel % 4)];
                let acs_isolated = [None, Some(false), Some(true)][usize::from(isolated % 3)];
                let kernel = kernel.map(ToOwned::to_owned);
                devices.push((id, HostFacts { driver, kernel, acs_isolated, ..HostFacts::default() }));
            }
            Known::Region { span, kind } => {
                let kinds = [
                    HostRegionKind::Reserved,
                    HostRegionKind::Msi,
                    HostRegionKind::Direct,
                    HostRegionKind::DirectRelaxable,
                    HostRegionKind::Other("strange".to_owned()),
                ];
                let kind = kinds[usize::from(*kind) % kinds.len()].clone();
                facts.reserved_regions.get_or_insert_default().push(HostRegion { range: span.range(), kind });
            }
            Known::Usable { span } => add(&mut facts.usable, span),
            Known::Aperture { span } => facts.aperture = Some(span.range()),
            Known::Window { span } => add(&mut facts.windows, span),
            Known::Bar { span } => facts.bars.get_or_insert_default().push(span.range()),
            Known::Inbound { span } => add(&mut facts.inbound, span),
            Known::Msi { span } => policy.guest_msi = Some(span.range()),
            Known::Ram { span } => policy.guest_ram.push(span.range()),
            Known::Offer { span } => policy.input_range = Some(span.range()),
            Known::Limits { probe_size, width } => {
                policy.probe_size = Some(u32::from(*probe_size));
                policy.max_address_width = Some(*width).filter(|width| *width != 0);
            }
            Known::Choices { bits } => {
                policy.relaxable = if bits & 1 == 0 { Relaxable::Ignore } else { Relaxable::Report };
                policy.inbound = if bits & 2 == 0 { Inbound::Report } else { Inbound::Withhold };
                policy.peer_to_peer = if bits & 4 == 0 { PeerToPeer::Warn } else { PeerToPeer::CarveBars };
            }
        }
    }
    FactsFile { policy, devices }
}

/// Plans, and looks at what comes of it.
fn check_plan(file: &FactsFile) {
    let FactsFile { policy, devices } = file;
    let planned = plan(policy, devices);
    let again = FactsFile::from_json(&file.to_json()).expect("what was written is read");
    assert_eq!(&again.devices, devices, "other facts are written");
    let planned = match planned {
        Ok(planned) => planned,
        Err(PlanError::NoEndpoint) => return assert!(devices.is_empty() && policy.input_range.is_none()),
        Err(error) => {
            let named = devices.iter().any(|(id, _)| error.to_string().contains(&format!("endpoint {id}")));
            return assert!(named, "an error names its endpoint: {error}");
        }
    };
    assert_eq!(planned.endpoints.len(), devices.len());
    for (endpoint, (id, facts)) in planned.endpoints.iter().zip(devices) {
        assert_eq!(endpoint.id, *id);
        check_shape(endpoint, policy, planned.input_range);
        check_reported(endpoint, facts, policy, planned.input_range);
    }
    check_without_withheld(&planned, file);
    check_widened(&planned, file);
    check_report(&planned, file);
}

/// Regions and withheld ranges are sorted, disjoint and merged, and have no address in common: I17 of docs/invariants.md.
fn check_shape(endpoint: &EndpointPlan, policy: &Policy, input_range: IovaRange) {
    let view = &endpoint.view;
    assert_eq!(EndpointView::new(view.reported().to_vec()).as_ref(), Ok(view));
    for pair in view.reported().windows(2) {
        let touch = pair[0].range.last() + 1 == pair[1].range.start();
        assert!(pair[0].range < pair[1].range && !(touch && pair[0].kind == pair[1].kind), "{pair:?} are one");
    }
    for region in view.reported() {
        assert!(input_range.covers(region.range), "{region:?} is out of {input_range}");
        assert!(
            region.kind != ReservedKind::Msi || Some(region.range) == policy.guest_msi,
            "{region:?} is no doorbell"
        );
    }
    let has_msi = view.reported().iter().any(|region| region.kind == ReservedKind::Msi);
    assert_eq!(has_msi, policy.guest_msi.is_some_and(|msi| input_range.covers(msi)), "the doorbell is reported");
    for pair in endpoint.withheld.windows(2) {
        let touch = pair[0].range.last().checked_add(1) == Some(pair[1].range.start());
        assert!(pair[0].range < pair[1].range && !pair[0].range.overlaps(pair[1].range), "{pair:?} are out of order");
        assert!(!(touch && pair[0].reason == pair[1].reason), "{pair:?} are one");
    }
    for withheld in &endpoint.withheld {
        assert_eq!(view.refused().overlapping(withheld.range), None, "{withheld:?} is refused");
    }
    assert!(endpoint.advisories.is_sorted_by_key(|advisory| (advisory.range, advisory.kind)));
}

/// What is told has a reason, and what has a reason is told.
fn check_reported(endpoint: &EndpointPlan, facts: &HostFacts, policy: &Policy, input_range: IovaRange) {
    let (offered, refused) = (RangeSet::from(input_range), endpoint.view.refused());
    assert!(!offered.subtract(refused).is_empty(), "nothing is left to be mapped");
    let inbound = facts.inbound.clone().filter(|_| policy.inbound == Inbound::Report);
    let everything = RangeSet::from(IovaRange::ALL);
    let mut reachable = RangeSet::from(facts.aperture.unwrap_or(IovaRange::ALL));
    for known in [&facts.usable, &inbound].into_iter().flatten() {
        reachable = reachable.intersect(known);
    }
    let unreachable = everything.subtract(&reachable);
    assert!(offered.intersect(&unreachable).subtract(refused).is_empty(), "what cannot be mapped is not told");
    let never_windows = matches!(facts.driver, Driver::IntelVtd | Driver::AmdVi | Driver::S390 | Driver::Virtio);
    let (mut may, mut direct) = (unreachable, None::<IovaRange>);
    for HostRegion { range, kind } in facts.reserved_regions.iter().flatten() {
        let must = match kind {
            HostRegionKind::DirectRelaxable => policy.relaxable == Relaxable::Report,
            HostRegionKind::Reserved => never_windows,
            HostRegionKind::Direct | HostRegionKind::Msi | HostRegionKind::Other(_) => true,
        };
        let told = RangeSet::from(*range).intersect(&offered).subtract(refused).is_empty();
        assert!(told || !must, "{range} {kind} is not told");
        if must || *kind == HostRegionKind::Reserved {
            may.insert(*range);
        }
        if *kind == HostRegionKind::Direct {
            direct = Some(direct.map_or(*range, |before| before.min(*range)));
        }
    }
    assert_eq!(endpoint.direct, direct);
    if policy.peer_to_peer == PeerToPeer::CarveBars && facts.acs_isolated == Some(false) {
        let bars: RangeSet = facts.bars.iter().flatten().copied().collect();
        assert!(bars.intersect(&offered).subtract(refused).is_empty(), "a BAR that can be reached is not told");
        may = may.union(&bars);
    }
    may = may.union(&policy.guest_msi.into_iter().collect());
    if policy.probe_size.is_none() {
        assert!(refused.subtract(&may).is_empty(), "what is refused has no reason: {}", refused.subtract(&may));
    }
    let reserved = endpoint.view.reported().iter().filter(|region| region.kind == ReservedKind::Reserved);
    let reserved: RangeSet = reserved.map(|region| region.range).collect();
    let ram: RangeSet = policy.guest_ram.iter().copied().collect();
    assert_eq!(endpoint.bypass_refused, reserved.intersect(&ram), "bypass is refused for what it cannot reach");
}

/// I17: with the withheld windows not even shown, the guest is told the same.
fn check_without_withheld(planned: &Plan, file: &FactsFile) {
    let policy = Policy { input_range: Some(planned.input_range), ..file.policy.clone() };
    // Where the doorbell is it does not matter what else is there.
    let msi = policy.guest_msi.filter(|msi| planned.input_range.covers(*msi));
    let mut devices = file.devices.clone();
    for (endpoint, (_, facts)) in planned.endpoints.iter().zip(&mut devices) {
        let windows = endpoint.withheld.iter().filter(|withheld| withheld.reason != WithheldReason::InboundByPolicy);
        let gone: RangeSet = windows.map(|withheld| withheld.range).chain(msi).collect();
        if let Some(regions) = &mut facts.reserved_regions {
            let without = |region: &HostRegion| {
                let kept = match region.kind {
                    HostRegionKind::Reserved => RangeSet::from(region.range).subtract(&gone),
                    _ => region.range.into(),
                };
                let kind = region.kind.clone();
                kept.ranges().iter().map(|range| HostRegion { range: *range, kind: kind.clone() }).collect::<Vec<_>>()
            };
            *regions = regions.iter().flat_map(without).collect();
        }
    }
    let other = plan(&policy, &devices).expect("there is no less room");
    for (endpoint, other) in planned.endpoints.iter().zip(&other.endpoints) {
        assert_eq!(endpoint.view, other.view, "a withheld range has an influence");
    }
}

/// Where there is little room regions are widened, never over guest memory, and all fit.
fn check_widened(planned: &Plan, file: &FactsFile) {
    let Some(probe_size) = file.policy.probe_size else { return };
    let policy = Policy { probe_size: None, ..file.policy.clone() };
    let narrow = plan(&policy, &file.devices).expect("there is more room");
    let ram: RangeSet = policy.guest_ram.iter().copied().collect();
    for (wide, narrow) in planned.endpoints.iter().zip(&narrow.endpoints) {
        assert!(wide.view.reported().len() * 24 <= probe_size as usize, "the regions do not fit");
        assert!(narrow.view.refused().subtract(wide.view.refused()).is_empty(), "a region is left out");
        let more = wide.view.refused().subtract(narrow.view.refused());
        assert!(more.intersect(&ram).is_empty(), "regions are widened over guest memory");
    }
}

/// The facts that a plan is printed with lead to it.
fn check_report(planned: &Plan, file: &FactsFile) {
    let text = report::to_json_with_facts(planned, file);
    let mut printed: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    printed.as_object_mut().expect("an object").retain(|key, _| key == "endpoints");
    for endpoint in printed["endpoints"].as_array_mut().expect("a list") {
        endpoint.as_object_mut().expect("an object").retain(|key, _| key == "id" || key == "facts");
    }
    let printed = FactsFile::from_json(&printed.to_string()).expect("what is printed is read");
    assert_eq!(plan(&file.policy, &printed.devices).as_ref(), Ok(planned), "the printed facts lead elsewhere");
}

fn check_text(text: &str) {
    match FactsFile::from_json(text) {
        Ok(file) => check_plan(&file),
        Err(error) => assert!(error.line() > 0, "an error names no line: {error}"),
    }
}

fn check_regions(text: &str) {
    match sysfs::regions_in(text, Path::new("reserved_regions")) {
        Ok(regions) => {
            let written: Vec<String> = regions.iter().map(ToString::to_string).collect();
            let read = sysfs::regions_in(&written.join("\n"), Path::new("reserved_regions"));
            match read {
                Ok(read) => assert_eq!(read, regions, "other regions are written"),
                Err(error) => assert!(matches!(error, SysfsError::Truncated { .. }), "{error}"),
            }
            assert_eq!(text.lines().count(), regions.len(), "a line is lost");
        }
        Err(SysfsError::Region { line, source, .. }) => {
            let bad = text.lines().nth(line - 1).expect("there is such a line");
            assert!(source.to_string().contains(bad), "{source} does not name `{bad}`");
        }
        Err(SysfsError::Truncated { .. }) => assert!(text.len() > 4000),
        Err(error) => panic!("{error}"),
    }
}

/// What an answer of VFIO type1 says; `None` if it is not one.
fn read_answer(answer: &[u8]) -> Option<Type1Info> {
    let u32_at = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_ne_bytes(answer.get(at..at.checked_add(8)?)?.try_into().ok()?));
    let flags = u32_at(4)?;
    let page_sizes = if flags & 1 == 0 { 0 } else { u64_at(8)? };
    let mut info = Type1Info { page_sizes, usable: None, mappings_left: None };
    let mut at = if flags & 2 == 0 { 0 } else { u32_at(16)? as usize };
    while at != 0 {
        let next = u32_at(at + 4)? as usize;
        match u32_at(at)? {
            0x1_0001 => {
                let ranges = (0..u32_at(at + 8)? as usize).map(|index| {
                    let at = at + 16 + index * 16;
                    IovaRange::new(u64_at(at)?, u64_at(at + 8)?)
                });
                info.usable = Some(ranges.collect::<Option<Vec<_>>>()?.into_iter().collect());
            }
            0x1_0003 => info.mappings_left = Some(u32_at(at + 8)?),
            _ => (),
        }
        if next != 0 && next <= at {
            return None;
        }
        at = next;
    }
    Some(info)
}

/// Reads what the bytes stand for, in one of several forms.
pub fn check(mut bytes: &[u8]) {
    match u8::take(&mut bytes) % 4 {
        0 => check_plan(&assemble(&wire::all::<Known>(bytes))),
        1 => check_text(&String::from_utf8_lossy(bytes)),
        2 => check_regions(&String::from_utf8_lossy(bytes)),
        _ => assert_eq!(type1::parse(bytes).ok(), read_answer(bytes)),
    }
}

/// Hosts of several kinds, in all forms.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seed = |values: &[Known]| [vec![0], wire::bytes_of(values)].concat();
    let text = |form: u8, text: &str| [&[form], text.as_bytes()].concat();
    let span = |near, page, pages| Span { near, page, pages, uneven: 0 };
    let window = [0, 2].map(|page| Known::Window { span: span(2, page, 1) });
    let region = |near, page, pages, kind| Known::Region { span: span(near, page, pages), kind };
    let mut answer: Vec<u8> = [0u32, 3, 0x1000, 0, 24, 0, 0x1_0001, 56, 1, 0, 0, 0, 0xffff_ffff, 0, 0x1_0003, 0, 9, 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    answer.insert(0, 3);
    vec![
        (
            "arm",
            seed(&[
                Known::Device { driver: 3, kernel: 2, isolated: 1 },
                window[0].clone(),
                window[1].clone(),
                region(2, 0, 3, 0),
                region(1, 0, 255, 1),
                region(3, 0, 255, 3),
                Known::Bar { span: span(2, 1, 0) },
                Known::Inbound { span: span(0, 0, 0xffff) },
                Known::Ram { span: span(2, 0, 9) },
                Known::Choices { bits: 6 },
            ]),
        ),
        (
            "old-arm",
            seed(&[
                Known::Device { driver: 2, kernel: 1, isolated: 0 },
                region(2, 0, 9, 0),
                Known::Aperture { span: span(0, 0, 0xffff) },
            ]),
        ),
        (
            "x86",
            seed(&[
                Known::Device { driver: 1, kernel: 2, isolated: 2 },
                region(3, 0, 255, 1),
                region(0, 5, 0, 3),
                region(0, 9, 0, 4),
                Known::Usable { span: span(0, 0, 0xffff) },
                Known::Usable { span: span(4, 0, 0xffff) },
                Known::Msi { span: span(3, 0, 255) },
                Known::Offer { span: span(0, 0, 0xffff) },
                Known::Limits { probe_size: 48, width: 39 },
            ]),
        ),
        (
            "text",
            text(
                1,
                r#"{"policy":{"relaxable":"report","inbound":"withhold","p2p":"carve-bars","max_address_width":39,"guest_msi":["0x0","0xfff"],"input_range":null,"probe_size":99,"guest_ram":[["0x0","0x1"]]},
"endpoints":[{"id":"00:03.0","facts":{"kernel":"6.1","driver":"arm-smmu-v3","reserved_regions":["0x1000 0x1fff msi"],"usable":[["0x0","0xffffff"]],"aperture":["0x0","0xffffffff"],"windows":[["0x8000","0x9fff"]],"bars":[["0x8000","0x80ff"]],"inbound":[],"acs_isolated":false,"sources":{"windows":"proc-iomem"}}}]}"#,
            ),
        ),
        (
            "regions",
            text(2, "0x0000000008000000 0x00000000080fffff msi\n0x00000000e0000000 0x00000000f7feffff reserved\n"),
        ),
        ("type1", answer),
    ]
}
