// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A control socket whose clients say what they like, and add and remove devices.
//!
//! An input is a list of steps. Devices are pipes: the other end says whether the last copy of one is closed. The server's own thread
//! serves the socket, and is the same for all inputs: each leaves it as it found it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, PipeReader, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use serde_json::{Value, json};
use virtio_iommu::control::{
    AssignedDevice, ControlServer, DeviceFile, DeviceFiles, FileError, Keeper, KeeperError, Limits, Pluggable, Registry,
};
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::fake::{FakeHost, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::queue::Polling;
use virtio_iommu::range::RangeSet;
use virtio_iommu::reserved::HostFacts;
use virtio_iommu::reserved::arguments::PolicyArguments;
use virtio_iommu::reserved::plan::{Policy, X86_MSI, plan};
use virtio_iommu::vhost_user::{BackendOptions, IommuBackend, OnStop};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::wire::{self, operations};

/// The endpoint that is there from the start, in host group 9.
const FIRST: &str = "0000:00:03.0";
const FIRST_GROUP: u8 = 9;
/// How many devices there are to be added, and groups that they are said to be in.
const DEVICES: u8 = 6;
const GROUPS: u8 = 4;
/// After which something hangs.
const PATIENCE: Duration = Duration::from_secs(9);

operations! {
    /// A step.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Step {
        /// Lines of any bytes, with files.
        Raw { bytes: Vec<u8>, files: u8, },
        /// A request that changes nothing.
        Ask { what: u8, number: u64, },
        /// Devices from one on, said to be of a group, with something wrong or nothing.
        Add { group: u8, first: u8, count: u8, flaw: u8, },
        /// Endpoints from one on.
        Remove { first: u8, count: u8, },
        /// The host wants a device back; its node is there again later.
        Gone { device: u8, },
        /// A client that goes in the middle of a line, with files.
        Half { bytes: Vec<u8>, files: u8, },
        /// A line without an end.
        Endless { byte: u8, },
    }
}

/// Makes groups of pipes.
#[derive(Debug)]
struct Pipes(FakeHost);

impl DeviceFiles for Pipes {
    fn identify(&self, file: BorrowedFd<'_>) -> Result<u64, FileError> {
        let stat = fstat(file).expect("an open file");
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => Ok(stat.st_ino),
            _ => Err(FileError::Unknown(io::Error::other("no pipe"))),
        }
    }

    fn is_node(&self, node: &std::fs::Metadata, _number: u64) -> bool {
        // No node is a pipe's: those of the test are plain files.
        node.is_file()
    }

    fn group(&self, devices: Vec<DeviceFile>) -> Result<Arc<dyn HostGroup>, FileError> {
        Ok(self.0.regroup_by_files(devices.into_iter().map(|(id, file, _)| (id, file)).collect(), usable()))
    }
}

/// Holds copies of files.
#[derive(Clone, Debug, Default)]
struct Copies(Arc<Mutex<BTreeMap<u8, OwnedFd>>>);

impl Copies {
    fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Keeper for Copies {
    fn hold(&mut self, file: BorrowedFd<'_>) -> Result<u8, KeeperError> {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The first endpoint's is taken.
        let place = (1..=u8::MAX).find(|place| !files.contains_key(place)).expect("a place");
        files.insert(place, file.try_clone_to_owned().map_err(KeeperError::Io)?);
        Ok(place)
    }

    fn release(&mut self, place: u8) -> Result<(), KeeperError> {
        let file = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&place);
        file.map(drop).ok_or_else(|| KeeperError::Io(io::Error::other("nothing is there")))
    }
}

fn usable() -> RangeSet {
    RangeSet::from("0-7fffffffff".parse::<virtio_iommu::range::IovaRange>().expect("a range"))
        .subtract(&RangeSet::from(X86_MSI))
}

/// The server, and what it serves.
struct Bench {
    registry: Arc<Registry>,
    copies: Copies,
    directory: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let host = FakeHost::new(Flavour::Iommufd);
        let facts = HostFacts { usable: Some(usable()), ..HostFacts::default() };
        let policy = Policy { guest_msi: Some(X86_MSI), ..Policy::default() };
        let id: EndpointId = FIRST.parse().expect("an address");
        let planned = plan(&policy, &[(id, facts)]).expect("a plan").endpoints.remove(0);
        let settings = Settings::new("0-7fffffffff".parse().expect("a range"), 0x1000);
        let groups = vec![host.group(&[id], usable())];
        let device = VirtioIommu::new(settings, vec![(id, planned.view.clone())], groups).expect("a device");
        let options = BackendOptions { on_stop: OnStop::Keep, polling: Polling::Auto };
        let backend = Arc::new(IommuBackend::new(device, options).expect("a backend"));
        let directory = std::env::temp_dir().join(format!("virtio-iommu-control-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory");
        for device in 0..=DEVICES {
            fs::write(directory.join(format!("vfio{device}")), "").expect("a node");
        }
        let copies = Copies::default();
        let policy = PolicyArguments::default();
        let pluggable = Pluggable {
            files: Some(Box::new(Pipes(host))),
            keeper: Some(Box::new(copies.clone())),
            policy,
            directory: directory.clone(),
        };
        let first = AssignedDevice {
            host: "0000:01:00.0".parse().expect("an address"),
            group: FIRST_GROUP.into(),
            node: format!("vfio{DEVICES}"),
            device_number: 0,
            plan: planned,
        };
        let registry = Arc::new(Registry::new(backend, vec![first], pluggable));
        let socket = directory.join("socket");
        // One of another process with this number.
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(socket).expect("a socket");
        let server = ControlServer::new(listener, Arc::clone(&registry), Limits::default()).expect("a server");
        std::thread::spawn(move || server.run());
        Self { registry, copies, directory }
    }

    fn client(&self) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(self.directory.join("socket")).expect("a server");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        BufReader::new(stream)
    }
}

/// The server, a client, and what must be there.
struct Run<'b> {
    bench: &'b Bench,
    client: BufReader<UnixStream>,
    /// The group that a device is in, and the other end of its file.
    present: BTreeMap<u8, (u8, PipeReader)>,
}

fn id(device: u8) -> String {
    format!("0000:{:02x}:00.0", device + 1)
}

fn host(device: u8) -> String {
    format!("0000:{:02x}:00.0", device + 0x40)
}

/// Whether no copy of a file is open any more.
fn is_closed(reader: &PipeReader) -> bool {
    let mut waiting = [PollFd::new(reader, PollFlags::IN)];
    poll(&mut waiting, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("a poll");
    waiting[0].revents().contains(PollFlags::HUP)
}

fn send(client: &BufReader<UnixStream>, bytes: &[u8], files: &[OwnedFd]) {
    let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = client.get_ref().send_with_fds(&[bytes], &numbers).expect("a socket");
    client.get_ref().write_all_from(bytes, sent);
}

/// The rest of what was sent in part.
trait WriteRest {
    fn write_all_from(&self, bytes: &[u8], sent: usize);
}

impl WriteRest for UnixStream {
    fn write_all_from(&self, bytes: &[u8], sent: usize) {
        let mut stream = self;
        stream.write_all(&bytes[sent..]).expect("a socket");
    }
}

fn nulls(count: u8) -> Vec<OwnedFd> {
    (0..count % 4).map(|_| File::open("/dev/null").expect("a file").into()).collect()
}

impl Run<'_> {
    /// The next reply that is no fault.
    fn reply(&mut self) -> Value {
        let mut line = String::new();
        let length = self.client.read_line(&mut line).expect("an answer in time");
        assert!(length > 0 && line.ends_with('\n'), "the client was closed");
        let answer: Value = serde_json::from_str(&line).expect("an answer is JSON");
        assert_eq!(answer["version"], 1);
        assert_eq!(answer["reply"].as_object().map(serde_json::Map::len), Some(1), "{line}");
        answer["reply"].clone()
    }

    fn ask(&mut self, request: &Value, files: &[OwnedFd]) -> Value {
        send(&self.client, format!("{}\n", json!({ "version": 1, "request": request })).as_bytes(), files);
        self.reply()
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Raw { bytes, files } => self.raw(bytes, *files),
            Step::Ask { what, number } => self.look(*what, *number),
            Step::Add { group, first, count, flaw } => self.add(group % GROUPS, *first, count % 3 + 1, *flaw),
            Step::Remove { first, count } => self.remove(*first, count % 3 + 1),
            Step::Gone { device } => self.gone(device % DEVICES),
            Step::Half { bytes, files } => {
                let client = self.bench.client();
                let half: Vec<u8> = bytes.iter().copied().filter(|byte| *byte != b'\n').collect();
                if !half.is_empty() {
                    send(&client, &half, &nulls(*files));
                }
            }
            Step::Endless { byte } => {
                let mut client = self.bench.client();
                let byte = if *byte == b'\n' { 0 } else { *byte };
                // It may be refused before all is written.
                let _ = client.get_mut().write_all(&vec![byte; (256 << 10) + 1]);
                let mut line = String::new();
                client.read_line(&mut line).expect("a refusal");
                assert!(line.contains("\"malformed\""), "{line}");
            }
        }
    }

    fn raw(&mut self, bytes: &[u8], files: u8) {
        let bytes = [bytes, b"\n"].concat();
        send(&self.client, &bytes, &nulls(files));
        for _ in bytes.iter().filter(|byte| **byte == b'\n') {
            self.reply();
        }
        // They may have said something.
        let listed = self.listed();
        self.present.retain(|device, (_, reader)| {
            let is_there = listed.contains(&id(*device));
            assert!(is_there || is_closed(reader), "the file of {device} stays open");
            is_there
        });
    }

    fn look(&mut self, what: u8, number: u64) {
        let address = format!("{number:#x}");
        let domain = number as u32;
        let (request, answers) = match what % 6 {
            0 => (json!("list"), &["endpoints"][..]),
            1 => (json!({ "domain": { "domain": domain } }), &["refused"][..]),
            2 => (json!({ "mappings": { "domain": domain, "from": address, "limit": domain } }), &["refused"][..]),
            3 => (json!("plan"), &["plan"][..]),
            4 => (json!({ "faults": { "after": number, "follow": domain & 1 == 1 } }), &["faults"][..]),
            _ => (json!("stats"), &["stats"][..]),
        };
        let reply = self.ask(&request, &[]);
        assert!(answers.iter().any(|name| reply.get(name).is_some()), "{request}: {reply}");
    }

    fn add(&mut self, group: u8, first: u8, count: u8, flaw: u8) {
        let devices: Vec<u8> = (0..count).map(|at| first.wrapping_add(at) % DEVICES).collect();
        let (mut files, mut readers) = (Vec::new(), Vec::new());
        for _ in &devices {
            let (reader, writer) = io::pipe().expect("a pipe");
            files.push(OwnedFd::from(writer));
            readers.push(reader);
        }
        let described = |device: &u8| {
            json!({ "id": id(*device), "host": host(*device), "node": format!("vfio{device}"),
                "facts": { "usable": [["0x0", "0x7fffffffff"]] } })
        };
        let members: Vec<String> = devices.iter().copied().map(host).collect();
        let described: Vec<Value> = devices.iter().map(described).collect();
        let mut addition = json!({ "group": group, "vfio_members": members, "devices": described });
        let device = &mut addition["devices"][0];
        let is_right = match flaw % 16 {
            1 => {
                device["granule"] = json!(0x1_0000);
                false
            }
            2 => {
                device["facts"]["usable"] = json!([["0x8000000000", "0xffffffffff"]]);
                false
            }
            3 => {
                device["facts"] =
                    json!({ "reserved_regions": ["0x1000 0x1fff direct"], "usable": [["0x0", "0xffffff"]] });
                false
            }
            4 => {
                device["node"] = json!("../vfio0");
                false
            }
            5 => {
                device["id"] = json!(FIRST);
                false
            }
            6 => {
                addition["vfio_members"] = json!([]);
                false
            }
            7 => {
                addition["vfio_members"].as_array_mut().expect("a list").push(json!("0000:ff:00.0"));
                false
            }
            8 => {
                addition["group"] = json!(FIRST_GROUP);
                false
            }
            9 => {
                files.pop();
                false
            }
            10 => {
                files[0] = File::open("/dev/null").expect("a file").into();
                false
            }
            11 => {
                addition["more"] = json!(1);
                false
            }
            _ => true,
        };
        let is_new = devices.iter().all(|device| !self.present.contains_key(device))
            && self.present.values().all(|(taken, _)| *taken != group);
        let reply = self.ask(&json!({ "add": addition }), &files);
        drop(files);
        if is_right && is_new {
            assert!(reply.get("added").is_some(), "{addition}: {reply}");
            self.present.extend(devices.into_iter().zip(readers.into_iter().map(|reader| (group, reader))));
        } else {
            assert!(reply.get("refused").is_some(), "{addition}: {reply}");
            assert!(readers.iter().all(is_closed), "a file that was refused stays open");
        }
    }

    fn remove(&mut self, first: u8, count: u8) {
        let devices: Vec<u8> = (0..count).map(|at| first.wrapping_add(at) % DEVICES).collect();
        let ids: Vec<String> = devices.iter().copied().map(id).collect();
        let reply = self.ask(&json!({ "remove": { "endpoints": ids } }), &[]);
        if devices.iter().any(|device| !self.present.contains_key(device)) {
            assert_eq!(reply["refused"]["kind"], "not-found", "{reply}");
            return;
        }
        assert_eq!(reply["removed"]["endpoints"], json!(ids));
        for device in devices {
            let (_, reader) = self.present.remove(&device).expect("it was there");
            assert!(is_closed(&reader), "the file of {device} is open when it is said to be closed");
        }
    }

    fn gone(&mut self, device: u8) {
        let node = self.bench.directory.join(format!("vfio{device}"));
        fs::remove_file(&node).expect("a node");
        self.bench.registry.remove_those_gone();
        fs::write(&node, "").expect("a node");
        if let Some((_, reader)) = self.present.remove(&device) {
            assert!(is_closed(&reader), "the host waits for {device}");
        }
    }

    fn listed(&mut self) -> Vec<String> {
        let reply = self.ask(&json!("list"), &[]);
        let endpoints = reply["endpoints"].as_array().expect("a list");
        endpoints.iter().map(|endpoint| endpoint["id"].as_str().expect("an ID").to_owned()).collect()
    }

    /// What is there is what must be.
    fn compare(&mut self) {
        let expected: Vec<String> =
            [FIRST.to_owned()].into_iter().chain(self.present.keys().copied().map(id)).collect();
        assert_eq!(self.listed(), expected);
        assert_eq!(self.bench.copies.count(), self.present.len());
        assert!(self.present.values().all(|(_, reader)| !is_closed(reader)), "the file of an endpoint is closed");
    }
}

/// Whether bytes may be a request to remove something, however it is written.
fn is_removal(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    text.contains("remove") || text.contains("\\u")
}

/// Checks an input.
pub fn check(input: &[u8]) {
    static BENCH: Mutex<Option<Bench>> = Mutex::new(None);
    let mut bench = BENCH.lock().unwrap_or_else(PoisonError::into_inner);
    let bench = bench.get_or_insert_with(Bench::new);
    let mut run = Run { bench, client: bench.client(), present: BTreeMap::new() };
    for step in wire::all::<Step>(input) {
        // What a raw line says may take the first endpoint away.
        if matches!(&step, Step::Raw { bytes, .. } if is_removal(bytes)) {
            continue;
        }
        run.take(&step);
        run.compare();
    }
    for device in 0..DEVICES {
        if run.present.contains_key(&device) {
            run.remove(device, 1);
        }
    }
    run.compare();
}

/// The seeds.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let raw = |text: &str, files| Step::Raw { bytes: text.as_bytes().to_vec(), files };
    let half = |text: &str, files| Step::Half { bytes: text.as_bytes().to_vec(), files };
    let come_and_go = [
        Step::Add { group: 0, first: 0, count: 0, flaw: 0 },
        Step::Add { group: 0, first: 1, count: 0, flaw: 0 },
        Step::Add { group: 1, first: 1, count: 1, flaw: 0 },
        Step::Remove { first: 0, count: 0 },
        Step::Gone { device: 1 },
        Step::Add { group: 1, first: 1, count: 0, flaw: 0 },
        Step::Remove { first: 1, count: 1 },
        Step::Add { group: 2, first: 5, count: 2, flaw: 0 },
    ];
    let flaws: Vec<Step> = (0..12).map(|flaw| Step::Add { group: 3, first: 2, count: 1, flaw }).collect();
    let lines = [
        raw(r#"{"version":1,"request":"list"}"#, 0),
        raw("{\"version\":1,\"request\":\"stats\"}\n{\"version\":1,\"request\":\"plan\"}", 0),
        raw(r#"{"version":1,"request":{"mappings":{"domain":1,"from":"0x1000","limit":2}}}"#, 1),
        raw(r#"{"version":1,"request":{"faults":{"after":3,"follow":true}}}"#, 0),
        raw(r#"{"version":1,"request":{"domain":{"domain":1}},"more":[[[[]]]]}"#, 0),
        raw(r#"{"version":2,"request":"list"}"#, 0),
        raw(r#"{"version":1,"request":{"log-level":{"level":"off"}}}"#, 0),
        raw(r#"{"version":1,"request":{"add":{"group":1,"vfio_members":[],"devices":[]}}}"#, 3),
        half(r#"{"version":1,"#, 2),
        Step::Endless { byte: b' ' },
    ];
    let looks: Vec<Step> = (0..6).map(|what| Step::Ask { what, number: 0x1001 }).collect();
    vec![
        ("come-and-go", wire::bytes_of(&come_and_go)),
        ("flaws", wire::bytes_of(&flaws)),
        ("lines", wire::bytes_of(&lines)),
        ("looks", wire::bytes_of(&looks)),
    ]
}
