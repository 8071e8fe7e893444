// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files that are not what a front end should send.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};

use super::raw::*;
use super::*;
use crate::common::alone::{alone, open_files};
use crate::common::processes::wait_until;
use rustix::event::{EventfdFlags, eventfd};

/// Files of all kinds but the right one.
fn wrong_files() -> Vec<(&'static str, OwnedFd)> {
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    let read_only = {
        let memory = memfd(SIZE);
        open(&format!("/proc/self/fd/{}", memory.as_raw_fd()))
    };
    vec![
        ("socket", UnixStream::pair().unwrap().0.into()),
        ("directory", open("/tmp")),
        ("process memory", open("/proc/self/mem")),
        ("pipe", std::io::pipe().unwrap().0.into()),
        ("event", event()),
        ("null", open("/dev/null")),
        ("memory that can only be read", read_only),
    ]
}

#[test]
fn what_is_no_memory_is_refused_as_memory() {
    alone("files::what_is_no_memory_is_refused_as_memory", || {
        let (files, memory) = (wrong_files(), memfd(SIZE));
        let before = open_files();
        for (kind, file) in &files {
            for (code, body) in
                [(SET_MEM_TABLE, table(&[0, SIZE, USER, 0])), (ADD_MEM_REG, region(&[SIZE, SIZE, USER + SIZE, 0]))]
            {
                let mut victim = Victim::ready(&memory);
                assert_eq!(victim.frontend.ask(code, &body, &[file.as_raw_fd()]), Some(false), "{kind}");
                assert!(!victim.frontend.is_heard(), "{kind}");
                victim.end();
            }
        }
        assert_eq!(open_files(), before);
    });
}

/// A ring with any file for kick and call either does not start, which ends the connection, or is served by the kicks that it gets;
/// and the connection's end is seen.
#[test]
fn any_file_as_kick_and_call_holds_up_nobody() {
    alone("files::any_file_as_kick_and_call_holds_up_nobody", || {
        let (files, memory, good) = (wrong_files(), memfd(SIZE), event());
        let before = open_files();
        for (kind, file) in &files {
            for (kick, call) in [(file, &good), (&good, file), (file, file)] {
                let mut victim = Victim::ready(&memory);
                for (code, body, file) in [
                    (SET_VRING_NUM, ring(0, 16), None),
                    (SET_VRING_ADDR, words(&[0, USER, USER + 0x2000, USER + 0x1000, 0]), None),
                    (SET_VRING_CALL, words(&[0]), Some(call)),
                    (SET_VRING_ERR, words(&[0]), Some(call)),
                    (SET_VRING_KICK, words(&[0]), Some(kick)),
                ] {
                    let file = file.map(AsRawFd::as_raw_fd);
                    assert_eq!(victim.frontend.ask(code, &body, file.as_slice()), Some(true), "{kind}");
                }
                let is_started = victim.frontend.ask(SET_VRING_ENABLE, &ring(0, 1), &[]).unwrap();
                assert_eq!(victim.frontend.is_heard(), is_started, "{kind}");
                if is_started {
                    assert!(victim.frontend.call(GET_VRING_BASE, &ring(0, 0), &[]).is_some(), "{kind}");
                }
                victim.end();
            }
        }
        assert_eq!(open_files(), before);
    });
}

/// A request that is answered with NOENT.
fn unknown() -> Vec<u8> {
    detach(1, 0xdead)
}

/// The library goes on to look at the kick of before, and then reads the new one: with nothing in it, that would block, or end the
/// thread that serves the rings.
#[test]
fn a_kick_that_is_exchanged_holds_up_nobody() {
    for flags in [EventfdFlags::CLOEXEC, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK] {
        let memory = memfd(SIZE);
        let (first, second, call) = (event(), eventfd(0, flags).unwrap(), event());
        let mut victim = Victim::ready(&memory);
        victim.start_ring(&first, &call);
        assert_eq!(victim.frontend.ask(SET_VRING_KICK, &words(&[0]), &[second.as_raw_fd()]), Some(true));
        kick(&first);
        put_request(&memory, 0, &unknown());
        assert_eq!(answer(&memory, 1), (NOENT, 4));
        // The ring's lock is free.
        assert_eq!(victim.frontend.ask(SET_VRING_NUM, &ring(0, 16), &[]), Some(true));
        assert!(victim.frontend.is_heard());
        put_request(&memory, 1, &unknown());
        kick(&second);
        assert_eq!(answer(&memory, 2), (NOENT, 4));
        victim.end();
    }
}

/// A call that takes no more holds up the thread that serves the rings, and nobody else: the device can be shut down, and the end of
/// the connection is seen.
#[test]
fn a_call_that_blocks_holds_up_only_the_ring() {
    let memory = memfd(SIZE);
    let (kicks, full) = (event(), event());
    let mut victim = Victim::ready(&memory);
    let mut more = File::from(full.try_clone().unwrap());
    more.write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
    victim.start_ring(&kicks, &full);
    put_request(&memory, 0, &unknown());
    kick(&kicks);
    assert_eq!(answer(&memory, 1), (NOENT, 4));
    // The ring's lock and the device's are free.
    assert_eq!(victim.frontend.ask(SET_VRING_NUM, &ring(0, 16), &[]), Some(true));
    assert!(victim.frontend.call(GET_VRING_BASE, &ring(0, 0), &[]).is_some());
    assert!(victim.frontend.is_heard());
    victim.backend.shut_down();
    assert_eq!(victim.host.attachment(ID), Attachment::Blocked);
    // Its thread ends when it can.
    std::io::Read::read_exact(&mut more, &mut [0; 8]).unwrap();
    victim.end();
}

/// While a large MAP is under way the ring is completed before it stops, and its driver told.
#[test]
fn a_call_that_blocks_does_not_hold_up_a_ring_that_stops() {
    use vhost::VhostBackend;

    let mut bench = Bench::started();
    let full = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let frontend = bench.machine().frontend.clone();
    frontend.set_vring_call(0, &full).unwrap();
    let filled = full.try_clone().unwrap();
    let stopped = bench.during_a_large_map(move |_| {
        // What came before was told by it.
        filled.read().unwrap();
        filled.write(u64::MAX - 1).unwrap();
        let stopping = std::thread::spawn(move || frontend.get_vring_base(0).unwrap());
        wait_until("the ring does not stop", || stopping.is_finished());
    });
    assert_eq!(stopped, STEPS);
    assert_eq!(bench.machine().wait_for_used(4), Reply::only(OK));
    // The thread that serves the rings may wait.
    full.read().unwrap();
    bench.end();
}
