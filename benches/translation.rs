// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One lookup, and one read of guest memory by an I/O virtual address.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::{Arc, RwLock};

use virtio_iommu::access::Access;
use virtio_iommu::host::HostGroup;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::IovaRange;
use virtio_iommu::translate::{EmulatedGroup, Limits, Translation, Translator};
use vm_memory::iommu::{Error as IommuError, Iommu, Iotlb, IotlbIterator};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, IommuMemory, Permissions};

use crate::case::{Case, Layout, MAPPINGS, PAGE};

/// Does something so many times.
type Work = Box<dyn FnMut(u64)>;

/// Guest memory is this large, and mapped over and over.
const MEMORY_SIZE: u64 = 64 << 20;
const ROUNDS: u64 = 200_000;

pub fn cases() -> Vec<Case> {
    let case = |name, set_up: fn() -> Work| {
        let set_up = move || -> crate::case::Work {
            let mut work = set_up();
            Box::new(move |meter| meter.measure(|| work(ROUNDS)))
        };
        Case::new(name, ROUNDS, set_up).repeatable()
    };
    vec![
        case("translate/dense", || translate(Layout::Dense)),
        case("translate/dense/btreemap", || translate_by_map(Layout::Dense)),
        case("translate/sparse", || translate(Layout::Sparse)),
        case("translate/sparse/btreemap", || translate_by_map(Layout::Sparse)),
        case("translate/pin", pin),
        case("guest_memory/u64", read_by_translator),
        case("guest_memory/u64/iommu_memory", read_by_iommu_memory),
        case("guest_memory/u64/plain", read_plain),
    ]
}

/// An emulated endpoint on a table of its own.
pub struct Emulated {
    pub group: EmulatedGroup,
    pub table: Arc<dyn virtio_iommu::host::IoPageTable>,
    pub translator: Translator,
    ram: GuestRam,
}

impl Emulated {
    pub fn new() -> Self {
        let translation = Translation::new(Limits::default());
        let group = translation.group(vec![EndpointId(0)]);
        let table = group.new_table().unwrap();
        group.attach(&table).unwrap();
        let translator = group.translator(EndpointId(0)).unwrap();
        let ram = GuestRam::in_software(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
        Self { group, table, translator, ram }
    }

    pub fn map(&self, page: u64) {
        let segments = self.ram.segments(GuestAddress(physical(page)), PAGE).unwrap();
        self.table.map(range(page), &segments, Access::READ_WRITE).unwrap();
    }

    pub fn with(pages: &[u64]) -> Self {
        let emulated = Self::new();
        for page in pages {
            emulated.map(*page);
        }
        for page in pages {
            emulated.translator.pin().translate(page * PAGE, 8, Access::READ).unwrap();
        }
        emulated
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        self.group.block();
    }
}

pub fn range(page: u64) -> IovaRange {
    IovaRange::from_length(page * PAGE, PAGE).unwrap()
}

pub const fn physical(page: u64) -> u64 {
    page * PAGE % MEMORY_SIZE
}

fn translate(layout: Layout) -> Work {
    let pages = layout.pages(MAPPINGS);
    let emulated = Emulated::with(&pages);
    Box::new(move |rounds| {
        let pinned = emulated.translator.pin();
        for page in pages.iter().cycle().take(rounds as usize) {
            black_box(pinned.translate(black_box(page * PAGE + 8), 8, Access::READ).unwrap());
        }
    })
}

/// The same by a map under a lock, as others keep it: first address to last and target.
pub fn locked_map(pages: &[u64]) -> RwLock<BTreeMap<u64, (u64, u64)>> {
    RwLock::new(pages.iter().map(|page| (page * PAGE, (page * PAGE + PAGE - 1, physical(*page)))).collect())
}

pub fn look_up(map: &RwLock<BTreeMap<u64, (u64, u64)>>, iova: u64) -> Option<u64> {
    let map = map.read().unwrap();
    let (start, (last, target)) = map.range(..=iova).next_back()?;
    (iova <= *last).then(|| target + (iova - start))
}

fn translate_by_map(layout: Layout) -> Work {
    let pages = layout.pages(MAPPINGS);
    let map = locked_map(&pages);
    Box::new(move |rounds| {
        for page in pages.iter().cycle().take(rounds as usize) {
            black_box(look_up(&map, black_box(page * PAGE + 8)).unwrap());
        }
    })
}

fn pin() -> Work {
    let emulated = Emulated::new();
    Box::new(move |rounds| {
        for _ in 0..rounds {
            black_box(emulated.translator.pin());
        }
    })
}

fn memory() -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE as usize)]).unwrap()
}

fn read_by_translator() -> Work {
    let pages = Layout::Sparse.pages(MAPPINGS);
    let emulated = Emulated::with(&pages);
    let physical = memory();
    Box::new(move |rounds| {
        let memory = emulated.translator.memory(&physical);
        for page in pages.iter().cycle().take(rounds as usize) {
            black_box(memory.read_obj::<u64>(black_box(GuestAddress(page * PAGE + 8))).unwrap());
        }
    })
}

fn read_plain() -> Work {
    let pages = Layout::Sparse.pages(MAPPINGS);
    let memory = memory();
    Box::new(move |rounds| {
        for page in pages.iter().cycle().take(rounds as usize) {
            black_box(memory.read_obj::<u64>(black_box(GuestAddress(physical(*page) + 8))).unwrap());
        }
    })
}

/// As vm-memory's documentation proposes: an Iotlb behind a lock.
#[derive(Debug)]
struct LockedIotlb(RwLock<Iotlb>);

impl Iommu for LockedIotlb {
    type IotlbGuard<'a> = std::sync::RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, IommuError> {
        Ok(Iotlb::lookup(self.0.read().unwrap(), iova, length, access).expect("it is mapped"))
    }
}

fn read_by_iommu_memory() -> Work {
    let pages = Layout::Sparse.pages(MAPPINGS);
    let mut iotlb = Iotlb::new();
    for page in &pages {
        let (iova, target) = (GuestAddress(page * PAGE), GuestAddress(physical(*page)));
        iotlb.set_mapping(iova, target, PAGE as usize, Permissions::ReadWrite).unwrap();
    }
    let memory = IommuMemory::new(memory(), LockedIotlb(RwLock::new(iotlb)), true, ());
    Box::new(move |rounds| {
        for page in pages.iter().cycle().take(rounds as usize) {
            black_box(memory.read_obj::<u64>(black_box(GuestAddress(page * PAGE + 8))).unwrap());
        }
    })
}
