// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The process that holds the devices when the daemon is gone, when it goes first or holds on.

use std::os::unix::fs::FileExt;

use super::common::processes::child_of;
use super::host::Host;
use super::*;

/// A daemon that devices can be added to, and its watcher.
fn start(host: &Host, place: &Place) -> (Daemon, Pid) {
    let control = place.path("control/socket");
    let start = Start::with(&[]).option("control-path", &control).option("socket-path", &place.socket);
    let daemon = host.inside(start).start();
    wait_until("the daemon does not listen", || UnixStream::connect(&control).is_ok() && place.socket.exists());
    let watcher = child_of(daemon.process.id());
    (daemon, Pid::from_raw(watcher.cast_signed()))
}

#[test]
fn the_end_of_the_watcher_is_said_and_the_daemon_goes_on() {
    let Some(host) = Host::new() else { return };
    let place = Place::new();
    let (daemon, watcher) = start(&host, &place);
    kill(watcher, Signal::SIGKILL).unwrap();
    let said = || {
        // Where the daemon writes is not to be moved.
        let mut said = vec![0; 1 << 16];
        let length = daemon.log.read_at(&mut said, 0).unwrap();
        String::from_utf8_lossy(&said[..length]).into_owned()
    };
    let line = "the watcher is gone: if this process is killed too";
    wait_until("the end of the watcher is not said", || said().contains(line));
    drop(use_device(UnixStream::connect(&place.socket).unwrap()));
    let ended = daemon.end();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert_eq!(ended.err.matches("the watcher is gone").count(), 1, "{}", ended.err);
}

#[test]
fn the_watcher_ends_with_the_daemon_and_nothing_is_said_of_it() {
    let Some(host) = Host::new() else { return };
    // Whoever hears of its end first may be late.
    for _ in 0..10 {
        let place = Place::new();
        let (daemon, watcher) = start(&host, &place);
        let said = daemon.end_well();
        assert!(!said.contains("watcher"), "{said}");
        assert!(kill(watcher, None).is_err(), "it has ended");
    }
}

#[test]
fn a_watcher_that_does_not_end_does_not_keep_the_daemon() {
    let Some(host) = Host::new() else { return };
    let place = Place::new();
    let (daemon, watcher) = start(&host, &place);
    kill(watcher, Signal::SIGSTOP).unwrap();
    let said = daemon.end_well();
    assert!(said.contains("the watcher has not closed the devices' files yet"), "{said}");
    kill(watcher, Signal::SIGKILL).unwrap();
}
