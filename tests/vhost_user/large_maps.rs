// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What others wait for while a large MAP is under way.

use vhost::VhostBackend;

use super::*;

impl Bench {
    /// While a MAP of all steps is under way, and the host goes on only when it is let, does something else with the backend.
    /// Lets the host on until that is done; how many steps that took.
    pub fn during_a_large_map(&mut self, act: impl FnOnce(&Arc<IommuBackend>) + Send + 'static) -> u64 {
        assert_eq!(self.send(&attach(1, ENDPOINT, 0)), OK);
        let host = self.host.hold_maps();
        let half = MEMORY_SIZE as u64 / 2;
        self.machine().post(&map(1, 0, half, half, 1), 4);
        // The first step is under way when it was let on.
        host.send(()).unwrap();
        let backend = Arc::clone(&self.backend);
        let other = std::thread::spawn(move || act(&backend));
        let mut steps = 1;
        while !other.is_finished() {
            let moment = std::time::Duration::from_millis(5);
            std::thread::sleep(moment);
            match host.try_send(()) {
                Ok(()) => steps += 1,
                Err(std::sync::mpsc::TrySendError::Full(())) => (),
                Err(error @ std::sync::mpsc::TrySendError::Disconnected(())) => panic!("{error}"),
            }
        }
        other.join().unwrap();
        steps
    }
}

#[test]
fn a_large_map_does_not_hold_up_the_end() {
    let mut bench = Bench::started();
    let steps = bench.during_a_large_map(|backend| {
        backend.shut_down();
    });
    assert!(steps < STEPS, "shut down after {steps} steps");
    assert_eq!(bench.host.attachment(ID), Attachment::Blocked);
    assert_eq!(bench.machine().wait_for_used(4), Reply::only(NOENT), "the MAP is given up");
    assert_eq!(bench.host.table_count(), 0);
    bench.end();
}

#[test]
fn a_large_map_does_not_hold_up_the_configuration() {
    use vhost_user_backend::VhostUserBackend;
    let mut bench = Bench::started();
    let steps = bench.during_a_large_map(|backend| assert_eq!(backend.get_config(36, 1), [1]));
    assert!(steps < STEPS, "answered after {steps} steps");
    assert_eq!(bench.machine().wait_for_used(4), Reply::only(OK), "the MAP goes on");
    assert_eq!(bench.reads(0x1f_ffff), Some(0x3f_ffff));
    bench.end();
}

#[test]
fn a_large_map_is_answered_before_the_ring_stops() {
    let mut bench = Bench::started();
    let frontend = bench.machine().frontend.clone();
    let steps = bench.during_a_large_map(move |_| assert_eq!(frontend.get_vring_base(0).unwrap(), 2));
    assert_eq!(steps, STEPS);
    assert_eq!(bench.machine().wait_for_used(4), Reply::only(OK));
    bench.end();
}
