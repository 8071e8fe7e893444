// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Counts instructions and takes times.

use std::process::Command;

use serde_json::{Value, json};

use crate::case::{Case, Meter};

/// Measures a case.
pub fn figures(case: &Case) -> Value {
    json!({ "ir": instructions(case), "ns": nanoseconds(case) })
}

/// Whether instructions can be counted.
pub fn has_valgrind() -> bool {
    Command::new("valgrind").arg("--version").output().is_ok_and(|output| output.status.success())
}

/// This program again, to do one thing in a process of its own.
pub fn own_program() -> String {
    let program = std::env::current_exe().expect("the path of this program");
    program.into_os_string().into_string().expect("a path in UTF-8")
}

/// What this program prints when it is run again with these arguments.
pub fn in_process_of_its_own(arguments: &[&str]) -> String {
    let output = Command::new(own_program()).args(arguments).output().expect("this program runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Instructions for each round.
fn instructions(case: &Case) -> f64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*counted_by_callgrind*"])
        .args([&own_program(), "once", &case.name])
        .output()
        .expect("valgrind runs");
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().find_map(|line| line.split_once("Collected : "));
    let count = line.and_then(|(_, count)| count.trim().parse::<u64>().ok()).filter(|_| output.status.success());
    let count = count.unwrap_or_else(|| panic!("{}: {text}", case.name));
    assert_ne!(count, 0, "{}: callgrind did not find what to count", case.name);
    count as f64 / case.rounds as f64
}

/// Nanoseconds for each round: the median of the runs.
fn nanoseconds(case: &Case) -> f64 {
    let run = |work: &mut crate::case::Work| {
        let mut meter = Meter::default();
        work(&mut meter);
        meter.elapsed.as_secs_f64()
    };
    let times: Vec<f64> = if case.repeatable {
        let mut work = (case.set_up)();
        run(&mut work);
        (0..case.runs).map(|_| run(&mut work)).collect()
    } else {
        (0..case.runs).map(|_| run(&mut (case.set_up)())).collect()
    };
    median(times) * 1e9 / case.rounds as f64
}

pub fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}

/// The value that this part of all values is below.
pub fn quantile(mut values: Vec<f64>, part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let place = (values.len() as f64 * part) as usize;
    values[place.min(values.len() - 1)]
}
