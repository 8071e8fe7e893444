// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! viommuctl against a control socket.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use super::common::{attach, map};
use super::*;
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::Failure;

fn viommuctl(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_viommuctl"));
    command.args(arguments);
    command
}

/// A pipe that nobody reads.
fn closed() -> Stdio {
    std::io::pipe().unwrap().1.into()
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
    assert!(status.contains("domains: 1, mappings: 1"), "{status}");
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
fn only_faults_that_were_followed_can_have_come_too_fast() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let fault = |number: u64| {
        json!({ "version": 1, "reply": { "fault": { "number": number, "time": 0, "endpoint": FIRST_TEXT, "reason": "domain",
            "address": null, "read": true, "write": false } } })
    };
    // The daemon has forgotten 2 to 5.
    let known = json!({ "version": 1, "reply": { "faults": { "recorded": 5, "faults": [] } } });
    for (followed, missing) in [(vec![6, 7], None), (vec![6, 9], Some("2 faults")), (vec![7], Some("1 faults"))] {
        let mut command = viommuctl(&["faults", "--follow", "--after", "1"]);
        command.arg("--control").arg(&path).stdout(Stdio::piped()).stderr(Stdio::piped());
        let follower = command.spawn().unwrap();
        let mut daemon = BufReader::new(listener.accept().unwrap().0);
        daemon.read_line(&mut String::new()).unwrap();
        for line in std::iter::once(known.clone()).chain(followed.iter().map(|number| fault(*number))) {
            writeln!(daemon.get_mut(), "{line}").unwrap();
        }
        drop(daemon);
        let said = String::from_utf8(follower.wait_with_output().unwrap().stderr).unwrap();
        match missing {
            None => assert_eq!(said, ""),
            Some(text) => assert!(said.contains(text) && said.lines().count() == 1, "{said}"),
        }
    }
}

#[test]
fn faults_are_not_followed_for_nobody() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    assert_eq!(guest.send(&attach(1, FIRST.0, 0)), OK);
    bench.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    assert_ne!(guest.send(&map(1, 0x1000, 0x1000, 0x2000, 3)), OK);
    let mut command = viommuctl(&["faults", "--follow"]);
    let mut follower = command.arg("--control").arg(bench.path()).stdout(closed()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = follower.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            follower.kill().unwrap();
            panic!("it follows on");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(status.code(), Some(0));
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

/// What a monitor says to commands about devices, which it has by names.
type Says = fn(command: &str, id: &str) -> Vec<Value>;

/// A monitor that says so, to one client after the other, or hangs up.
fn monitor(bench: &Bench, says: Says) -> String {
    let path = bench.directory.path().join("qmp");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            writeln!(stream.get_mut(), "{}", json!({ "QMP": {} })).unwrap();
            let mut line = String::new();
            while stream.read_line(&mut line).unwrap_or(0) > 0 {
                let message: Value = serde_json::from_str(&std::mem::take(&mut line)).unwrap();
                let answers = match message["execute"].as_str().unwrap() {
                    "qmp_capabilities" => vec![done()],
                    command => says(command, message["arguments"]["id"].as_str().unwrap_or_default()),
                };
                if answers.is_empty() {
                    break;
                }
                for answer in answers {
                    writeln!(stream.get_mut(), "{answer}").unwrap();
                }
            }
        }
    });
    path.to_str().unwrap().to_owned()
}

fn done() -> Value {
    json!({ "return": {} })
}

fn unplugged(id: &str) -> Vec<Value> {
    vec![done(), json!({ "event": "DEVICE_DELETED", "data": { "device": id, "path": "x" } })]
}

/// QEMU has no device by that name, and at its place there is this one.
fn no_device(command: &str, devices: &Value) -> Vec<Value> {
    match command {
        "query-pci" => vec![json!({ "return": [{ "bus": 0, "devices": devices }] })],
        _ => vec![json!({ "error": { "class": "DeviceNotFound", "desc": "Device not found" } })],
    }
}

/// The endpoints that the daemon has besides the first.
fn added(bench: &Bench) -> Vec<String> {
    let reply = bench.ask(&json!("list"));
    let ids = reply["endpoints"].as_array().unwrap().iter().map(|endpoint| endpoint["id"].as_str().unwrap().to_owned());
    ids.filter(|id| id != FIRST_TEXT).collect()
}

/// A bench with two endpoints of groups of their own besides the first.
fn bench_of_two() -> Bench {
    let bench = Bench::new();
    let other = json!({ "group": 8, "vfio_members": ["0000:06:00.0"], "devices": [device(OTHER_TEXT, "0000:06:00.0", "vfio2")] });
    for addition in [addition(), other] {
        let (reply, _) = bench.add(&addition);
        assert!(reply["added"].is_object(), "{reply}");
    }
    assert_eq!(added(&bench), [NEW_TEXT, OTHER_TEXT]);
    bench
}

#[test]
fn what_the_guest_has_let_go_is_removed_though_it_keeps_something_else() {
    let bench = bench_of_two();
    let path = monitor(&bench, |command, id| match (command, id) {
        ("device_del", "viommu-01-00.0") => unplugged(id),
        _ => vec![json!({ "error": { "class": "GenericError", "desc": "guest is busy" } })],
    });
    let (code, _, said) = ask(&bench, &["remove", NEW_TEXT, OTHER_TEXT, "--qmp", &path, "--wait=1"]);
    assert_eq!(code, 1);
    for text in [
        "0000:02:00.0 was not removed: QEMU refuses device_del: guest is busy",
        "0000:02:00.0 not removed, but left to the daemon; removed: 0000:01:00.0",
    ] {
        assert!(said.contains(text), "{said}");
    }
    assert_eq!(added(&bench), [OTHER_TEXT]);

    // It can be repeated.
    let path = monitor(&bench, |command, id| match (command, id) {
        ("device_del", "viommu-02-00.0") => unplugged(id),
        _ => no_device(command, &json!([])),
    });
    let (code, _, said) = ask(&bench, &["remove", NEW_TEXT, OTHER_TEXT, "--qmp", &path]);
    assert!(code == 1 && said.contains("there is no endpoint 0000:01:00.0"), "{said}");
    assert_eq!(added(&bench), [] as [&str; 0]);
}

#[test]
fn a_guest_is_waited_for_as_long_as_is_said() {
    let bench = bench_of_two();
    let path = monitor(&bench, |_, _| vec![json!({ "return": {} })]);
    let (code, _, said) = ask(&bench, &["remove", OTHER_TEXT, "--qmp", &path, "--wait=1"]);
    assert!(code == 1 && said.contains("did not let viommu-02-00.0 go in 1 seconds: try again"), "{said}");
    assert_eq!(added(&bench), [NEW_TEXT, OTHER_TEXT]);
}

#[test]
fn what_was_begun_is_done_though_nobody_reads_what_is_said() {
    let bench = bench_of_two();
    let path = monitor(&bench, |command, id| match (command, id) {
        ("device_del", "viommu-02-00.0") => unplugged(id),
        _ => vec![json!({ "error": { "class": "GenericError", "desc": "no hot-plug" } })],
    });
    let mut command = viommuctl(&["remove", NEW_TEXT, OTHER_TEXT, "--qmp", &path]);
    let status = command.arg("--control").arg(bench.path()).stdout(closed()).stderr(closed()).status().unwrap();
    assert_eq!(status.code(), Some(1));
    assert_eq!(added(&bench), [NEW_TEXT]);
}

#[test]
fn what_is_removed_is_not_said_to_be_left_because_the_watcher_has_its_file() {
    let bench = bench_of_two();
    let path = monitor(&bench, |_, id| unplugged(id));
    bench.keeper.refuse_from(0);
    let (code, _, said) = ask(&bench, &["remove", NEW_TEXT, OTHER_TEXT, "--qmp", &path]);
    assert_eq!(code, 0, "{said}");
    for id in [NEW_TEXT, OTHER_TEXT] {
        let warning = format!(
            "viommuctl: {id} was removed and reaches nothing, but the host cannot have its device back yet: the watcher did not say \
             that it closed its file: it has not answered yet"
        );
        assert!(said.contains(&warning), "{said}");
    }
    assert!(!said.contains("not removed"), "{said}");
    assert_eq!(added(&bench), [] as [&str; 0]);
}

#[test]
fn what_qemu_has_not_got_is_removed() {
    let bench = bench_of_two();
    let path = monitor(&bench, |command, _| no_device(command, &json!([])));
    assert_eq!(well(&bench, &["remove", NEW_TEXT, OTHER_TEXT, "--qmp", &path]), "");
    assert_eq!(added(&bench), [] as [&str; 0]);

    // But not what it has by another name, as those that it was started with.
    let path = monitor(&bench, |command, _| {
        no_device(command, &json!([{ "bus": 0, "slot": 3, "function": 0, "qdev_id": "viommu-device0" }]))
    });
    let (code, _, said) = ask(&bench, &["remove", FIRST_TEXT, "--qmp", &path]);
    assert!(code == 1 && said.contains("QEMU's `viommu-device0`"), "{said}");
    assert_eq!(bench.ask(&json!("list"))["endpoints"].as_array().unwrap().len(), 1);
}

#[test]
fn what_the_guest_let_go_after_the_host_took_it_back_is_removed() {
    let bench = Bench::new();
    let path = monitor(&bench, |_, id| unplugged(id));
    assert_eq!(well(&bench, &["remove", NEW_TEXT, "--qmp", &path]), "");
}

#[test]
fn siblings_that_are_removed_together_are_none_that_stay() {
    let bench = Bench::new();
    let both = json!({ "group": 7, "vfio_members": ["0000:05:00.0", "0000:05:00.1"],
        "devices": [device(NEW_TEXT, "0000:05:00.0", "vfio1"), device("0000:01:00.1", "0000:05:00.1", "vfio2")] });
    let (reply, _) = bench.add(&both);
    assert!(reply["added"].is_object(), "{reply}");
    // With function 0, the guest lets the others of its slot go.
    let path = monitor(&bench, |command, id| match (command, id) {
        ("device_del", "viommu-01-00.0") => unplugged(id),
        _ => no_device(command, &json!([])),
    });
    assert_eq!(well(&bench, &["remove", NEW_TEXT, "0000:01:00.1", "--qmp", &path]), "");
    assert_eq!(added(&bench), [] as [&str; 0]);
}

#[test]
fn a_monitor_that_hangs_up_leaves_the_endpoints_as_they_are() {
    let bench = bench_of_two();
    let path = monitor(&bench, |_, _| Vec::new());
    let (code, _, said) = ask(&bench, &["remove", NEW_TEXT, OTHER_TEXT, "--qmp", &path]);
    assert!(code == 1 && said.matches("QEMU's monitor does not answer").count() == 1, "{said}");
    assert!(said.contains("0000:01:00.0 0000:02:00.0 not removed, but left to the daemon; removed: none"), "{said}");
    assert_eq!(added(&bench), [NEW_TEXT, OTHER_TEXT]);
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_touched() {
    let bench = Bench::new();
    for (arguments, code, text) in [
        (&["add", "ffff:ff:1f.7", "--guest", "01:00.0"][..], 3, "there is no PCI device ffff:ff:1f.7"),
        (&["add", "05:00.0", "--guest", "01:00.0,02:00.0"], 2, "as many --guest addresses as devices"),
        (&["add", "05:00.0", "--guest", "00:05.0", "--qmp", "/nowhere"], 2, "cannot be plugged into the root bus"),
        (&["add", "05:00.0", "--guest", "01:00.0", "--qmp", "/nowhere"], 1, "cannot reach QEMU's monitor at /nowhere"),
        (&["add", "05:00.0", "--guest", "01:00.1", "--qmp", "/nowhere"], 2, "would not see 0000:01:00.1"),
        (&["add", "05:00.0", "--guest", "01:00.0", "--cdev-fd", "8,9"], 2, "as many --cdev-fd numbers"),
        (&["remove", "00:03.0", "--qmp", "/nowhere"], 1, "cannot reach QEMU's monitor at /nowhere"),
        (&["log-level", "loud"], 2, "[possible values: off, error, warn, info, debug, trace]"),
        (&["remove", "00:09.0"], 1, "there is no endpoint 0000:00:09.0: `viommuctl status` shows which there are"),
    ] {
        let (found, _, said) = ask(&bench, arguments);
        assert!(found == code && said.contains(text), "{arguments:?}: {found}: {said}");
    }
    assert_eq!(bench.ask(&json!("list"))["endpoints"].as_array().unwrap().len(), 1);
}

#[test]
fn a_daemon_that_does_not_answer_is_told_from_one_that_is_not_there() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("socket");
    let status = || {
        let mut command = viommuctl(&["status", "--control"]);
        command.arg(&path);
        command
    };
    let expect_of = |command: &mut Command, text: &str| {
        let (code, _, said) = run(command);
        assert!(code == 1 && said.contains(text), "{code}: {said}");
    };
    let expect = |text: &str| expect_of(&mut status(), text);
    expect("it has ended, or was started without --control-path");
    let listener = UnixListener::bind(&path).unwrap();
    // It closes the connection when it was asked, as the daemon's other socket does.
    let other = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        BufReader::new(stream).read_line(&mut String::new()).unwrap();
    });
    expect("this is not its control socket");
    other.join().unwrap();
    expect("it was killed, and left its socket behind");
    let set_mode =
        |path: &std::path::Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    set_mode(place.path(), 0o755);
    set_mode(&path, 0o000);
    let mut command = status();
    // Root may connect to everything.
    if rustix::process::geteuid().is_root() {
        command.uid(12345);
    }
    expect_of(&mut command, "as root, or as the daemon's user");
}

#[test]
fn a_size_that_is_none_is_said_to_be_in_qemus_command_line() {
    let (code, _, said) = run(&mut viommuctl(&["run", "ffff:ff:1f.7", "--", "qemu", "-m", "4X"]));
    assert!(code == 2 && said.contains("QEMU's command line: -m: `4X` is not a size"), "{code}: {said}");
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
