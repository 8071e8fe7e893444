// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Several threads at once, and memory.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virtio_iommu::access::Access;

use crate::translation::{Emulated, MAPPINGS, PAGE, locked_map, look_up, physical, range};
use crate::{median, pages};

const RUNS: usize = 7;
const RUN: Duration = Duration::from_millis(300);

/// Reader threads, and whether a writer maps and unmaps beside them without pause.
const SETTINGS: [(&str, usize, bool); 3] = [("1", 1, false), ("2", 2, false), ("1+writer", 1, true)];

pub fn measure() -> Vec<(String, Value)> {
    let mut figures = Vec::new();
    for (kind, sparse) in [("dense", false), ("sparse", true)] {
        let pages = pages(sparse, MAPPINGS);
        let emulated = Emulated::with(&pages);
        let map = locked_map(&pages);
        for (name, readers, writer) in SETTINGS {
            eprintln!("bench: readers/{kind}/{name}");
            let read = |rounds: &[u64]| {
                let pinned = emulated.translator.pin();
                for page in rounds {
                    let _ = black_box(pinned.translate(black_box(page * PAGE + 8), 8, Access::READ));
                }
            };
            let write = |page: u64| {
                emulated.table.unmap(range(page)).unwrap();
                emulated.map(page);
            };
            let read_map = |rounds: &[u64]| {
                for page in rounds {
                    black_box(look_up(&map, black_box(page * PAGE + 8)));
                }
            };
            let write_map = |page: u64| {
                map.write().unwrap().remove(&(page * PAGE));
                map.write().unwrap().insert(page * PAGE, (page * PAGE + PAGE - 1, physical(page)));
            };
            // Both in turn, so that a change of the machine's speed is in both.
            let mut runs = [Vec::new(), Vec::new()];
            for _ in 0..RUNS {
                runs[0].push(lookups(&pages, readers, writer, &read, &write));
                runs[1].push(lookups(&pages, readers, writer, &read_map, &write_map));
            }
            let [ours, theirs] = runs.map(median);
            figures.push((format!("readers/{kind}/{name}"), json!({ "millions_per_second": ours })));
            figures.push((format!("readers/{kind}/{name}/btreemap"), json!({ "millions_per_second": theirs })));
        }
    }
    figures
}

/// Million lookups in a second, of all readers together. They pin, or lock, once for 16 lookups, or for each.
fn lookups(
    pages: &[u64],
    readers: usize,
    writer: bool,
    read: &(impl Fn(&[u64]) + Sync),
    write: &(impl Fn(u64) + Sync),
) -> f64 {
    let (ended, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for reader in 0..readers {
            let (ended, count) = (&ended, &count);
            let start = reader * pages.len() / readers;
            scope.spawn(move || {
                let mut done = 0;
                for chain in pages[start..].chunks(16).chain(pages.chunks(16).cycle()) {
                    if ended.load(Ordering::Relaxed) {
                        break;
                    }
                    read(chain);
                    done += chain.len() as u64;
                }
                count.fetch_add(done, Ordering::Relaxed);
            });
        }
        if writer {
            let ended = &ended;
            scope.spawn(move || {
                for page in pages.iter().rev().cycle() {
                    if ended.load(Ordering::Relaxed) {
                        break;
                    }
                    write(*page);
                }
            });
        }
        std::thread::sleep(RUN);
        ended.store(true, Ordering::Relaxed);
    });
    count.into_inner() as f64 / start.elapsed().as_secs_f64() / 1e6
}

/// What the process grows by, for each of many mappings that are all looked up. To be called before anything was freed.
pub fn bytes_per_mapping() -> f64 {
    let resident = || -> f64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * PAGE as f64
    };
    let count = MAPPINGS * 8;
    let mut pages: Vec<u64> = (0..count).collect();
    crate::Random(1).shuffle(&mut pages);
    let before = resident();
    let emulated = Emulated::with(&pages);
    let after = resident();
    drop(emulated);
    (after - before) / count as f64
}
