// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tables of what was measured, on the terminal and for the documentation.

use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use serde_json::{Map, Value};

use crate::environment;
use crate::targets::{TARGETS, Target};

/// Figures of cases, by name.
pub type Summary = Map<String, Value>;

/// All figures.
pub fn table(summary: &Summary) -> String {
    let mut names: Vec<&String> = summary.keys().collect();
    // The yardstick's below the device's own.
    names.sort_by_key(|name| (name.trim_start_matches("yardstick/"), name.len()));
    let rows = names.into_iter().map(|name| {
        let figures = &summary[name];
        let target = Target::of(name);
        vec![
            name.clone(),
            cell(figures, "ir"),
            nanoseconds(figures),
            other(figures),
            target.map(Target::describe).unwrap_or_default(),
            target.map(|target| met(target, figures)).unwrap_or_default(),
        ]
    });
    draw(&["", "instructions", "ns", "other", "target", ""], rows)
}

/// What is put into the documentation: the machine, the targets, and all figures.
pub fn markdown(summary: &Summary) -> String {
    let environment = draw(&["", ""], environment::facts().into_iter().map(|(name, value)| vec![name, value]));
    let targets = TARGETS.iter().filter_map(|target| {
        let figures = summary.get(target.case)?;
        let yardstick = summary.get(&format!("yardstick/{}", target.case));
        let yardstick = yardstick.map(|figures| cell(figures, target.figure)).unwrap_or_default();
        let unit = if target.figure == "ir" { "instructions" } else { target.figure };
        let value = cell(figures, target.figure);
        Some(vec![target.case.to_owned(), unit.to_owned(), yardstick, value, target.describe(), met(target, figures)])
    });
    let targets = draw(&["", "in", "yardstick", "measured", "target", ""], targets);
    format!("{environment}\n\n{targets}\n\n{}\n", table(summary))
}

fn draw(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header(header).add_rows(rows);
    for column in table.column_iter_mut().skip(1).take(header.len().saturating_sub(2)) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn met(target: &Target, figures: &Value) -> String {
    if target.is_met_by(figures) { "met" } else { "missed" }.to_owned()
}

fn cell(figures: &Value, name: &str) -> String {
    let decimals = match name {
        "calls" => 0,
        "bytes" | "ratio" => 2,
        _ => 1,
    };
    figures.get(name).and_then(Value::as_f64).map_or(String::new(), |value| format!("{value:.decimals$}"))
}

/// The median, and where most are if that is known.
fn nanoseconds(figures: &Value) -> String {
    let [low, high] = ["ns_p10", "ns_p90"].map(|name| cell(figures, name));
    let spread = if low.is_empty() { String::new() } else { format!(" ({low} to {high})") };
    cell(figures, "ns") + &spread
}

fn other(figures: &Value) -> String {
    let units = [("millions_per_second", "M/s"), ("bytes", "bytes"), ("calls", "calls"), ("ratio", "times")];
    let known = units.iter().map(|(name, unit)| (cell(figures, name), unit)).find(|(value, _)| !value.is_empty());
    known.map_or(String::new(), |(value, unit)| format!("{value} {unit}"))
}
