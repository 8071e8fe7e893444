// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Links in the documents lead somewhere: files and headings are looked at, other sites' addresses are only read. And the documents
//! that are read first fit a screen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use pulldown_cmark::{Event, Parser, Tag, TagEnd};

use super::*;

/// Directories that are not the sources'.
const NOT_OURS: [&str; 4] = ["target", ".git", "artifacts", "corpus"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files_named(extension: &str) -> Vec<PathBuf> {
    let (mut found, mut left) = (Vec::new(), vec![root().to_owned()]);
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() && !path.is_symlink() && !NOT_OURS.contains(&name.as_str()) {
                left.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found
}

/// What a heading is linked by: as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

struct Document {
    links: Vec<String>,
    anchors: BTreeSet<String>,
    /// What is not in blocks of code.
    prose: String,
}

fn read(text: &str) -> Document {
    let (mut links, mut anchors, mut prose) = (Vec::new(), BTreeSet::new(), String::new());
    let mut times: BTreeMap<String, usize> = BTreeMap::new();
    let (mut heading, mut in_code) = (None::<String>, false);
    for event in Parser::new(text) {
        match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                links.push(dest_url.into_string());
            }
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::End(TagEnd::Heading(_)) => {
                let name = anchor(&heading.take().unwrap());
                let count = times.entry(name.clone()).or_default();
                anchors.insert(if *count == 0 { name } else { format!("{name}-{count}") });
                *count += 1;
            }
            Event::Start(Tag::CodeBlock(_)) => in_code = true,
            Event::End(TagEnd::CodeBlock) => in_code = false,
            Event::Text(text) | Event::Code(text) if !in_code => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&text);
                }
                prose.push_str(&text);
                prose.push(' ');
            }
            _ => (),
        }
    }
    Document { links, anchors, prose }
}

/// What is wrong with a link of a document.
fn mistake(from: &Path, link: &str) -> Option<String> {
    if let Some((scheme, rest)) = link.split_once(':') {
        let host = rest.trim_start_matches('/').split('/').next().unwrap_or_default();
        let is_well = scheme == "https" && rest.starts_with("//") && host.contains('.') && !host.contains(' ');
        return (!is_well).then(|| "is no https address".to_owned());
    }
    let (path, wanted) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    let target = if path.is_empty() { from.to_owned() } else { from.parent().unwrap().join(path) };
    if !target.exists() {
        return Some("leads to no file".to_owned());
    }
    let wanted = wanted?;
    let there = read(&fs::read_to_string(target).unwrap()).anchors;
    (!there.contains(wanted)).then(|| format!("leads to no heading: there are {there:?}"))
}

#[test]
fn links_of_documents_lead_somewhere() {
    let documents = files_named("md");
    assert!(documents.len() > 10, "{documents:?}");
    let (mut mistakes, mut looked_at) = (Vec::new(), 0);
    for document in documents {
        for link in read(&fs::read_to_string(&document).unwrap()).links {
            looked_at += 1;
            if let Some(mistake) = mistake(&document, &link) {
                mistakes.push(format!("{}: {link} {mistake}", document.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    assert!(looked_at > 20, "only {looked_at} links were found");
    assert!(mistakes.is_empty(), "{}", mistakes.join("\n"));
}

/// Manual pages of ours that pages and documents name are there.
#[test]
fn manual_pages_that_are_named_are_there() {
    let there: BTreeSet<String> =
        files_named("8").iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(there.len(), 2, "{there:?}");
    let mut named = 0;
    let mut check = |document: &Path, name: &str, section: &str| {
        let ours = name.starts_with("viommu") || name.starts_with("vhost-device");
        assert!(
            section.len() == 1 && section.parse::<u8>().is_ok_and(|section| section > 0),
            "{}: {name}({section})",
            document.display()
        );
        assert!(
            !ours || there.contains(&format!("{name}.{section}")),
            "{}: there is no {name}({section})",
            document.display()
        );
        named += usize::from(ours);
    };
    for page in files_named("8") {
        let text = fs::read_to_string(&page).unwrap();
        for reference in text.lines().filter_map(|line| line.strip_prefix(".Xr ")) {
            let mut words = reference.split_whitespace();
            check(&page, words.next().unwrap(), words.next().unwrap());
        }
    }
    for document in files_named("md") {
        let prose = read(&fs::read_to_string(&document).unwrap()).prose;
        for word in prose.split_whitespace() {
            let Some((name, rest)) = word.split_once('(') else { continue };
            let section = rest.split(')').next().unwrap();
            if !name.is_empty() && section.len() == 1 && section.parse::<u8>().is_ok() {
                check(&document, name, section);
            }
        }
    }
    assert!(named > 3, "only {named} were found");
}

/// The words of a text that begin with these letters and go on with a number.
fn numbered<'a>(text: &'a str, letters: &'a str) -> impl Iterator<Item = String> + 'a {
    let words = text.split(|character: char| !character.is_alphanumeric() && character != '_');
    let is_number = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit());
    words.filter(move |word| word.strip_prefix(letters).is_some_and(is_number)).map(ToOwned::to_owned)
}

#[test]
fn what_always_holds_is_listed_and_what_looks_at_it_is_there() {
    let list = fs::read_to_string(root().join("docs/invariants.md")).unwrap();
    let rows: Vec<_> = list.lines().filter(|line| line.starts_with("| I")).collect();
    let listed: BTreeSet<_> = rows.iter().flat_map(|row| numbered(row.split(" | ").next().unwrap(), "I")).collect();
    let mut cited = BTreeSet::new();
    for file in files_named("rs").into_iter().filter(|file| !file.ends_with("tests/conventions/links.rs")) {
        let text = fs::read_to_string(&file).unwrap();
        for number in text.lines().filter(|line| line.contains("//")).flat_map(|line| numbered(line, "I")) {
            assert!(listed.contains(&number), "{} cites {number}, which docs/invariants.md has not", file.display());
            cited.insert(number);
        }
    }
    assert!(cited.len() > 10, "only {cited:?} are cited");
    for name in rows.iter().flat_map(|row| row.split('`').skip(1).step_by(2)).filter(|name| name.contains('/')) {
        assert!(root().join(name).is_file(), "docs/invariants.md names {name}, which is not there");
    }
}

#[test]
fn the_documents_that_are_read_first_fit_a_screen() {
    const WIDTH: usize = 132;
    for name in ["README.md", "CONTRIBUTING.md"] {
        for (number, line) in (1..).zip(fs::read_to_string(root().join(name)).unwrap().lines()) {
            assert!(line.len() <= WIDTH, "{name}:{number} has {} bytes, and may have {WIDTH}", line.len());
        }
    }
}
