// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! docs/hostile-cases.md is the list of cases. It names tests that there are, and all of those in this directory. SECURITY.md names tests
//! that there are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// How many cases there are.
const CASES: u32 = 74;

/// A row of the list.
struct Case {
    number: u32,
    shown_by: Vec<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn cases() -> Vec<Case> {
    let text = read("docs/hostile-cases.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix('|'));
    let cells = rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    let numbered = cells.filter_map(|cells| Some((cells[0].parse().ok()?, cells)));
    let case = |(number, cells): (u32, Vec<&str>)| {
        let [_, what, outcome, shown_by] = cells[..] else { panic!("case {number} has {} cells", cells.len()) };
        assert!(!what.is_empty() && !outcome.is_empty(), "case {number} says nothing");
        let shown_by = shown_by.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        Case { number, shown_by }
    };
    numbered.map(case).collect()
}

/// The names of the tests in a source file.
fn tests_in(source: &str) -> BTreeSet<&str> {
    let mut names = BTreeSet::new();
    let mut is_test = false;
    for line in source.lines().map(str::trim) {
        if line == "#[test]" {
            is_test = true;
        } else if let Some(function) = line.strip_prefix("fn ") {
            if is_test {
                names.extend(function.split('(').next());
            }
            is_test = false;
        }
    }
    names
}

#[test]
fn every_case_is_in_the_list_once_and_in_order() {
    let numbers: Vec<u32> = cases().iter().map(|case| case.number).collect();
    assert_eq!(numbers, (1..=CASES).collect::<Vec<_>>());
}

#[test]
fn every_case_is_shown_by_tests_that_there_are() {
    for Case { number, shown_by } in cases() {
        assert!(!shown_by.is_empty(), "nothing shows case {number}");
        for test in &shown_by {
            let (path, name) = test.split_once("::").unwrap_or_else(|| panic!("case {number}: `{test}` is no test"));
            assert!(tests_in(&read(path)).contains(name), "case {number}: there is no test {name} in {path}");
        }
    }
}

#[test]
fn every_test_of_this_directory_is_in_the_list() {
    let shown_by: BTreeSet<String> = cases().into_iter().flat_map(|case| case.shown_by).collect();
    let directory = root().join("tests/hostile");
    let files = fs::read_dir(&directory).unwrap().map(|entry| PathBuf::from(entry.unwrap().file_name()));
    for file in files.filter(|file| file != Path::new("list.rs")) {
        let path = Path::new("tests/hostile").join(file);
        for name in tests_in(&read(&path)) {
            let test = format!("{}::{name}", path.display());
            assert!(shown_by.contains(&test), "{test} is not in docs/hostile-cases.md");
        }
    }
}

/// The names of all tests below a directory.
fn tests_below(directory: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let (kind, path) = (entry.file_type().unwrap(), entry.path());
        // The hosts of the tests are full of links that lead back.
        if kind.is_dir() {
            tests_below(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(tests_in(&fs::read_to_string(path).unwrap()).into_iter().map(str::to_owned));
        }
    }
}

/// Whether it is a test, a fuzz target, or scenarios of the host VM: all of a file, or those whose names begin so.
fn is_there(name: &str, tests: &BTreeSet<String>) -> bool {
    if tests.contains(name) || root().join(format!("fuzz/fuzz_targets/{name}.rs")).is_file() {
        return true;
    }
    let (group, start) = name.split_once("::").unwrap_or((name, ""));
    let scenarios = fs::read_to_string(root().join(format!("tests/hostvm/{group}.rs")));
    scenarios.is_ok_and(|source| tests_in(&source).iter().any(|test| test.starts_with(start)))
}

#[test]
fn every_promise_names_tests_that_there_are() {
    let text = read("SECURITY.md");
    let (_, table) = text.split_once("| promise | tests |\n|---|---|\n").unwrap();
    let promises: Vec<&str> = table.lines().take_while(|line| line.starts_with('|')).collect();
    assert!(promises.len() >= 10);
    let mut tests = BTreeSet::new();
    for directory in ["src", "tests"] {
        tests_below(&root().join(directory), &mut tests);
    }
    assert!(!is_there("read", &tests), "any function counts as a test");
    assert!(!is_there("embedded::nothing", &tests), "any scenario does");
    for promise in promises {
        let named: Vec<&str> = promise.split('|').nth(2).unwrap().split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty(), "{promise}");
        for name in named {
            assert!(is_there(name, &tests), "there is no {name}: {promise}");
        }
    }
}
