// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that goes from one backend to another: its device's state is saved and loaded.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, pipe};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use serde_json::Value;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostTransferStateDirection as Direction;
use vhost::vhost_user::message::VhostTransferStatePhase::STOPPED;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use virtio_iommu::host::fake::Failure;
use virtio_iommu::host::{AttachError, HostError, HostErrorKind, HostGroup, IoPageTable};
use virtio_iommu::memory::GuestRam;

use super::raw::*;
use super::*;
use crate::common::alone::{alone, peak_memory};

const OTHER: EndpointId = EndpointId(0x20);

/// A group of the model's whose devices are taken for emulated ones.
#[derive(Debug)]
struct Emulated(Arc<dyn HostGroup>);

impl HostGroup for Emulated {
    fn members(&self) -> &[EndpointId] {
        self.0.members()
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        self.0.new_table()
    }

    fn can_share(&self, table: &dyn IoPageTable) -> bool {
        self.0.can_share(table)
    }

    fn attach(&self, table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        self.0.attach(table)
    }

    fn block(&self) {
        self.0.block();
    }

    fn memory_changed(&self, ram: &GuestRam) {
        self.0.memory_changed(ram);
    }

    fn can_migrate(&self) -> bool {
        true
    }
}

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
        let group = |(id, _): &(EndpointId, _)| -> Arc<dyn HostGroup> {
            Arc::new(Emulated(host.group(&[*id], RangeSet::from(self.settings.input_range))))
        };
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

/// What a backend that nobody is connected to says of a state that it does not take. Nothing is changed, and no host is asked.
fn refusal(terms: Terms, state: &[u8]) -> String {
    let (host, backend) = terms.backend();
    let before = (host.calls(), backend.inspect(VirtioIommu::config));
    let (reader, writer) = pipe().unwrap();
    backend.set_device_state_fd(Direction::LOAD, STOPPED, File::from(OwnedFd::from(reader))).unwrap();
    send(writer, state);
    let error = backend.check_device_state().expect_err("it is refused");
    assert_eq!((host.calls(), backend.inspect(VirtioIommu::config)), before, "{error}");
    assert_eq!(backend.inspect(|device| device.domains().count()), 0, "{error}");
    error.to_string()
}

/// A state with something else at a place.
fn changed(state: &[u8], place: &str, value: impl Into<Value>) -> Vec<u8> {
    let mut document: Value = serde_json::from_slice(state).unwrap();
    *document.pointer_mut(place).unwrap() = value.into();
    serde_json::to_vec(&document).unwrap()
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
    let event = target.machine().wait_for_event().expect("what it was not told of yet");
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
fn a_state_that_is_cut_off_or_has_more_to_it_is_refused() {
    let (mut source, _) = stopped_guest();
    let state = save(&mut source);
    source.end();
    for length in [0, 1, 20, state.len() / 2, state.len() - 1] {
        assert!(refusal(Terms::new(), &state[..length]).contains("EOF"), "{length}");
    }
    assert!(refusal(Terms::new(), &[&state[..], b"{}"].concat()).contains("trailing"));
    assert!(refusal(Terms::new(), b"no JSON").contains("cannot be read"));
    let named = refusal(Terms::new(), b"{\"version\":1,\"\\n\\u001b[2J\":1}");
    assert!(!named.contains(char::is_control) && named.contains("unknown field"), "{named:?}");
}

#[test]
fn a_state_of_another_version_is_refused_by_that_whatever_else_is_in_it() {
    let (mut source, _) = stopped_guest();
    let state = save(&mut source);
    source.end();
    for version in [0, 2, u64::from(u32::MAX)] {
        assert!(refusal(Terms::new(), &changed(&state, "/version", version)).contains(&format!("version {version},")));
        let device = refusal(Terms::new(), &changed(&state, "/device/version", version));
        assert!(device.contains(&format!("version {version} cannot")), "{device}");
    }
    assert!(refusal(Terms::new(), b"{\"version\":2,\"news\":[]}").contains("version 2,"));
}

#[test]
fn a_backend_that_is_not_what_the_guest_was_told_refuses_it_and_says_why() {
    let (mut source, _) = stopped_guest();
    let state = save(&mut source);
    source.end();
    let refused = |change: fn(&mut Terms)| {
        let mut terms = Terms::new();
        change(&mut terms);
        refusal(terms, &state)
    };
    for (change, expected) in [
        (
            (|terms| terms.settings.granule = 0x4000) as fn(&mut Terms),
            "the page sizes 0x40201000, and here it is 0x40204000",
        ),
        (
            |terms| terms.settings.input_range = "0-ffffffffff".parse().unwrap(),
            "the input range 0x0-0x7fffffffff, and here it is 0x0-0xffffffffff",
        ),
        (|terms| terms.settings.domain_range = 0..=100, "the domain range 0x0-0xffffffff, and here it is 0x0-0x64"),
        (|terms| terms.settings.probe_size = 512, "the probe size 1536, and here it is 512"),
        (|terms| terms.endpoints.truncate(1), "the guest has endpoint 0000:00:04.0, and this backend has not"),
        (
            |terms| terms.endpoints[0].1.clear(),
            "0xfee00000-0xfeefffff (msi) for endpoint 0000:00:03.0, and here it is no reserved region",
        ),
        (|terms| terms.endpoints[1].1[0].kind = ReservedKind::Reserved, "here it is 0xfee00000-0xfeefffff (reserved)"),
        (|terms| terms.settings.max_domains = 1, "NoMemory"),
        (|terms| terms.settings.max_mappings = 1, "NoMemory"),
    ] {
        let said = refused(change);
        assert!(said.contains(expected), "{said}");
    }
    // An endpoint that the guest does not know of is no harm.
    let mut more = Terms::new();
    more.endpoints.push((EndpointId(0x28), Vec::new()));
    let mut target = more.bench();
    assert!(load(&mut target, &state));
    target.end();
}

#[test]
fn a_state_that_no_device_can_be_in_is_refused() {
    let (mut source, _) = stopped_guest();
    let state = save(&mut source);
    source.end();
    for (place, value) in [
        ("/device/domains/0/mappings/0/last", 0x8fff),
        ("/device/domains/0/mappings/0/physical", 1),
        ("/device/domains/0/mappings/1/last", u64::MAX),
        ("/device/domains/0/endpoints/0", 77),
        ("/device/faults/0/endpoint", 77),
        ("/device/driver_features", u64::MAX),
    ] {
        refusal(Terms::new(), &changed(&state, place, value));
    }
}

#[test]
fn a_device_that_is_in_use_takes_no_state() {
    let (mut source, base) = stopped_guest();
    let state = save(&mut source);
    let before = source.host.calls();
    assert!(!load(&mut source, &state));
    assert_eq!(source.host.calls(), before);
    source.machine().start_ring(base);
    assert_eq!(source.send(&unmap(1, 0x5000, 0x1000)), OK);
    source.end();
}

#[test]
fn a_state_that_is_too_long_is_refused_before_it_takes_memory() {
    alone("migrating::a_state_that_is_too_long_is_refused_before_it_takes_memory", || {
        let (_, backend) = Terms::new().backend();
        let before = peak_memory();
        let (reader, writer) = pipe().unwrap();
        backend.set_device_state_fd(Direction::LOAD, STOPPED, File::from(OwnedFd::from(reader))).unwrap();
        let start = br#"{"version":1,"told":{"page_size_mask":1,"input_range":[0,0],"domain_range":[0,0],"probe_size":0,
            "endpoints":[{"id":0,"regions":[]}]},"request_queue":null,"device":{"version":1,"driver_features":0,"bypass":true,
            "domains":[{"id":0,"bypass":false,"endpoints":[0"#;
        send(writer, &[&start[..], &b",0".repeat(16 << 20)].concat());
        let error = backend.check_device_state().unwrap_err().to_string();
        assert!(error.contains("longer than"), "{error}");
        // What was sent is twice that in this process already.
        let grown = peak_memory() - before;
        assert!(grown < 96 << 20, "{grown:#x} bytes");
    });
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
    assert_eq!(save(&mut bench), state);
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
