// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A picture of I/O virtual address space: what the host shows, what the guest is told, where guest memory lies.
//!
//! The axis is broken at every edge: each stretch between two edges is as wide as the logarithm of its size, so that a doorbell
//! of 1 MiB and an aperture of 256 TiB are both seen.

// Places on a picture, not addresses.
#![allow(clippy::cast_precision_loss)]

use std::collections::BTreeSet;

use svg::Document;
use svg::node::element::{Definitions, Line, Path, Pattern, Rectangle, Text, Title};

use super::show::human_size;
use crate::range::{IovaRange, RangeSet};
use crate::reserved::plan::{EndpointPlan, Plan};
use crate::reserved::report::reason_name;
use crate::reserved::{HostFacts, HostRegionKind, ReservedKind};

const WIDTH: f64 = 1000.0;
const MARGIN: f64 = 120.0;
const LANE: f64 = 34.0;
const GAP: f64 = 12.0;
/// Room for the addresses below the lanes, which stand on end.
const ADDRESSES: f64 = 120.0;
const LEGEND: f64 = 30.0;
const TITLE: f64 = 30.0;

/// How something in a lane is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paint {
    Usable,
    Reserved,
    Msi,
    Relaxable,
    Window,
    Withheld,
    Ram,
}

impl Paint {
    const LEGEND: [(Self, &'static str); 7] = [
        (Self::Usable, "usable"),
        (Self::Reserved, "reserved"),
        (Self::Msi, "msi"),
        (Self::Relaxable, "direct-relaxable"),
        (Self::Window, "host bridge window"),
        (Self::Withheld, "withheld from the guest"),
        (Self::Ram, "guest memory"),
    ];

    const fn fill(self) -> &'static str {
        match self {
            Self::Usable => "#d9ead3",
            Self::Reserved => "#cc4125",
            Self::Msi => "#f1a33c",
            Self::Relaxable => "#f4cccc",
            Self::Window => "#b7b7b7",
            Self::Withheld => "url(#hatching)",
            Self::Ram => "#6fa8dc",
        }
    }
}

/// A stretch of a lane.
struct Bar {
    range: IovaRange,
    paint: Paint,
    says: String,
}

/// One row of the picture.
struct Lane {
    name: &'static str,
    bars: Vec<Bar>,
}

/// Draws the first endpoint of a plan.
pub fn draw(name: &str, facts: &HostFacts, plan: &Plan, guest_ram: &[IovaRange]) -> String {
    let Some(endpoint) = plan.endpoints.first() else {
        return Document::new().to_string();
    };
    let lanes = [host_lane(facts), guest_lane(plan, endpoint), ram_lane(guest_ram)];
    let lanes: Vec<&Lane> = lanes.iter().filter(|lane| !lane.bars.is_empty()).collect();
    let axis = Axis::of(&lanes);
    let bottom = TITLE + lanes.iter().map(|_| LANE + GAP).sum::<f64>();
    let height = bottom + ADDRESSES + LEGEND;
    let mut document = Document::new()
        .set("viewBox", (0, 0, WIDTH + 2.0 * MARGIN, height))
        .set("font-family", "sans-serif")
        .set("font-size", 12)
        .add(hatching())
        .add(Rectangle::new().set("width", "100%").set("height", "100%").set("fill", "white"))
        .add(Text::new(format!("{name}: I/O virtual addresses")).set("x", MARGIN).set("y", 20).set("font-size", 15));
    let mut top = TITLE;
    for lane in lanes {
        document = document.add(label(lane.name, MARGIN - 8.0, top + LANE / 2.0 + 4.0, "end"));
        for (index, bar) in lane.bars.iter().enumerate() {
            // A size in what is drawn over again would be cut.
            let is_covered = lane.bars.iter().skip(index + 1).any(|later| later.range.overlaps(bar.range));
            document = document.add(rectangle(bar, &axis, top, !is_covered));
        }
        top += LANE + GAP;
    }
    for edge in &axis.edges {
        let x = axis.place(*edge);
        let tick = Line::new().set("x1", x).set("x2", x).set("y1", TITLE).set("y2", bottom + 4.0);
        document = document.add(tick.set("stroke", "#999999").set("stroke-width", 0.5));
        let turned = format!("rotate(60 {x} {})", bottom + 12.0);
        let address = label(&edge_name(*edge), x, bottom + 12.0, "start").set("font-size", 10).set("transform", turned);
        document = document.add(address);
    }
    document_with_legend(document, bottom + ADDRESSES + 12.0).to_string()
}

fn document_with_legend(mut document: Document, y: f64) -> Document {
    let mut x = MARGIN;
    for (paint, name) in Paint::LEGEND {
        document = document.add(
            Rectangle::new()
                .set("x", x)
                .set("y", y - 11.0)
                .set("width", 16)
                .set("height", 12)
                .set("fill", paint.fill())
                .set("stroke", "#666666"),
        );
        document = document.add(label(name, x + 21.0, y, "start"));
        x += 40.0 + 7.0 * name.len() as f64;
    }
    document
}

fn hatching() -> Definitions {
    let strokes =
        Path::new().set("d", "M-2,2 l4,-4 M0,8 l8,-8 M6,10 l4,-4").set("stroke", "#888888").set("stroke-width", 1.5);
    let pattern =
        Pattern::new().set("id", "hatching").set("width", 8).set("height", 8).set("patternUnits", "userSpaceOnUse");
    Definitions::new().add(pattern.add(strokes))
}

fn label(text: &str, x: f64, y: f64, anchor: &str) -> Text {
    Text::new(text).set("x", x).set("y", y).set("text-anchor", anchor)
}

fn rectangle(bar: &Bar, axis: &Axis, top: f64, with_size: bool) -> svg::node::element::Group {
    let (left, right) = (axis.place(u128::from(bar.range.start())), axis.place(u128::from(bar.range.last()) + 1));
    let shape = Rectangle::new()
        .set("x", left)
        .set("y", top)
        .set("width", right - left)
        .set("height", LANE)
        .set("fill", bar.paint.fill())
        .set("stroke", "#666666")
        .set("stroke-width", 0.7);
    let group = svg::node::element::Group::new().add(Title::new(format!("{}: {}", bar.range, bar.says))).add(shape);
    let size = human_size(bar.range);
    if !with_size || right - left < 6.5 * size.len() as f64 {
        return group;
    }
    let text = label(&size, f64::midpoint(left, right), top + LANE / 2.0 + 4.0, "middle");
    group.add(text.set("font-size", 10).set("stroke", "white").set("stroke-width", 3).set("paint-order", "stroke"))
}

fn host_lane(facts: &HostFacts) -> Lane {
    let mut bars = Vec::new();
    let mut add = |range, paint, says: &str| bars.push(Bar { range, paint, says: says.to_owned() });
    for range in facts.usable.iter().flat_map(RangeSet::ranges) {
        add(*range, Paint::Usable, "usable");
    }
    for range in facts.windows.iter().flat_map(RangeSet::ranges) {
        add(*range, Paint::Window, "host bridge window");
    }
    for region in facts.reserved_regions.iter().flatten() {
        let paint = match region.kind {
            HostRegionKind::Msi => Paint::Msi,
            HostRegionKind::DirectRelaxable => Paint::Relaxable,
            HostRegionKind::Direct | HostRegionKind::Reserved | HostRegionKind::Other(_) => Paint::Reserved,
        };
        add(region.range, paint, &region.kind.to_string());
    }
    Lane { name: "the host says", bars }
}

fn guest_lane(plan: &Plan, endpoint: &EndpointPlan) -> Lane {
    let mut bars = Vec::new();
    let usable = RangeSet::from(plan.input_range).subtract(endpoint.view.refused());
    for range in usable.ranges() {
        bars.push(Bar { range: *range, paint: Paint::Usable, says: "usable".to_owned() });
    }
    for withheld in &endpoint.withheld {
        let says = format!("not reported: {}", reason_name(withheld.reason));
        bars.push(Bar { range: withheld.range, paint: Paint::Withheld, says });
    }
    for region in endpoint.view.reported() {
        let paint = match region.kind {
            ReservedKind::Reserved => Paint::Reserved,
            ReservedKind::Msi => Paint::Msi,
        };
        bars.push(Bar { range: region.range, paint, says: region.kind.to_string() });
    }
    Lane { name: "the guest is told", bars }
}

fn ram_lane(guest_ram: &[IovaRange]) -> Lane {
    let bar = |range: &IovaRange| Bar { range: *range, paint: Paint::Ram, says: "guest memory".to_owned() };
    Lane { name: "guest memory", bars: guest_ram.iter().map(bar).collect() }
}

/// Where addresses are on the picture.
struct Axis {
    /// Every first address of a bar, and every one after its last; ascending.
    edges: Vec<u128>,
    /// Where each edge is.
    places: Vec<f64>,
}

impl Axis {
    fn of(lanes: &[&Lane]) -> Self {
        let ranges = lanes.iter().flat_map(|lane| &lane.bars).map(|bar| bar.range);
        let edges: BTreeSet<u128> =
            ranges.flat_map(|range| [u128::from(range.start()), u128::from(range.last()) + 1]).collect();
        let edges: Vec<u128> = edges.into_iter().collect();
        // A page is the smallest thing to be seen.
        let widths: Vec<f64> =
            edges.iter().zip(edges.iter().skip(1)).map(|(a, b)| (((b - a) as f64).log2() - 10.0).max(2.0)).collect();
        let total: f64 = widths.iter().sum();
        let mut places = vec![MARGIN];
        let mut x = MARGIN;
        for width in widths {
            x += width / total * WIDTH;
            places.push(x);
        }
        Self { edges, places }
    }

    fn place(&self, edge: u128) -> f64 {
        let at = self.edges.partition_point(|own| *own < edge);
        self.places.get(at).copied().unwrap_or(MARGIN + WIDTH)
    }
}

/// The address at an edge; the end of the address space has none.
fn edge_name(edge: u128) -> String {
    u64::try_from(edge).map_or_else(|_| "2^64".to_owned(), |address| format!("{address:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::EndpointId;
    use crate::reserved::plan::{Policy, X86_MSI, plan};

    fn picture() -> String {
        let set = |texts: &[&str]| texts.iter().map(|text| text.parse::<IovaRange>().unwrap()).collect::<RangeSet>();
        let facts = HostFacts {
            reserved_regions: Some(vec!["0xfee00000 0xfeefffff msi".parse().unwrap()]),
            usable: Some(set(&["0-fedfffff", "fef00000-ffffffffffff"])),
            windows: Some(set(&["80000000-afffffff"])),
            ..HostFacts::default()
        };
        let ram = ["0-9fffffff".parse().unwrap()];
        let policy = Policy { guest_msi: Some(X86_MSI), guest_ram: ram.to_vec(), ..Policy::default() };
        let plan = plan(&policy, &[(EndpointId(0x18), facts.clone())]).unwrap();
        draw("0000:00:03.0 <&>", &facts, &plan, &ram)
    }

    #[test]
    fn every_lane_and_edge_is_there_and_text_is_escaped() {
        let picture = picture();
        for text in
            ["the host says", "the guest is told", "guest memory", "0xfee00000", "0x1000000000000", "url(#hatching)"]
        {
            assert!(picture.contains(text), "{text}");
        }
        assert!(picture.contains("not reported: window-not-in-sysfs"));
        assert!(picture.contains("&lt;&amp;&gt;") && !picture.contains("<&>"));
    }

    #[test]
    fn the_doorbell_and_the_aperture_are_both_seen() {
        let msi = Bar { range: X86_MSI, paint: Paint::Msi, says: String::new() };
        let all = Bar { range: "0-ffffffffffff".parse().unwrap(), paint: Paint::Usable, says: String::new() };
        let axis = Axis::of(&[&Lane { name: "", bars: vec![msi, all] }]);
        let width = |range: IovaRange| axis.place(u128::from(range.last()) + 1) - axis.place(u128::from(range.start()));
        assert!(width(X86_MSI) > WIDTH / 20.0);
        assert!((width("0-ffffffffffff".parse().unwrap()) - WIDTH).abs() < 0.001);
    }
}
