// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that cannot be added: each with the reason, and nothing is changed or left open.

use super::*;

/// Tries to add something, and sees that nothing has come of it.
fn refuse(bench: &Bench, addition: &Value, kind: &str, text: &str) {
    let before = (bench.ask(&json!("list")), bench.ask(&json!("plan")), bench.keeper.count());
    let (reply, closed) = bench.add(addition);
    let (found, message) = refusal(&reply);
    assert!(found == kind && message.contains(text), "{kind}, {text}: {reply}");
    assert!(closed.iter().all(Closed::is_closed), "{text}: a file stays open");
    assert_eq!((bench.ask(&json!("list")), bench.ask(&json!("plan")), bench.keeper.count()), before, "{text}");
}

/// The addition, with something else at a place.
fn with(pointer: &str, value: Value) -> Value {
    let mut addition = addition();
    *addition.pointer_mut(pointer).unwrap() = value;
    addition
}

#[test]
fn what_does_not_fit_what_the_guest_was_told_is_refused() {
    let bench = Bench::new();
    let facts = |facts: Value| with("/devices/0/facts", facts);
    // The granule and the input range are what they were.
    refuse(&bench, &with("/devices/0/granule", json!(65536)), "does-not-fit", "pages of 0x10000 bytes");
    refuse(&bench, &facts(json!({ "usable": [["0x8000000000", "0xffffffffff"]] })), "does-not-fit", "no address in");
    refuse(&bench, &facts(json!({})), "does-not-fit", "which addresses it can use is not known");
    let direct = json!({ "usable": [["0x0", "0x7fffffffff"]], "reserved_regions": ["0x1000 0x1fff direct"] });
    refuse(&bench, &facts(direct), "host", "0x1000-0x1fff mapped to itself");
}

#[test]
fn regions_that_do_not_fit_a_probe_are_widened_but_not_over_memory() {
    let bench = Bench::new();
    // Five regions with the doorbell, and there is room for four.
    let given = [0x1_0000, 0x10_0000, 0x20_0000, 0x30_0000].map(|first: u64| (first, first + 0xfff));
    let lines = given.map(|(first, last)| format!("{first:#x} {last:#x} reserved"));
    let many = json!({ "usable": [["0x0", "0x7fffffffff"]], "reserved_regions": lines });
    let (reply, _closed) = bench.add(&with("/devices/0/facts", many.clone()));
    let told = reply["added"]["endpoints"][0]["resv"].as_array().unwrap();
    let number = |value: &Value| u64::from_str_radix(value.as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
    let told: Vec<_> = told.iter().map(|region| (number(&region["start"]), number(&region["end"]))).collect();
    assert!(told.len() <= 4, "{reply}");
    for (first, last) in given.into_iter().chain([(X86_MSI.start(), X86_MSI.last())]) {
        assert!(told.iter().any(|(start, end)| *start <= first && last <= *end), "{first:#x}-{last:#x}: {reply}");
    }
    bench.ask(&json!({ "remove": { "endpoints": [NEW_TEXT] } }));
    let _guest = bench.guest();
    refuse(&bench, &with("/devices/0/facts", many), "does-not-fit", "do not fit 96 bytes");
}

#[test]
fn what_is_there_already_is_refused() {
    let bench = Bench::new();
    refuse(&bench, &with("/devices/0/id", json!(FIRST_TEXT)), "taken", "there is an endpoint 0000:00:03.0 already");
    let mut same_host = with("/devices/0/host", json!("0000:01:00.0"));
    same_host["vfio_members"] = json!(["0000:01:00.0"]);
    refuse(&bench, &same_host, "taken", "0000:00:03.0 and 0000:01:00.0 are the same host device");
    refuse(&bench, &with("/group", json!(1)), "taken", "0000:00:03.0 is in host IOMMU group 1");
    let twice = |id: &str, host: &str| {
        json!({ "group": 7, "vfio_members": ["0000:05:00.0", "0000:05:00.1"],
            "devices": [device(NEW_TEXT, "0000:05:00.0", "vfio1"), device(id, host, "vfio2")] })
    };
    refuse(&bench, &twice(NEW_TEXT, "0000:05:00.1"), "taken", "there is an endpoint 0000:01:00.0 already");
    refuse(&bench, &twice(OTHER_TEXT, "0000:05:00.0"), "taken", "are the same host device");
    // One file for two devices, whatever they are called.
    let (file, closed) = files::pipe();
    let request = json!({ "add": twice(OTHER_TEXT, "0000:05:00.1") });
    let reply = bench.client().ask_with(&request, &[files::copies(&file, 2).remove(0), file]);
    assert!(refusal(&reply).1.contains("are the same host device"), "{reply}");
    assert!(closed.is_closed());
}

#[test]
fn a_group_is_added_as_a_whole() {
    let bench = Bench::new();
    let sibling = with("/vfio_members", json!(["0000:05:00.0", "0000:05:00.1"]));
    refuse(&bench, &sibling, "host", "0000:05:00.1 is in IOMMU group 7 and bound to VFIO, but not among the devices");
    refuse(&bench, &with("/vfio_members", json!([])), "host", "0000:05:00.0 is not among those of IOMMU group 7");
}

#[test]
fn files_must_be_those_of_the_devices() {
    let bench = Bench::new();
    let ask = |files: Vec<std::os::fd::OwnedFd>| bench.client().ask_with(&json!({ "add": addition() }), &files);
    for (files, text) in [
        (vec![], "1 devices with 0 files"),
        (vec![files::pipe().0, files::pipe().0], "1 devices with 2 files"),
        (vec![files::null()], "is no pipe"),
    ] {
        let reply = ask(files);
        let (kind, message) = refusal(&reply);
        assert!(kind == "files" && message.contains(text), "{message}");
    }
    let none = json!({ "group": 7, "vfio_members": [], "devices": [] });
    refuse(&bench, &none, "files", "0 devices with 0 files");
    for node in ["vfio77", "../nodes/vfio1", "..", "", "/etc/passwd"] {
        refuse(&bench, &with("/devices/0/node", json!(node)), "host", "is not the device's where the daemon runs");
    }
}

#[test]
fn nobody_is_added_without_a_watcher() {
    let bench = Bench::new();
    let two = json!({ "group": 9, "vfio_members": ["0000:06:00.0", "0000:06:00.1"], "devices": [
        device(NEW_TEXT, "0000:06:00.0", "vfio2"), device(OTHER_TEXT, "0000:06:00.1", "vfio3") ] });
    // The watcher takes the first and not the second.
    bench.keeper.refuse_from(1);
    refuse(&bench, &two, "host", "the watcher does not take the files");
}

#[test]
fn the_operators_choices_hold_for_what_is_added() {
    let bench = Bench::with(Limits::default(), &["--relaxable=report"]);
    let relaxable =
        json!({ "usable": [["0x0", "0x7fffffffff"]], "reserved_regions": ["0x1000 0x1fff direct-relaxable"] });
    let (reply, _closed) = bench.add(&with("/devices/0/facts", relaxable));
    assert_eq!(reply["added"]["endpoints"][0]["resv"][0]["start"], "0x1000", "{reply}");
}

#[test]
fn windows_that_the_operator_knows_are_withheld_from_what_is_added_and_the_log_says_so() {
    let shown = json!({ "usable": [["0x0", "0x7fffffffff"]], "driver": "arm-smmu-v3",
        "reserved_regions": ["0xe0000000 0xefffffff reserved"] });
    let add = |options: &[&str]| {
        let bench = Bench::with(Limits::default(), options);
        let (reply, _closed) = bench.add(&with("/devices/0/facts", shown.clone()));
        reply["added"]["endpoints"][0]["withheld"].clone()
    };
    assert_eq!(add(&[]), json!([]));
    super::common::logged::keep();
    assert_eq!(add(&["--host-window=e0000000-efffffff"])[0]["reason"], "window-by-match");
    let lines = super::common::logged::lines();
    for line in ["0xfee00000-0xfeefffff is reported as msi", "0xe0000000-0xefffffff is not reported (window-by-match: "]
    {
        let line = format!("endpoint {NEW_TEXT}: {line}");
        assert!(lines.iter().any(|logged| logged.starts_with(&line)), "{line}: {lines:?}");
    }
}
