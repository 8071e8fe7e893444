// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests over the ring, features and the configuration space.

use super::*;

#[test]
fn requests_over_a_ring_reach_the_host() {
    let mut bench = Bench::started();
    let reply = bench.machine().ask(&probe(ENDPOINT), 1536 + 4);
    assert_eq!((reply.status, reply.used), (OK, 1540));
    assert_eq!(reply.body[..8], [1, 0, 20, 0, 1, 0, 0, 0]);
    assert!(reply.body[24..].iter().all(|byte| *byte == 0));
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(bench.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), OK);
    assert_eq!(bench.reads(0x5000), Some(0x2000));
    assert_eq!(bench.send(&map(1, 0xfee0_0000, 0x1000, 0x2000, 1)), INVAL);
    assert_eq!(bench.send(&unmap(1, 0x5000, 0x1000)), OK);
    assert_eq!(bench.reads(0x5000), None);
    assert_eq!(bench.send(&detach(1, ENDPOINT)), OK);
    assert_eq!(bench.reads(0x5000), Some(0x5000));
    assert_eq!(bench.machine().ask(&[9, 0, 0, 0], 4), Reply { status: 0xaa, used: 0, body: vec![] });
    bench.end();
}

#[test]
fn a_request_that_comes_while_the_ring_is_watched_needs_no_kick() {
    let answered = |polling: Polling| {
        let mut bench = Bench::with(true, BackendOptions { on_stop: OnStop::Keep, polling });
        bench.machine().start();
        assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
        bench.machine().post_quietly(&map(1, 0x5000, 0x1000, 0x2000, 1), 4);
        let reply = bench.machine().used_after_all(4);
        assert_eq!(bench.reads(0x5000), reply.as_ref().map(|_| 0x2000));
        if reply.is_none() {
            // Nothing is lost: the next kick has it served.
            bench.machine().kick();
            assert_eq!(bench.machine().wait_for_used(4), Reply::only(OK));
        }
        bench.end();
        reply
    };
    // A thread that looks once more before it waits may find the request there.
    assert!((0..20).any(|_| answered(Polling::Off).is_none()));
    // A thread that does not get to run in time has watched for too long already.
    let watched = (0..20).find_map(|_| answered(Polling::For(Polling::LONGEST)));
    assert_eq!(watched, Some(Reply::only(OK)));
}

#[test]
fn only_the_bypass_byte_of_a_config_write_is_applied() {
    let mut bench = Bench::started();
    let before = bench.machine().config();
    assert_eq!(before[36], 1);
    let mut written = [0xff; 40];
    written[36] = 0;
    bench.machine().frontend.set_config(0, VhostUserConfigFlags::empty(), &written).unwrap();
    let after = bench.machine().config();
    assert_eq!((after[36], &after[..36]), (0, &before[..36]));
    assert_eq!(bench.host.attachment(ID), Attachment::Blocked);
    bench.end();
}

#[test]
fn without_boot_bypass_setting_the_features_blocks() {
    let mut bench = Bench::new(false, OnStop::Keep);
    bench.machine().config();
    assert_eq!(bench.host.attachment(ID), Attachment::AsFound);
    bench.machine().start();
    bench.machine().config();
    assert_eq!(bench.host.attachment(ID), Attachment::Blocked);
    bench.end();
}
