// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a driver's kick to the used index, over vhost-user: two processes, of which one serves the device. Behind it is no host.
//! The driver spins until all that it sent is answered, as Linux's does.

use std::fs::File;
use std::hint::spin_loop;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, Listener, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_iommu::queue::Polling;
use virtio_iommu::spec::feature::RING_EVENT_IDX;
use virtio_iommu::vhost_user::{BackendOptions, IommuBackend, OnStop};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::driver::{AVAILABLE, DESCRIPTORS, Driver, MEMORY_SIZE, Memory, QUEUE_SIZE, Request, USED};
use crate::machine::{DOMAIN, ENDPOINT, LAST_INPUT, Ours, map};
use crate::measure::{own_program, quantile};

const QUEUE: usize = 0;
const WARM_UP: usize = 200;
const BATCHES: usize = 2000;
/// The device has nothing to do for so long before a kick.
const PAUSE: Duration = Duration::from_micros(300);
const PATIENCE: Duration = Duration::from_secs(20);

struct Exchange {
    name: &'static str,
    batch: u64,
    /// What passes before the kick.
    pause: Duration,
}

const EXCHANGES: [Exchange; 3] = [
    Exchange { name: "vhost_user/kick_to_used/1", batch: 1, pause: PAUSE },
    Exchange { name: "vhost_user/kick_to_used/1/back_to_back", batch: 1, pause: Duration::ZERO },
    Exchange { name: "vhost_user/kick_to_used/64", batch: 64, pause: PAUSE },
];

/// Nanoseconds for a batch: the median, and what a tenth of all batches is below and above.
pub fn measure(wanted: impl Fn(&str) -> bool) -> Vec<(String, Value)> {
    let wanted = EXCHANGES.iter().filter(|exchange| wanted(exchange.name));
    wanted.map(|exchange| (exchange.name.to_owned(), figures(exchange))).collect()
}

fn figures(exchange: &Exchange) -> Value {
    let mut machine = Machine::start();
    machine.send(&[Request::attach(DOMAIN, ENDPOINT)]);
    let maps: Vec<Request> = (0..exchange.batch).map(map).collect();
    let mut times = Vec::with_capacity(BATCHES);
    for index in 0..WARM_UP + BATCHES {
        let pause = Instant::now();
        while pause.elapsed() < exchange.pause {
            spin_loop();
        }
        let time = machine.send(&maps);
        if index >= WARM_UP {
            times.push(time.as_secs_f64() * 1e9);
        }
        machine.send(&[Request::unmap(DOMAIN, 0, LAST_INPUT)]);
    }
    machine.stop();
    let [low, middle, high] = [0.1, 0.5, 0.9].map(|part| quantile(times.clone(), part));
    json!({ "ns": middle, "ns_p10": low, "ns_p90": high })
}

/// A driver, its VMM, and the process that serves its device.
struct Machine {
    driver: Driver,
    kick: EventFd,
    /// The device's process ends when this is gone.
    frontend: Frontend,
    server: Child,
}

impl Machine {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let server = Command::new(own_program()).arg("serve").arg(&socket).stdin(Stdio::null()).spawn().unwrap();
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY_SIZE as u64).unwrap();
        let region = (GuestAddress(0), MEMORY_SIZE, Some(FileOffset::new(file, 0)));
        let driver = Driver::new(Memory::from_ranges_with_files([region]).unwrap());
        let mut frontend = Frontend::from_stream(connect(&socket), 2);
        let kick = EventFd::new(0).unwrap();
        set_up(&mut frontend, &driver.memory, &kick);
        Self { driver, kick, frontend, server }
    }

    /// Sends requests; what passed from the kick until all were answered. Each was answered with OK.
    fn send(&mut self, requests: &[Request]) -> Duration {
        self.driver.post(requests);
        let start = Instant::now();
        self.kick.write(1).unwrap();
        while !self.driver.is_answered() {
            assert!(start.elapsed() < PATIENCE, "the device does not answer");
            spin_loop();
        }
        let elapsed = start.elapsed();
        self.driver.check();
        elapsed
    }

    fn stop(self) {
        let Self { frontend, mut server, .. } = self;
        drop(frontend);
        assert!(server.wait().unwrap().success(), "the device's process ended well");
    }
}

fn connect(socket: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(start.elapsed() < PATIENCE, "nobody listens: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a VMM does before the driver sends something.
fn set_up(frontend: &mut Frontend, memory: &Memory, kick: &EventFd) {
    frontend.set_owner().unwrap();
    // This driver kicks whenever it sends something.
    let features = frontend.get_features().unwrap() & !RING_EVENT_IDX;
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol & !VhostUserProtocolFeatures::REPLY_ACK).unwrap();
    frontend.set_features(features).unwrap();
    let regions: Vec<_> =
        memory.iter().map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()).collect();
    frontend.set_mem_table(&regions).unwrap();
    let address = |guest| memory.get_host_address(GuestAddress(guest)).unwrap() as u64;
    let ring = VringConfigData {
        queue_max_size: QUEUE_SIZE,
        queue_size: QUEUE_SIZE,
        flags: 0,
        desc_table_addr: address(DESCRIPTORS),
        used_ring_addr: address(USED),
        avail_ring_addr: address(AVAILABLE),
        log_addr: None,
    };
    frontend.set_vring_num(QUEUE, QUEUE_SIZE).unwrap();
    frontend.set_vring_base(QUEUE, 0).unwrap();
    frontend.set_vring_addr(QUEUE, &ring).unwrap();
    frontend.set_vring_call(QUEUE, &EventFd::new(0).unwrap()).unwrap();
    frontend.set_vring_kick(QUEUE, kick).unwrap();
    frontend.set_vring_enable(QUEUE, true).unwrap();
}

/// Serves a device on a socket until its front end is gone.
pub fn serve(socket: &Path) {
    let backend = Arc::new(
        IommuBackend::new(Ours::in_software().device, BackendOptions { on_stop: OnStop::Keep, polling: Polling::Auto })
            .unwrap(),
    );
    let mut listener = Listener::from(UnixListener::bind(socket).unwrap());
    let mut daemon = backend.daemon("bench").unwrap();
    daemon.start(&mut listener).unwrap();
    // It ends with an error: the front end is gone.
    let _ = daemon.wait();
    backend.shut_down();
}
