// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `viommuctl inspect` shows of hosts: each directory of `tests/hosts` has parts of a host's sysfs and proc, the doorbell of
//! the guest's machine, and what is shown.

#![cfg(feature = "daemon")]
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

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
    assert!(count >= 8, "only {count} hosts");
}

#[test]
fn what_is_gathered_can_be_planned_from_and_drawn() {
    let directory = tempfile::tempdir().unwrap();
    let host = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/hisilicon-4.14");
    let (facts, picture) = (directory.path().join("facts.json"), directory.path().join("picture.svg"));
    let out = |path: &Path| path.to_str().unwrap().to_owned();
    let output = inspect(&host, &["--facts-out", &out(&facts), "--svg", &out(&picture), "--json"]);
    assert!(output.status.success());
    // The answer is the one that `plan` computes from the facts, with the facts beside it.
    let mut answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let shown = answer["endpoints"][0].as_object_mut().unwrap().remove("facts").unwrap();
    let mut written: Value = serde_json::from_slice(&fs::read(&facts).unwrap()).unwrap();
    assert_eq!(written["endpoints"][0]["facts"], shown);
    assert_eq!(shown["sources"]["bars"], "pci-resource");
    written["policy"] = serde_json::json!({ "guest_msi": ["0x8090000", "0x809ffff"] });
    fs::write(&facts, written.to_string()).unwrap();
    let plan =
        Command::new(env!("CARGO_BIN_EXE_viommuctl")).args(["plan", "--json", "--facts"]).arg(&facts).output().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&plan.stdout).unwrap(), answer);
    assert!(fs::read_to_string(&picture).unwrap().contains("window-by-era"));
}

#[test]
fn what_the_operator_chooses_changes_what_is_told() {
    let host = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/inbound-window");
    let told = |options: &[&str]| -> Value {
        let output = inspect(&host, &[&["--json"], options].concat());
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert_eq!(told(&[])["input_range"], serde_json::json!(["0x80000000", "0x17fffffff"]));
    let withheld = told(&["--inbound=withhold", "--max-address-width=36"]);
    assert_eq!(withheld["input_range"], serde_json::json!(["0x0", "0xfffffffff"]));
    let list = withheld["endpoints"][0]["withheld"].as_array().unwrap();
    assert!(list.iter().any(|range| range["reason"] == "inbound-by-policy"), "{list:?}");
    let window = told(&["--host-window=90000000-9fffffff"]);
    assert_eq!(window["endpoints"][0]["withheld"][0]["start"], "0x90000000");
    assert_eq!(window["endpoints"][0]["facts"]["sources"]["windows"], "operator");
    let nothing = inspect(&host, &["--json", "--input-range=0-fff"]);
    assert_eq!((nothing.status.code(), nothing.stdout.len()), (Some(3), 0));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("no address in 0x0-0xfff can be mapped"));
}

#[test]
fn a_host_that_is_not_as_it_should_be_is_named() {
    let copy = tempfile::tempdir().unwrap();
    let host = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/seattle-6.12");
    let refused = |path: &str, content: &[u8], says: &str| {
        let root = copy.path().join("host");
        let _ = fs::remove_dir_all(&root);
        let copied = Command::new("cp").arg("-a").arg(&host).arg(&root).status().unwrap();
        assert!(copied.success());
        fs::write(root.join(path), content).unwrap();
        let output = inspect(&root, &[]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(3), "{path}: {said}");
        assert!(said.contains(says) && output.stdout.is_empty(), "{said}");
    };
    refused("sys/kernel/iommu_groups/7/reserved_regions", b"0x0 0x1 msi\nfish\n", "reserved_regions, line 2");
    refused("sys/kernel/iommu_groups/7/reserved_regions", &[b'x'; 4090], "fills a page");
    refused("sys/kernel/iommu_groups/7/reserved_regions", &[0xff], "reserved_regions");
    refused("sys/firmware/devicetree/base/soc/pcie/ranges", &[0; 5], "pcie/ranges has 5 bytes");
    refused("sys/devices/platform/soc/pcie/pci0000:00/0000:01:00.0/resource", b"1", "resource");
}
