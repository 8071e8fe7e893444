// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The backend over a real socket and a real ring, on the model of a host.

#![cfg(all(feature = "vhost-user", feature = "test-utils"))]
#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "translate")]
mod emulated;
mod files;
mod large_maps;
mod measuring;
mod memory;
mod messages;
mod migrating;
mod raw;
mod regions;
mod requests;
mod running;
mod starts;

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;

use common::status::{FAULT, INVAL, NOENT, OK};
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

type Served = JoinHandle<Result<(), vhost_user_backend::Error>>;

struct Bench {
    host: FakeHost,
    backend: Arc<IommuBackend>,
    machine: Option<Machine>,
    daemon: Served,
}

/// A device with one endpoint, on the model of a host.
fn device(boot_bypass: bool, options: BackendOptions) -> (FakeHost, Arc<IommuBackend>) {
    let host = FakeHost::new(Flavour::Iommufd);
    let msi: IovaRange = "fee00000-feefffff".parse().unwrap();
    let input_range: IovaRange = "0-7fffffffff".parse().unwrap();
    let usable = RangeSet::from(input_range).subtract(&RangeSet::from(msi));
    let view = EndpointView::new(vec![ReservedRegion { range: msi, kind: ReservedKind::Msi }]).unwrap();
    let settings = Settings { boot_bypass, map_step: MAP_STEP, ..Settings::new(input_range, 0x1000) };
    let device = VirtioIommu::new(settings, vec![(ID, view)], vec![host.group(&[ID], usable)]).unwrap();
    (host, Arc::new(IommuBackend::new(device, options).unwrap()))
}

impl Bench {
    fn new(boot_bypass: bool, on_stop: OnStop) -> Self {
        Self::with(boot_bypass, BackendOptions { on_stop, polling: Polling::Auto })
    }

    fn with(boot_bypass: bool, options: BackendOptions) -> Self {
        let (host, backend) = device(boot_bypass, options);
        let (daemon, stream) = serve(&backend);
        let machine = Machine::over(stream, guest_memory(MEMORY_SIZE));
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
        // However the connection ended; the library's threads did not panic.
        assert!(!matches!(self.daemon.join().unwrap(), Err(vhost_user_backend::Error::WaitDaemon(_))));
        self.backend.shut_down();
        assert_eq!(self.host.attachment(ID), Attachment::Blocked);
        assert_eq!(self.host.table_count(), 0);
    }
}

/// The library only logs that the thread of the rings panicked: that ends the tests.
fn abort_if_the_rings_thread_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            before(panic);
            if std::thread::current().name() == Some("vring_worker") {
                // What goes through the macros is kept from who reads the tests' output.
                let _ = writeln!(std::io::stderr(), "the thread of the rings: {panic}");
                std::process::abort();
            }
        }));
    });
}

/// Serves a backend over a connection.
fn serve(backend: &Arc<IommuBackend>) -> (Served, UnixStream) {
    abort_if_the_rings_thread_panics();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut listener = Listener::from(UnixListener::bind(&path).unwrap());
    let mut daemon = backend.daemon("test").unwrap();
    let stream = UnixStream::connect(&path).unwrap();
    let served = std::thread::spawn(move || {
        daemon.start(&mut listener).unwrap();
        daemon.wait()
    });
    (served, stream)
}
