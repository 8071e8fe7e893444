// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Several threads at once, and memory.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virtio_iommu::access::Access;

use crate::case::{Layout, MAPPINGS, PAGE};
use crate::measure::{in_process_of_its_own, median};
use crate::store::resident;
use crate::translation::{Emulated, locked_map, look_up, physical, range};

const RUNS: usize = 7;
const RUN: Duration = Duration::from_millis(300);

/// Reader threads, and whether a writer maps and unmaps beside them without pause.
const SETTINGS: [(&str, usize, bool); 3] = [("1", 1, false), ("2", 2, false), ("1+writer", 1, true)];

/// What a mapping takes that was looked up: what a process grows by.
pub const BYTES: &str = "translate/bytes_per_mapping/dense";

pub fn measure(wanted: impl Fn(&str) -> bool) -> Vec<(String, Value)> {
    let mut figures = Vec::new();
    if wanted(BYTES) {
        let bytes: f64 = in_process_of_its_own(&["bytes", BYTES]).trim().parse().expect("a number");
        figures.push((BYTES.to_owned(), json!({ "bytes": bytes })));
    }
    for (kind, layout) in [("dense", Layout::Dense), ("sparse", Layout::Sparse)] {
        let settings = SETTINGS.iter().map(|setting| (format!("readers/{kind}/{}", setting.0), setting));
        let settings: Vec<_> = settings.filter(|(name, _)| wanted(name)).collect();
        if settings.is_empty() {
            continue;
        }
        let pages = layout.pages(MAPPINGS);
        let emulated = Emulated::with(&pages);
        let map = locked_map(&pages);
        for (name, (_, readers, writer)) in settings {
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
                runs[0].push(lookups(&pages, *readers, *writer, &read, &write));
                runs[1].push(lookups(&pages, *readers, *writer, &read_map, &write_map));
            }
            let [ours, theirs] = runs.map(median);
            figures.push((format!("{name}/btreemap"), json!({ "millions_per_second": theirs })));
            figures.push((name, json!({ "millions_per_second": ours })));
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
    let count = MAPPINGS * 8;
    let pages = Layout::Dense.pages(count);
    let before = resident();
    let emulated = Emulated::with(&pages);
    let after = resident();
    drop(emulated);
    (after - before) / count as f64
}
