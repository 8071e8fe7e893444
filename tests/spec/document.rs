// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Makes `docs/conformance.md`, and checks that it is what the tests say.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

use crate::disagreements::DISAGREEMENTS;
use crate::statements::{Chapter, Party, Rule, Statement, chapters};

/// How many normative statements 5.13 has about the device.
const STATEMENTS: u32 = 53;

/// Where it is in the repository.
const PATH: &str = "docs/conformance.md";

const INTRODUCTION: &str = "\
# Conformance with virtio 1.3

<!-- Made by `make conformance` from tests/spec. -->

What the specification says of an IOMMU device (5.13, and what holds for the descriptors of every device), sentence by sentence,
what this device does, and the test that shows it: a request by its bytes, and after it the reply, the used length, what became of
DMA on a model of a host, and that nothing else changed. `cargo test --test spec` runs them.

The 53 normative statements of 5.13 about the device have numbers, in their order. Rows without one are sentences outside of the
normative sections, or of other sections. Who does otherwise was found by reading, not by running: QEMU (10.2.50), cloud-hypervisor
(ae44c2971), crosvm (f1e797a68), and kvmtool (its author's branch; there is none in its main one). They may have changed since.

Four answers are not all that the words ask for. 12 and 24: the host moves a group as a whole, so a detached endpoint reaches what
another member of its group is still attached to. 16 and 18: a host that is out of memory, or busy, is not taken for one that cannot,
so that a driver can tell what may work later.
";

const DEVICE: &str = "
## What binds the device
";

const DRIVERS: &str = "
## What binds drivers

A driver that breaks a rule of its own meets this:
";

const DISAGREE: &str = "
## Where other devices disagree

A driver that was tried on one of them may have come to rely on what it does. Where they differ, this device follows the
specification.
";

fn document(chapters: &[Chapter]) -> String {
    let is_device = |party: Party| matches!(party, Party::Device(_));
    let mut text = INTRODUCTION.to_string();
    text += DEVICE;
    for chapter in chapters {
        text += &table(chapter, is_device);
    }
    text += DRIVERS;
    for chapter in chapters {
        text += &table(chapter, |party| party == Party::Driver);
    }
    text + DISAGREE + &disagreements(chapters)
}

/// The rules of a chapter that bind one party.
fn table(chapter: &Chapter, binds: impl Fn(Party) -> bool) -> String {
    let mut rows = String::new();
    for statement in &chapter.statements {
        for rule in statement.rules.iter().filter(|rule| binds(rule.party)) {
            rows += &row(rule, statement);
        }
    }
    if rows.is_empty() {
        return rows;
    }
    format!(
        "\n### {}\n\n| | section | level | virtio 1.3 says | this device | who does otherwise | test |\n\
         |---|---|---|---|---|---|---|\n{rows}",
        chapter.title
    )
}

fn row(rule: &Rule, statement: &Statement) -> String {
    let number = match rule.party {
        Party::Device(Some(number)) => number.to_string(),
        Party::Device(None) | Party::Driver => String::new(),
    };
    let Rule { section, level, quote, .. } = rule;
    let Statement { test, answer, otherwise, .. } = statement;
    let otherwise = otherwise.as_deref().unwrap_or("");
    format!("| {number} | {section} | {level} | {quote} | {answer} | {otherwise} | `{test}` |\n")
}

fn disagreements(chapters: &[Chapter]) -> String {
    let mut text = "\n| | the specification | QEMU | cloud-hypervisor | crosvm | this device | why | test |\n\
                    |---|---|---|---|---|---|---|---|\n"
        .to_string();
    for it in DISAGREEMENTS {
        let statement =
            chapters.iter().flat_map(|chapter| &chapter.statements).find(|statement| statement.test == it.test);
        let answer = &statement.unwrap_or_else(|| panic!("there is no test {}", it.test)).answer;
        let cells = [it.about, it.specification, it.qemu, it.cloud_hypervisor, it.crosvm, answer, it.why];
        writeln!(text, "| {} | `{}` |", cells.join(" | "), it.test).unwrap();
    }
    text
}

#[test]
fn the_documentation_says_what_the_tests_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PATH);
    let document = document(&chapters());
    if env::var_os("UPDATE_CONFORMANCE").is_some() {
        fs::write(&path, &document).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == document, "{PATH} is not what the tests say: run `make conformance` and commit it");
}

#[test]
fn every_statement_has_one_test() {
    let mut numbers = Vec::new();
    for statement in chapters().iter().flat_map(|chapter| &chapter.statements) {
        numbers.extend(statement.rules.iter().filter_map(|rule| match rule.party {
            Party::Device(number) => number,
            Party::Driver => None,
        }));
    }
    assert_eq!(numbers, (1..=STATEMENTS).collect::<Vec<_>>(), "in their order");
}

#[test]
fn every_test_of_a_statement_is_in_the_documentation() {
    let mut found = BTreeSet::new();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/spec");
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let module = path.file_stem().unwrap().to_str().unwrap().to_string();
        let tests = fs::read_to_string(&path).unwrap().lines().filter(|line| line.trim() == "#[test]").count();
        if tests > 0 && module != "document" {
            found.insert((module, tests));
        }
    }
    let listed = chapters().into_iter().map(|chapter| {
        let module = chapter.statements[0].test.split("::").next().unwrap().to_string();
        (module, chapter.statements.len())
    });
    assert_eq!(listed.collect::<BTreeSet<_>>(), found);
}

#[test]
fn no_cell_breaks_its_table() {
    let document = document(&chapters());
    let columns = |line: &str| line.matches('|').count();
    for table in document.split("\n\n").filter(|block| block.starts_with('|')) {
        let expected = columns(table.lines().next().unwrap());
        for line in table.lines() {
            assert_eq!(columns(line), expected, "{line}");
        }
    }
}
