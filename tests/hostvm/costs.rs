// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What MAP and UNMAP cost on this host, printed for docs/host-backends.md. Nothing is asserted about time.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_iommu::access::Access;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::IovaRange;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::embedded::{BACKENDS, group_of};
use crate::pci::{EDU, find};

const PAGE: u64 = 0x1000;
const SIZE: u64 = 256 << 20;
const MAPPINGS: u64 = 4096;

/// What guest memory is made of.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// A memfd.
    File,
    /// A memfd of huge pages.
    HugeFile,
    Anonymous,
}

/// Memory of this kind and size, with all its pages there or none.
fn ram(kind: Kind, resident: bool) -> GuestRam {
    let file = |flags| {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC | flags).unwrap();
        ftruncate(&file, SIZE).unwrap();
        Some(FileOffset::new(File::from(file), 0))
    };
    let file = match kind {
        Kind::File => file(MemfdFlags::empty()),
        Kind::HugeFile => file(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB),
        Kind::Anonymous => None,
    };
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files([(GuestAddress(0), SIZE as usize, file)]).unwrap();
    if resident {
        for page in 0..SIZE / PAGE {
            vm_memory::Bytes::write_slice(&memory, &[1], GuestAddress(page * PAGE)).unwrap();
        }
    }
    GuestRam::from_mmap(&memory).unwrap()
}

fn time(act: impl FnOnce()) -> Duration {
    let start = Instant::now();
    act();
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
#[ignore = "tests/hostvm/run costs"]
fn of_map_and_unmap() {
    // Twice the size: what was used last is given back when its table is.
    fs::write("/proc/sys/vm/nr_hugepages", ((2 * SIZE) >> 21).to_string()).unwrap();
    for backend in BACKENDS {
        let (group, _, _files, _kept) = group_of(&[find(EDU)], backend);
        let table = group.new_table().unwrap();
        group.attach(&table).unwrap();
        let kinds = [Kind::File, Kind::HugeFile, Kind::Anonymous];
        for (kind, resident) in kinds.into_iter().flat_map(|kind| [(kind, true), (kind, false)]) {
            let mut times = [Vec::new(), Vec::new()];
            for _ in 0..5 {
                let ram = ram(kind, resident);
                group.memory_changed(&ram);
                let all = IovaRange::from_length(1 << 32, SIZE).unwrap();
                let segments = ram.segments(GuestAddress(0), SIZE).unwrap();
                times[0].push(time(|| table.map(all, &segments, Access::READ_WRITE).unwrap()) * 4);
                times[1].push(time(|| assert_eq!(table.unmap(all).unwrap(), SIZE)) * 4);
            }
            let [map, unmap] = times.map(median);
            println!("cost: {backend:?} {kind:?} resident {resident}: MAP {map:?}/GiB, UNMAP {unmap:?}/GiB");
        }
        let ram = ram(Kind::File, true);
        group.memory_changed(&ram);
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..5 {
            times[0].push(time(|| {
                for page in 0..MAPPINGS {
                    let iova = IovaRange::from_length((1 << 32) + page * 2 * PAGE, PAGE).unwrap();
                    let segments = ram.segments(GuestAddress(page * PAGE), PAGE).unwrap();
                    table.map(iova, &segments, Access::READ_WRITE).unwrap();
                }
            }));
            let all = IovaRange::from_length(1 << 32, MAPPINGS * 2 * PAGE).unwrap();
            times[1].push(time(|| assert_eq!(table.unmap(all).unwrap(), MAPPINGS * PAGE)));
        }
        let [map, unmap] = times.map(|times| median(times) / u32::try_from(MAPPINGS).unwrap());
        println!("cost: {backend:?}: MAP of a page {map:?}, UNMAP of a range {unmap:?} for each mapping in it");
        group.block();
    }
}
