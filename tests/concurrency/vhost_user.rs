// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device behind a connection, with an assigned device and one that is emulated in one domain.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, Listener, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::fake::{Attachment, FakeHost, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::queue::Polling;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::translate::{Limits, Translation, Translator};
use virtio_iommu::vhost_user::{BackendDaemon, BackendOptions, IommuBackend, OnStop};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::common::{Machine, attach, guest_memory, map, unmap};
use super::*;

const DISK: EndpointId = EndpointId(8);
const UNATTACHED: EndpointId = EndpointId(16);
const ASSIGNED: EndpointId = EndpointId(24);
/// Endpoints that are taken away one by one.
const LEAVING: std::ops::Range<u32> = 100..164;
const MEMORY_SIZE: usize = 0x20_0000;

/// A connection, and what is behind it.
struct Connection {
    host: FakeHost,
    backend: Arc<IommuBackend>,
    /// Of the emulated endpoints: the disk's, that of the one that is never attached, and those of the ones that leave.
    translators: Vec<Translator>,
    frontend: Frontend,
    /// Memory that comes and goes.
    high: File,
    /// Who changes memory, bypass or the whole device does not do it while another does.
    changing: Mutex<()>,
}

impl Connection {
    fn disk(&self) -> &Translator {
        &self.translators[0]
    }

    fn assigned(&self, iova: u64) -> Option<u64> {
        self.host.dma(ASSIGNED, iova, Access::WRITE)
    }

    /// Waits until what was said before is done.
    fn wait(&self) {
        self.frontend.get_features().unwrap();
    }

    /// Does something while the memory is there that comes and goes.
    fn with_high(&self, act: impl FnOnce()) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: HIGH,
            memory_size: PAGE,
            userspace_addr: 0x7fff_0000_0000,
            mmap_offset: 0,
            mmap_handle: self.high.as_raw_fd(),
        };
        let mut frontend = self.frontend.clone();
        frontend.add_mem_region(&region).unwrap();
        self.wait();
        act();
        frontend.remove_mem_region(&region).unwrap();
        self.wait();
    }

    fn populate(&self, machine: &mut Machine) {
        self.with_high(|| {
            assert_eq!(machine.send(&attach(1, DISK.0, 0)), OK);
            assert_eq!(machine.send(&attach(1, ASSIGNED.0, 0)), OK);
            assert_eq!(machine.send(&map(1, FIXED, PAGE, HIGH, READ_WRITE)), OK);
        });
    }

    /// A driver's MAP and UNMAP, with pauses and resets in between.
    fn requests(&self, machine: &mut Machine, round: u64) {
        let (iova, page) = (slot(round), TARGETS[(round % 3) as usize]);
        assert_eq!(machine.send(&map(1, iova, PAGE, page, READ_WRITE)), OK, "round {round}");
        assert_eq!((reach(self.disk(), iova), self.assigned(iova)), (Some(page), Some(page)), "round {round}");
        pause(round);
        if round % 16 == 5 {
            // A pause.
            let base = machine.stop_ring();
            machine.start_ring(base);
        }
        if round % 32 == 9 {
            let _changing = self.changing.lock();
            machine.frontend.reset_device().unwrap();
            self.wait();
            let found = reach(self.disk(), iova);
            assert!(found.is_none_or(|found| found == iova), "round {round}: {found:x?}");
            assert!(
                !matches!(self.host.attachment(ASSIGNED), Attachment::Table(_)) || self.assigned(iova) != Some(page)
            );
            machine.forget_ring();
            machine.start();
            self.populate(machine);
        } else {
            assert_eq!(machine.send(&unmap(1, iova, PAGE)), OK, "round {round}");
        }
        assert_eq!((reach(self.disk(), iova), self.assigned(iova)), (None, None), "round {round}");
        is_left_alone(&machine.memory, page, round);
    }

    /// Memory that comes and goes.
    fn change_memory(&self, round: u64) {
        let _changing = self.changing.lock();
        self.with_high(|| {
            assert_eq!((reach(self.disk(), FIXED), self.assigned(FIXED)), (Some(HIGH), Some(HIGH)), "round {round}");
        });
        assert_eq!((reach(self.disk(), FIXED), self.assigned(FIXED)), (None, None), "round {round}");
    }

    /// Writes to the configuration space.
    fn write_bypass(&self, round: u64) {
        let bypass = round % 2;
        let mut frontend = self.frontend.clone();
        let _changing = self.changing.lock();
        frontend.set_config(36, VhostUserConfigFlags::empty(), &[bypass as u8]).unwrap();
        let (_, config) = frontend.get_config(36, 1, VhostUserConfigFlags::empty(), &[0]).unwrap();
        assert_eq!(config, [bypass as u8]);
        assert_eq!(reach(&self.translators[1], 0x5000), (bypass == 1).then_some(0x5000), "round {round}");
    }

    /// Endpoints whose devices the host wants back.
    fn take_away(&self, round: u64) {
        // Not all at the start.
        std::thread::sleep(Duration::from_millis(5));
        if let Some(id) = LEAVING.clone().nth(round as usize) {
            self.backend.remove_endpoint(EndpointId(id));
        }
        for gone in self.translators.iter().skip(2).take(1 + round as usize) {
            assert_eq!(reach(gone, 0x5000), None, "round {round}");
        }
    }
}

/// A machine that is connected to a backend with all these endpoints.
fn connect() -> (Connection, Machine, BackendDaemon) {
    let translation = Translation::new(Limits { nodes: 256, nodes_per_domain: 64, ..Limits::default() });
    let group = |id: EndpointId| Arc::new(translation.group(vec![id]));
    let emulated: Vec<_> = [DISK, UNATTACHED].into_iter().chain(LEAVING.map(EndpointId)).map(group).collect();
    let translators = emulated.iter().map(|group| group.translator(group.members()[0]).unwrap()).collect();
    let host = FakeHost::new(Flavour::Iommufd);
    let mut groups: Vec<_> = emulated.iter().map(|group| Arc::clone(group) as Arc<dyn HostGroup>).collect();
    groups.push(host.group(&[ASSIGNED], RangeSet::from(IovaRange::ALL)));
    let ids = groups.iter().map(|group| (group.members()[0], EndpointView::default())).collect();
    let device = VirtioIommu::new(Settings::new("0-ffffffffffff".parse().unwrap(), PAGE), ids, groups).unwrap();
    let options = BackendOptions { on_stop: OnStop::Keep, polling: Polling::Auto };
    let backend = Arc::new(IommuBackend::new(device, options).unwrap());

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut listener = Listener::from(UnixListener::bind(&path).unwrap());
    let mut daemon = backend.daemon("test").unwrap();
    let stream = UnixStream::connect(&path).unwrap();
    daemon.start(&mut listener).unwrap();
    let mut machine = Machine::over(stream, guest_memory(MEMORY_SIZE));
    machine.start();

    let high: OwnedFd = memfd_create("high", MemfdFlags::CLOEXEC).unwrap();
    let high = File::from(high);
    high.set_len(PAGE).unwrap();
    let frontend = machine.frontend.clone();
    let connection = Connection { host, backend, translators, frontend, high, changing: Mutex::new(()) };
    connection.populate(&mut machine);
    (connection, machine, daemon)
}

#[test]
fn what_was_answered_holds_whatever_else_a_frontend_does() {
    let (connection, mut machine, mut daemon) = connect();
    let (ours, writes) = (&connection, &AtomicU64::new(0));
    let mut works: Vec<(&'static str, Work<'_>)> = vec![
        ("requests", Box::new(|round| ours.requests(&mut machine, round))),
        ("memory", Box::new(|round| ours.change_memory(round))),
        ("bypass", Box::new(|round| ours.write_bypass(round))),
        ("taking away", Box::new(|round| ours.take_away(round))),
    ];
    for device in 0..2 {
        let memory = || GuestMemoryMmap::clone(&ours.backend.memory().memory());
        works.push(("writes", Box::new(move |_| write_everywhere(ours.disk(), memory, device, writes))));
    }
    at_once(works);
    assert!(writes.load(Ordering::Relaxed) > 0, "the device wrote while it could");

    let Connection { host, backend, translators, frontend, .. } = connection;
    drop((machine, frontend));
    // However the connection ended.
    let _ = daemon.wait();
    backend.shut_down();
    assert!(translators.iter().all(|translator| reach(translator, 0x5000).is_none()));
    assert_eq!((host.attachment(ASSIGNED), host.table_count()), (Attachment::Blocked, 0));
}
