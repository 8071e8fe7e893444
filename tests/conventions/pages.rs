// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The manual pages name every option, command and exit status that there is, and none that there is not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::*;

const DAEMON_PAGE: &str = "vhost-device-iommu.8";
const TOOL_PAGE: &str = "viommuctl.8";
const TOOL: &str = env!("CARGO_BIN_EXE_viommuctl");
/// What clap adds to every command, and a page says once.
const EVERYWHERE: [&str; 2] = ["--help", "--version"];

type Options = BTreeSet<String>;

fn source(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn page(name: &str) -> String {
    source(&format!("dist/man/{name}"))
}

fn help(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).arg("--help").output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The long options in a help text. Their lines are indented less than what is said of them.
fn options_of_help(text: &str) -> Options {
    const INDENT: usize = 6;
    let lines = text.lines().filter(|line| line.len() - line.trim_start().len() <= INDENT);
    let words = lines.flat_map(|line| line.split_whitespace().take(2));
    let long = words.filter(|word| word.starts_with("--") && word.len() > 2);
    let names = long.map(|word| word.split(['[', '=']).next().unwrap().to_owned());
    names.filter(|name| !EVERYWHERE.contains(&name.as_str())).collect()
}

/// The commands in a help text, but that for help.
fn commands_of_help(text: &str) -> BTreeSet<String> {
    let list = text.split("\nCommands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let lines = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = lines.map(|line| line.split_whitespace().next().unwrap().to_owned());
    names.filter(|name| name != "help").collect()
}

/// The long options that a line of mdoc names.
fn options_of_line(line: &str) -> impl Iterator<Item = String> {
    let words: Vec<String> = line.split_whitespace().map(ToOwned::to_owned).collect();
    let pairs: Vec<_> = words.iter().cloned().zip(words.iter().skip(1).cloned()).collect();
    let long = pairs.into_iter().filter(|(flag, name)| flag.ends_with("Fl") && name.len() > 1 && name.starts_with('-'));
    long.map(|(_, name)| format!("-{name}"))
}

/// The long options that are explained below each heading of a page: of commands (`.Ss`) or anything else.
fn explained(page: &str) -> BTreeMap<String, Options> {
    let mut heading = String::new();
    let mut found: BTreeMap<String, Options> = BTreeMap::new();
    for line in page.lines() {
        if let Some(name) = line.strip_prefix(".Ss ").or(line.strip_prefix(".Sh ")) {
            name.clone_into(&mut heading);
        } else if line.starts_with(".It ") {
            let options = options_of_line(line).filter(|name| !EVERYWHERE.contains(&name.as_str()));
            found.entry(heading.clone()).or_default().extend(options);
        }
    }
    found
}

fn assert_same(page: &str, what: &str, explained: &BTreeSet<String>, there: &BTreeSet<String>) {
    let missing: Vec<_> = there.difference(explained).collect();
    let stale: Vec<_> = explained.difference(there).collect();
    assert!(missing.is_empty(), "dist/man/{page}: {what}: {missing:?} are not explained: add them with .It");
    assert!(stale.is_empty(), "dist/man/{page}: {what}: {stale:?} are explained, and there are none: take them out");
}

#[test]
fn the_daemons_page_explains_its_options_and_no_others() {
    let explained = explained(&page(DAEMON_PAGE)).into_values().flatten().collect();
    assert_same(DAEMON_PAGE, "options", &explained, &options_of_help(&help(DAEMON, &[])));
}

#[test]
fn the_tools_page_explains_each_commands_options_and_no_others() {
    let page = page(TOOL_PAGE);
    let headings = page.lines().filter_map(|line| line.strip_prefix(".Ss ")).map(ToOwned::to_owned).collect();
    let commands = commands_of_help(&help(TOOL, &[]));
    assert_same(TOOL_PAGE, "commands", &headings, &commands);
    let explained = explained(&page);
    for command in &commands {
        let options = explained.get(command).cloned().unwrap_or_default();
        assert_same(TOOL_PAGE, command, &options, &options_of_help(&help(TOOL, &[command])));
    }
}

/// Also where pages only mention them: in the synopsis, in sentences, in examples.
#[test]
fn no_page_mentions_an_option_that_there_is_not() {
    let mut there = options_of_help(&help(DAEMON, &[]));
    for command in commands_of_help(&help(TOOL, &[])) {
        there.extend(options_of_help(&help(TOOL, &[&command])));
    }
    there.extend(EVERYWHERE.map(ToOwned::to_owned));
    for name in [DAEMON_PAGE, TOOL_PAGE] {
        for line in page(name).lines() {
            let literal = line.split(|c: char| c.is_whitespace() || c == '=').filter(|word| word.starts_with("--"));
            let literal = literal.map(ToOwned::to_owned).filter(|word| word.len() > 2);
            for option in options_of_line(line).chain(literal) {
                assert!(there.contains(&option), "dist/man/{name}: there is no {option}: {line}");
            }
        }
    }
}

/// The exit statuses that a page explains.
fn statuses(page: &str) -> BTreeSet<String> {
    let section = page.split(".Sh EXIT STATUS\n").nth(1).unwrap().split("\n.Sh ").next().unwrap();
    section.lines().filter_map(|line| line.strip_prefix(".It ")).map(ToOwned::to_owned).collect()
}

/// The exit codes that sources name: after `Failure(`, and in functions that are called `exit_code`.
fn codes(paths: &[&str]) -> BTreeSet<String> {
    let number = |text: &str| text.chars().next().filter(char::is_ascii_digit).map(|digit| digit.to_string());
    let mut found = BTreeSet::from(["0".to_owned()]);
    for path in paths {
        let text = source(path);
        found.extend(text.split("Failure(").skip(1).filter_map(number));
        for function in text.split("fn exit_code(").skip(1) {
            let body = function.split("\n    }\n").next().unwrap();
            found.extend(body.split("=> ").skip(1).filter_map(number));
        }
    }
    found
}

#[test]
fn the_pages_explain_the_exit_codes_and_no_others() {
    // clap ends with 2 too.
    let daemon = codes(&["src/vhost_user/serve.rs"]);
    assert!(daemon.len() > 3, "{daemon:?}");
    assert_same(DAEMON_PAGE, "EXIT STATUS", &statuses(&page(DAEMON_PAGE)), &daemon);
    let tool = codes(&["src/bin/viommuctl.rs", "src/launch/run.rs", "src/launch/operate.rs"]);
    assert!(tool.len() > 3, "{tool:?}");
    assert_same(TOOL_PAGE, "EXIT STATUS", &statuses(&page(TOOL_PAGE)), &tool);
}
