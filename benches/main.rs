// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `make bench`: what things cost, in instructions (callgrind) and in nanoseconds (medians), beside what others would cost in the same
//! run. Ends in one table and in `target/bench/summary.json`.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, ExitCode};
use std::time::Instant;

use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use serde_json::{Map, Value, json};

mod readers;
mod requests;
mod translation;

/// Something that is done so many times.
type Work = Box<dyn FnMut(u64)>;

/// What can be measured: its name, how often it is done at a time, and how to set it up.
struct Case {
    name: &'static str,
    rounds: u64,
    set_up: fn() -> Work,
    /// The same without what is measured, for what is done once after it was set up; if there is none, it can be done over and over.
    without: Option<fn() -> Work>,
}

/// How often a case is done without being measured, then for each measurement.
const MEASUREMENTS: usize = 9;
const SUMMARY: &str = "target/bench/summary.json";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let cases: Vec<Case> = translation::cases().into_iter().chain(requests::cases()).collect();
    // Run by valgrind: does one thing, so many times.
    if let [_, run, name, rounds] = &arguments[..]
        && (run == "run" || run == "without")
    {
        let case = cases.iter().find(|case| case.name == name).expect("a case");
        let set_up = case.without.filter(|_| run == "without").unwrap_or(case.set_up);
        set_up()(rounds.parse().expect("a number"));
        return ExitCode::SUCCESS;
    }
    // Run in a process of its own.
    if arguments.get(1).is_some_and(|argument| argument == "bytes") {
        println!("{}", readers::bytes_per_mapping());
        return ExitCode::SUCCESS;
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        eprintln!("bench: valgrind is needed to count instructions (Debian: apt install valgrind)");
        return ExitCode::FAILURE;
    }
    let mut summary = Map::new();
    for case in &cases {
        eprintln!("bench: {}", case.name);
        summary.insert(case.name.to_owned(), json!({ "ir": instructions(case), "ns": nanoseconds(case) }));
    }
    let bytes = Command::new(std::env::current_exe().unwrap()).arg("bytes").output().expect("this program runs").stdout;
    let bytes: f64 = String::from_utf8_lossy(&bytes).trim().parse().expect("a number");
    summary.insert("translate/bytes_per_mapping/dense".to_owned(), json!({ "bytes": bytes }));
    for (name, value) in readers::measure() {
        summary.insert(name, value);
    }
    show(&summary);
    fs::create_dir_all("target/bench").expect("a place for the summary");
    fs::write(SUMMARY, serde_json::to_string_pretty(&summary).unwrap() + "\n").expect("the summary is written");
    println!("bench: OK, {} figures in {SUMMARY}", summary.len());
    ExitCode::SUCCESS
}

/// Instructions for each round: those of many rounds less those of none, or of what is not measured.
fn instructions(case: &Case) -> f64 {
    let count = |run: &str, rounds: u64| -> u64 {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe().unwrap())
            .args([run, case.name, &rounds.to_string()])
            .output()
            .expect("valgrind runs");
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().find_map(|line| line.split_once("Collected : "));
        line.and_then(|(_, count)| count.trim().parse().ok()).unwrap_or_else(|| panic!("{text}"))
    };
    if case.without.is_some() {
        return (count("run", case.rounds) - count("without", case.rounds)) as f64 / case.rounds as f64;
    }
    let rounds = case.rounds / 10;
    (count("run", rounds) - count("run", 0)) as f64 / rounds as f64
}

/// Nanoseconds for each round: the median.
fn nanoseconds(case: &Case) -> f64 {
    let time = |work: &mut Work| {
        let start = Instant::now();
        work(case.rounds);
        start.elapsed().as_secs_f64()
    };
    let times: Vec<f64> = match case.without {
        None => {
            let mut work = (case.set_up)();
            work(case.rounds);
            (0..MEASUREMENTS).map(|_| time(&mut work)).collect()
        }
        Some(without) => (0..MEASUREMENTS).map(|_| time(&mut (case.set_up)()) - time(&mut without())).collect(),
    };
    median(times) * 1e9 / case.rounds as f64
}

fn median<T: PartialOrd + Copy>(mut values: Vec<T>) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).expect("they can be compared"));
    values[values.len() / 2]
}

fn show(summary: &Map<String, Value>) {
    let columns: [(&str, &str); 4] =
        [("ir", "instructions"), ("ns", "ns"), ("millions_per_second", "M/s"), ("bytes", "bytes")];
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN);
    table.set_header(std::iter::once("").chain(columns.map(|(_, title)| title)));
    for (name, figures) in summary {
        let cell =
            |(key, _)| figures.get(key).and_then(Value::as_f64).map_or(String::new(), |value| format!("{value:.1}"));
        table.add_row(std::iter::once(name.clone()).chain(columns.map(cell)));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
}

/// Pseudo-random numbers, the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            items.swap(index, (self.next() % (index as u64 + 1)) as usize);
        }
    }
}

/// Mappings of one page each, shuffled.
fn pages(sparse: bool, count: u64) -> Vec<u64> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut pages: Vec<u64> = if sparse {
        // All over a TiB.
        let mut chosen = BTreeSet::new();
        while chosen.len() < count as usize {
            chosen.insert(random.next() % (1 << 28));
        }
        chosen.into_iter().collect()
    } else {
        (0..count).collect()
    };
    random.shuffle(&mut pages);
    pages
}
