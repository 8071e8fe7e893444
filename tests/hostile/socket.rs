// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest behind a vhost-user socket can have the daemon log.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Instant;

use vhost::vhost_user::Listener;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::{Failure, FakeHost, Flavour};
use virtio_iommu::queue::Polling;
use virtio_iommu::vhost_user::{BackendOptions, IommuBackend, OnStop};

use crate::common::alone::alone;
use crate::common::{Machine, attach, detach, guest_memory, logged, map};
use crate::machine::{LONE, NOMEM, OK, READ, msi_view, range, usable};

/// Serves a guest whose log is kept; what was logged, and for how many seconds, one begun and one ended among them.
fn lines_of(guest: impl FnOnce(&FakeHost, &mut Machine)) -> (Vec<String>, usize) {
    logged::keep();
    let host = FakeHost::new(Flavour::Iommufd);
    let settings = Settings::new(range("0-ffffffff"), 0x1000);
    let device = VirtioIommu::new(settings, vec![(LONE, msi_view())], vec![host.group(&[LONE], usable())]).unwrap();
    let options = BackendOptions { on_stop: OnStop::Keep, polling: Polling::Off };
    let backend = Arc::new(IommuBackend::new(device, options).unwrap());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut listener = Listener::from(UnixListener::bind(&path).unwrap());
    let mut daemon = backend.daemon("test").unwrap();
    let daemon = std::thread::spawn(move || {
        daemon.start(&mut listener).unwrap();
        let _ = daemon.wait();
    });
    let mut machine = Machine::connect(&path, guest_memory(0x20_0000));
    machine.start();
    let started = Instant::now();
    guest(&host, &mut machine);
    let seconds = started.elapsed().as_secs() as usize + 2;
    let lines = logged::lines();
    drop(machine);
    daemon.join().unwrap();
    backend.shut_down();
    (lines, seconds)
}

#[test]
fn a_guest_whose_maps_fail_without_end_fills_no_log() {
    alone("socket::a_guest_whose_maps_fail_without_end_fills_no_log", || {
        let (lines, seconds) = lines_of(|host, machine| {
            assert_eq!(machine.send(&attach(1, LONE.0, 0)), OK);
            for _ in 0..2000 {
                host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
                assert_eq!(machine.send(&map(1, 0x5000, 0x1000, 0x2000, READ)), NOMEM);
            }
        });
        let about_maps = lines.iter().filter(|line| line.contains("cannot map 0x5000-0x5fff")).count();
        assert!((1..=10 * seconds).contains(&about_maps), "{about_maps} lines in {seconds} s");
        assert!(lines.len() <= 11 * seconds + 10, "{} lines in {seconds} s", lines.len());
    });
}

#[test]
fn a_guest_that_restarts_its_ring_without_end_fills_no_log() {
    alone("socket::a_guest_that_restarts_its_ring_without_end_fills_no_log", || {
        let (lines, seconds) = lines_of(|_, machine| {
            for _ in 0..500 {
                // Once as a driver that starts anew, once as a guest that was paused.
                machine.restart();
                assert_eq!(machine.send(&attach(1, LONE.0, 0)), OK);
                let base = machine.stop_ring();
                machine.start_ring(base);
                assert_eq!(machine.send(&detach(1, LONE.0)), OK);
            }
        });
        let about_starts = lines.iter().filter(|line| line.contains("the guest reset the device")).count();
        assert!((1..=10 * seconds).contains(&about_starts), "{about_starts} lines in {seconds} s");
        assert!(lines.len() <= 11 * seconds + 10, "{} lines in {seconds} s", lines.len());
    });
}
