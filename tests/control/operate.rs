// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! viommuctl against a control socket.

use std::process::{Command, Output, Stdio};

use super::common::{attach, map};
use super::*;
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::Failure;

fn viommuctl(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_viommuctl"));
    command.args(arguments);
    command
}

/// Exit code, output, and what was said.
fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// Asks the bench's daemon.
fn ask(bench: &Bench, arguments: &[&str]) -> (i32, String, String) {
    run(viommuctl(arguments).arg("--control").arg(bench.path()))
}

fn well(bench: &Bench, arguments: &[&str]) -> String {
    let (code, output, said) = ask(bench, arguments);
    assert_eq!((code, said.as_str()), (0, ""), "{arguments:?}");
    output
}

#[test]
fn what_there_is_is_shown_to_people_and_programs() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    assert_eq!(guest.send(&attach(5, FIRST.0, 0)), OK);
    assert_eq!(guest.send(&map(5, 0x10_0000, 0x1000, 0x2000, 1)), OK);
    bench.add(&addition());

    let status = well(&bench, &["status"]);
    let row = |id: &str| {
        status.lines().find(|line| line.trim_start().starts_with(id)).unwrap_or_else(|| panic!("{status}")).to_owned()
    };
    assert!(row(FIRST_TEXT).contains("0000:01:00.0") && row(FIRST_TEXT).contains("the domain's mappings"), "{status}");
    assert!(row(NEW_TEXT).contains("none") && row(NEW_TEXT).contains("what the VMM set up"), "{status}");
    assert!(status.contains("1 domains with 1 mappings"), "{status}");
    let words = row("MAP");
    let words: Vec<_> = words.split_whitespace().collect();
    assert_eq!(words[..4], ["MAP", "1", "0", "not"], "{status}");
    assert!(status.contains("host groups: 2, of which 0 blocked"), "{status}");
    let json: Value = serde_json::from_str(&well(&bench, &["status", "--json"])).unwrap();
    assert_eq!((&json["endpoints"][0]["domain"], &json["stats"]["mappings"]), (&json!(5), &json!(1)));

    assert_eq!(well(&bench, &["mappings", "5"]), "0x100000-0x100fff to 0x2000 read-only\n");
    let json: Value = serde_json::from_str(&well(&bench, &["mappings", "5", "--json"])).unwrap();
    assert_eq!(json["physical"], "0x2000");
    let (code, _, said) = ask(&bench, &["mappings", "6"]);
    assert!(code == 1 && said.contains("there is no domain 6"), "{said}");

    let told = well(&bench, &["told"]);
    assert!(told.contains("input range: 0x0-0x7fffffffff") && told.contains("0xfee00000-0xfeefffff"), "{told}");
    let json: Value = serde_json::from_str(&well(&bench, &["told", "--json"])).unwrap();
    assert_eq!(json["endpoints"][1]["id"], NEW_TEXT);
}

#[test]
fn all_pages_of_mappings_are_shown() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    assert_eq!(guest.send(&attach(1, FIRST.0, 0)), OK);
    for page in 0..1500u64 {
        assert_eq!(guest.send(&map(1, page * 0x2000, 0x1000, 0x5000, 3)), OK);
    }
    let shown = well(&bench, &["mappings", "1"]);
    assert_eq!(shown.lines().count(), 1500);
    assert_eq!(shown.lines().last(), Some("0xbb6000-0xbb6fff to 0x5000 read-write"));
}

#[test]
fn faults_are_shown_and_followed_until_the_daemon_ends() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    assert_eq!(guest.send(&attach(1, FIRST.0, 0)), OK);
    let fail = |guest: &mut Machine, iova| {
        bench.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
        assert_ne!(guest.send(&map(1, iova, 0x1000, 0x2000, 3)), OK);
    };
    fail(&mut guest, 0x1000);
    let line = "#1 endpoint 0000:00:03.0: read-write access to 0x1000 refused: nothing is mapped there";
    let shown = well(&bench, &["faults"]);
    assert!(shown.contains(line) && shown.lines().count() == 1, "{shown}");
    assert_eq!(well(&bench, &["faults", "--after", "1"]), "");

    let mut command = viommuctl(&["faults", "--follow", "--json"]);
    let mut follower = command.arg("--control").arg(bench.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap()["number"].clone();
    assert_eq!(next(), 1);
    fail(&mut guest, 0x2000);
    assert_eq!(next(), 2);
    follower.kill().unwrap();
    follower.wait().unwrap();
}

#[test]
fn faults_are_followed_until_the_daemon_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let answer = "{\"version\":1,\"reply\":{\"faults\":{\"recorded\":0,\"faults\":[]}}}\n";
    for (answer, code) in [(answer, 0), ("", 1)] {
        let mut command = viommuctl(&["faults", "--follow"]);
        let follower = command.arg("--control").arg(&path).stderr(Stdio::piped()).spawn().unwrap();
        let mut daemon = BufReader::new(listener.accept().unwrap().0);
        daemon.read_line(&mut String::new()).unwrap();
        daemon.get_mut().write_all(answer.as_bytes()).unwrap();
        drop(daemon);
        let output = follower.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn endpoints_are_removed() {
    let bench = Bench::new();
    let (_, closed) = bench.add(&addition());
    let (code, _, said) = ask(&bench, &["remove", NEW_TEXT, OTHER_TEXT]);
    assert!(code == 1 && said.contains("there is no endpoint 0000:02:00.0"), "{said}");
    assert!(closed[0].is_open());
    assert_eq!(well(&bench, &["remove", "01:00.0"]), "");
    assert!(closed[0].is_closed());
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_touched() {
    let bench = Bench::new();
    for (arguments, code, text) in [
        (&["add", "ffff:ff:1f.7", "--guest", "01:00.0"][..], 3, "there is no PCI device ffff:ff:1f.7"),
        (&["add", "05:00.0", "--guest", "01:00.0,02:00.0"], 2, "as many --guest addresses as devices"),
        (&["add", "05:00.0", "--guest", "00:05.0", "--qmp", "/nowhere"], 2, "cannot be plugged into the root bus"),
        (&["add", "05:00.0", "--guest", "01:00.0", "--qmp", "/nowhere"], 1, "cannot reach QEMU's monitor at /nowhere"),
        (&["add", "05:00.0", "--guest", "01:00.0", "--cdev-fd", "8,9"], 2, "as many --cdev-fd numbers"),
        (&["remove", "00:03.0", "--qmp", "/nowhere"], 1, "cannot reach QEMU's monitor at /nowhere"),
        (&["log-level", "loud"], 2, "loud"),
    ] {
        let (found, _, said) = ask(&bench, arguments);
        assert!(found == code && said.contains(text), "{arguments:?}: {found}: {said}");
    }
    let (code, _, said) = run(&mut viommuctl(&["status", "--control", "/nowhere"]));
    assert!(code == 1 && said.contains("cannot reach a daemon at /nowhere"), "{said}");
    assert_eq!(bench.ask(&json!("list"))["endpoints"].as_array().unwrap().len(), 1);
}

#[test]
fn limits_that_are_not_granted_are_an_exit_code() {
    let enough = ["memlock", "--memory", "4K", "--page", "4K", "--devices", "2"];
    // One that may lock all it likes lacks mappings only.
    let few = ["memlock", "--memory", "96G", "--page", "4K"];
    let (code, output, said) = run(&mut viommuctl(&few));
    assert!(code == 3 && said.contains("does not grant"), "{said}");
    assert!(output.contains("--max-mappings 25165824"), "{output}");
    let json: Value = serde_json::from_str(&run(viommuctl(&few).arg("--json")).1).unwrap();
    assert_eq!(json["granted"], false);
    let (code, output, said) = run(&mut viommuctl(&enough));
    assert!(code == 0 && output.contains("16K"), "{output}{said}");
    assert_eq!(run(&mut viommuctl(&["memlock", "--memory", "1G", "--page", "0"])).0, 2);
}

#[test]
fn the_number_of_ports_is_not_taken_for_a_device() {
    // There is no such device: what is said against it shows that it was taken for one.
    for hotplug in ["--hotplug", "--hotplug=2"] {
        let (code, _, said) =
            run(&mut viommuctl(&["run", hotplug, "ffff:ff:1f.7", "--print", "--", "qemu", "-m", "1G"]));
        assert!(code == 3 && said.contains("ffff:ff:1f.7"), "{hotplug}: {code}: {said}");
    }
    let (code, _, said) = run(&mut viommuctl(&["run", "--hotplug=9", "ffff:ff:1f.7", "--", "qemu"]));
    assert!(code == 2 && said.contains("0..=8"), "{said}");
}
