// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the figures were measured on.

use std::fs::read_to_string;
use std::process::Command;

/// The crates whose cost is in the figures.
const CRATES: [&str; 5] = ["vm-memory", "virtio-queue", "vhost", "vhost-user-backend", "crossbeam-epoch"];

/// Name and value of each fact.
pub fn facts() -> Vec<(String, String)> {
    let processors = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let cores = processors.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let facts = [
        ("processor", model.trim_start_matches([' ', '\t', ':']).to_owned()),
        ("cores", cores.to_string()),
        ("kernel", kernel.trim().to_owned()),
        ("compiler", answer("rustc", &["--version"])),
        ("valgrind", answer("valgrind", &["--version"])),
        ("crates", crates(&read_to_string("Cargo.lock").unwrap_or_default())),
        ("commit", answer("git", &["describe", "--always", "--dirty"])),
        ("command", "make bench".to_owned()),
    ];
    facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// What a program says; nothing if it is not there.
fn answer(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

/// The versions in a lock file, where the line of a version follows that of a name.
fn crates(lock: &str) -> String {
    let version = |name: &&str| {
        let (_, behind) = lock.split_once(&format!("name = \"{name}\"\nversion = \""))?;
        Some(format!("{name} {}", behind.split_once('"')?.0))
    };
    CRATES.iter().filter_map(version).collect::<Vec<_>>().join(", ")
}
