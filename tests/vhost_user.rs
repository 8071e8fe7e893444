// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The backend over a real socket and a real ring, on the model of a host.

#![cfg(all(feature = "vhost-user", feature = "test-utils"))]
#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

mod common;

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;

use common::{Machine, Reply, attach, detach, guest_memory, map, probe, unmap};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Listener, VhostUserFrontend};
use virtio_iommu::access::Access;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::fake::{Attachment, FakeHost, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::queue::Polling;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};
use virtio_iommu::vhost_user::{BackendOptions, IommuBackend, OnStop};

const ENDPOINT: u32 = 0x18;
const ID: EndpointId = EndpointId(ENDPOINT);
const MEMORY_SIZE: usize = 0x40_0000;

/// Small, so that a MAP can have many steps.
const MAP_STEP: u64 = 0x1_0000;
/// How many steps a MAP of the upper half of memory has.
const STEPS: u64 = MEMORY_SIZE as u64 / 2 / MAP_STEP;

const OK: u8 = 0;
const INVAL: u8 = 4;
const NOENT: u8 = 6;
const FAULT: u8 = 7;

struct Bench {
    host: FakeHost,
    backend: Arc<IommuBackend>,
    machine: Option<Machine>,
    daemon: JoinHandle<()>,
}

impl Bench {
    fn new(boot_bypass: bool, on_stop: OnStop) -> Self {
        Self::with(boot_bypass, BackendOptions { on_stop, polling: Polling::Auto })
    }

    fn with(boot_bypass: bool, options: BackendOptions) -> Self {
        let host = FakeHost::new(Flavour::Iommufd);
        let msi: IovaRange = "fee00000-feefffff".parse().unwrap();
        let input_range: IovaRange = "0-7fffffffff".parse().unwrap();
        let usable = RangeSet::from(input_range).subtract(&RangeSet::from(msi));
        let view = EndpointView::new(vec![ReservedRegion { range: msi, kind: ReservedKind::Msi }]).unwrap();
        let settings = Settings { boot_bypass, map_step: MAP_STEP, ..Settings::new(input_range, 0x1000) };
        let device = VirtioIommu::new(settings, vec![(ID, view)], vec![host.group(&[ID], usable)]).unwrap();
        let backend = Arc::new(IommuBackend::new(device, options).unwrap());

        let (daemon, machine) = serve(&backend);
        Self { host, backend, machine: Some(machine), daemon }
    }

    fn started() -> Self {
        let mut bench = Self::new(true, OnStop::Keep);
        bench.machine().start();
        bench
    }

    fn machine(&mut self) -> &mut Machine {
        self.machine.as_mut().unwrap()
    }

    fn send(&mut self, request: &[u8]) -> u8 {
        self.machine().send(request)
    }

    fn reads(&self, iova: u64) -> Option<u64> {
        self.host.dma(ID, iova, Access::READ)
    }

    /// The frontend goes away.
    fn end(mut self) {
        drop(self.machine.take());
        self.daemon.join().unwrap();
        self.backend.shut_down();
        assert_eq!(self.host.attachment(ID), Attachment::Blocked);
        assert_eq!(self.host.table_count(), 0);
    }
}

/// Serves a backend to a front end that is connected.
fn serve(backend: &Arc<IommuBackend>) -> (JoinHandle<()>, Machine) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut listener = Listener::from(UnixListener::bind(&path).unwrap());
    let mut daemon = backend.daemon("test").unwrap();
    let daemon = std::thread::spawn(move || {
        daemon.start(&mut listener).unwrap();
        let _ = daemon.wait();
    });
    (daemon, Machine::connect(&path, guest_memory(MEMORY_SIZE)))
}

#[test]
fn requests_over_a_ring_reach_the_host() {
    let mut bench = Bench::started();
    let reply = bench.machine().try_send(&probe(ENDPOINT), 1536 + 4).unwrap();
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
    assert_eq!(bench.machine().try_send(&[9, 0, 0, 0], 4), Some(Reply { status: 0xaa, used: 0, body: vec![] }));
    bench.end();
}

#[test]
fn a_request_that_comes_while_the_ring_is_watched_needs_no_kick() {
    let answered = |polling: Polling| {
        let mut bench = Bench::with(true, BackendOptions { on_stop: OnStop::Keep, polling });
        bench.machine().start();
        assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
        bench.machine().post_quietly(&map(1, 0x5000, 0x1000, 0x2000, 1), 4);
        let reply = bench.machine().wait_for_used(4);
        assert_eq!(bench.reads(0x5000), reply.as_ref().map(|_| 0x2000));
        if reply.is_none() {
            // Nothing is lost: the next kick has it served.
            bench.machine().kick();
            assert_eq!(bench.machine().wait_for_used(4), Some(Reply::only(OK)));
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
    bench.machine().start_ring(base + 1);
    bench.machine().break_ring(base + 1);
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
    assert_eq!(bench.machine().try_send(&detach(1, ENDPOINT), 4), None);
    bench.machine().restart();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    bench.end();
}

#[test]
fn a_ring_that_was_broken_before_a_stop_that_resets_is_served_after_it() {
    let mut bench = Bench::new(true, OnStop::Reset);
    bench.machine().start();
    bench.machine().break_ring(1000);
    bench.machine().restart();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    bench.end();
}

#[test]
fn a_ring_whose_memory_was_away_is_served_when_it_is_back() {
    let mut bench = Bench::started();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    let memory = std::mem::replace(&mut bench.machine().memory, guest_memory(0x1000));
    bench.machine().set_memory();
    bench.machine().config();
    bench.machine().memory = memory;
    // Kicked while the ring is nowhere.
    let base = 1;
    bench.machine().break_ring(base);
    bench.machine().set_memory();
    assert_eq!(bench.send(&detach(1, ENDPOINT)), OK);
    bench.end();
}

#[test]
fn memory_that_the_frontend_takes_away_is_not_reached() {
    let mut bench = Bench::started();
    bench.send(&attach(1, ENDPOINT, 0));
    bench.send(&map(1, 0x5000, 0x1000, 0x30_0000, 1));
    bench.send(&map(1, 0x6000, 0x1000, 0x2000, 1));
    // The same addresses, other memory: whatever was mapped is not the guest's any more.
    let other = guest_memory(0x20_0000);
    bench.machine().memory = other;
    bench.machine().set_memory();
    bench.machine().config();
    assert_eq!(bench.reads(0x5000), None);
    assert_eq!(bench.reads(0x6000), Some(0x2000));
    bench.end();
}

#[test]
fn regions_of_memory_come_and_go_one_by_one() {
    const HIGH: u64 = 0x1_0000_0000;
    let mut bench = Bench::started();
    bench.send(&attach(1, ENDPOINT, 0));
    bench.send(&map(1, 0x5000, 0x1000, 0x2000, 1));
    assert_eq!(bench.send(&map(1, 0x6000, 0x1000, HIGH, 1)), FAULT, "there is no memory yet");

    let region = |file| VhostUserMemoryRegionInfo {
        guest_phys_addr: HIGH,
        memory_size: 0x1_0000,
        userspace_addr: 0x7fff_0000_0000,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(file),
    };
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1_0000).unwrap();
        file
    };
    let (first, second) = (file(), file());
    bench.machine().frontend.add_mem_region(&region(&first)).unwrap();
    bench.machine().config();
    assert_eq!(bench.send(&map(1, 0x6000, 0x1000, HIGH, 1)), OK);
    assert_eq!(bench.reads(0x6000), Some(HIGH));

    let calls = bench.host.calls();
    bench.machine().frontend.remove_mem_region(&region(&first)).unwrap();
    bench.machine().config();
    assert_eq!((bench.reads(0x6000), bench.reads(0x5000)), (None, Some(0x2000)));
    assert_eq!(bench.host.calls() - calls, 1, "nothing but its own mapping is touched");

    bench.machine().frontend.add_mem_region(&region(&second)).unwrap();
    bench.machine().config();
    assert_eq!(bench.reads(0x6000), Some(HIGH), "memory that is there again is reached again");
    assert_eq!(bench.host.calls() - calls, 2);
    bench.end();
}

impl Bench {
    /// While a MAP of all steps is under way, and the host goes on only when it is let, does something else with the backend.
    /// Lets the host on until that is done; how many steps that took.
    fn during_a_large_map(&mut self, act: impl FnOnce(&IommuBackend) + Send + 'static) -> u64 {
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
    assert_eq!(bench.machine().wait_for_used(4), Some(Reply::only(NOENT)), "the MAP is given up");
    assert_eq!(bench.host.table_count(), 0);
    bench.end();
}

#[test]
fn a_large_map_does_not_hold_up_the_configuration() {
    use vhost_user_backend::VhostUserBackend;
    let mut bench = Bench::started();
    let steps = bench.during_a_large_map(|backend| assert_eq!(backend.get_config(36, 1), [1]));
    assert!(steps < STEPS, "answered after {steps} steps");
    assert_eq!(bench.machine().wait_for_used(4), Some(Reply::only(OK)), "the MAP goes on");
    assert_eq!(bench.reads(0x1f_ffff), Some(0x3f_ffff));
    bench.end();
}

#[test]
fn a_large_map_is_answered_before_the_ring_stops() {
    use vhost_user_backend::VhostUserBackend;
    let mut bench = Bench::started();
    let steps = bench.during_a_large_map(|backend| backend.stop_vring(0).unwrap());
    assert_eq!(steps, STEPS);
    assert_eq!(bench.machine().wait_for_used(4), Some(Reply::only(OK)));
    bench.end();
}

#[cfg(feature = "translate")]
#[test]
fn an_emulated_device_uses_the_guests_memory_and_its_faults_reach_the_guest_without_a_kick() {
    use virtio_iommu::translate::{Limits, Translation};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    let group = Arc::new(Translation::new(Limits::default()).group(vec![ID]));
    let translator = group.translator(ID).unwrap();
    let settings = Settings { boot_bypass: false, ..Settings::new("0-7fffffffff".parse().unwrap(), 0x1000) };
    let views = vec![(ID, EndpointView::new(Vec::new()).unwrap())];
    let device = VirtioIommu::new(settings, views, vec![Arc::clone(&group) as _]).unwrap();
    let backend =
        Arc::new(IommuBackend::new(device, BackendOptions { on_stop: OnStop::Keep, polling: Polling::Off }).unwrap());
    group.on_refused(backend.waker());

    let (daemon, mut machine) = serve(&backend);
    machine.start();
    machine.start_event_ring();
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(machine.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), OK);

    let write = |iova| {
        let pinned = translator.pin();
        let memory = backend.memory().memory();
        let found = pinned.segments(iova, 4, Access::WRITE).next().unwrap();
        found.map(|segment| memory.write_slice(b"data", segment.start).unwrap()).is_ok()
    };
    assert!(!write(0x5000), "it may only be read");
    let event = machine.wait_for_event().expect("an event");
    assert_eq!((event[0], u64::from_le_bytes(event[16..].try_into().unwrap())), (2, 0x5000));
    assert_eq!(machine.send(&map(1, 0x6000, 0x1000, 0x3000, 2)), OK);
    assert!(write(0x6000));
    assert_eq!(machine.memory.read_obj::<[u8; 4]>(GuestAddress(0x3000)).unwrap(), *b"data");

    drop(machine);
    daemon.join().unwrap();
    backend.shut_down();
    assert!(!write(0x6000), "the frontend is gone");
}
