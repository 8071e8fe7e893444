// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is told of the exchanges between guest and device.

use std::sync::{Mutex, PoisonError};

use super::*;
use crate::host::HostErrorKind;

/// A machine, and the lines of its trace.
fn traced(settings: Settings) -> (Machine, Arc<Mutex<Vec<String>>>) {
    let mut machine = Machine::with(Flavour::Iommufd, settings);
    let lines = Arc::new(Mutex::new(Vec::new()));
    let trace = Arc::clone(&lines);
    machine.device.on_exchange(move |exchange| trace.lock().unwrap().push(exchange.to_string()));
    (machine, lines)
}

fn take(lines: &Mutex<Vec<String>>) -> Vec<String> {
    std::mem::take(&mut lines.lock().unwrap_or_else(PoisonError::into_inner))
}

#[test]
fn each_request_that_gets_a_status_is_told_with_it() {
    let (mut machine, lines) = traced(settings());
    machine.attach(1, LONE);
    machine.attach_bypass(2, EndpointId(99));
    machine.map(1, "1000-2fff", 0x5000, READ);
    machine.map(1, "2000-2fff", 0x5000, READ | WRITE);
    machine.unmap(1, "0-ffffffffffffffff");
    machine.detach(1, LONE);
    machine.send(&probe_bytes(LONE), 68);
    machine.request(&[1, 0, 0, 0]);
    // Neither of these is answered.
    machine.send(&[9, 0, 0, 0], 4);
    machine.send(&attach_bytes(1, LONE, 0), 3);
    let expected = [
        "ATTACH domain 1: endpoint 0000:00:01.0: OK",
        "ATTACH domain 2: endpoint 0000:00:0c.3, bypass: NOENT",
        "MAP domain 1: 0x1000-0x2fff to 0x5000, read-only: OK",
        "MAP domain 1: 0x2000-0x2fff to 0x5000, read-write: INVAL",
        "UNMAP domain 1: 0x0-0xffffffffffffffff: OK",
        "DETACH domain 1: endpoint 0000:00:01.0: OK",
        "PROBE endpoint 0000:00:01.0: OK",
        "ATTACH, malformed: INVAL",
    ];
    assert_eq!(take(&lines), expected);
}

#[test]
fn a_map_in_steps_is_told_once_when_it_is_answered() {
    let (mut machine, lines) = traced(Settings { map_step: 0x1000, ..settings() });
    machine.attach(1, LONE);
    take(&lines);
    let progress = machine.device.begin(&map_bytes(1, range("1000-3fff"), 0, READ), &mut [0; 4]);
    let Progress::Unfinished(map) = progress else { panic!("it has three steps") };
    assert_eq!(take(&lines), [""; 0]);
    machine.device.reset();
    assert!(matches!(machine.device.go_on(map, &mut [0; 4]), Progress::Answered { used: 4 }));
    assert_eq!(take(&lines), ["MAP domain 1: 0x1000-0x3fff to 0x0, read-only: NOENT"]);
    machine.attach(1, LONE);
    machine.map(1, "1000-3fff", 0, READ);
    assert_eq!(take(&lines)[1..], ["MAP domain 1: 0x1000-0x3fff to 0x0, read-only: OK"]);
}

#[test]
fn a_fault_is_told_when_it_is_taken_for_the_guest() {
    let (mut machine, lines) = traced(settings());
    machine.attach(1, LONE);
    machine.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    machine.map(1, "1000-1fff", 0, WRITE);
    assert!(machine.device.first_fault().is_some());
    assert_eq!(take(&lines).last().unwrap(), "MAP domain 1: 0x1000-0x1fff to 0x0, write-only: NOMEM");
    assert!(machine.device.take_fault().is_some() && machine.device.take_fault().is_none());
    let told = "fault: endpoint 0000:00:01.0: write-only access to 0x1000 refused: nothing is mapped there, or not for this access";
    assert_eq!(take(&lines), [told]);
}
