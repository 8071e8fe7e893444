// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest of the host VM puts its IOMMU under: reads of its disk, or the kernel's own benchmark of mappings. One line says what
//! they took.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use rustix::fs::{OFlags, SeekFrom, seek};
use rustix::ioctl::{Updater, ioctl, opcode};

const BLOCK: usize = 4096;

/// A block's place in memory: what is read past the page cache must be aligned.
#[repr(align(4096))]
struct Block([u8; BLOCK]);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["reads", disk, count] => reads(disk, count.parse().expect("a number")),
        ["maps", seconds] => maps(seconds.parse().expect("a number")),
        _ => {
            eprintln!("usage: load reads DISK COUNT | load maps SECONDS");
            std::process::exit(2);
        }
    }
}

/// Reads blocks all over a disk, one after the other, each by a DMA of its own.
fn reads(disk: &str, count: u64) {
    let file = File::options().read(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(disk).unwrap();
    let mut block = Box::new(Block([0; BLOCK]));
    let length = block.0.len() as u64;
    let blocks = seek(&file, SeekFrom::End(0)).unwrap() / length;
    let start = Instant::now();
    for number in 0..count {
        // Neighbours in time are far from each other on the disk (the step is large, and odd), and the same for every run.
        let place = number * 40_503 % blocks;
        file.read_exact_at(&mut block.0, place * length).unwrap();
    }
    println!("load: {count} reads took {} ns", start.elapsed().as_nanos());
}

/// `struct map_benchmark` of Linux, `include/uapi/linux/map_benchmark.h`.
#[repr(C)]
struct MapBenchmark {
    average_map_100ns: u64,
    map_deviation: u64,
    average_unmap_100ns: u64,
    unmap_deviation: u64,
    threads: u32,
    seconds: u32,
    node: i32,
    dma_bits: u32,
    direction: u32,
    transmission_ns: u32,
    granule: u32,
    expansion: [u8; 76],
}

/// `DMA_MAP_FROM_DEVICE`: nothing is written to the page between two mappings of it.
const FROM_DEVICE: u32 = 2;
/// `NUMA_NO_NODE`
const NO_NODE: i32 = -1;

/// Has the kernel map and unmap a page over and over for the device that is bound to its benchmark.
fn maps(seconds: u32) {
    let file = File::options().read(true).write(true).open("/sys/kernel/debug/dma_map_benchmark").unwrap();
    let mut benchmark = MapBenchmark {
        average_map_100ns: 0,
        map_deviation: 0,
        average_unmap_100ns: 0,
        unmap_deviation: 0,
        threads: 1,
        seconds,
        node: NO_NODE,
        dma_bits: 32,
        direction: FROM_DEVICE,
        transmission_ns: 0,
        granule: 1,
        expansion: [0; 76],
    };
    // SAFETY: DMA_MAP_BENCHMARK is _IOWR('d', 1, struct map_benchmark): the kernel reads and writes as many bytes as the structure has,
    // any of which are valid in it, and keeps nothing of it.
    #[allow(unsafe_code)]
    unsafe {
        let call = Updater::<{ opcode::read_write::<MapBenchmark>(b'd', 1) }, _>::new(&mut benchmark);
        ioctl(&file, call).unwrap();
    }
    let [map, unmap] = [benchmark.average_map_100ns, benchmark.average_unmap_100ns].map(|time| time * 100);
    println!("load: {seconds} s of maps, each {map} ns, unmaps, each {unmap} ns");
}
