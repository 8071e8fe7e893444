// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection on which a frontend says what it likes, and a ring in which its guest's driver does.
//!
//! An input is a list of steps. Messages are made from what would be right, so that most of them are understood: a step says where
//! they are wrong. The library's own threads serve the connection and the ring.

use std::fs::{self, File};
use std::io::{ErrorKind, PipeWriter, Read, Write, pipe};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::Listener;
use vhost_user_backend::Error as DaemonError;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::fake::{Attachment, FakeHost, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::queue::Polling;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};
use virtio_iommu::vhost_user::{BackendDaemon, BackendOptions, IommuBackend, OnStop};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const ENDPOINT: EndpointId = EndpointId(8);
/// Where the guest's memory is for the frontend, and how much there is.
const USER: u64 = 0x7000_0000;
const SIZE: u64 = 0x1_0000;
/// After which something hangs.
const PATIENCE: Duration = Duration::from_secs(20);

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;
const SET_DEVICE_STATE_FD: u32 = 42;
/// The direction in which a state comes to the backend.
const LOAD: u8 = 1;
/// What a guest made that this backend could take over.
const STATE: &[u8] = br#"{"version":1,"told":{"page_size_mask":1075843072,"input_range":[0,1099511627775],"domain_range":[0,4294967295],"probe_size":1536,"endpoints":[{"id":8,"regions":[{"first":4276092928,"last":4277141503,"msi":true}]}]},"request_queue":null,"device":{"version":1,"driver_features":4294967296,"bypass":true,"domains":[{"id":1,"bypass":false,"endpoints":[8],"mappings":[{"first":4096,"last":8191,"physical":0,"read":true,"write":false}]}],"faults":[]}}"#;
/// Steps that are no messages: a kick, and a request in the ring.
const KICK: u8 = 0xfd;
const REQUEST: u8 = 0xfe;

/// A step, as it is in an input: four bytes, then so many pairs of a place in the body and what is there.
#[derive(Clone, Copy)]
struct Step<'i> {
    code: u8,
    /// How long the message is: as it should be, but for 5 (one less), 6 (one more), 7 (less than its header says).
    length: u8,
    /// How many files come with it: as many as should, but for 4 (none), 5 (one), 6 (two), 7 (more than can be).
    files: u8,
    /// Whether they are of the wrong kind.
    wrong_files: bool,
    /// Which request, or anything else.
    number: u8,
    patches: &'i [[u8; 2]],
}

impl<'i> Step<'i> {
    fn take(input: &mut &'i [u8]) -> Option<Self> {
        let ([code, shape, number, count], rest) = input.split_first_chunk()?;
        let (pairs, _) = rest.as_chunks();
        let patches = pairs.get(..usize::from(count % 16)).unwrap_or(pairs);
        *input = rest.get(2 * patches.len()..).unwrap_or_default();
        let (length, files) = (shape & 7, shape >> 3 & 7);
        Some(Self { code: *code, length, files, wrong_files: shape & 0x40 != 0, number: *number, patches })
    }
}

/// The body that a message should have, and how many files.
fn right(code: u32, features: u64, protocol: u64) -> (Vec<u8>, usize) {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let halves = |halves: &[u32]| halves.iter().flat_map(|half| half.to_ne_bytes()).collect::<Vec<u8>>();
    match code {
        2 => (words(&[features]), 0),
        SET_MEM_TABLE => (words(&[1, 0, SIZE, USER, 0]), 1),
        8 => (halves(&[0, 16]), 0),
        9 => (words(&[0, USER, USER + 0x2000, USER + 0x1000, 0]), 0),
        10 | 11 | 42 => (halves(&[0, 0]), usize::from(code == 42)),
        12..=14 => (words(&[0]), 1),
        16 => (words(&[protocol]), 0),
        18 => (halves(&[0, 1]), 0),
        24 | 25 => ([halves(&[36, 1, 0]), vec![1]].concat(), 0),
        ADD_MEM_REG => (words(&[0, SIZE, SIZE, USER + SIZE, 0]), 1),
        38 => (words(&[0, SIZE, SIZE, USER + SIZE, 0]), 0),
        _ => (Vec::new(), 0),
    }
}

/// The library adds a region's size to its user address and looks for no carry: where that panics, it is a program's own choice.
fn would_wrap(code: u32, body: &[u8]) -> bool {
    let word =
        |index: usize| body.get(8 * index..).and_then(|rest| rest.first_chunk()).map(|word| u64::from_ne_bytes(*word));
    code == ADD_MEM_REG && word(2).zip(word(3)).is_some_and(|(size, user)| user.checked_add(size).is_none())
}

struct Run {
    host: FakeHost,
    backend: Arc<IommuBackend>,
    daemon: BackendDaemon,
    stream: UnixStream,
    memory: File,
    event: OwnedFd,
    /// How many requests were put into the ring.
    requests: u16,
    features: u64,
    protocol: u64,
}

impl Run {
    fn new() -> Self {
        static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
        let host = FakeHost::new(Flavour::Iommufd);
        let msi: IovaRange = "fee00000-feefffff".parse().expect("a range");
        let usable = RangeSet::from(IovaRange::ALL).subtract(&RangeSet::from(msi));
        let view = EndpointView::new(vec![ReservedRegion { range: msi, kind: ReservedKind::Msi }]).expect("a view");
        let settings = Settings::new("0-ffffffffff".parse().expect("a range"), 0x1000);
        host.allow_migration();
        let group = host.group(&[ENDPOINT], usable);
        let device = VirtioIommu::new(settings, vec![(ENDPOINT, view)], vec![group]).expect("a device");
        let options = BackendOptions { on_stop: OnStop::Keep, polling: Polling::Off };
        let backend = Arc::new(IommuBackend::new(device, options).expect("a backend"));

        let number = CONNECTIONS.fetch_add(1, Ordering::Relaxed);
        let name = format!("virtio-iommu-fuzz-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("an address");
        let listener = UnixListener::bind_addr(&address).expect("a socket");
        let stream = UnixStream::connect_addr(&address).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut daemon = backend.daemon("fuzz").expect("a daemon");
        daemon.start(&mut Listener::from(listener)).expect("a connection");

        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("memory"));
        memory.set_len(SIZE).expect("memory");
        let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an event");
        let (features, protocol) = (0, 0);
        Self { host, backend, daemon, stream, memory, event, requests: 0, features, protocol }
    }

    /// Whether the connection goes on.
    fn step(&mut self, step: &Step<'_>) -> bool {
        match step.code {
            KICK => self.kick(),
            REQUEST => {
                self.put_request(step);
                self.kick();
                self.wait_for_answer();
            }
            code => return self.say(u32::from(code), step),
        }
        true
    }

    fn say(&mut self, code: u32, step: &Step<'_>) -> bool {
        let (mut body, files) = right(code, self.features, self.protocol);
        for [at, value] in step.patches {
            if let Some(byte) = body.get_mut(usize::from(*at)) {
                *byte = *value;
            }
        }
        let length = body.len();
        match step.length {
            5 => body.truncate(length.saturating_sub(1)),
            6 => body.push(0),
            _ => (),
        }
        if would_wrap(code, &body) {
            return true;
        }
        let claimed = body.len() as u32 + if step.length == 7 { 8 } else { 0 };
        let count = match step.files {
            4 => 0,
            5 => 1,
            6 => 2,
            7 => 33,
            _ => files,
        };
        let is_memory = matches!(code, SET_MEM_TABLE | ADD_MEM_REG) != step.wrong_files;
        let (reader, writer) = pipe().expect("a pipe");
        let file = match code {
            SET_DEVICE_STATE_FD if body.first() == Some(&LOAD) => reader.as_raw_fd(),
            SET_DEVICE_STATE_FD => writer.as_raw_fd(),
            _ if is_memory => self.memory.as_raw_fd(),
            _ => self.event.as_raw_fd(),
        };
        if !self.send(code, claimed, &body, &vec![file; count]) {
            return false;
        }
        if code == SET_DEVICE_STATE_FD && body.first() == Some(&LOAD) {
            Self::send_state(writer, step);
        }
        drop(reader);
        if claimed as usize > body.len() {
            // What follows can be taken for the rest of it, and what follows that be waited for: nothing does.
            self.stream.shutdown(Shutdown::Write).expect("a connection");
        }
        self.is_heard()
    }

    /// Writes a state as it could be, but for the bytes that the step changes. All of it fits a pipe.
    fn send_state(mut writer: PipeWriter, step: &Step<'_>) {
        let mut state = STATE.to_vec();
        for [at, value] in step.patches.iter().skip(1) {
            if let Some(byte) = state.get_mut(2 * usize::from(*at)) {
                *byte = *value;
            }
        }
        // It may be refused, and closed, already.
        let _ = writer.write_all(&state);
    }

    fn send(&self, code: u32, length: u32, body: &[u8], files: &[RawFd]) -> bool {
        // Version 1, and an answer is wanted.
        let header = [code, 1 | 8, length].map(u32::to_ne_bytes);
        self.stream.send_with_fds(&[&[header.as_flattened(), body].concat()[..]], files).is_ok()
    }

    /// Whether the backend answers, when it has done all that it was told.
    fn is_heard(&mut self) -> bool {
        if !self.send(GET_FEATURES, 0, &[], &[]) {
            return false;
        }
        loop {
            let mut header = [0; 12];
            if !self.receive(&mut header) {
                return false;
            }
            let ([code, _, length], _) = header.as_chunks::<4>() else { return false };
            let mut body = vec![0; u32::from_ne_bytes(*length) as usize];
            if !self.receive(&mut body) {
                return false;
            }
            let word = body.first_chunk().map(|word| u64::from_ne_bytes(*word));
            match (u32::from_ne_bytes(*code), word) {
                (GET_FEATURES, Some(features)) => {
                    self.features = features;
                    return true;
                }
                (15, Some(protocol)) => self.protocol = protocol,
                _ => (),
            }
        }
    }

    fn receive(&mut self, bytes: &mut [u8]) -> bool {
        match self.stream.read_exact(bytes) {
            Ok(()) => true,
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => false,
            Err(error) => panic!("the backend does not answer: {error}"),
        }
    }

    fn kick(&self) {
        let file = self.event.try_clone().expect("a descriptor");
        File::from(file).write_all(&1u64.to_ne_bytes()).expect("room for a kick");
    }

    /// Puts a request where the ring is if it was set up as it should be.
    fn put_request(&mut self, step: &Step<'_>) {
        let word = |value: u32| value.to_le_bytes();
        let iova = u64::from(step.number >> 2) << 12;
        let range = [iova, iova + 0xfff].map(u64::to_le_bytes);
        let mut request = match step.number & 3 {
            0 => [1, 1, ENDPOINT.0, 0, 0].map(word).concat(),
            1 => [2, 1, ENDPOINT.0, 0, 0].map(word).concat(),
            2 => [&[3, 1].map(word).concat(), range.as_flattened(), &(SIZE + 0x1000).to_le_bytes(), &word(3)].concat(),
            _ => [&[4, 1].map(word).concat(), range.as_flattened(), &word(0)].concat(),
        };
        for [at, value] in step.patches {
            if let Some(byte) = request.get_mut(usize::from(*at)) {
                *byte = *value;
            }
        }
        let descriptor = |start: u64, length: u32, flags: u16, next: u16| {
            [&start.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
        };
        self.requests = self.requests.wrapping_add(1);
        let chain = [descriptor(0x3000, request.len() as u32, 1, 1), descriptor(0x4000, 4, 2, 0)].concat();
        let index = self.requests.to_le_bytes();
        for (bytes, at) in [(&chain[..], 0), (&request, 0x3000), (&index, 0x1002)] {
            self.memory.write_all_at(bytes, at).expect("memory");
        }
    }

    /// Waits a moment for the request to be answered. It never is if the ring is not what it should be.
    fn wait_for_answer(&self) {
        for _ in 0..20 {
            let mut used = [0; 2];
            self.memory.read_exact_at(&mut used, 0x2002).expect("memory");
            if u16::from_le_bytes(used) == self.requests {
                return;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Memory is there to the end of its files. What a device reaches is memory that the frontend gave and did not take back, and never a reserved region.
    fn check(&self) {
        let msi = "fee00000-feefffff".parse().expect("a range");
        let memory = self.backend.memory().memory();
        for region in memory.iter() {
            let place = region.file_offset().expect("memory of a frontend's is a file");
            let size = place.file().metadata().expect("a file").len();
            assert!(place.start() + region.len() <= size, "memory is missing at {:x?}", region.start_addr());
        }
        for mapping in self.host.mappings(ENDPOINT) {
            let in_bypass = mapping.to.first().is_some_and(|(start, _)| *start == mapping.iova.start());
            assert!(in_bypass || !mapping.iova.overlaps(msi), "a reserved region is mapped: {mapping:x?}");
            for (start, length) in &mapping.to {
                let is_there = memory.check_range(GuestAddress(*start), *length as usize);
                assert!(is_there, "memory that is not the guest's is mapped: {mapping:x?}");
            }
        }
    }

    /// The frontend goes, and nothing is left.
    fn end(self) {
        let Self { host, backend, mut daemon, stream, .. } = self;
        drop(stream);
        let ended = daemon.wait();
        assert!(!matches!(ended, Err(DaemonError::WaitDaemon(_))), "the connection's thread panicked: {ended:?}");
        backend.shut_down();
        assert_eq!(host.attachment(ENDPOINT), Attachment::Blocked, "the frontend is gone");
        assert_eq!(host.table_count(), 0, "the frontend is gone");
    }
}

/// How many files are open, and how many threads run.
fn in_use() -> [usize; 2] {
    ["/proc/self/fd", "/proc/self/task"].map(|list| fs::read_dir(list).expect("a list").count())
}

/// A write to a pipe that nobody reads is to fail, and not to end the process. In programs of Rust it is so from the start; a fuzzer's
/// `main` is libFuzzer's.
fn survive_broken_pipes() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, Arc::default()).expect("the signal can be handled");
    });
}

/// Checks an input.
pub fn check(mut input: &[u8]) {
    survive_broken_pipes();
    let before = in_use();
    let mut run = Run::new();
    let mut goes_on = run.is_heard();
    while goes_on && let Some(step) = Step::take(&mut input) {
        goes_on = run.step(&step);
        if goes_on {
            run.check();
        }
    }
    run.end();
    // Whoever else is in this process may have files and threads too, for a moment; and a thread that received a state may end later.
    let deadline = Instant::now() + PATIENCE;
    while in_use().iter().zip(before).any(|(now, before)| *now > before) {
        assert!(Instant::now() < deadline, "files are left open, or threads run: {before:?}, {:?}", in_use());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A session as it should be, and some that are not.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let message = |code: u8| vec![code, 0, 0, 0];
    let request = |number: u8| vec![REQUEST, 0, number, 0];
    let start = [3, 15, 16, 2, 5, 8, 10, 9, 13, 12, 18].map(message).concat();
    let mapped = [start.clone(), message(37), request(0), request(2), request(6)].concat();
    let add = |sent: &[Vec<u8>]| [mapped.clone(), sent.concat()].concat();
    vec![
        ("good-session", add(&[request(7), message(38), message(11)])),
        ("memory-leaves", add(&[message(38), message(37), message(5)])),
        ("pause-and-reset", add(&[message(11), message(10), message(9), message(12), message(34)])),
        ("config", add(&[message(24), vec![25, 0, 0, 1, 12, 0], message(25)])),
        ("wrong-files", add(&[vec![12, 0x40, 0, 0], vec![KICK, 0, 0, 0], vec![37, 0x40, 0, 0]])),
        ("two-files", add(&[vec![37, 6 << 3, 0, 0]])),
        ("too-many-files", add(&[vec![3, 7 << 3, 0, 0], message(1)])),
        ("header-lies", add(&[vec![9, 7, 0, 0]])),
        ("short", [start.clone(), vec![5, 5, 0, 0]].concat()),
        ("ring-elsewhere", add(&[vec![9, 0, 0, 2, 10, 0xff, 11, 0], request(3)])),
        ("region-beyond-its-file", [start.clone(), vec![37, 0, 0, 1, 34, 1]].concat()),
        ("state-saved", add(&[message(11), message(42), message(43)])),
        ("state-loaded", [loaded(), start, request(7)].concat()),
        // Another digit of a version, and of a mapping.
        ("state-of-another-version", [vec![42, 0, 0, 2, 0, LOAD, 6, b'2'], message(43)].concat()),
        ("state-that-cannot-be", [vec![42, 0, 0, 2, 0, LOAD, 210, b'9'], message(43)].concat()),
    ]
}

/// Steps by which the backend takes a state.
fn loaded() -> Vec<u8> {
    vec![42, 0, 0, 1, 0, LOAD, 43, 0, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_one_that_the_backend_takes() {
        let mut run = Run::new();
        assert!(run.is_heard());
        let input = [&loaded()[..], &[5, 0, 0, 0]].concat();
        let mut input = &input[..];
        while let Some(step) = Step::take(&mut input) {
            assert!(run.step(&step));
        }
        run.check();
        let mapped: Vec<_> = run.host.mappings(ENDPOINT).iter().map(|mapping| mapping.iova.start()).collect();
        assert_eq!(mapped, [0x1000]);
        run.end();
    }
}
