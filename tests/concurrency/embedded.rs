// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device behind a VMM's lock.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::embed::{EmbeddedIommu, Transport};
use virtio_iommu::host::HostGroup;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::queue::QueueError;
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::translate::{EmulatedGroup, Limits, Translation, Translator};
use vm_memory::GuestMemoryMmap;

use super::common::{attach, detach, map, unmap};
use super::*;

const DISK: EndpointId = EndpointId(8);
const UNATTACHED: EndpointId = EndpointId(16);
const PLUGGED: EndpointId = EndpointId(24);
/// Where the bypass byte is in the configuration space.
const BYPASS: u64 = 36;

struct NoTransport;

impl Transport for NoTransport {
    fn buffers_used(&self, _queue: u16) {}

    fn needs_reset(&self, reason: &QueueError) {
        panic!("{reason}");
    }
}

type Iommu = EmbeddedIommu<Arc<GuestMemoryMmap>>;

fn device(groups: &[Arc<EmulatedGroup>]) -> VirtioIommu {
    let settings = Settings::new("0-ffffffffffff".parse().unwrap(), PAGE);
    let endpoints = groups.iter().map(|group| (group.members()[0], EndpointView::default())).collect();
    let groups = groups.iter().map(|group| Arc::clone(group) as Arc<dyn HostGroup>).collect();
    let mut device = VirtioIommu::new(settings, endpoints, groups).unwrap();
    device.set_memory(ram(true));
    device
}

/// Guest memory, with the part that comes and goes or without.
fn ram(with_high: bool) -> GuestRam {
    let ranges = [(GuestAddress(0), 0x20_0000), (GuestAddress(HIGH), PAGE)];
    GuestRam::in_software(&ranges[..=usize::from(with_high)]).unwrap()
}

fn send(device: &mut VirtioIommu, request: &[u8]) -> u8 {
    let mut reply = [0xaa; 4];
    assert_eq!(device.handle(request, &mut reply), 4);
    assert_eq!(reply[1..], [0; 3]);
    reply[0]
}

/// A VMM's device, and what is behind it.
struct Vmm {
    /// A lock that everybody gets in turn: with another, one can be kept waiting by the others for very long.
    iommu: Mutex<Iommu>,
    translation: Arc<Translation>,
    disk: Translator,
    unattached: Translator,
    memory: Arc<GuestMemoryMmap>,
}

fn attach_disk(device: &mut VirtioIommu) {
    assert_eq!(send(device, &attach(1, DISK.0, 0)), OK);
    // The memory may be away.
    send(device, &map(1, FIXED, PAGE, HIGH, READ_WRITE));
}

fn translation() -> Arc<Translation> {
    Translation::new(Limits { nodes: 256, nodes_per_domain: 64, ..Limits::default() })
}

impl Vmm {
    fn new() -> Self {
        let translation = translation();
        let groups = [DISK, UNATTACHED].map(|id| Arc::new(translation.group(vec![id])));
        let [disk, unattached] = [0, 1].map(|index| groups[index].translator([DISK, UNATTACHED][index]).unwrap());
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap());
        let mut device = device(&groups);
        device.set_driver_features(device.features());
        attach_disk(&mut device);
        let iommu = EmbeddedIommu::new(device, Arc::clone(&memory), Arc::new(NoTransport)).unwrap();
        Self { iommu: Mutex::new(iommu), translation, disk, unattached, memory }
    }

    fn lock(&self) -> MutexGuard<'_, Iommu> {
        self.iommu.lock()
    }

    /// A driver's MAP, and UNMAP or DETACH.
    fn requests(&self, round: u64) {
        let (iova, page) = (slot(round), TARGETS[(round % 3) as usize]);
        let mapped = {
            let mut iommu = self.lock();
            let device = iommu.device_mut();
            let request = map(1, iova, PAGE, page, READ_WRITE);
            match send(device, &request) {
                // The device was reset.
                NOENT => {
                    attach_disk(device);
                    assert_eq!(send(device, &request), OK);
                }
                status => assert_eq!(status, OK),
            }
            reach(&self.disk, iova)
        };
        assert_eq!(mapped, Some(page), "round {round}");
        pause(round);
        {
            let mut iommu = self.lock();
            let device = iommu.device_mut();
            let leaves = round.is_multiple_of(2);
            let status = send(device, &if leaves { detach(1, DISK.0) } else { unmap(1, iova, PAGE) });
            // As after a reset, if it was.
            assert!(matches!(status, OK | INVAL | NOENT), "round {round}: {status}");
            let found = reach(&self.disk, iova);
            // In no domain, an address may stand for itself.
            let may_be = (leaves || status != OK).then_some(iova);
            assert!(found.is_none() || found == may_be, "round {round}: {found:x?}");
        }
        is_left_alone(&*self.memory, page, round);
    }

    /// Writes to the configuration space.
    fn write_bypass(&self, round: u64) {
        let bypass = round % 2;
        let mut iommu = self.lock();
        iommu.write_config(BYPASS, &[bypass as u8]);
        assert_eq!(reach(&self.unattached, 0x5000), (bypass == 1).then_some(0x5000), "round {round}");
    }

    /// Memory that comes and goes.
    fn change_memory(&self, round: u64) {
        let with_high = round % 2 == 1;
        self.lock().device_mut().set_memory(ram(with_high));
        let found = reach(&self.disk, FIXED);
        assert!(found.is_none() || (with_high && found == Some(HIGH)), "round {round}: {found:x?}");
    }

    /// An endpoint that comes, is used, and goes.
    fn plug(&self, round: u64) {
        let group = Arc::new(self.translation.group(vec![PLUGGED]));
        let translator = group.translator(PLUGGED).unwrap();
        {
            let mut iommu = self.lock();
            let device = iommu.device_mut();
            device.add_group(group, vec![(PLUGGED, EndpointView::default())]).unwrap();
            assert_eq!(send(device, &attach(2, PLUGGED.0, 0)), OK, "round {round}");
            assert_eq!(send(device, &map(2, 0x5000, PAGE, 0x1000, READ_WRITE)), OK, "round {round}");
            assert_eq!(reach(&translator, 0x5000), Some(0x1000), "round {round}");
        }
        std::thread::yield_now();
        assert!(self.lock().device_mut().remove_endpoint(PLUGGED));
        assert_eq!(reach(&translator, 0x5000), None, "round {round}");
        assert_eq!(send(self.lock().device_mut(), &attach(2, PLUGGED.0, 0)), NOENT, "round {round}");
    }

    /// What is saved is what another device is then.
    fn save(&self) {
        let state = self.lock().device_mut().save();
        let others = translation();
        let groups: Vec<_> =
            [DISK, UNATTACHED, PLUGGED].into_iter().map(|id| Arc::new(others.group(vec![id]))).collect();
        let mut other = device(&groups);
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        for domain in &state.domains {
            for group in groups.iter().filter(|group| domain.endpoints.contains(&group.members()[0].0)) {
                let translator = group.translator(group.members()[0]).unwrap();
                for mapping in &domain.mappings {
                    assert_eq!(reach(&translator, mapping.first), Some(mapping.physical));
                }
            }
        }
    }

    /// Resets of the device and of the machine.
    fn reset(&self, round: u64) {
        std::thread::sleep(Duration::from_millis(2));
        let mut iommu = self.lock();
        if round % 3 == 2 {
            iommu.system_reset();
        } else {
            iommu.reset();
        }
        let device = iommu.device_mut();
        device.set_driver_features(device.features());
        // In bypass an address stands for itself, where there is memory; no mapping is left.
        for iova in (0..SLOTS).map(slot).chain([FIXED]) {
            let found = reach(&self.disk, iova);
            assert!(found.is_none_or(|found| found == iova), "round {round}: {found:x?}");
        }
        assert_eq!(device.save().domains, []);
    }
}

#[test]
fn what_was_answered_holds_whatever_else_a_vmm_does() {
    let vmm = &Vmm::new();
    let writes = &AtomicU64::new(0);
    let mut last = 0;
    let statistics = move |round: u64| {
        let answered = vmm.lock().device_mut().statistics().map.ok();
        assert!(answered >= last, "round {round}");
        last = answered;
        std::thread::yield_now();
    };
    let mut works: Vec<(&'static str, Work<'_>)> = vec![
        ("requests", Box::new(|round| vmm.requests(round))),
        ("bypass", Box::new(|round| vmm.write_bypass(round))),
        ("memory", Box::new(|round| vmm.change_memory(round))),
        ("plugging", Box::new(|round| vmm.plug(round))),
        ("saving", Box::new(|_| vmm.save())),
        ("resets", Box::new(|round| vmm.reset(round))),
        ("statistics", Box::new(statistics)),
    ];
    for device in 0..2 {
        let memory = || GuestMemoryMmap::clone(&vmm.memory);
        works.push(("writes", Box::new(move |_| write_everywhere(&vmm.disk, memory, device, writes))));
    }
    at_once(works);
    assert!(writes.load(Ordering::Relaxed) > 0, "the device wrote while it could");
}
