// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each exit code but 5, with a line that says why. For 5 the kernel must refuse to confine a process: `tests/sandbox`.

use std::io::Write;
use std::os::unix::net::UnixStream;

use super::host::Host;
use super::*;

#[test]
fn all_is_well_when_it_was_asked_to_end_or_the_frontend_is_gone() {
    let place = Place::new();
    let said = place.start(Start::with(&[])).end_well();
    assert!(!said.contains("ERROR"), "{said}");
    assert!(!place.socket.exists());
    let daemon = place.start(Start::with(&[]));
    drop(use_device(UnixStream::connect(&place.socket).unwrap()));
    let ended = daemon.end();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("every endpoint is blocked") && !ended.err.contains("ERROR"), "{}", ended.err);
}

#[test]
fn what_fails_at_run_time_is_1() {
    let place = Place::new();
    let Ended { code, err, .. } = Start::with(&[]).option("socket-path", &place.path("nowhere/socket")).run();
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("nowhere/socket: No such file or directory"), "{err}");
}

#[test]
fn wrong_arguments_are_2() {
    let place = Place::new();
    for (options, says) in [
        (&["--no-such-option"][..], "--no-such-option"),
        (&["--log-level=loud"], "loud"),
        (&["--iommufd-fd=99"], "fd 99 is not open"),
        (&["--facts=/nowhere"], "/nowhere"),
        (&["--fd=3"], "cannot be used with"),
    ] {
        let Ended { code, err, .. } = Start::with(options).option("socket-path", &place.socket).run();
        assert_eq!(code, Some(2), "{options:?}: {err}");
        assert!(err.contains(says), "{options:?}: {err}");
    }
    let Ended { code, err, .. } = Start::with(&[]).run();
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("there is no socket to serve: give --socket-path or --fd"), "{err}");
    assert!(!place.socket.exists());
}

#[test]
fn a_host_that_does_not_do_is_3() {
    let Some(host) = Host::new() else { return };
    let place = Place::new();
    let group = "kernel/iommu_groups/7";
    for (file, text, says) in [
        ("reserved_regions", "fish\n", "reserved_regions, line 1"),
        ("reserved_regions", "0x1000 0x1fff direct\n", "must keep 0x1000-0x1fff mapped to itself"),
        ("reserved_regions", "0x0 0xffffffffffffffff reserved\n", "no address in"),
        ("name", "vfio-noiommu\n", "is behind no IOMMU"),
    ] {
        host.write(&format!("{group}/{file}"), text);
        for check in [&["--check"][..], &[]] {
            let options = [&["--endpoint=id=00:03.0,cdev-fd=4", "--input-range=0-ffffffff"], check].concat();
            let Ended { code, out, err } = host.daemon(Start::with(&options).option("socket-path", &place.socket));
            assert_eq!((code, out.as_str()), (Some(3), ""), "{says}: {err}");
            assert!(err.contains(says), "{err}");
            assert!(!place.socket.exists());
        }
    }
}

#[test]
fn a_frontend_that_breaks_the_protocol_is_4() {
    let place = Place::new();
    let daemon = place.start(Start::with(&[]));
    UnixStream::connect(&place.socket).unwrap().write_all(&[0xff; 64]).unwrap();
    let ended = daemon.end();
    assert_eq!(ended.code, Some(4), "{}", ended.err);
    assert!(ended.err.contains("broke the protocol"), "{}", ended.err);
    assert!(!place.socket.exists());
}
