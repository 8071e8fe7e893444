// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `viommuctl inspect` shows of hosts: each directory of `tests/hosts` has parts of a host's sysfs and proc, the doorbell of
//! the guest's machine, and what is shown.

#![cfg(feature = "daemon")]
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

const DEVICE: &str = "0000:01:00.0";

fn inspect(host: &Path, more: &[&str]) -> Output {
    let msi = fs::read_to_string(host.join("guest-msi")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_viommuctl"));
    command.args(["inspect", DEVICE, "--guest-msi", msi.trim()]);
    command.arg("--sysfs").arg(host.join("sys")).arg("--proc").arg(host.join("proc")).args(more);
    command.output().unwrap()
}

/// Without the blanks at the ends of a table's lines.
fn trimmed(text: &[u8]) -> String {
    let text = String::from_utf8(text.to_vec()).unwrap();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.join("\n") + "\n"
}

#[test]
fn every_host_is_shown_as_its_file_says() {
    let mut count = 0;
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts")).unwrap() {
        let host = entry.unwrap().path();
        let output = inspect(&host, &[]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let shown = trimmed(&output.stdout);
        let expected = fs::read_to_string(host.join("inspect.txt")).unwrap_or_default();
        assert_eq!(shown, expected, "{}:\n{shown}", host.display());
        count += 1;
    }
    assert!(count >= 5, "only {count} hosts");
}

#[test]
fn what_is_gathered_can_be_planned_from_and_drawn() {
    let directory = tempfile::tempdir().unwrap();
    let host = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/hisilicon-4.14");
    let (facts, picture) = (directory.path().join("facts.json"), directory.path().join("picture.svg"));
    let out = |path: &Path| path.to_str().unwrap().to_owned();
    let output = inspect(&host, &["--facts-out", &out(&facts), "--svg", &out(&picture), "--json"]);
    assert!(output.status.success());
    assert_eq!(fs::read(&facts).unwrap(), output.stdout);
    let plan =
        Command::new(env!("CARGO_BIN_EXE_viommuctl")).args(["plan", "--json", "--facts"]).arg(&facts).output().unwrap();
    assert!(String::from_utf8(plan.stdout).unwrap().contains("window-by-era"));
    assert!(fs::read_to_string(&picture).unwrap().contains("window-by-era"));
}
