// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that write without pause while their mappings change.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;

const READERS: u64 = 3;
/// What is mapped and unmapped: each device has a page of its own behind each of these addresses.
const SLOTS: u64 = 8;

fn iova(slot: u64) -> u64 {
    // Neighbours share a node, but not all of them.
    0x10_0000 + (slot << if slot < 4 { 12 } else { 19 })
}

/// A device that writes wherever it may, each to a part of its own: what devices do to each other is not looked for.
fn write_everywhere(translator: &Translator, memory: &Memory, reader: u8, writes: &AtomicU64, ended: &AtomicBool) {
    let mut slot = 0;
    while !ended.load(Ordering::Relaxed) {
        slot = (slot + 1) % SLOTS;
        if slot == 0 {
            std::thread::yield_now();
        }
        translator.with_translation(iova(slot) + u64::from(reader) * 64, 64, Access::WRITE, |mut segments| {
            let Some(Ok(segment)) = segments.next() else { return };
            for _ in 0..100 {
                std::hint::spin_loop();
            }
            memory.write_slice(&[reader; 64], segment.start).unwrap();
            writes.fetch_add(1, Ordering::Relaxed);
        });
    }
}

/// Tells the devices to end, even if the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// After an UNMAP is answered, not a byte of what it unmapped is touched.
#[test]
fn nothing_is_touched_after_an_unmap_is_answered() {
    let mut machine = Machine::new(Limits { nodes: 64, ..Limits::default() }, false);
    assert_eq!(machine.attach(1, DISK), OK);
    let (ended, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let end = Instant::now() + Duration::from_secs(seconds);
    let patience = end + Duration::from_secs(30);
    let disk = machine.disk.clone();
    let memory = machine.memory.clone();
    let rounds = std::thread::scope(|scope| {
        for reader in 0..READERS {
            let (disk, memory, writes, ended) = (&disk, &memory, &writes, &ended);
            scope.spawn(move || write_everywhere(disk, memory, reader as u8, writes, ended));
        }
        let _ends = Ends(&ended);
        let mut rounds = 0u64;
        // On a machine that has no time for the writers, until one of them had a turn.
        let has_time = |now| now < end || writes.load(Ordering::Relaxed) == 0 && now < patience;
        while has_time(Instant::now()) {
            let slot = rounds % SLOTS;
            let page = (rounds % 3) * PAGE;
            assert_eq!(machine.map(1, iova(slot), PAGE, page, READ | WRITE), OK);
            // Long enough to be used at times, too short at others.
            for _ in 0..(rounds % 50) * 40 {
                std::hint::spin_loop();
            }
            if rounds.is_multiple_of(2) {
                assert_eq!(machine.detach(1, DISK), OK);
                assert_eq!(machine.attach(1, DISK), OK);
            } else {
                assert_eq!(machine.unmap(1, iova(slot), PAGE), OK);
            }
            let pattern = [rounds as u8 | 0x80; PAGE as usize];
            memory.write_slice(&pattern, GuestAddress(page)).unwrap();
            let mut found = [0; PAGE as usize];
            for _ in 0..20 {
                memory.read_slice(&mut found, GuestAddress(page)).unwrap();
                assert!(found == pattern, "round {rounds}: written after the answer");
            }
            rounds += 1;
        }
        rounds
    });
    let writes = writes.into_inner();
    println!("{rounds} rounds, {writes} writes");
    assert!(writes > 0, "the devices wrote while they could");
}
