// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rings that stop and start: pauses, resets, and rings that the driver broke.

use super::*;

#[test]
fn a_pause_is_no_reset() {
    let mut bench = Bench::started();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(bench.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), OK);
    let calls = bench.host.calls();
    let base = bench.machine().stop_ring();
    assert_eq!(base, 2);
    assert_eq!(bench.reads(0x5000), Some(0x2000), "nothing is dropped when the ring stops");
    // As QEMU goes on: features and memory first.
    bench.machine().start();
    assert_eq!(bench.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), INVAL, "it is still mapped");
    assert_eq!(bench.host.calls(), calls, "what is mapped was not disturbed");
    assert_eq!(bench.send(&unmap(1, 0x5000, 0x1000)), OK);
    bench.end();
}

#[test]
fn a_ring_that_starts_from_zero_is_a_reset() {
    let mut bench = Bench::started();
    bench.send(&attach(1, ENDPOINT, 0));
    bench.send(&map(1, 0x5000, 0x1000, 0x2000, 1));
    bench.machine().restart();
    assert_eq!(bench.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), NOENT, "the domain is gone");
    assert_eq!(bench.reads(0x5000), Some(0x5000));
    assert_eq!(bench.send(&attach(1, ENDPOINT, 1)), OK, "the features that were set again hold");
    bench.end();
}

#[test]
fn a_ring_that_starts_elsewhere_is_taken_for_a_reset() {
    let mut bench = Bench::started();
    bench.send(&attach(1, ENDPOINT, 0));
    let base = bench.machine().stop_ring();
    assert_eq!(bench.reads(0x5000), None, "nothing is mapped");
    bench.machine().start_ring(base + 1);
    bench.machine().break_ring(base + 1);
    assert_eq!(bench.reads(0x5000), Some(0x5000), "it is back in bypass");
    bench.machine().restart();
    assert_eq!(bench.send(&unmap(1, 0, 0x1000)), NOENT);
    bench.end();
}

#[test]
fn a_stop_can_be_taken_for_a_reset() {
    let mut bench = Bench::new(true, OnStop::Reset);
    bench.machine().start();
    bench.send(&attach(1, ENDPOINT, 0));
    bench.machine().stop_ring();
    assert_eq!(bench.reads(0x5000), Some(0x5000), "at once, and back to guest memory");
    bench.end();
}

#[test]
fn the_frontends_reset_is_a_reset() {
    let mut bench = Bench::started();
    bench.send(&attach(1, ENDPOINT, 0));
    bench.machine().frontend.reset_device().unwrap();
    bench.machine().forget_ring();
    bench.machine().start();
    assert_eq!(bench.send(&unmap(1, 0, 0x1000)), NOENT);
    bench.end();
}

#[test]
fn a_broken_ring_is_left_alone_until_it_is_set_up_again() {
    let mut bench = Bench::started();
    bench.send(&attach(1, ENDPOINT, 0));
    bench.machine().break_ring(1000);
    bench.machine().post(&detach(1, ENDPOINT), 4);
    assert_eq!(bench.machine().used_after_all(4), None);
    bench.machine().restart_ring();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    bench.end();
}

#[test]
fn a_ring_that_was_broken_before_a_stop_that_resets_is_served_after_it() {
    let mut bench = Bench::new(true, OnStop::Reset);
    bench.machine().start();
    bench.machine().break_ring(1000);
    bench.machine().restart_ring();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    bench.end();
}
