// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of messages in docs/operators.md has what the programs can print, and nothing that they cannot.

use std::collections::BTreeSet;
use std::fs;

use super::*;

/// Shorter pieces of a message do not tell it from others.
const SHORTEST: usize = 9;

/// What prints a message for an operator, which comes next.
const PRINTS: [&str; 8] = [
    "error!(",
    "warn!(",
    "self.warn(format_args!(",
    "say(format_args!(",
    "write_line_now(",
    "Level::Warn,",
    "Failure(1,",
    "Failure(3,",
];

/// Files with errors whose messages come with exit code 1, 3, 4 or 5.
const ERRORS: [&str; 23] = [
    "control/add.rs",
    "control/client.rs",
    "control/files.rs",
    "control/listener.rs",
    "control/registry.rs",
    "launch/directory.rs",
    "launch/inspect.rs",
    "launch/operate.rs",
    "launch/output.rs",
    "launch/plugging.rs",
    "launch/qmp.rs",
    "launch/run.rs",
    "reserved/bridge.rs",
    "reserved/device_tree.rs",
    "reserved/facts.rs",
    "reserved/gather.rs",
    "reserved/plan.rs",
    "reserved/sysfs.rs",
    "sandbox.rs",
    "vhost_user/incoming.rs",
    "vhost_user/serve.rs",
    "vhost_user/setup.rs",
    "vhost_user/socket.rs",
];

/// Files with other errors: they blame what the programs were given (exit code 2), come after a line's `: …`, or are a VMM's.
const OTHER_ERRORS: [&str; 26] = [
    "control/protocol.rs",
    "device/settings.rs",
    "device/state.rs",
    "embed/mod.rs",
    "fd.rs",
    "fd/kind.rs",
    "host/mod.rs",
    "host/type1/info.rs",
    "id.rs",
    "launch/qemu.rs",
    "launch/size.rs",
    "memory.rs",
    "queue.rs",
    "queue/polling.rs",
    "range.rs",
    "reserved/mod.rs",
    "reserved/source.rs",
    "topology/viot.rs",
    "translate/translator.rs",
    "translate/vhost.rs",
    "vhost_user/activation.rs",
    "vhost_user/args.rs",
    "vhost_user/metrics_file.rs",
    "vhost_user/migration.rs",
    "vhost_user/told.rs",
    "vhost_user/transfer.rs",
];

/// What is before the message of an error.
const ERROR: &str = "#[error(";

/// A part of a source: the file, how the part begins, and how it ends.
type Part = (&'static str, &'static str, &'static str);

/// Lines that only pass on what is put together elsewhere: the file, the literal, or the call that has it, and the parts of sources
/// that have the texts.
const PASSED_ON: [(&str, &str, &[Part]); 13] = [
    ("sandbox.rs", "message(code)", &[("sandbox.rs", "const fn message(code", "\n}\n")]),
    // What is among ERRORS.
    ("bin/viommuctl.rs", "error.into()", &[]),
    ("vhost_user/state.rs", "{notice}", &[("device/notice.rs", "impl fmt::Display for Notice", "\n}\n")]),
    ("vhost_user/setup.rs", "endpoint {id}: {warning}", &[("reserved/mod.rs", "fn peer_to_peer_warning", "\n    }\n")]),
    (
        "reserved/report.rs",
        "endpoint {id}: {}: {}",
        &[("reserved/advisory.rs", "impl fmt::Display for AdvisoryKind", "\n}\n")],
    ),
    ("translate/vhost.rs", "endpoint {}: {error}", &[("translate/vhost.rs", "pub enum VhostIotlbError", "\n}\n")]),
    // The line, and what is wrong with it.
    ("reserved/sysfs.rs", "{}, line {line}", &[("reserved/mod.rs", "pub enum ParseRegionError", "\n}\n")]),
    // What clients do.
    ("control/server.rs", "{text}", &[]),
    // A name, and what it should be.
    ("reserved/sysfs.rs", "{} is not {expected}", &[]),
    // What fails is among ERRORS.
    ("bin/vhost-device-iommu.rs", "{}", &[]),
    // What `check` finds.
    ("bin/viommuctl.rs", "{report}", &[]),
    // How to add devices.
    ("launch/run.rs", "{}", &[]),
    ("launch/run.rs", "{device}: {reason}", &[("launch/run.rs", "fn vfio_node", "\n}\n")]),
];

/// A file of the sources, without its tests.
struct Source {
    name: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut found, mut left) = (Vec::new(), vec![root.clone()]);
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
                let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
                let name = path.strip_prefix(&root).unwrap().display().to_string();
                found.push(Source { name, text: code.collect::<Vec<_>>().join("\n") + "\n" });
            }
        }
    }
    // Whole files of tests.
    found.retain(|source| !source.name.contains("tests") && !source.name.starts_with("host/fake"));
    found
}

/// The string literal that a text begins with, after spaces, a macro that formats and a first argument that is a word.
fn literal(text: &str) -> Option<String> {
    let text = text.trim_start().trim_start_matches('&');
    let text = text.strip_prefix("format!(").unwrap_or(text).trim_start();
    let mut characters = text.strip_prefix('"')?.chars().peekable();
    let mut found = String::new();
    loop {
        match characters.next()? {
            '"' => return Some(found),
            '\\' => match characters.next()? {
                // A line that goes on, without the next one's indentation.
                '\n' => while characters.next_if(|character| character.is_whitespace()).is_some() {},
                character => found.push(character),
            },
            character => found.push(character),
        }
    }
}

/// What is printed after each marker: its literal, or, where there is none, the call that is there instead.
fn printed_after<'a>(text: &'a str, marker: &'a str) -> impl Iterator<Item = String> + 'a {
    let call = |text: &str| text.split_inclusive(')').next().unwrap_or_default().trim().to_owned();
    let is_definition = move |at: usize| text[..at].ends_with("fn ");
    let places = text.match_indices(marker).filter(move |(at, _)| !is_definition(*at)).map(|(at, _)| at + marker.len());
    places.map(move |at| literal(&text[at..]).unwrap_or_else(|| call(&text[at..])))
}

/// Every literal in a part of a source.
fn literals_in(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('"') {
        let next = literal(&rest[at..]).unwrap();
        let end = rest[at + 1..].match_indices('"').find(|(end, _)| !rest[at + 1..][..*end].ends_with('\\')).unwrap().0;
        rest = &rest[at + end + 2..];
        found.push(next);
    }
    found
}

/// What of a literal stays the same, without the marks of code.
fn pieces(literal: &str) -> Vec<String> {
    let (mut found, mut piece, mut depth) = (Vec::new(), String::new(), 0);
    for character in literal.chars() {
        match character {
            '{' => {
                depth += 1;
                found.push(std::mem::take(&mut piece));
            }
            '}' => depth -= 1,
            '`' => (),
            _ if depth > 0 => (),
            _ => piece.push(character),
        }
    }
    found.push(piece);
    found
        .iter()
        .map(|piece| piece.trim_matches([' ', ':', ',', ';']).to_owned())
        .filter(|piece| !piece.is_empty())
        .collect()
}

fn longest(literal: &str) -> Option<String> {
    pieces(literal).into_iter().max_by_key(String::len).filter(|piece| piece.len() >= SHORTEST)
}

/// The messages that can be printed: where they are from, and their literals.
fn messages() -> Vec<(String, String)> {
    let sources = sources();
    let mut found = Vec::new();
    for source in &sources {
        let mut literals: Vec<String> = PRINTS.iter().flat_map(|marker| printed_after(&source.text, marker)).collect();
        if ERRORS.contains(&source.name.as_str()) {
            literals.extend(printed_after(&source.text, ERROR));
        }
        for literal in literals {
            let passed_on = PASSED_ON.iter().find(|(file, text, _)| source.name == *file && literal == *text);
            match passed_on {
                Some((_, _, parts)) => {
                    for (file, start, end) in *parts {
                        let text = &sources.iter().find(|source| source.name == *file).unwrap().text;
                        let part = text.split(start).nth(1).unwrap_or_else(|| panic!("src/{file} has no `{start}`"));
                        let part = part.split(end).next().unwrap();
                        let worded = literals_in(part).into_iter().filter(|text| longest(text).is_some());
                        found.extend(worded.map(|literal| ((*file).to_owned(), literal)));
                    }
                }
                // Of errors: what has it below.
                None if literal == "{0}" || literal == "transparent)" => (),
                None => found.push((source.name.clone(), literal)),
            }
        }
    }
    found
}

/// The messages in the document's table: each cell of the first column has some.
fn listed() -> Vec<String> {
    let document = include_str!("../../docs/operators.md");
    let section = document.split("\n## By log line\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `") || line.starts_with("| ``"));
    let cells = rows.map(|row| row.trim_start_matches("| ").split(" | ").next().unwrap());
    cells.flat_map(|cell| cell.split("<br>")).map(|message| message.replace('`', "").trim().to_owned()).collect()
}

#[test]
fn of_every_error_it_is_known_whether_operators_see_it() {
    let with_errors = sources().into_iter().filter(|source| source.text.contains(ERROR)).map(|source| source.name);
    let known = ERRORS.iter().chain(&OTHER_ERRORS).map(|name| (*name).to_owned());
    let (found, known): (BTreeSet<_>, BTreeSet<_>) = (with_errors.collect(), known.collect());
    let differing: Vec<_> = found.symmetric_difference(&known).collect();
    assert!(differing.is_empty(), "name them in ERRORS or in OTHER_ERRORS, and no others: {differing:?}");
}

#[test]
fn every_message_is_in_the_operators_table() {
    let listed = listed();
    let mut missing = BTreeSet::new();
    for (file, literal) in messages() {
        let Some(piece) = longest(&literal) else {
            missing.insert(format!("src/{file}: {literal} (passes on something: name it in PASSED_ON of this test)"));
            continue;
        };
        if !listed.iter().any(|message| message.contains(&piece)) {
            missing.insert(format!("src/{file}: {literal}"));
        }
    }
    assert!(
        missing.is_empty(),
        "docs/operators.md, \"By log line\", says nothing of these messages: add a row for each:\n{}",
        missing.into_iter().collect::<Vec<_>>().join("\n")
    );
}

#[test]
fn the_operators_table_has_no_message_that_is_never_printed() {
    let known: Vec<String> = messages().iter().flat_map(|(_, literal)| pieces(literal)).collect();
    for message in listed() {
        let trimmed = message.split('…').map(|piece| piece.trim_matches([' ', ':', ',', ';']));
        let telling: Vec<&str> = trimmed.filter(|piece| piece.len() >= SHORTEST).collect();
        assert!(!telling.is_empty(), "docs/operators.md: `{message}` does not tell a message from others");
        for piece in telling {
            let is_known = known.iter().any(|known| known.contains(piece));
            assert!(is_known, "docs/operators.md: nothing prints `{piece}` of `{message}`");
        }
    }
}
