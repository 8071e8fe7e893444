// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest is told, from what hosts show: each file of `tests/plans` has facts, and the plan that `viommuctl plan` makes
//! of them or the code that it exits with.

#![cfg(feature = "daemon")]
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn plan(input: &Value) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_viommuctl"))
        .args(["plan", "--facts", "-", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.to_string().as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// Takes the texts for people out of a plan, each of which must say something.
fn without_texts(mut plan: Value) -> Value {
    for endpoint in plan["endpoints"].as_array_mut().unwrap() {
        for advisory in endpoint["advisories"].as_array_mut().unwrap() {
            let text = advisory.as_object_mut().unwrap().remove("text").unwrap();
            assert!(text.as_str().unwrap().len() > 10);
        }
    }
    plan
}

#[test]
fn every_host_is_planned_as_its_file_says() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plans");
    let mut count = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let case: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let output = plan(&case["input"]);
        let said = String::from_utf8_lossy(&output.stderr);
        let code = case["exit"].as_i64().unwrap_or(0);
        assert_eq!(output.status.code().map(i64::from), Some(code), "{name}: {said}");
        if code == 0 {
            let found = without_texts(serde_json::from_slice(&output.stdout).unwrap());
            assert_eq!(found, case["plan"], "{name}: {found:#}");
        } else {
            assert!(!said.is_empty() && output.stdout.is_empty(), "{name}");
        }
        count += 1;
    }
    assert!(count >= 30, "only {count} files");
}

#[test]
fn the_picture_of_the_documentation_is_what_is_drawn_today() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let directory = tempfile::tempdir().unwrap();
    let drawn = directory.path().join("drawn.svg");
    let mut command = Command::new(env!("CARGO_BIN_EXE_viommuctl"));
    command.args(["plan", "--facts"]).arg(docs.join("reserved-regions.json")).arg("--svg").arg(&drawn);
    assert!(command.output().unwrap().status.success());
    assert!(fs::read(drawn).unwrap() == fs::read(docs.join("reserved-regions.svg")).unwrap(), "draw it anew");
}
