// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The way of a state through a file of the frontend's, and what goes wrong on it.

use std::io::PipeReader;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::*;
use crate::raw::{SIZE, Victim, event, memfd, ring};

#[test]
fn nothing_is_saved_or_loaded_while_a_ring_runs() {
    let (mut bench, base) = stopped_guest();
    let state = save(&mut bench);
    bench.machine().start_ring(base);
    let refused = |bench: &mut Bench| {
        let (reader, writer) = pipe().unwrap();
        let saves = give(bench, Direction::SAVE, writer);
        let loads = give(bench, Direction::LOAD, reader);
        (saves, loads) == (false, false)
    };
    assert!(refused(&mut bench), "the request ring runs");
    bench.machine().stop_ring();
    bench.machine().start_event_ring();
    assert!(refused(&mut bench), "the event ring runs");
    bench.machine().frontend.get_vring_base(1).unwrap();
    save(&mut bench);
    bench.end();

    // A ring that starts before the state is taken on.
    let mut target = Terms::new().bench();
    target.machine().start();
    target.machine().stop_ring();
    let (reader, writer) = pipe().unwrap();
    assert!(give(&mut target, Direction::LOAD, reader));
    send(writer, &state);
    target.machine().start_ring(0);
    assert!(!check(&mut target));
    target.end();
}

#[test]
fn a_backend_that_resets_when_it_is_stopped_has_nothing_to_give() {
    let mut bench = Terms { on_stop: OnStop::Reset, ..Terms::new() }.bench();
    let (_reader, writer) = pipe().unwrap();
    assert!(!give(&mut bench, Direction::SAVE, writer));
    bench.end();
}

#[test]
fn what_is_no_end_of_a_pipe_or_the_wrong_one_is_refused() {
    let mut bench = Terms::new().bench();
    for direction in [Direction::SAVE, Direction::LOAD] {
        let (reader, writer) = pipe().unwrap();
        let wrong: OwnedFd = if direction == Direction::SAVE { reader.into() } else { writer.into() };
        for file in [wrong, memfd(0x1000).into(), event(), File::open("/").unwrap().into()] {
            assert!(!give(&mut bench, direction, file), "{direction:?}");
            assert!(!check(&mut bench));
        }
    }
    assert!(bench.machine().frontend.get_features().is_ok(), "the connection goes on");
    bench.end();
}

#[test]
fn a_state_can_go_over_a_socket() {
    let (mut source, _) = stopped_guest();
    let expected = save(&mut source);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    assert!(give(&mut source, Direction::SAVE, theirs));
    let mut state = Vec::new();
    ours.read_to_end(&mut state).unwrap();
    assert!(check(&mut source));
    assert_eq!(state, expected);
    let mut target = Terms::new().bench_for(&mut source);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    assert!(give(&mut target, Direction::LOAD, theirs));
    ours.write_all(&state).unwrap();
    drop(ours);
    assert!(check(&mut target));
    target.end();
    source.end();
}

#[test]
fn there_is_nothing_to_check_before_a_transfer_and_after_it_was_checked() {
    let (mut source, _) = stopped_guest();
    assert!(!check(&mut source));
    save(&mut source);
    assert!(!check(&mut source));
    let error = source.backend.check_device_state().unwrap_err().to_string();
    assert!(error.contains("no transfer"), "{error}");
    source.end();
}

#[test]
fn a_phase_that_there_is_not_ends_the_connection() {
    let memory = memfd(SIZE);
    for body in [ring(0, 1), ring(2, 0), ring(u32::MAX, u32::MAX)] {
        let mut victim = Victim::ready(&memory);
        let (_reader, writer) = pipe().unwrap();
        assert_eq!(victim.frontend.call(42, &body, &[std::os::fd::AsRawFd::as_raw_fd(&writer)]), None);
        victim.end();
    }
}

/// A guest with so many mappings that its state does not fit a pipe.
fn large_guest() -> (Bench, u16) {
    let mut bench = Terms::new().bench();
    bench.machine().start();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    for page in 0..2000 {
        assert_eq!(bench.send(&map(1, page << 12, 0x1000, 0x2000, 3)), OK);
    }
    let base = bench.machine().stop_ring();
    (bench, base)
}

#[test]
fn a_pipe_that_nobody_reads_holds_up_nobody() {
    let (mut bench, base) = large_guest();
    let (mut reader, writer) = pipe().unwrap();
    assert!(give(&mut bench, Direction::SAVE, writer));
    // The guest goes on meanwhile, and changes what was saved no more.
    bench.machine().start_ring(base);
    assert_eq!(bench.send(&unmap(1, 0, 2000 << 12)), OK);
    bench.machine().stop_ring();
    let (_other, second) = pipe().unwrap();
    assert!(!give(&mut bench, Direction::SAVE, second), "one at a time");
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    assert!(check(&mut bench));
    let document: Value = serde_json::from_slice(&state).unwrap();
    assert_eq!(document.pointer("/device/domains/0/mappings").unwrap().as_array().unwrap().len(), 2000);
    bench.end();
}

#[test]
fn a_pipe_whose_other_end_goes_is_a_failure_and_the_next_one_is_none() {
    let (mut bench, _) = large_guest();
    let (reader, writer) = pipe().unwrap();
    assert!(give(&mut bench, Direction::SAVE, writer));
    drop(reader);
    assert!(!check(&mut bench));
    assert!(save(&mut bench).len() > 0x1_0000);
    bench.end();
}

#[test]
fn a_pipe_that_nobody_closes_is_answered_for_all_the_same() {
    let (mut source, _) = stopped_guest();
    let state = save(&mut source);
    let mut target = Terms::new().bench_for(&mut source);
    let (reader, mut writer) = pipe().unwrap();
    let before = target.host.calls();
    assert!(give(&mut target, Direction::LOAD, reader.try_clone().unwrap()));
    writer.write_all(&state).unwrap();
    let asked = Instant::now();
    assert!(!check(&mut target), "it is not at its end");
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    assert!(!give(&mut target, Direction::LOAD, reader), "one at a time");
    assert_eq!(target.host.calls(), before);
    drop(writer);
    assert!(check(&mut target));
    assert_eq!(target.backend.inspect(|device| device.domains().count()), 2);
    target.end();
    source.end();
}

/// Nobody waits for the thread that a frontend left behind.
#[test]
fn a_frontend_may_go_while_its_state_is_on_its_way() {
    let (mut bench, _) = large_guest();
    let (_reader, writer): (PipeReader, _) = pipe().unwrap();
    assert!(give(&mut bench, Direction::SAVE, writer));
    let left = Instant::now();
    bench.end();
    assert!(left.elapsed() < Duration::from_secs(10), "{:?}", left.elapsed());
}
