// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads the comments of the tests. Each has one rule or more, then the answer, then who does otherwise, if anybody; each part
//! starts a line, and may go on in the next ones:
//!
//! ```text
//! /// Statement 13 (5.13.6.3.2, MUST): "The device MUST ..."      a normative statement about the device
//! /// Statement (5.13.5, text): "..."                             one that is not among the numbered ones
//! /// Driver (5.13.6.3.1, SHOULD): "The driver SHOULD ..."        a rule for drivers that the device must bear to see broken
//! /// Answer: INVAL.
//! /// Otherwise: QEMU does not look.
//! ```

/// What the specification says.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// Whom it binds.
    pub party: Party,
    /// Its section of virtio 1.3.
    pub section: String,
    /// How strongly it binds, in the words of the specification; `text` for what is outside of its normative sections.
    pub level: String,
    pub quote: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    /// The device; the number if it is one of the normative statements of 5.13.
    Device(Option<u32>),
    Driver,
}

/// A test and what it shows.
#[derive(Debug)]
pub struct Statement {
    /// The test's name, with its module.
    pub test: String,
    pub rules: Vec<Rule>,
    /// What the device does.
    pub answer: String,
    /// Who does otherwise, of the devices whose sources were read.
    pub otherwise: Option<String>,
}

/// The tests of a module.
#[derive(Debug)]
pub struct Chapter {
    /// What they are about: the first line of the module's comment.
    pub title: String,
    pub statements: Vec<Statement>,
}

/// In the order of the specification.
const SOURCES: [(&str, &str); 10] = [
    ("features", include_str!("features.rs")),
    ("configuration", include_str!("configuration.rs")),
    ("operations", include_str!("operations.rs")),
    ("attach", include_str!("attach.rs")),
    ("detach", include_str!("detach.rs")),
    ("map", include_str!("map.rs")),
    ("unmap", include_str!("unmap.rs")),
    ("probe", include_str!("probe.rs")),
    ("reserved_memory", include_str!("reserved_memory.rs")),
    ("faults", include_str!("faults.rs")),
];
/// What holds for every virtio device.
const GENERAL: (&str, &str) = ("framing", include_str!("framing.rs"));

pub fn chapters() -> Vec<Chapter> {
    SOURCES.iter().chain([&GENERAL]).map(|(module, source)| chapter(module, source)).collect()
}

fn chapter(module: &str, source: &str) -> Chapter {
    let title = source.lines().find_map(|line| line.strip_prefix("//! ")).expect("a module says what it is about");
    let mut statements = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        if let Some(text) = line.strip_prefix("/// ") {
            comment.push(text);
        } else if line == "#[test]" {
            let function = lines.next().and_then(|line| line.strip_prefix("fn ")).and_then(|line| line.split_once('('));
            let (function, _) = function.expect("a test is a function");
            statements.push(statement(format!("{module}::{function}"), &comment));
            comment.clear();
        } else {
            comment.clear();
        }
    }
    Chapter { title: title.trim_end_matches('.').into(), statements }
}

fn statement(test: String, comment: &[&str]) -> Statement {
    let mut statement = Statement { test, rules: Vec::new(), answer: String::new(), otherwise: None };
    for (head, text) in parts(comment) {
        match head.split(['(', ',', ')']).map(str::trim).collect::<Vec<_>>()[..] {
            ["Answer"] => statement.answer = text,
            ["Otherwise"] => statement.otherwise = Some(text),
            [party, section, level, ""] => statement.rules.push(rule(party, section, level, &text)),
            _ => panic!("{}: {head:?} is no part of a statement", statement.test),
        }
    }
    let is_whole = !statement.rules.is_empty() && !statement.answer.is_empty();
    assert!(is_whole, "{}: a test says which rule it shows, and what the device answers", statement.test);
    statement
}

/// The parts of a comment: what is before the first colon, and the rest with the lines that belong to it.
fn parts(comment: &[&str]) -> Vec<(String, String)> {
    let mut parts: Vec<(String, String)> = Vec::new();
    for line in comment {
        let starts = ["Statement", "Driver (", "Answer:", "Otherwise:"].iter().any(|start| line.starts_with(start));
        match (line.split_once(": "), parts.last_mut()) {
            (Some((head, text)), _) if starts => parts.push((head.into(), text.into())),
            (_, Some((_, text))) => {
                text.push(' ');
                text.push_str(line);
            }
            (_, None) => panic!("{line:?} starts no part of a statement"),
        }
    }
    parts
}

fn rule(party: &str, section: &str, level: &str, text: &str) -> Rule {
    let party = match (party, party.strip_prefix("Statement ")) {
        ("Driver", _) => Party::Driver,
        ("Statement", _) => Party::Device(None),
        (_, Some(number)) => Party::Device(Some(number.parse().expect("a statement has a number or none"))),
        _ => panic!("{party:?} is bound by nothing"),
    };
    let levels = ["MUST", "MUST NOT", "SHOULD", "SHOULD NOT", "MAY", "text"];
    assert!(levels.contains(&level), "{level:?} is no level");
    let quote = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).expect("a statement is quoted");
    // How strongly a sentence binds is said by its own words.
    assert!(level == "text" || quote.contains(level), "{quote:?} has no {level}");
    Rule { party, section: section.into(), level: level.into(), quote: quote.into() }
}
