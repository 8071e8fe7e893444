// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests, translations, and all else that can happen to a device, at the same time. What was answered holds, and nobody waits for
//! ever. `SOAK_SECONDS` says for how long.

#![cfg(all(feature = "embed", feature = "translate", feature = "vhost-user", feature = "test-utils"))]
#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod embedded;
mod vhost_user;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::status::{INVAL, NOENT, OK};
use virtio_iommu::access::Access;
use virtio_iommu::translate::Translator;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const PAGE: u64 = 0x1000;
/// How many addresses are mapped and unmapped.
const SLOTS: u64 = 8;
/// The pages that they are mapped to, by turns.
const TARGETS: [u64; 3] = [0x1_0000, 0x1_1000, 0x1_2000];
/// What is mapped all the time, to memory that comes and goes.
const FIXED: u64 = 0x80_0000;
const HIGH: u64 = 0x1_0000_0000;
const READ_WRITE: u32 = 3;

fn slot(round: u64) -> u64 {
    // Neighbours share a node of the translation, but not all of them.
    let slot = round % SLOTS;
    0x10_0000 + (slot << if slot < 4 { 12 } else { 19 })
}

/// Something that is done over and over, told how often it was done before.
type Work<'w> = Box<dyn FnMut(u64) + Send + 'w>;

/// Ends the others when one panics.
struct EndOnPanic<'e>(&'e AtomicBool);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Does all of it at the same time. Ends the process if anything does not go on.
fn at_once(works: Vec<(&'static str, Work<'_>)>) {
    const LEAST: u64 = 50;
    const PATIENCE: Duration = Duration::from_secs(30);
    let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let end = Instant::now() + Duration::from_secs(seconds);
    let ended = &AtomicBool::new(false);
    let watched: Vec<_> = works.iter().map(|(name, _)| (*name, AtomicU64::new(0))).collect();
    std::thread::scope(|scope| {
        let spawn = |((_, mut work), (_, rounds)): ((_, Work<'_>), &'_ (_, AtomicU64))| {
            let _end = EndOnPanic(ended);
            while !ended.load(Ordering::Relaxed) {
                work(rounds.fetch_add(1, Ordering::Relaxed));
            }
        };
        let pairs = works.into_iter().zip(&watched);
        let threads: Vec<_> = pairs.map(|pair| scope.spawn(move || spawn(pair))).collect();
        let mut seen = vec![(0, Instant::now()); watched.len()];
        while threads.iter().any(|thread| !thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(5));
            for (((name, rounds), thread), (last, since)) in watched.iter().zip(&threads).zip(&mut seen) {
                let now = rounds.load(Ordering::Relaxed);
                if now != *last || thread.is_finished() {
                    (*last, *since) = (now, Instant::now());
                } else if since.elapsed() > PATIENCE {
                    eprintln!("{name} does not go on after {now} rounds");
                    std::process::abort();
                }
            }
            // On a machine that has no time for all of them, until each had its turns.
            if Instant::now() > end && seen.iter().all(|(rounds, _)| *rounds >= LEAST) {
                ended.store(true, Ordering::Relaxed);
            }
        }
    });
    for (name, rounds) in watched {
        println!("{name}: {} rounds", rounds.into_inner());
    }
}

/// Where an address leads.
fn reach(translator: &Translator, iova: u64) -> Option<u64> {
    translator.pin().translate(iova, 1, Access::WRITE).ok().map(|segment| segment.start.0)
}

/// A device that writes wherever it may, a byte of its own in each page.
fn write_everywhere<M: GuestMemoryBackend>(
    translator: &Translator,
    memory: impl Fn() -> M,
    device: u8,
    writes: &AtomicU64,
) {
    for turn in 0..SLOTS {
        let pinned = translator.pin();
        let found = pinned.translate(slot(turn) + u64::from(device), 1, Access::WRITE);
        if let Ok(segment) = found {
            let memory = memory();
            for _ in 0..500 {
                std::hint::spin_loop();
            }
            memory.write_obj(device, segment.start).unwrap();
            writes.fetch_add(1, Ordering::Relaxed);
        }
    }
    std::thread::yield_now();
}

/// Not a byte of a page is touched that was unmapped and answered.
fn is_left_alone<M: GuestMemoryBackend>(memory: &M, page: u64, round: u64) {
    let pattern = [round as u8 | 0x80; PAGE as usize];
    memory.write_slice(&pattern, GuestAddress(page)).unwrap();
    let mut found = [0; PAGE as usize];
    for _ in 0..20 {
        memory.read_slice(&mut found, GuestAddress(page)).unwrap();
        assert!(found == pattern, "round {round}: written after the answer");
    }
}

/// As long as it takes for a mapping to be used at times, and not at others.
fn pause(round: u64) {
    for _ in 0..(round % 50) * 40 {
        std::hint::spin_loop();
    }
}
