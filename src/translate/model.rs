// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All interleavings of lookups, fills, unmaps and reclaimed nodes, by the model checker: `make model`.

use loom::sync::Arc as Shared;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use vm_memory::GuestAddress;

use super::arena::Arena;
use super::sync::pin;
use super::table::Table;
use super::{Limits, Pinned, Translation, Translator};
use crate::access::Access;
use crate::host::{HostGroup, IoPageTable};
use crate::id::EndpointId;
use crate::mapping::{Mapping, SMALLEST_PAGE};
use crate::memory::GuestRam;
use crate::range::IovaRange;

/// As many nodes as a table of two pages side by side needs: the first root, the root above it, and one for the block they are in.
const NODES: u32 = 3;
/// Two pages in the second block of 256 KiB, so that they need a node, and where they are.
const PAGES: [(u64, u64); 2] = [(0x4_1000, 0x5000), (0x4_2000, 0x7000)];
const BLOCK: &str = "40000-7ffff";
/// The same places in the next block.
const OTHERS: [(u64, u64); 2] = [(0x8_1000, 0x9000), (0x8_2000, 0xb000)];

fn new_table() -> Shared<Table> {
    Shared::new(Table::new(&std::sync::Arc::new(Arena::new(NODES)), NODES))
}

fn map(table: &Table, pages: &[(u64, u64)]) {
    for (iova, physical) in pages {
        let iova = IovaRange::from_length(*iova, SMALLEST_PAGE).unwrap();
        assert!(table.map(Mapping { iova, physical: GuestAddress(*physical), access: Access::READ }));
    }
}

fn physical(table: &Table, iova: u64) -> Option<u64> {
    table.lookup(iova).map(|hit| hit.physical)
}

fn look_up(table: &Table, pages: &[(u64, u64)]) {
    for (iova, expected) in pages {
        assert_eq!(physical(table, *iova), Some(*expected));
    }
}

fn unmap(table: &Table) {
    assert_eq!(table.unmap(BLOCK.parse().unwrap()), Ok(2 * SMALLEST_PAGE));
}

fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// A thread with a pin.
fn device(table: &Shared<Table>, act: impl Fn(&Table) + 'static) -> thread::JoinHandle<()> {
    let table = Shared::clone(table);
    thread::spawn(move || {
        let pin = pin();
        act(&table);
        drop(pin);
    })
}

/// I3 of docs/invariants.md: when an UNMAP has returned, every use that began before it is over, and none begins.
#[test]
fn no_use_outlives_an_unmap() {
    explore(|| {
        let table = new_table();
        map(&table, &PAGES);
        look_up(&table, &PAGES);
        let is_unmapped = Shared::new(AtomicBool::new(false));
        let seen = Shared::clone(&is_unmapped);
        let device = device(&table, move |table| {
            if physical(table, PAGES[0].0).is_some() {
                assert!(!seen.load(Ordering::Relaxed), "used after it was unmapped");
            }
        });
        unmap(&table);
        is_unmapped.store(true, Ordering::Relaxed);
        device.join().unwrap();
        assert_eq!(physical(&table, PAGES[0].0), None);
    });
}

/// A lookup that misses while the mapping goes leaves nothing in the tree.
#[test]
fn nothing_is_filled_in_after_it_was_unmapped() {
    explore(|| {
        let table = new_table();
        map(&table, &PAGES);
        let device = device(&table, |table| {
            assert!(matches!(physical(table, PAGES[0].0), None | Some(0x5000)));
        });
        unmap(&table);
        device.join().unwrap();
        assert_eq!(physical(&table, PAGES[0].0), None);
    });
}

/// A node that is used again for other addresses does not lead a lookup of the former ones astray.
#[test]
fn a_reclaimed_node_translates_nothing_of_before() {
    explore(|| {
        let table = new_table();
        map(&table, &PAGES);
        look_up(&table, &PAGES);
        let device = device(&table, |table| {
            let found = physical(table, PAGES[0].0);
            assert!(matches!(found, None | Some(0x5000)), "{found:x?}");
        });
        unmap(&table);
        map(&table, &OTHERS);
        look_up(&table, &OTHERS);
        device.join().unwrap();
        assert_eq!(physical(&table, PAGES[0].0), None);
    });
}

/// A node is not given to another table while somebody may still be in it.
#[test]
fn a_node_is_given_away_when_nobody_is_in_it() {
    explore(|| {
        // Two roots for each, and one node for both tables.
        let arena = std::sync::Arc::new(Arena::new(5));
        let tables = [0, 1].map(|_| Shared::new(Table::new(&arena, NODES)));
        map(&tables[1], &OTHERS[..1]);
        look_up(&tables[1], &OTHERS[..1]);
        map(&tables[1], &OTHERS[1..]);
        map(&tables[0], &PAGES);
        look_up(&tables[0], &PAGES);
        let devices = [
            device(&tables[0], |table| {
                let found = physical(table, PAGES[1].0);
                assert!(matches!(found, None | Some(0x7000)), "{found:x?}");
            }),
            device(&tables[1], |table| look_up(table, &OTHERS[1..])),
        ];
        unmap(&tables[0]);
        for device in devices {
            device.join().unwrap();
        }
    });
}

/// Lookups find what is there while the tree around it changes: it grows higher, and a page that was alone is pushed down.
#[test]
fn what_is_in_the_tree_stays_there_while_it_grows() {
    explore(|| {
        let table = new_table();
        map(&table, &[(0x1000, 0x3000)]);
        look_up(&table, &[(0x1000, 0x3000)]);
        map(&table, &PAGES);
        let device = device(&table, |table| look_up(table, &[(0x1000, 0x3000), PAGES[0]]));
        look_up(&table, &PAGES);
        device.join().unwrap();
        look_up(&table, &PAGES);
        look_up(&table, &[(0x1000, 0x3000)]);
    });
}

/// What a device finds as long as it is pinned: one and the same.
fn find(translator: &Translator) -> (Option<u64>, Pinned<'_>) {
    let pinned = translator.pin();
    let found = || pinned.translate(PAGES[0].0, 1, Access::READ).ok().map(|segment| segment.start.0);
    let first = found();
    assert_eq!(found(), first);
    (first, pinned)
}

/// ATTACH to another domain, DETACH, and a write of `bypass`: all of them put a group on another table, or on none. An access is by the
/// old one as a whole, or by the new one as a whole, and by the new one after the answer.
#[test]
fn an_access_is_by_the_table_of_before_or_by_the_one_after() {
    const ENDPOINT: EndpointId = EndpointId(8);
    for after in [Some(OTHERS[0].1), None] {
        explore(move || {
            let translation =
                Translation::new(Limits { nodes: 2 * NODES, nodes_per_domain: NODES, ..Limits::default() });
            let group = translation.group(vec![ENDPOINT]);
            let table = |physical: u64| -> std::sync::Arc<dyn IoPageTable> {
                let ram = GuestRam::in_software(&[(GuestAddress(physical), SMALLEST_PAGE)]).unwrap();
                let to = ram.segments(GuestAddress(physical), SMALLEST_PAGE).unwrap();
                let table = group.new_table().unwrap();
                table.map(IovaRange::from_length(PAGES[0].0, SMALLEST_PAGE).unwrap(), &to, Access::READ).unwrap();
                table
            };
            group.attach(&table(PAGES[0].1)).unwrap();
            let next = after.map(table);
            let translator = group.translator(ENDPOINT).unwrap();
            let is_answered = Shared::new(AtomicBool::new(false));
            let seen = Shared::clone(&is_answered);
            let device = thread::spawn({
                let translator = translator.clone();
                move || {
                    let (found, _pinned) = find(&translator);
                    if found == Some(PAGES[0].1) {
                        assert!(!seen.load(Ordering::Relaxed), "used after the answer");
                    } else {
                        assert_eq!(found, after);
                    }
                }
            });
            match &next {
                Some(next) => group.attach(next).unwrap(),
                None => group.block(),
            }
            is_answered.store(true, Ordering::Relaxed);
            device.join().unwrap();
            assert_eq!(find(&translator).0, after);
        });
    }
}
