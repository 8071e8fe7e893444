// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! No memory left, at every point of the requests that a guest can send by the million: MAP is answered with NOMEM and changes
//! nothing, UNMAP and PROBE need none. (What grows with endpoints alone, an ATTACH, is bounded by the configuration; as in any Rust
//! program it ends the process, and with that all DMA, if there is no memory for it.)

#![allow(clippy::unwrap_used)]

use std::alloc::System;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cap::Cap;
use virtio_iommu::access::Access;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::{AttachError, Constraints, HostError, HostGroup, IoPageTable, MapError};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::{GuestRam, HostSegment};
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::EndpointView;
use vm_memory::GuestAddress;

#[allow(dead_code)]
#[path = "common/alone.rs"]
mod alone;

use alone::alone;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

const ENDPOINT: u32 = 8;
const PAGE: u64 = 0x1000;
const RAM: u64 = 0x10_0000;
const OK: u8 = 0;
const NOMEM: u8 = 8;
const UNTOUCHED: u8 = 0xaa;
/// More than one request ever asks for.
const PLENTY: usize = 1 << 20;

/// A group on a host that has memory of its own: it keeps how many bytes are mapped, and takes none to do so.
#[derive(Debug, Default)]
struct Group {
    mapped: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Table(Arc<AtomicU64>);

impl HostGroup for Group {
    fn members(&self) -> &[EndpointId] {
        &[EndpointId(ENDPOINT)]
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        Ok(Arc::new(Table(Arc::clone(&self.mapped))))
    }

    fn can_share(&self, _table: &dyn IoPageTable) -> bool {
        false
    }

    fn attach(&self, _table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        Ok(())
    }

    fn block(&self) {}
}

impl IoPageTable for Table {
    fn map(&self, iova: IovaRange, to: &[HostSegment], _access: Access) -> Result<(), MapError> {
        let length = iova.length().unwrap();
        assert_eq!(to.iter().map(HostSegment::length).sum::<u64>(), length);
        self.0.fetch_add(length, Ordering::Relaxed);
        Ok(())
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        // The requests of this test leave no hole in what they unmap.
        let length = iova.length().unwrap();
        self.0.fetch_sub(length, Ordering::Relaxed);
        Ok(length)
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        Ok(Constraints { usable: RangeSet::from(IovaRange::ALL), granule: PAGE })
    }
}

/// The device in front of it, with an endpoint in domain 1.
struct Machine {
    device: VirtioIommu,
    mapped: Arc<AtomicU64>,
}

impl Machine {
    fn new() -> Self {
        let group = Group::default();
        let mapped = Arc::clone(&group.mapped);
        let settings = Settings::new(IovaRange::new(0, (1 << 48) - 1).unwrap(), PAGE);
        let endpoints = vec![(EndpointId(ENDPOINT), EndpointView::default())];
        let mut device = VirtioIommu::new(settings, endpoints, vec![Arc::new(group)]).unwrap();
        // Two regions side by side, so that a mapping can be in two pieces.
        let ram = [(GuestAddress(0), RAM / 2), (GuestAddress(RAM / 2), RAM / 2)];
        device.set_memory(GuestRam::in_software(&ram).unwrap());
        device.set_driver_features(device.features());
        device.write_config(36, &[0]);
        let mut machine = Self { device, mapped };
        assert_eq!(machine.send(&request(1, &[1, ENDPOINT, 0, 0]), PLENTY), OK);
        machine.mapped.store(0, Ordering::Relaxed);
        machine
    }

    /// Sends a request while there is so much memory left; its status.
    fn send(&mut self, request: &[u8], left: usize) -> u8 {
        let mut reply = [UNTOUCHED; 4];
        MEMORY.set_limit(MEMORY.allocated() + left).unwrap();
        let used = self.device.handle(request, &mut reply);
        MEMORY.set_limit(usize::MAX).unwrap();
        assert_eq!((used, &reply[1..]), (4, &[0; 3][..]));
        reply[0]
    }

    /// What the domain maps, and how many bytes the host does.
    fn mappings(&mut self) -> (Vec<u64>, u64) {
        let state = self.device.save();
        let mappings = state.domains.iter().flat_map(|domain| &domain.mappings);
        (mappings.map(|mapping| mapping.first).collect(), self.mapped.load(Ordering::Relaxed))
    }
}

fn request(kind: u8, fields: &[u32]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    bytes
}

fn range(kind: u8, first: u64, pages: u64) -> Vec<u8> {
    let mut bytes = request(kind, &[1]);
    bytes.extend((first * PAGE).to_le_bytes());
    bytes.extend(((first + pages) * PAGE - 1).to_le_bytes());
    bytes
}

fn map(page: u64, pages: u64) -> Vec<u8> {
    let mut bytes = range(3, page, pages);
    bytes.extend((RAM / 2 - PAGE).to_le_bytes());
    bytes.extend(3u32.to_le_bytes());
    bytes
}

fn unmap(page: u64, pages: u64) -> Vec<u8> {
    let mut bytes = range(4, page, pages);
    bytes.extend([0; 4]);
    bytes
}

/// Sends a MAP with no memory, with a little more, and so on, until it is answered with OK; how many times it was not.
fn map_with_more_and_more(machine: &mut Machine, page: u64) -> usize {
    let request = map(page, 2);
    let before = machine.mappings();
    for refusals in 0.. {
        match machine.send(&request, refusals * 8) {
            OK => {
                let (mappings, bytes) = machine.mappings();
                assert_eq!((mappings.len(), bytes), (before.0.len() + 1, before.1 + 2 * PAGE));
                return refusals;
            }
            status => assert_eq!((status, machine.mappings()), (NOMEM, before.clone())),
        }
    }
    unreachable!("there is more memory each time")
}

/// Waits until the thread that started the test waits for its end: until then it takes memory.
fn wait_for_the_harness() {
    let stat = format!("/proc/self/task/{}/stat", std::process::id());
    while !std::fs::read_to_string(&stat).unwrap().contains(") S ") {
        std::thread::yield_now();
    }
}

/// The memory of the process is limited while this runs.
#[test]
fn a_map_without_memory_is_nomem_and_unmap_needs_none() {
    alone("a_map_without_memory_is_nomem_and_unmap_needs_none", || {
        wait_for_the_harness();
        a_map_without_memory();
    });
}

fn a_map_without_memory() {
    let mut machine = Machine::new();
    // In order, and then into every gap from the last one down, so that leaves of the table are split in both ways.
    let pages: Vec<u64> = (0..400).map(|page| page * 4).chain((0..400).rev().map(|page| page * 4 + 2)).collect();
    let refused: Vec<usize> = pages.iter().map(|page| map_with_more_and_more(&mut machine, *page)).collect();
    let short_of_memory = refused.iter().filter(|refusals| **refusals > 0).count();
    assert!((10..100).contains(&short_of_memory), "{short_of_memory} of 800 mappings took memory");

    assert_eq!(machine.send(&unmap(4, 2), 0), OK);
    assert_eq!(machine.send(&unmap(6, 394), 0), OK);
    assert_eq!(machine.mappings().0.len(), 800 - 198);
    assert_eq!(machine.send(&unmap(400, 1200), 0), OK);
    assert_eq!(machine.mappings(), (vec![0, 2 * PAGE], 4 * PAGE));
    let mut probe = request(5, &[ENDPOINT]);
    probe.resize(72, 0);
    let mut reply = vec![UNTOUCHED; 1536 + 4];
    MEMORY.set_limit(MEMORY.allocated()).unwrap();
    let used = machine.device.handle(&probe, &mut reply);
    MEMORY.set_limit(usize::MAX).unwrap();
    assert_eq!((used, reply.get(used - 4)), (reply.len(), Some(&OK)));
}
