// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is counted and measured of requests.

use std::time::Duration;

use virtio_iommu::host::timed::{HostTime, TimedGroup};
use virtio_iommu::request::Status;
use virtio_iommu::vhost_user::{Counted, Times};

use super::*;

/// A bench whose requests are measured.
fn measured() -> Bench {
    let host = FakeHost::new(Flavour::Iommufd);
    let time = Arc::new(HostTime::default());
    let input_range: IovaRange = "0-7fffffffff".parse().unwrap();
    let group = TimedGroup::new(host.group(&[ID], RangeSet::from(input_range)), Arc::clone(&time));
    let view = EndpointView::new(Vec::new()).unwrap();
    let settings = Settings { map_step: MAP_STEP, ..Settings::new(input_range, 0x1000) };
    let device = VirtioIommu::new(settings, vec![(ID, view)], vec![Arc::new(group)]).unwrap();
    let options = BackendOptions { on_stop: OnStop::Keep, polling: Polling::Off };
    let backend = Arc::new(IommuBackend::new(device, options).unwrap());
    assert!(backend.measure(Arc::clone(&time)));
    assert!(!backend.measure(time), "once only");
    let (daemon, stream) = serve(&backend);
    let mut machine = Machine::over(stream, guest_memory(MEMORY_SIZE));
    machine.start();
    // When that is answered, all that came before was done.
    machine.config();
    Bench { host, backend, machine: Some(machine), daemon }
}

/// How many requests of each kind there were, which is what each histogram of the kind has.
fn counts(counted: &Counted) -> [u64; 5] {
    let times = counted.times.as_ref().unwrap();
    let statistics = &counted.statistics;
    [
        (&times.attach, &statistics.attach),
        (&times.detach, &statistics.detach),
        (&times.map, &statistics.map),
        (&times.unmap, &statistics.unmap),
        (&times.probe, &statistics.probe),
    ]
    .map(|(Times { waiting, own, host }, count)| {
        let answered = count.ok() + count.failed();
        for histogram in [waiting, own, host] {
            assert_eq!(histogram.count(), answered);
            assert_eq!(histogram.buckets().map(|(_, count)| count).sum::<u64>(), answered);
        }
        answered
    })
}

#[test]
fn each_request_is_counted_by_its_kind_and_status_and_measured_once() {
    let mut bench = measured();
    assert_eq!(counts(&bench.backend.counted()), [0; 5]);
    for (request, status, expected) in [
        (attach(1, ENDPOINT, 0), Status::Ok, [1, 0, 0, 0, 0]),
        (attach(1, 77, 0), Status::NoEntry, [2, 0, 0, 0, 0]),
        (map(1, 0x5000, 0x1000, 0x2000, 1), Status::Ok, [2, 0, 1, 0, 0]),
        (map(1, 0x5000, 0x1000, 0x2000, 1), Status::Invalid, [2, 0, 2, 0, 0]),
        (map(1, 0x6000, 0x1000, 0x4000_0000, 1), Status::Fault, [2, 0, 3, 0, 0]),
        (unmap(1, 0x5000, 0x1000), Status::Ok, [2, 0, 3, 1, 0]),
        (unmap(2, 0x5000, 0x1000), Status::NoEntry, [2, 0, 3, 2, 0]),
        (detach(1, ENDPOINT), Status::Ok, [2, 1, 3, 2, 0]),
        (probe(ENDPOINT), Status::Invalid, [2, 1, 3, 2, 1]),
    ] {
        assert_eq!(bench.send(&request), status as u8);
        assert_eq!(counts(&bench.backend.counted()), expected);
    }
    let statistics = bench.backend.counted().statistics;
    let all = |count: virtio_iommu::device::Count| Status::ALL.map(|status| count.of(status));
    assert_eq!(all(statistics.attach), [1, 0, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(all(statistics.map), [1, 0, 0, 0, 1, 0, 0, 1, 0]);
    assert_eq!(all(statistics.probe), [0, 0, 0, 0, 1, 0, 0, 0, 0]);
    bench.end();
}

/// More than anything takes that is not held up, on a machine that is busy with other things.
const LONG: Duration = Duration::from_millis(100);

/// Returns when what was just sent has been held up for longer than that, for whatever reason.
fn wait_for_long(bench: &mut Bench) {
    bench.machine().wait_for_kick_taken();
    std::thread::sleep(3 * LONG);
}

#[test]
fn what_the_host_takes_is_the_hosts_time_and_the_next_requests_wait() {
    let mut bench = measured();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    let let_on = bench.host.hold_maps();
    bench.machine().post(&map(1, 0x5000, 0x1000, 0x2000, 1), 4);
    wait_for_long(&mut bench);
    drop(let_on);
    assert_eq!(bench.machine().wait_for_used(4), Reply::only(OK));
    let times = *bench.backend.counted().times.unwrap();
    let Times { waiting, own, host } = times.map;
    assert!(host.sum() >= LONG, "{host:?}");
    assert!(own.sum() < host.sum() && waiting.sum() < host.sum(), "{own:?} {waiting:?}");

    // Two requests in one kick: the other waits for the first.
    let let_on = bench.host.hold_maps();
    bench.machine().post_two(&map(1, 0x6000, 0x1000, 0x2000, 1), &unmap(1, 0x5000, 0x1000));
    wait_for_long(&mut bench);
    drop(let_on);
    bench.machine().wait_for_used(4);
    assert_eq!(bench.machine().wait_for_used(4), Reply::only(OK));
    let Times { waiting, own, host } = bench.backend.counted().times.unwrap().unmap;
    assert!(own.sum() > Duration::ZERO, "what the host took for the first is not the second's");
    assert!(waiting.sum() >= LONG, "{waiting:?}");
    assert!(host.sum() < LONG, "{host:?}");
    bench.end();
}

#[test]
fn who_holds_the_device_keeps_requests_waiting() {
    let mut bench = measured();
    let backend = Arc::clone(&bench.backend);
    let (holds, held) = std::sync::mpsc::channel();
    let (lets_go, let_go) = std::sync::mpsc::channel();
    let holder = std::thread::spawn(move || {
        backend.inspect(|_| {
            holds.send(()).unwrap();
            let_go.recv().unwrap();
        });
    });
    held.recv().unwrap();
    bench.machine().post(&attach(1, ENDPOINT, 0), 4);
    // Its kick is not taken either.
    std::thread::sleep(3 * LONG);
    lets_go.send(()).unwrap();
    assert_eq!(bench.machine().wait_for_used(4), Reply::only(OK));
    holder.join().unwrap();
    let Times { waiting, own, .. } = bench.backend.counted().times.unwrap().attach;
    assert!(waiting.sum() >= LONG, "{waiting:?}");
    assert!(own.sum() < waiting.sum(), "{own:?}");
    bench.end();
}

#[test]
fn a_map_in_steps_is_measured_as_one() {
    let mut bench = measured();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    let half = MEMORY_SIZE as u64 / 2;
    let let_on = bench.host.hold_maps();
    bench.machine().post(&map(1, half, half, half, 3), 4);
    for _ in 0..STEPS {
        std::thread::sleep(Duration::from_millis(2));
        let_on.send(()).unwrap();
    }
    assert_eq!(bench.machine().wait_for_used(4), Reply::only(OK));
    let counted = bench.backend.counted();
    assert_eq!(counts(&counted), [1, 0, 1, 0, 0]);
    let host = counted.times.unwrap().map.host.sum();
    assert!(host >= Duration::from_millis(2 * (STEPS - 1)), "{host:?}");
    bench.end();
}

#[test]
fn faults_that_the_guest_takes_and_groups_that_are_blocked_are_counted() {
    let mut bench = measured();
    let counted = bench.backend.counted();
    assert_eq!((counted.groups, counted.groups_blocked, counted.bypass), (1, 0, true));
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    bench.host.fail_after(0, virtio_iommu::host::fake::Failure::Error(virtio_iommu::host::HostErrorKind::NoMemory));
    assert_ne!(bench.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), OK);
    bench.host.stop_failing();
    let counted = bench.backend.counted();
    assert_eq!((counted.faults, counted.statistics.faults_sent), (1, 0));
    bench.machine().start_event_ring();
    bench.machine().kick();
    bench.machine().wait_for_event();
    bench.machine().config();
    assert_eq!(bench.backend.counted().statistics.faults_sent, 1);
    bench.machine().frontend.set_config(36, VhostUserConfigFlags::empty(), &[0]).unwrap();
    assert_eq!(bench.send(&detach(1, ENDPOINT)), OK);
    let counted = bench.backend.counted();
    assert_eq!((counted.groups, counted.groups_blocked, counted.bypass), (1, 1, false));
    bench.end();
}

#[test]
fn nothing_is_measured_unless_asked_for() {
    let mut bench = Bench::started();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    let counted = bench.backend.counted();
    assert_eq!((counted.statistics.attach.ok(), counted.times), (1, None));
    bench.end();
}

#[test]
fn a_group_that_is_added_is_timed_too() {
    let mut bench = measured();
    let other = EndpointId(0x20);
    let group = bench.host.group(&[other], RangeSet::from("0-7fffffffff".parse::<IovaRange>().unwrap()));
    bench.backend.add_group(group, vec![(other, EndpointView::new(Vec::new()).unwrap())]).unwrap();
    let let_on = bench.host.hold_maps();
    assert_eq!(bench.send(&attach(1, other.0, 0)), OK);
    bench.machine().post(&map(1, 0x5000, 0x1000, 0x2000, 1), 4);
    wait_for_long(&mut bench);
    drop(let_on);
    assert_eq!(bench.machine().wait_for_used(4), Reply::only(OK));
    let host = bench.backend.counted().times.unwrap().map.host.sum();
    assert!(host >= LONG, "{host:?}");
    bench.end();
}
