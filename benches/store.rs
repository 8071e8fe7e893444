// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a mapping takes in memory: what a process grows by, which is also what the allocator adds.

use serde_json::{Value, json};

use crate::case::{Layout, MAPPINGS, PAGE};
use crate::machine::{Device, Machine, Ours, yardstick};
use crate::measure::in_process_of_its_own;

const NAME: &str = "store/bytes_per_mapping";
const LAYOUTS: [(&str, Layout); 3] =
    [("", Layout::Sequential), ("/shuffled", Layout::Dense), ("/sparse", Layout::Sparse)];
const YARDSTICK: &str = "yardstick/";
/// Half of what a domain may have by default; enough for whole pages not to matter.
const COUNT: u64 = MAPPINGS * 8;

/// Each in a process of its own: memory that was freed before would be used first.
pub fn measure(wanted: impl Fn(&str) -> bool) -> Vec<(String, Value)> {
    let names =
        ["", YARDSTICK].into_iter().flat_map(|prefix| LAYOUTS.map(|(layout, _)| format!("{prefix}{NAME}{layout}")));
    let bytes = |name: &String| -> f64 { in_process_of_its_own(&["bytes", name]).trim().parse().expect("a number") };
    names.filter(|name| wanted(name)).map(|name| (name.clone(), json!({ "bytes": bytes(&name) }))).collect()
}

/// What the process grows by for each of many mappings. To be called before anything was freed.
pub fn bytes_per_mapping(name: &str) -> f64 {
    let (layout, is_ours) = match name.strip_prefix(YARDSTICK) {
        Some(layout) => (layout, false),
        None => (name, true),
    };
    let layout = layout.strip_prefix(NAME).expect("a store");
    let layout = LAYOUTS.iter().find(|(name, _)| *name == layout).expect("a layout").1;
    if is_ours { growth(Machine::new(Ours::in_software()), layout) } else { growth(Machine::new(yardstick()), layout) }
}

fn growth<D: Device>(mut machine: Machine<D>, layout: Layout) -> f64 {
    let pages = layout.pages(COUNT);
    let before = resident();
    machine.map_all(&pages);
    (resident() - before) / COUNT as f64
}

/// How much of the process is in memory, in bytes.
pub fn resident() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * PAGE as f64
}
