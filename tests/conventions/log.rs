// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The log: its formats, its levels, and what nobody can fill it with.

use std::io::{PipeWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use serde_json::Value;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use super::*;

/// What a daemon says that is used and asked to end.
fn said(start: Start) -> String {
    let place = Place::new();
    let daemon = place.start(start);
    let used = use_device(UnixStream::connect(&place.socket).unwrap());
    let said = daemon.end_well();
    drop(used);
    said
}

#[test]
fn a_json_log_has_an_object_on_each_line() {
    let said = said(Start::with(&["--log-format=json", "--log-level=debug"]));
    let mut messages = Vec::new();
    for line in said.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let object = line.as_object().unwrap();
        let mut keys: Vec<&str> = object.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["level", "message", "target", "time"]);
        assert!(["ERROR", "WARN", "INFO", "DEBUG"].contains(&line["level"].as_str().unwrap()), "{line}");
        let time = line["time"].as_str().unwrap();
        assert!(time.len() == "2026-01-01T00:00:00.000000Z".len() && time.ends_with('Z'), "{time}");
        assert!(line["target"].as_str().unwrap().starts_with("virtio_iommu"), "{line}");
        messages.push(line["message"].as_str().unwrap().to_owned());
    }
    assert!(messages.iter().any(|message| message == "a frontend connected"), "{said}");
    assert!(messages.iter().any(|message| message.starts_with("every endpoint is blocked")), "{said}");
}

#[test]
fn a_failure_is_a_line_of_the_log_too_and_hostile_names_are_one_line() {
    let hostile = "/nowhere/a\n<0>b";
    for format in ["text", "json", "journal"] {
        let start = Start::with(&[&format!("--log-format={format}")]);
        let Ended { code, err, .. } =
            start.option("facts", Path::new(hostile)).option("socket-path", Path::new("s")).run();
        assert_eq!((code, err.lines().count()), (Some(2), 1), "{err}");
        match format {
            "json" => {
                let line: Value = serde_json::from_str(&err).unwrap();
                assert_eq!(line["level"], "ERROR");
                assert!(line["message"].as_str().unwrap().contains(hostile), "{err}");
            }
            "journal" => assert!(err.starts_with("<3>") && err.contains(r"a\n<0>b"), "{err}"),
            _ => assert!(err.starts_with('[') && err.contains("Z ERROR vhost_device_iommu] "), "{err}"),
        }
    }
}

#[test]
fn a_journal_reads_priorities() {
    let said = said(Start::with(&["--log-format=journal"]).environment("NOTIFY_SOCKET", "/nowhere"));
    assert!(said.lines().all(|line| ["<3>", "<4>", "<6>", "<7>"].contains(&&line[..3])), "{said}");
    assert!(said.contains("\n<6>a frontend connected\n") && said.contains("<4>NOTIFY_SOCKET=/nowhere"), "{said}");
}

#[test]
#[cfg_attr(sanitized, ignore = "that it is not confined is logged")]
fn levels_are_the_options_or_the_environments() {
    let listens = |said: &str| said.contains("listening on");
    assert!(listens(&said(Start::with(&[]))));
    assert_eq!(said(Start::with(&["--log-level=warn"])), "");
    assert_eq!(said(Start::with(&["--log-level=off"])), "");
    assert_eq!(said(Start::with(&[]).environment("RUST_LOG", "error")), "");
    assert!(listens(&said(Start::with(&[]).environment("RUST_LOG", "virtio_iommu::vhost_user=debug"))));
    // With both, what both let pass.
    assert_eq!(said(Start::with(&["--log-level=warn"]).environment("RUST_LOG", "debug")), "");
    assert_eq!(said(Start::with(&["--log-level=trace"]).environment("RUST_LOG", "virtio_iommu=error")), "");
}

#[test]
fn a_request_is_a_line_with_what_it_asks_for_how_it_ended_and_how_long_it_took() {
    let said = said(Start::with(&["--log-level=debug"]));
    let line = said.lines().find(|line| line.contains("virtio_iommu::requests")).expect("a line for the request");
    assert!(line.contains("ATTACH") && line.contains("NOENT") && line.contains("0000:00:01.0"), "{line}");
    assert!(line.contains("; it waited ") && line.contains("s, took ") && line.contains("s, and the host "), "{line}");
}

/// A pipe that takes nothing more.
fn fill(pipe: &PipeWriter) {
    rustix::io::ioctl_fionbio(pipe, true).unwrap();
    while rustix::io::write(pipe, &[b'.'; 256]).is_ok() {}
    while rustix::io::write(pipe, b".").is_ok() {}
    rustix::io::ioctl_fionbio(pipe, false).unwrap();
}

#[test]
fn a_log_that_nobody_reads_holds_up_neither_guest_nor_operator_nor_the_end() {
    let (_reader, writer) = std::io::pipe().unwrap();
    let place = Place::new();
    let control = place.path("control/socket");
    let start = Start::with(&["--log-level=trace"]).option("control-path", &control);
    let daemon = place.start(start.log(writer.try_clone().unwrap()));
    fill(&writer);
    let (mut machine, _) = use_device(UnixStream::connect(&place.socket).unwrap());
    // More than ten lines that are logged.
    for _ in 0..20 {
        machine.frontend.reset_device().unwrap();
    }
    machine.frontend.get_features().unwrap();
    let mut operator = UnixStream::connect(&control).unwrap();
    writeln!(operator, "{{\"version\":1,\"request\":\"stats\"}}").unwrap();
    operator.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(operator.read(&mut [0]).unwrap(), 1, "it is answered");
    assert_eq!(daemon.end_well(), "");
    assert!(!control.exists() && !place.socket.exists(), "the sockets are removed");
}

/// How long a frontend had, and what was logged, while it did something many times.
fn flooded(flood: impl FnOnce(&mut Machine)) -> (usize, String) {
    let place = Place::new();
    let daemon = place.start(Start::with(&["--log-level=trace"]));
    let mut machine = Machine::connect(&place.socket, guest_memory(0x20_0000));
    machine.start();
    let started = Instant::now();
    flood(&mut machine);
    // Answered when all of that was done.
    machine.frontend.get_features().unwrap();
    let said = daemon.end_well();
    let seconds = usize::try_from(started.elapsed().as_secs()).unwrap() + 2;
    (seconds, said)
}

#[test]
fn a_frontend_that_resets_without_end_fills_no_log() {
    let (seconds, said) = flooded(|machine| {
        for _ in 0..5000 {
            machine.frontend.reset_device().unwrap();
        }
    });
    let lines = said.lines().count();
    assert!(said.contains("the frontend reset the device"), "{said}");
    assert!(lines <= 11 * seconds + 20, "{lines} lines in {seconds} s");
}

#[test]
fn a_guest_that_stops_and_starts_without_end_fills_no_log() {
    let (seconds, said) = flooded(|machine| {
        for _ in 0..1000 {
            let base = machine.stop_ring();
            machine.start_ring(base);
            assert_eq!(machine.send(&attach(1, 8, 0)), 6);
        }
    });
    let lines = said.lines().count();
    assert!(said.contains("the guest goes on"), "{said}");
    // Requests have a limit of their own.
    assert!(lines <= 2 * 11 * seconds + 20, "{lines} lines in {seconds} s");
    let requests = said.lines().filter(|line| line.contains("ATTACH")).count();
    assert!(requests > 0 && requests <= 11 * seconds, "{requests} requests in {seconds} s");
}

/// What the library that speaks the protocol logs of it is limited too, or ends the connection.
#[test]
fn a_frontend_that_asks_for_the_impossible_without_end_fills_no_log() {
    let place = Place::new();
    let daemon = place.start(Start::with(&["--log-level=trace"]));
    let machine = Machine::connect(&place.socket, guest_memory(0x20_0000));
    let started = Instant::now();
    for _ in 0..3000 {
        if machine.frontend.set_vring_num(0, 0).is_err() {
            break;
        }
    }
    drop(machine);
    let ended = daemon.end();
    let seconds = usize::try_from(started.elapsed().as_secs()).unwrap() + 2;
    let lines = ended.err.lines().count();
    assert!(lines <= 11 * seconds + 20, "{lines} lines in {seconds} s");
    assert!(ended.err.contains("requested queue size 0 out of range"), "{}", ended.err);
}
