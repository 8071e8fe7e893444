// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What hosts say and what guests are told, as tables for people.

use std::fmt::Write;

use comfy_table::{Table, presets};

use super::inspect::Inspection;
use crate::causes::with_causes;
use crate::id::{EndpointId, PciAddress};
use crate::range::{IovaRange, RangeSet};
use crate::reserved::plan::{EndpointPlan, Plan};
use crate::reserved::report::reason_name;
use crate::reserved::{Fact, HostFacts, HostRegionKind, ReservedKind, WithheldReason};

/// What the guest is told of a range, and why.
#[derive(Clone, Copy, Default)]
struct Told {
    what: &'static str,
    why: &'static str,
}

impl Told {
    const USABLE: Self = Self { what: "usable", why: "" };
}

/// One line of a table: what somebody says of a range.
struct Row {
    range: IovaRange,
    says: String,
    source: String,
    /// What the guest is told, unless that follows from the range.
    told: Option<Told>,
}

/// What was found of a device, and what the guest is told; `plan` is `None` if it cannot have the devices.
pub fn inspection(device: PciAddress, inspection: &Inspection, plan: Option<&Plan>) -> String {
    let Inspection { group, facts, usable_unknown, .. } = inspection;
    let members: Vec<String> = group.members.iter().map(ToString::to_string).collect();
    let kernel = facts.kernel.as_deref().unwrap_or("not known");
    let mut text =
        format!("{device}: IOMMU group {} ({}), {}, Linux {kernel}\n", group.number, members.join(" "), facts.driver);
    let planned = plan.and_then(|plan| plan.endpoints.iter().find(|planned| planned.id == EndpointId::from(device)));
    let mut rows = rows(facts);
    rows.extend(planned.iter().flat_map(|planned| unexplained(facts, planned)));
    rows.sort_by(|a, b| (a.range, &a.says).cmp(&(b.range, &b.says)));
    let mut table = table(&["range", "size", "the host says", "the guest is told", "why", "source"]);
    for Row { range, says, source, told } in rows {
        let told = told.or_else(|| Some(self::told(plan?.input_range, planned?, range)));
        let Told { what, why } = match told.unwrap_or_default() {
            // Windows have nothing to do with it.
            Told { what: "nothing" | "usable", .. } if says == HostRegionKind::DirectRelaxable.to_string() => {
                Told { what: "nothing", why: "it can be mapped (--relaxable)" }
            }
            told => told,
        };
        table.add_row([&range.to_string(), &human_size(range), &says, what, why, &source]);
    }
    push_line(&mut text, &table.to_string());
    if let Some((plan, planned)) = plan.zip(planned) {
        push_line(&mut text, &format!("input range: {}", plan.input_range));
        push_remarks(&mut text, planned);
    }
    if let Some(warning) = facts.peer_to_peer_warning() {
        push_line(&mut text, warning);
    }
    if facts.reserved_regions.is_none() {
        push_line(&mut text, "reserved regions: not known (the kernel is older than 4.11)");
    }
    if facts.windows.is_none() {
        push_line(
            &mut text,
            "host bridge windows: not known (they are in /proc/iomem, for root; or give --host-window)",
        );
    }
    if let Some(reason) = usable_unknown {
        push_line(&mut text, &format!("usable addresses: not known: {}", with_causes(reason)));
    }
    text
}

/// What a guest is told of each endpoint.
pub fn plan(plan: &Plan) -> String {
    let mut text = format!("input range: {}\n", plan.input_range);
    for planned in &plan.endpoints {
        push_line(&mut text, &planned.id.to_string());
        let mut table = table(&["range", "size", "the guest is told", "why"]);
        for region in planned.view.reported() {
            table.add_row([&region.range.to_string(), &human_size(region.range), &region.kind.to_string(), ""]);
        }
        for withheld in &planned.withheld {
            let range = withheld.range;
            table.add_row([&range.to_string(), &human_size(range), "nothing", reason_name(withheld.reason)]);
        }
        push_line(&mut text, &table.to_string());
        push_remarks(&mut text, planned);
    }
    text
}

/// An empty table with this header.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

fn push_line(text: &mut String, line: &str) {
    // A String takes everything.
    let _ = writeln!(text, "{line}");
}

/// What does not fit the table: evidence, advice, refusals.
fn push_remarks(text: &mut String, planned: &EndpointPlan) {
    for withheld in planned.withheld.iter().filter(|withheld| withheld.reason != WithheldReason::WindowNotInSysfs) {
        push_line(text, &format!("{} is withheld: {}", withheld.range, withheld.evidence));
    }
    for advisory in &planned.advisories {
        push_line(text, &format!("{}: {}", advisory.range, advisory.kind));
    }
    if let Some(direct) = planned.direct {
        push_line(text, &format!("VFIO refuses the device: {direct} must stay mapped to itself (`direct`)"));
    }
    if !planned.bypass_refused.is_empty() {
        push_line(text, &format!("bypass is refused: guest memory at {} is not reached", planned.bypass_refused));
    }
}

/// What the host says.
fn rows(facts: &HostFacts) -> Vec<Row> {
    let source = |fact| facts.sources.get(&fact).map(ToString::to_string).unwrap_or_default();
    let usable = Some(Told::USABLE);
    let mut rows = Vec::new();
    for region in facts.reserved_regions.iter().flatten() {
        let says = region.kind.to_string();
        rows.push(Row { range: region.range, says, source: "sysfs reserved_regions".to_owned(), told: None });
    }
    let sets = [
        (&facts.windows, "host bridge window", Fact::Windows, None),
        (&facts.usable, "usable", Fact::Usable, usable),
        (&facts.inbound, "memory is reached", Fact::Inbound, usable),
    ];
    for (set, says, fact, told) in sets {
        for range in set.iter().flat_map(RangeSet::ranges) {
            rows.push(Row { range: *range, says: says.to_owned(), source: source(fact), told });
        }
    }
    // Usable addresses say more.
    if let Some(range) = facts.aperture.filter(|_| facts.usable.is_none()) {
        rows.push(Row { range, says: "translated at most".to_owned(), source: source(Fact::Aperture), told: usable });
    }
    rows
}

/// What the guest is told is reserved, and no line of the host's says: what is left over by those that say what can be used.
fn unexplained(facts: &HostFacts, planned: &EndpointPlan) -> Vec<Row> {
    let shown: RangeSet = facts.reserved_regions.iter().flatten().map(|region| region.range).collect();
    let reported = planned.view.reported().iter().filter(|region| region.kind == ReservedKind::Reserved);
    let reported: RangeSet = reported.map(|region| region.range).collect();
    let row = |range: &IovaRange| Row {
        range: *range,
        says: String::new(),
        source: String::new(),
        told: Some(Told { what: "reserved", why: "it cannot be reached" }),
    };
    reported.subtract(&shown).ranges().iter().map(row).collect()
}

/// What the guest is told of a range that the host shows, and why.
fn told(input_range: IovaRange, planned: &EndpointPlan, range: IovaRange) -> Told {
    if !input_range.overlaps(range) {
        return Told { what: "nothing", why: "outside of the input range" };
    }
    let regions = |kind| planned.view.reported().iter().filter(move |region| region.kind == kind);
    let reserved: RangeSet = regions(ReservedKind::Reserved).map(|region| region.range).collect();
    let has_msi = regions(ReservedKind::Msi).any(|region| region.range.overlaps(range));
    let withheld = planned.withheld.iter().find(|withheld| withheld.range.overlaps(range));
    let whole = reserved.covers(range);
    let (what, why) = match (reserved.overlapping(range).is_some(), has_msi, withheld) {
        (true, true, _) => ("reserved, msi in it", "the guest's doorbell is cut out"),
        (false, true, _) => ("msi", "the guest's doorbell"),
        (true, false, _) if whole => ("reserved", "the host cannot map there"),
        (true, false, Some(withheld)) => ("reserved in part", reason_name(withheld.reason)),
        (true, false, None) => ("reserved in part", ""),
        (false, false, Some(withheld)) => ("nothing", reason_name(withheld.reason)),
        (false, false, None) => return Told::USABLE,
    };
    Told { what, why }
}

/// A size as people read it.
pub(super) fn human_size(range: IovaRange) -> String {
    const UNITS: [(u32, &str); 5] = [(50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let size = range.size();
    match UNITS.iter().find(|(shift, _)| size >> shift > 0) {
        Some((shift, unit)) if size.trailing_zeros() >= *shift => format!("{} {unit}", size >> shift),
        Some((shift, unit)) => {
            let tenths = (size * 10) >> shift;
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
        None => format!("{size} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_at_a_glance() {
        for (range, size) in [
            ("0-0", "1 B"),
            ("0-fff", "4 KiB"),
            ("0-17ff", "6 KiB"),
            ("0-7ff", "2 KiB"),
            ("0-5fffff", "6 MiB"),
            ("0-fedfffff", "3.9 GiB"),
            ("0-ffffffffffff", "256 TiB"),
            ("0-ffffffffffffffff", "16384 PiB"),
        ] {
            assert_eq!(human_size(range.parse().unwrap()), size);
        }
    }
}
