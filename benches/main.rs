// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `make bench`: what things cost, in instructions (callgrind) and in nanoseconds (medians), beside what others would cost in the same
//! run. Ends in one table, in `target/bench/summary.json`, and in `target/bench/report.md` for the documentation.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde_json::{Value, json};

mod agreement;
mod attach;
mod case;
mod driver;
mod environment;
mod hosts;
mod kick;
mod machine;
mod measure;
mod readers;
mod report;
mod requests;
mod store;
mod targets;
mod translation;
mod yardstick;

use case::{Case, Meter};
use report::Summary;
use targets::Target;

const DIRECTORY: &str = "target/bench";

#[derive(Parser)]
struct Arguments {
    /// Measure only cases whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Cargo says so to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

/// What this program does when it is run by itself.
#[derive(Subcommand)]
enum Part {
    /// Does one case once, for callgrind.
    Once { case: String },
    /// Says what a mapping takes in memory.
    Bytes { name: String },
    /// Serves a device on a socket.
    Serve { socket: PathBuf },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.part {
        None => return measure_all(&arguments.only),
        Some(Part::Once { case }) => {
            let case = cases().into_iter().find(|known| known.name == case).expect("a case");
            (case.set_up)()(&mut Meter::default());
        }
        Some(Part::Bytes { name }) if name == readers::BYTES => println!("{}", readers::bytes_per_mapping()),
        Some(Part::Bytes { name }) => println!("{}", store::bytes_per_mapping(&name)),
        Some(Part::Serve { socket }) => kick::serve(&socket),
    }
    ExitCode::SUCCESS
}

fn cases() -> Vec<Case> {
    translation::cases().into_iter().chain(requests::cases()).chain(attach::cases()).collect()
}

fn measure_all(only: &str) -> ExitCode {
    if !measure::has_valgrind() {
        eprintln!("bench: valgrind is needed to count instructions (Debian: apt install valgrind)");
        return ExitCode::FAILURE;
    }
    eprintln!("bench: the yardstick answers as the device does");
    agreement::check();
    let wanted = |name: &str| {
        let wanted = name.contains(only);
        if wanted {
            eprintln!("bench: {name}");
        }
        wanted
    };
    let mut summary = Summary::new();
    for case in cases().iter().filter(|case| wanted(&case.name)) {
        summary.insert(case.name.clone(), measure::figures(case));
    }
    summary.extend(targets::growth(|name| summary.get(name)?["ir"].as_f64()));
    summary.extend(attach::measure(wanted));
    summary.extend(store::measure(wanted));
    summary.extend(readers::measure(wanted));
    summary.extend(kick::measure(wanted));
    if summary.is_empty() {
        eprintln!("bench: no case has {only} in its name");
        return ExitCode::FAILURE;
    }
    for (name, figures) in &mut summary {
        judge(name, figures);
    }
    println!("{}", report::table(&summary));
    write(&summary, only.is_empty());
    let targets = || summary.values().filter_map(|figures| figures.get("met"));
    let met = targets().filter(|met| **met == Value::Bool(true)).count();
    println!(
        "bench: OK, {} figures in {DIRECTORY}/summary.json, {met} of {} targets met",
        summary.len(),
        targets().count()
    );
    ExitCode::SUCCESS
}

/// Adds the target of a case, and whether it is met.
fn judge(name: &str, figures: &mut Value) {
    if let Some(target) = Target::of(name) {
        figures["met"] = json!(target.is_met_by(figures));
        figures["target"] = json!(target.bound());
    }
}

/// Writes the summary, and the report if nothing is missing from it.
fn write(summary: &Summary, complete: bool) {
    fs::create_dir_all(DIRECTORY).expect("a place for the summary");
    let text = serde_json::to_string_pretty(summary).unwrap() + "\n";
    fs::write(format!("{DIRECTORY}/summary.json"), text).expect("the summary is written");
    if complete {
        fs::write(format!("{DIRECTORY}/report.md"), report::markdown(summary)).expect("the report is written");
    }
}
