// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rings that a front end changes while they run.

use vhost::{VhostBackend, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::*;

/// A change of a ring that runs.
#[derive(Clone, Copy, Debug)]
enum Change {
    Size(u16),
    Base(u16),
    /// Guest-physical addresses of descriptors, available and used ring.
    Place([u64; 3]),
}

impl Change {
    fn apply(self, machine: &Machine) {
        match self {
            Self::Size(size) => machine.frontend.set_vring_num(0, size).unwrap(),
            Self::Base(base) => machine.frontend.set_vring_base(0, base).unwrap(),
            Self::Place(addresses) => {
                let [descriptors, available, used] =
                    addresses.map(|address| machine.memory.get_host_address(GuestAddress(address)).unwrap() as u64);
                let ring = VringConfigData {
                    queue_max_size: 16,
                    queue_size: 16,
                    flags: 0,
                    desc_table_addr: descriptors,
                    avail_ring_addr: available,
                    used_ring_addr: used,
                    log_addr: None,
                };
                machine.frontend.set_vring_addr(0, &ring).unwrap();
            }
        }
    }
}

/// A request that comes over a ring which was changed is carried out as it stands in the ring, or not at all; everything else is as it
/// was, and a driver that starts anew is served.
#[test]
fn a_ring_that_is_changed_while_it_runs_breaks_nothing_but_itself() {
    const LAST: u64 = MEMORY_SIZE as u64;
    for change in [
        Change::Size(1),
        Change::Size(2),
        Change::Size(3),
        Change::Size(1024),
        Change::Base(0),
        Change::Base(1),
        Change::Base(0x8000),
        Change::Base(0xffff),
        // All in one place, each in another's, and as far up as there is memory: the rings are cut off.
        Change::Place([0xf_0000; 3]),
        Change::Place([0xf_1000, 0xf_2000, 0xf_0000]),
        Change::Place([LAST - 16, LAST - 2, LAST - 4]),
        Change::Place([0x2000, 0x3000, 0x4000]),
    ] {
        let mut bench = Bench::started();
        assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
        assert_eq!(bench.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), OK);
        let before = bench.host.mappings(ID);

        change.apply(bench.machine());
        bench.machine().config();
        bench.machine().post(&map(1, 0x6000, 0x1000, 0x3000, 1), 4);
        bench.machine().wait_for_kick_taken();
        let mut after = bench.host.mappings(ID);
        after.retain(|mapping| mapping.iova != "6000-6fff".parse().unwrap());
        assert_eq!(after, before, "{change:?}");

        bench.machine().restart();
        assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK, "{change:?}");
        assert_eq!(bench.send(&map(1, 0x6000, 0x1000, 0x3000, 1)), OK, "{change:?}");
        assert_eq!(bench.reads(0x6000), Some(0x3000), "{change:?}");
        assert_eq!(bench.reads(0x5000), None, "{change:?}: of before");
        bench.end();
    }
}

/// What no ring can be ends the connection, and with it all that endpoints reach.
#[test]
fn a_ring_that_cannot_be_ends_the_connection() {
    let changes: [fn(&Machine); 6] = [
        |machine| machine.frontend.set_vring_num(0, 0).unwrap(),
        |machine| machine.frontend.set_vring_num(0, 1025).unwrap(),
        |machine| Change::Place([0xf_0008, 0xf_1000, 0xf_2000]).apply(machine),
        |machine| Change::Place([0xf_0000, 0xf_1001, 0xf_2000]).apply(machine),
        |machine| Change::Place([0xf_0000, 0xf_1000, 0xf_2002]).apply(machine),
        |machine| {
            let nowhere = VringConfigData {
                queue_max_size: 16,
                queue_size: 16,
                flags: 0,
                desc_table_addr: 0x1000,
                avail_ring_addr: 0x2000,
                used_ring_addr: 0x3000,
                log_addr: None,
            };
            machine.frontend.set_vring_addr(0, &nowhere).unwrap();
        },
    ];
    for (index, change) in changes.into_iter().enumerate() {
        let mut bench = Bench::started();
        assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
        change(bench.machine());
        assert!(vhost::VhostBackend::get_features(&bench.machine().frontend).is_err(), "change {index}");
        bench.end();
    }
}

#[test]
fn a_daemon_that_is_dropped_leaves_no_thread_and_no_connection() {
    let (host, backend) = device(true, BackendOptions { on_stop: OnStop::Keep, polling: Polling::Off });
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut listener = Listener::from(UnixListener::bind(&path).unwrap());
    let mut daemon = backend.daemon("test").unwrap();
    let stream = UnixStream::connect(&path).unwrap();
    daemon.start(&mut listener).unwrap();
    let mut machine = Machine::over(stream, guest_memory(MEMORY_SIZE));
    machine.start();
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), OK);
    // What was said is heard, so that there is something to wait for.
    let features = machine.frontend.get_features().unwrap() & !(1 << 29);
    for _ in 0..200 {
        machine.frontend.set_features(features).unwrap();
    }
    drop(daemon);
    assert_eq!(Arc::strong_count(&backend), 1, "nobody else has the backend");
    assert!(machine.frontend.get_features().is_err(), "the connection is closed");
    backend.shut_down();
    assert_eq!(host.attachment(ID), Attachment::Blocked);
}

#[test]
fn a_backend_has_one_daemon() {
    let (_, backend) = device(true, BackendOptions { on_stop: OnStop::Keep, polling: Polling::Off });
    let first = backend.daemon("first").unwrap();
    let error = backend.daemon("second").unwrap_err();
    assert!(error.to_string().contains("one daemon"), "{error}");
    drop(first);
    assert!(backend.daemon("second").is_err(), "it would serve nothing");
}
