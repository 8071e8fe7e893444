// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that goes from one backend to another: its device's state is saved and loaded.

mod refused;
mod transfers;

use std::fs::File;
use std::io::{PipeWriter, Read, pipe};
use std::os::fd::OwnedFd;

use vhost::VhostBackend;
use vhost::vhost_user::message::VhostTransferStateDirection as Direction;
use vhost::vhost_user::message::VhostTransferStatePhase::STOPPED;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::Failure;

use super::*;

const OTHER: EndpointId = EndpointId(0x20);

/// What a backend is made with.
struct Terms {
    settings: Settings,
    /// Each endpoint, and what is reserved for it.
    endpoints: Vec<(EndpointId, Vec<ReservedRegion>)>,
    on_stop: OnStop,
}

fn msi() -> ReservedRegion {
    ReservedRegion { range: "fee00000-feefffff".parse().unwrap(), kind: ReservedKind::Msi }
}

impl Terms {
    fn new() -> Self {
        let settings = Settings {
            max_domains: 10,
            max_mappings: 10_000,
            max_mappings_in_all: 10_000,
            ..Settings::new("0-7fffffffff".parse().unwrap(), 0x1000)
        };
        Self { settings, endpoints: vec![(ID, vec![msi()]), (OTHER, vec![msi()])], on_stop: OnStop::Keep }
    }

    fn backend(self) -> (FakeHost, Arc<IommuBackend>) {
        let host = FakeHost::new(Flavour::Iommufd);
        host.allow_migration();
        let group = |(id, _): &(EndpointId, _)| host.group(&[*id], RangeSet::from(self.settings.input_range));
        let groups = self.endpoints.iter().map(group).collect();
        let view = |(id, regions)| (id, EndpointView::new(regions).unwrap());
        let device = VirtioIommu::new(self.settings, self.endpoints.into_iter().map(view).collect(), groups).unwrap();
        let options = BackendOptions { on_stop: self.on_stop, polling: Polling::Off };
        (host, Arc::new(IommuBackend::new(device, options).unwrap()))
    }

    fn bench(self) -> Bench {
        let (host, backend) = self.backend();
        let (daemon, stream) = serve(&backend);
        let machine = Machine::over(stream, guest_memory(MEMORY_SIZE));
        Bench { host, backend, machine: Some(machine), daemon }
    }

    /// A backend to which the guest of another one comes.
    fn bench_for(self, guest: &mut Bench) -> Bench {
        let (host, backend) = self.backend();
        let (daemon, stream) = serve(&backend);
        let machine = guest.machine().moved(stream);
        Bench { host, backend, machine: Some(machine), daemon }
    }
}

/// A guest with a domain that has mappings, one that passes everything, and a fault that it was not told of; stopped.
fn stopped_guest() -> (Bench, u16) {
    let mut bench = Terms::new().bench();
    bench.machine().start();
    assert_eq!(bench.send(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(bench.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), OK);
    assert_eq!(bench.send(&map(1, 0x8000, 0x4000, 0x10_0000, 3)), OK);
    assert_eq!(bench.send(&attach(2, OTHER.0, 1)), OK);
    bench.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    assert_ne!(bench.send(&map(1, 0x1_0000, 0x1000, 0x3000, 3)), OK);
    bench.host.stop_failing();
    let base = bench.machine().stop_ring();
    (bench, base)
}

fn give(bench: &mut Bench, direction: Direction, end: impl Into<OwnedFd>) -> bool {
    bench.machine().frontend.set_device_state_fd(direction, STOPPED, end.into()).is_ok()
}

fn check(bench: &mut Bench) -> bool {
    bench.machine().frontend.check_device_state().is_ok()
}

/// As QEMU's `vhost_save_backend_state()`.
fn save(bench: &mut Bench) -> Vec<u8> {
    let (mut reader, writer) = pipe().unwrap();
    assert!(give(bench, Direction::SAVE, writer));
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    assert!(check(bench));
    state
}

/// As QEMU's `vhost_load_backend_state()`.
fn load(bench: &mut Bench, state: &[u8]) -> bool {
    let (reader, writer) = pipe().unwrap();
    assert!(give(bench, Direction::LOAD, reader));
    send(writer, state);
    check(bench)
}

/// Writes until there is no more, or the other side closes.
fn send(mut writer: PipeWriter, state: &[u8]) {
    let _ = writer.write_all(state);
}

/// The guest comes to another backend, which is given memory before the state or, as QEMU does, after it.
fn goes_on(memory_first: bool) {
    let (mut source, base) = stopped_guest();
    let state = save(&mut source);
    let there = source.host.mappings(ID);
    let mut target = Terms::new().bench_for(&mut source);
    if memory_first {
        target.machine().set_memory();
    }
    assert!(load(&mut target, &state));
    // Sets features and memory, too.
    target.machine().start_from(base);
    target.machine().start_event_ring();
    target.machine().kick();
    let event = target.machine().wait_for_event();
    assert_eq!(event[8..12], ENDPOINT.to_le_bytes());
    assert_eq!(target.host.mappings(ID), there);
    assert_eq!(target.host.dma(OTHER, 0x7000, Access::WRITE), Some(0x7000), "bypass");

    assert_eq!(target.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), INVAL, "it is mapped");
    assert_eq!(target.send(&map(1, 0x6000, 0x1000, 0x3000, 1)), OK);
    assert_eq!(target.send(&unmap(1, 0x8000, 0x4000)), OK);
    assert_eq!([0x5000, 0x6000, 0x8000].map(|iova| target.reads(iova)), [Some(0x2000), Some(0x3000), None]);
    assert_eq!(target.host.dma(ID, 0x5000, Access::WRITE), None, "it may only be read");
    assert_eq!(target.send(&detach(2, OTHER.0)), OK);
    target.end();
    source.end();
}

#[test]
fn a_guest_goes_on_behind_another_backend() {
    goes_on(false);
}

#[test]
fn a_guest_goes_on_behind_another_backend_that_has_memory_already() {
    goes_on(true);
}

#[test]
fn a_guest_stays_if_it_could_not_go() {
    let (mut source, base) = stopped_guest();
    save(&mut source);
    source.machine().start_ring(base);
    assert_eq!(source.send(&unmap(1, 0x5000, 0x1000)), OK);
    assert_eq!(source.send(&unmap(1, 0x8000, 0x4000)), OK);
    source.end();
}

#[test]
fn a_state_is_the_same_to_the_byte_when_it_was_loaded_and_saved_again() {
    let (mut source, _) = stopped_guest();
    let state = save(&mut source);
    assert_eq!(save(&mut source), state);
    let mut target = Terms::new().bench_for(&mut source);
    assert!(load(&mut target, &state));
    assert_eq!(save(&mut target), state);
    target.end();
    source.end();
}

/// The guest was reset and went to another backend before its driver was back: what it made before is gone there too.
#[test]
fn a_reset_of_before_the_migration_is_told_from_a_pause_after_it() {
    let (mut source, base) = stopped_guest();
    assert_ne!(base, 0);
    source.machine().forget_ring();
    let state = save(&mut source);
    let mut target = Terms::new().bench_for(&mut source);
    assert!(load(&mut target, &state));
    target.machine().start();
    assert_eq!(target.send(&unmap(1, 0x5000, 0x1000)), NOENT);
    assert_eq!(target.reads(0x5000), Some(0x5000), "bypass, as after a reset");
    target.end();
    source.end();
}

#[test]
fn an_assigned_device_is_refused_with_the_reason() {
    let mut bench = Bench::started();
    bench.machine().stop_ring();
    for direction in [Direction::SAVE, Direction::LOAD] {
        let (reader, writer) = pipe().unwrap();
        let end: OwnedFd = if direction == Direction::SAVE { writer.into() } else { reader.into() };
        let other = end.try_clone().unwrap();
        assert!(!give(&mut bench, direction, other));
        let error = bench.backend.set_device_state_fd(direction, STOPPED, File::from(end)).unwrap_err().to_string();
        assert!(error.contains("endpoint 0000:00:03.0 is a device of this host"), "{error}");
    }
    assert!(!check(&mut bench));
    bench.end();
}

#[test]
fn a_backend_without_endpoints_can_be_left() {
    let terms = || Terms { endpoints: Vec::new(), ..Terms::new() };
    let mut source = terms().bench();
    let state = save(&mut source);
    let mut target = terms().bench_for(&mut source);
    assert!(load(&mut target, &state));
    drop((target.machine.take(), source.machine.take()));
}

#[test]
fn it_is_offered() {
    let (_, backend) = device(true, BackendOptions { on_stop: OnStop::Keep, polling: Polling::Off });
    assert!(backend.protocol_features().contains(VhostUserProtocolFeatures::DEVICE_STATE));
}

#[cfg(feature = "translate")]
#[test]
fn an_emulated_device_reaches_the_same_memory_behind_another_backend() {
    use virtio_iommu::translate::{Limits, Translation};

    let new = || {
        let group = Arc::new(Translation::new(Limits::default()).group(vec![ID]));
        let translator = group.translator(ID).unwrap();
        let settings = Settings { boot_bypass: false, ..Settings::new("0-7fffffffff".parse().unwrap(), 0x1000) };
        let view = EndpointView::new(Vec::new()).unwrap();
        let device = VirtioIommu::new(settings, vec![(ID, view)], vec![group]).unwrap();
        let options = BackendOptions { on_stop: OnStop::Keep, polling: Polling::Off };
        (Arc::new(IommuBackend::new(device, options).unwrap()), translator)
    };
    let (source, _) = new();
    let (_source, stream) = serve(&source);
    let mut machine = Machine::over(stream, guest_memory(MEMORY_SIZE));
    machine.start();
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(machine.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), OK);
    let base = machine.stop_ring();
    let (mut reader, writer) = pipe().unwrap();
    machine.frontend.set_device_state_fd(Direction::SAVE, STOPPED, writer.into()).unwrap();
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    machine.frontend.check_device_state().unwrap();

    let (target, translator) = new();
    let (_target, stream) = serve(&target);
    let mut machine = machine.moved(stream);
    let (reader, writer) = pipe().unwrap();
    machine.frontend.set_device_state_fd(Direction::LOAD, STOPPED, reader.into()).unwrap();
    send(writer, &state);
    machine.frontend.check_device_state().unwrap();
    machine.start_from(base);
    assert_eq!(machine.send(&map(1, 0x6000, 0x1000, 0x3000, 3)), OK);
    let pinned = translator.pin();
    let reaches = |iova, access| {
        let found = pinned.segments(iova, 4, access).next().unwrap();
        found.ok().map(|segment| segment.start.0)
    };
    assert_eq!(reaches(0x5000, Access::READ), Some(0x2000));
    assert_eq!(reaches(0x5000, Access::WRITE), None);
    assert_eq!(reaches(0x6000, Access::WRITE), Some(0x3000));
}
