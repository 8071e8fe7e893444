// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket: in this process over the model of a host, with a guest where one is needed, and the daemon's own.

#![cfg(all(feature = "daemon", feature = "test-utils"))]
#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
#[cfg(not(sanitized = "thread"))]
mod daemon;
mod faults;
mod files;
mod hostile;
mod looking;
mod operate;
mod plugging;
mod refused;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use common::processes::PATIENCE;
use common::status::{NOENT, OK};
use common::{Machine, guest_memory};
use files::{Closed, Kept, PipeFiles};
use serde_json::{Value, json};
use vhost::vhost_user::Listener;
use virtio_iommu::control::{AssignedDevice, ControlServer, Limits, Pluggable, Registry};
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::fake::{FakeHost, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::queue::Polling;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::HostFacts;
use virtio_iommu::reserved::plan::{Policy, X86_MSI, plan};
use virtio_iommu::vhost_user::{Arguments, BackendOptions, IommuBackend, OnStop};

/// The endpoint that is there from the start, as numbers and as text.
const FIRST: EndpointId = EndpointId(0x18);
const FIRST_TEXT: &str = "0000:00:03.0";
/// Endpoints that are added.
const NEW: EndpointId = EndpointId(0x100);
const NEW_TEXT: &str = "0000:01:00.0";
const OTHER: EndpointId = EndpointId(0x200);
const OTHER_TEXT: &str = "0000:02:00.0";

const INPUT_RANGE: &str = "0-7fffffffff";
const MEMORY_SIZE: usize = 0x40_0000;

/// A backend with one endpoint, and its control socket.
struct Bench {
    host: FakeHost,
    backend: Arc<IommuBackend>,
    registry: Arc<Registry>,
    keeper: Kept,
    directory: tempfile::TempDir,
}

fn usable() -> RangeSet {
    RangeSet::from(INPUT_RANGE.parse::<IovaRange>().unwrap()).subtract(&RangeSet::from(X86_MSI))
}

impl Bench {
    fn new() -> Self {
        Self::with(Limits::default(), &[])
    }

    /// A bench whose daemon was given these options.
    fn with(limits: Limits, options: &[&str]) -> Self {
        let host = FakeHost::new(Flavour::Iommufd);
        let facts = HostFacts { usable: Some(usable()), ..HostFacts::default() };
        let policy = Policy { guest_msi: Some(X86_MSI), ..Policy::default() };
        let planned = plan(&policy, &[(FIRST, facts)]).unwrap().endpoints.remove(0);
        // Room for four regions.
        let settings = Settings { probe_size: 96, ..Settings::new(INPUT_RANGE.parse().unwrap(), 0x1000) };
        let views = vec![(FIRST, planned.view.clone())];
        let device = VirtioIommu::new(settings, views, vec![host.group(&[FIRST], usable())]).unwrap();
        let options = [&["daemon", "--socket-path=x"][..], options].concat();
        let Arguments { policy, .. } = Arguments::parse_from(options);
        let choices = BackendOptions { on_stop: OnStop::Keep, polling: Polling::Auto };
        let backend = Arc::new(IommuBackend::new(device, choices).unwrap());

        let directory = tempfile::tempdir().unwrap();
        let nodes = directory.path().join("nodes");
        std::fs::create_dir(&nodes).unwrap();
        for node in 0..8 {
            std::fs::write(nodes.join(format!("vfio{node}")), "").unwrap();
        }
        let keeper = Kept::default();
        let pluggable = Pluggable {
            files: Some(Box::new(PipeFiles::new(host.clone(), usable()))),
            keeper: Some(Box::new(keeper.clone())),
            policy,
            directory: nodes,
        };
        let first = AssignedDevice {
            host: "01:00.0".parse().unwrap(),
            group: 1,
            node: "vfio/devices/vfio0".to_owned(),
            device_number: 0,
            plan: planned,
        };
        let registry = Arc::new(Registry::new(Arc::clone(&backend), vec![first], pluggable));
        let listener = UnixListener::bind(directory.path().join("control")).unwrap();
        let server = ControlServer::new(listener, Arc::clone(&registry), limits).unwrap();
        std::thread::spawn(move || server.run());
        Self { host, backend, registry, keeper, directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    fn node(&self, name: &str) -> PathBuf {
        self.directory.path().join("nodes").join(name)
    }

    fn client(&self) -> Client {
        Client::new(UnixStream::connect(self.path()).unwrap())
    }

    /// Asks as a new client.
    fn ask(&self, request: &Value) -> Value {
        self.client().ask(request)
    }

    /// Adds endpoints of one group, each with a file; what came of it, and the files' other ends.
    fn add(&self, addition: &Value) -> (Value, Vec<Closed>) {
        let count = addition["devices"].as_array().unwrap().len();
        let (files, closed): (Vec<_>, Vec<_>) = (0..count).map(|_| files::pipe()).unzip();
        let reply = self.client().ask_with(&json!({ "add": addition }), &files);
        (reply, closed)
    }

    /// A guest behind the backend, with all features and memory.
    fn guest(&self) -> Machine {
        let path = self.directory.path().join("socket");
        let mut listener = Listener::from(UnixListener::bind(&path).unwrap());
        let mut daemon = self.backend.daemon("test").unwrap();
        let stream = UnixStream::connect(&path).unwrap();
        std::thread::spawn(move || {
            daemon.start(&mut listener).unwrap();
            daemon.wait()
        });
        let mut machine = Machine::over(stream, guest_memory(MEMORY_SIZE));
        machine.start();
        // When that is answered, all that came before was done.
        machine.config();
        machine
    }
}

/// A device of host IOMMU group 7, with all that is known of it.
fn device(id: &str, host: &str, node: &str) -> Value {
    json!({ "id": id, "host": host, "node": node, "granule": 4096,
        "facts": { "usable": [["0x0", "0xfedfffff"], ["0xfef00000", "0x7fffffffff"]] } })
}

/// The only device of host IOMMU group 7.
fn addition() -> Value {
    json!({ "group": 7, "vfio_members": ["0000:05:00.0"], "devices": [device(NEW_TEXT, "0000:05:00.0", "vfio1")] })
}

/// The kind and the text of a refusal.
fn refusal(reply: &Value) -> (&str, &str) {
    let refused = &reply["refused"];
    assert!(refused.is_object(), "{reply}");
    (refused["kind"].as_str().unwrap(), refused["message"].as_str().unwrap())
}

/// A client that speaks the protocol by hand.
struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream: BufReader::new(stream) }
    }

    fn write(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    /// Asks, and returns what is in the reply.
    fn ask(&mut self, request: &Value) -> Value {
        self.ask_with(request, &[])
    }

    fn ask_with(&mut self, request: &Value, files: &[std::os::fd::OwnedFd]) -> Value {
        let line = format!("{}\n", json!({ "version": 1, "request": request }));
        let files: Vec<BorrowedFd> = files.iter().map(std::os::fd::AsFd::as_fd).collect();
        files::send(self.stream.get_ref(), line.as_bytes(), &files);
        self.next().expect("an answer")
    }

    /// The next line's reply; `None` at the end.
    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        // One that is closed with something unread is reset.
        if self.stream.read_line(&mut line).unwrap_or(0) == 0 {
            return None;
        }
        let mut answer: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(answer["version"], 1);
        Some(answer["reply"].take())
    }
}
