// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the program does by its options, where other topics do not have it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use super::common::alone::close;
use super::host::Host;
use super::*;

/// The input range in a device's configuration: start, end.
fn input_range(options: &[&str]) -> ([u64; 2], String) {
    let place = Place::new();
    let daemon = place.start(Start::with(options));
    let (machine, config) = use_device(UnixStream::connect(&place.socket).unwrap());
    drop(machine);
    let ended = daemon.end();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let at = |offset: usize| u64::from_le_bytes(config[offset..offset + 8].try_into().unwrap());
    assert_eq!(at(0) & at(0).wrapping_neg(), rustix::param::page_size() as u64, "the host's page is the smallest");
    ([at(8), at(16)], ended.err)
}

#[test]
fn capabilities_are_printed_whatever_else_is_asked_for() {
    for options in [
        &["--print-capabilities"][..],
        &["--print-capabilities", "--socket-path=/nowhere/socket", "--fd=99"],
        &["--no-such-option", "--endpoint=fish", "--print-capabilities"],
    ] {
        let Ended { code, out, err } = Start::with(options).run();
        assert_eq!((code, err.as_str()), (Some(0), ""));
        assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), json!({ "type": "iommu" }));
    }
}

#[test]
fn whoever_does_not_read_what_is_printed_hears_of_no_failure() {
    let place = Place::new();
    let socket = format!("--socket-path={}", place.socket.display());
    for options in [&["--print-capabilities"][..], &["--check", &socket], &["--check", "--json", &socket]] {
        let closed = || Stdio::from(std::io::pipe().unwrap().1);
        let status = Command::new(DAEMON).args(options).stdout(closed()).stderr(closed()).status().unwrap();
        assert_eq!(status.code(), Some(0), "{options:?}");
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = Command::new(DAEMON).args(options).stdout(full).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{options:?}: {said}");
        assert!(said.contains("cannot write to the standard output: No space left on device"), "{said}");
    }
}

#[test]
fn a_path_can_be_any_bytes() {
    let place = Place::new();
    let socket = place.directory.path().join(OsStr::from_bytes(b"socket\xff"));
    let mut option = OsString::from("--socket-path=");
    option.push(&socket);
    let mut process = Process::spawn(Command::new(DAEMON).arg(option).stderr(Stdio::null()));
    let deadline = Instant::now() + PATIENCE;
    while !socket.exists() && process.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "it does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    let daemon = Daemon { process, log: tempfile::tempfile().unwrap() };
    daemon.end_well();
}

#[test]
fn a_daemon_without_endpoints_offers_what_it_was_told_to_or_48_bits() {
    for (options, range) in [
        (&[][..], [0, 0xffff_ffff_ffff]),
        (&["--max-address-width=39"], [0, 0x7f_ffff_ffff]),
        (&["--input-range=1000-ffffffff"], [0x1000, 0xffff_ffff]),
    ] {
        let (offered, said) = input_range(options);
        assert_eq!(offered, range);
        let told = format!("no endpoint is given: the guest is offered {:#x}-{:#x} in pages of", range[0], range[1]);
        assert!(said.contains(&told), "{said}");
    }
}

#[test]
fn a_check_says_what_a_start_would_and_touches_no_socket() {
    let place = Place::new();
    let check =
        |options: &[&str]| Start::with(&[&["--check"], options].concat()).option("socket-path", &place.socket).run();
    let Ended { code, out, err } = check(&["--max-address-width=32"]);
    assert_eq!((code, out.as_str()), (Some(0), "input range: 0x0-0xffffffff\n"), "{err}");
    assert!(err.contains("no endpoint is given"), "{err}");
    let Ended { code, out, .. } = check(&["--json", "--input-range=0-fffff"]);
    assert_eq!(code, Some(0));
    assert_eq!(
        serde_json::from_str::<Value>(&out).unwrap(),
        json!({ "input_range": ["0x0", "0xfffff"], "endpoints": [] })
    );
    assert!(!place.socket.exists());

    // Somebody waits for a frontend there, and goes on doing so.
    let listener = place.listener();
    listener.set_nonblocking(true).unwrap();
    let Ended { code, out, err } = check(&[]);
    assert_eq!((code, out.as_str()), (Some(2), ""));
    assert!(err.contains("in use by another process"), "{err}");
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    // A dead socket could be replaced, and is not.
    close(listener, &place.socket);
    assert_eq!(check(&[]).code, Some(0));
    assert!(place.socket.exists());
    assert_eq!(Start::with(&["--json"]).option("socket-path", &place.socket).run().code, Some(2));
}

/// A line of the log without the time it starts with.
fn without_time(line: &str) -> String {
    match line.strip_prefix('[').and_then(|line| line.split_once(' ')) {
        Some((_, said)) => said.to_owned(),
        None => line.to_owned(),
    }
}

#[test]
fn a_check_ends_as_a_start_would() {
    let place = Place::new();
    let facts = place.path("facts.json");
    fs::write(&facts, "fish").unwrap();
    let facts = format!("--facts={}", facts.display());
    for options in [
        &[facts.as_str()][..],
        &["--input-range=0-fff0"],
        &["--iommufd-fd=3"],
        &["--endpoint=id=00:03.0,cdev-fd=3"],
        &["--ready-fd=77"],
        &["--log-format=fish"],
    ] {
        let run = |more: &[&str]| -> (Option<i32>, Vec<String>) {
            let Ended { code, err, .. } =
                Start::with(&[options, more].concat()).option("socket-path", &place.socket).third(null()).run();
            // Without the times, and how the command line is summed up.
            let said = err.split("\n\nUsage:").next().unwrap_or_default().lines().map(without_time).collect();
            (code, said)
        };
        let started = run(&[]);
        assert_eq!(started.0, Some(2), "{started:?}");
        assert_eq!(run(&["--check"]), started, "{options:?}");
    }
    let nowhere = place.path("nowhere/socket");
    let run = |options: &[&str]| Start::with(options).option("socket-path", &nowhere).run();
    let (started, checked) = (run(&[]), run(&["--check"]));
    assert_eq!((started.code, checked.code), (Some(1), Some(1)), "{started:?} {checked:?}");
    assert!(
        started.err.contains("nowhere/socket: No such file") && checked.err.contains("nowhere/socket: No such file")
    );
}

#[test]
fn a_check_looks_at_the_files_and_the_host_of_endpoints() {
    let Some(host) = Host::new() else { return };
    let place = Place::new();
    let check = |more: &[&str]| {
        host.daemon(
            Start::with(&[&["--check", "--json", "--log-level=warn"], more].concat())
                .option("socket-path", &place.socket),
        )
    };
    let Ended { code, out, err } = check(&["--endpoint=id=00:03.0,cdev-fd=4,host=01:00.0", "--input-range=0-ffffffff"]);
    assert_eq!(code, Some(0), "{err}");
    let plan: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(plan["input_range"], json!(["0x0", "0xffffffff"]));
    let endpoint = &plan["endpoints"][0];
    assert_eq!((&endpoint["id"], &endpoint["attachable"]), (&json!("0000:00:03.0"), &json!(true)));
    assert_eq!(endpoint["resv"], json!([{ "start": "0xfee00000", "end": "0xfeefffff", "subtype": "msi" }]));
    let Ended { code, out, err } = check(&["--endpoint=id=00:03.0,cdev-fd=4,host=02:00.0"]);
    assert_eq!((code, out.as_str()), (Some(2), ""));
    assert!(err.contains("fd 4 is for the host device 0000:01:00.0, not 0000:02:00.0"), "{err}");
    // The host has the device's node, but where the daemon runs there is another's only.
    let endpoint = "--endpoint=id=00:03.0,cdev-fd=4,host=01:00.0";
    for options in [&["--check"][..], &[]] {
        // Or it is another device's, or none.
        for other in [("NODE", "vfio1"), ("OF", "/dev/full"), ("OF", "/etc/passwd")] {
            let start = Start::with(&[&[endpoint], options].concat()).option("socket-path", &place.socket);
            let Ended { code, out, err } = host.daemon(start.environment(other.0, other.1));
            assert_eq!((code, out.as_str()), (Some(3), ""), "{err}");
            assert!(err.contains("/dev/vfio/devices/vfio0 is not the device's where this process runs"), "{err}");
        }
    }
    assert!(!place.socket.exists());
}
