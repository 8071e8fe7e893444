// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device behind a connection, with an assigned device and one that is emulated in one domain.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Listener, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::fake::{Attachment, FakeHost, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::queue::Polling;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::translate::{Limits, Translation};
use virtio_iommu::vhost_user::{BackendOptions, IommuBackend, OnStop};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::common::{Machine, attach, guest_memory, map, unmap};
use super::*;

const DISK: EndpointId = EndpointId(8);
const UNATTACHED: EndpointId = EndpointId(16);
const ASSIGNED: EndpointId = EndpointId(24);
/// Endpoints that are taken away one by one.
const LEAVING: std::ops::Range<u32> = 100..164;
const MEMORY_SIZE: usize = 0x20_0000;

#[test]
fn what_was_answered_holds_whatever_else_a_frontend_does() {
    let translation = Translation::new(Limits { nodes: 256, nodes_per_domain: 64, ..Limits::default() });
    let group = |id: EndpointId| Arc::new(translation.group(vec![id]));
    let emulated: Vec<_> = [DISK, UNATTACHED].into_iter().chain(LEAVING.map(EndpointId)).map(group).collect();
    let translators: Vec<_> = emulated.iter().map(|group| group.translator(group.members()[0]).unwrap()).collect();
    let (disk, unattached) = (&translators[0], &translators[1]);

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

    // The frontend's other threads.
    let frontend = machine.frontend.clone();
    let high: OwnedFd = memfd_create("high", MemfdFlags::CLOEXEC).unwrap();
    let high = File::from(high);
    high.set_len(PAGE).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: HIGH,
        memory_size: PAGE,
        userspace_addr: 0x7fff_0000_0000,
        mmap_offset: 0,
        mmap_handle: high.as_raw_fd(),
    };
    // Answered when what was said before is done.
    let is_done = || assert!(frontend.get_features().is_ok());
    let with_high = |act: &mut dyn FnMut()| {
        let mut frontend = frontend.clone();
        frontend.add_mem_region(&region).unwrap();
        is_done();
        act();
        frontend.remove_mem_region(&region).unwrap();
        is_done();
    };
    // Who changes memory or resets the device does not do it while another does.
    let changing = Mutex::new(());
    let populate = |machine: &mut Machine| {
        with_high(&mut || {
            assert_eq!(machine.send(&attach(1, DISK.0, 0)), OK);
            assert_eq!(machine.send(&attach(1, ASSIGNED.0, 0)), OK);
            assert_eq!(machine.send(&map(1, FIXED, PAGE, HIGH, READ_WRITE)), OK);
        });
    };
    populate(&mut machine);
    let memory = machine.memory.clone();
    let assigned = |iova| host.dma(ASSIGNED, iova, Access::WRITE);
    let writes = AtomicU64::new(0);

    let driver = |round: u64| {
        let (iova, page) = (slot(round), TARGETS[(round % 3) as usize]);
        assert_eq!(machine.send(&map(1, iova, PAGE, page, READ_WRITE)), OK, "round {round}");
        assert_eq!((reach(disk, iova), assigned(iova)), (Some(page), Some(page)), "round {round}");
        pause(round);
        if round % 16 == 5 {
            // A pause.
            let base = machine.stop_ring();
            machine.start_ring(base);
        }
        if round % 32 == 9 {
            let _changing = changing.lock().unwrap();
            machine.frontend.reset_device().unwrap();
            is_done();
            let found = reach(disk, iova);
            assert!(found.is_none_or(|found| found == iova), "round {round}: {found:x?}");
            assert!(!matches!(host.attachment(ASSIGNED), Attachment::Table(_)) || assigned(iova) != Some(page));
            machine.forget_ring();
            machine.start();
            populate(&mut machine);
        } else {
            assert_eq!(machine.send(&unmap(1, iova, PAGE)), OK, "round {round}");
        }
        assert_eq!((reach(disk, iova), assigned(iova)), (None, None), "round {round}");
        is_left_alone(&memory, page, round);
    };
    let change_memory = |round: u64| {
        let _changing = changing.lock().unwrap();
        with_high(&mut || {
            assert_eq!((reach(disk, FIXED), assigned(FIXED)), (Some(HIGH), Some(HIGH)), "round {round}");
        });
        assert_eq!((reach(disk, FIXED), assigned(FIXED)), (None, None), "round {round}");
    };
    let bypass = |round: u64| {
        let bypass = round % 2;
        let mut frontend = frontend.clone();
        let _changing = changing.lock().unwrap();
        frontend.set_config(36, VhostUserConfigFlags::empty(), &[bypass as u8]).unwrap();
        let (_, config) = frontend.get_config(36, 1, VhostUserConfigFlags::empty(), &[0]).unwrap();
        assert_eq!(config, [bypass as u8]);
        assert_eq!(reach(unattached, 0x5000), (bypass == 1).then_some(0x5000), "round {round}");
    };
    let take_away = |round: u64| {
        // Not all at the start.
        std::thread::sleep(Duration::from_millis(5));
        if let Some(id) = LEAVING.clone().nth(round as usize) {
            backend.remove_endpoint(EndpointId(id));
        }
        for gone in translators.iter().skip(2).take(1 + round as usize) {
            assert_eq!(reach(gone, 0x5000), None, "round {round}");
        }
    };
    let mut works: Vec<(&'static str, Work<'_>)> = vec![
        ("requests", Box::new(driver)),
        ("memory", Box::new(change_memory)),
        ("bypass", Box::new(bypass)),
        ("taking away", Box::new(take_away)),
    ];
    for device in 0..2 {
        let memory = || GuestMemoryMmap::clone(&backend.memory().memory());
        let writes = &writes;
        works.push(("writes", Box::new(move |_| write_everywhere(disk, memory, device, writes))));
    }
    at_once(works);
    assert!(writes.into_inner() > 0, "the device wrote while it could");

    drop((machine, frontend));
    let _ = daemon.wait();
    backend.shut_down();
    assert!(translators.iter().all(|translator| reach(translator, 0x5000).is_none()));
    assert_eq!((host.attachment(ASSIGNED), host.table_count()), (Attachment::Blocked, 0));
}
