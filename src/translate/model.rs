// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All interleavings of lookups, fills, unmaps and reclaimed nodes, by the model checker: `make model`.

use loom::sync::Arc as Shared;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use vm_memory::GuestAddress;

use super::arena::Arena;
use super::sync::pin;
use super::table::Table;
use crate::access::Access;
use crate::mapping::{Mapping, SMALLEST_PAGE};
use crate::range::IovaRange;

/// Two levels.
const BITS: u32 = 24;

fn page(iova: u64) -> IovaRange {
    IovaRange::from_length(iova, SMALLEST_PAGE).unwrap()
}

fn mapping(iova: u64, physical: u64) -> Mapping {
    Mapping { iova: page(iova), physical: GuestAddress(physical), access: Access::READ }
}

fn physical(table: &Table, iova: u64) -> Option<u64> {
    table.lookup(iova).map(|hit| hit.physical)
}

fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// A table with a mapping that was looked up, and as few nodes as that takes.
fn table() -> Shared<Table> {
    let table = Shared::new(Table::new(&std::sync::Arc::new(Arena::new(2)), BITS, 2));
    assert!(table.map(mapping(0x1000, 0x5000)));
    assert_eq!(physical(&table, 0x1000), Some(0x5000));
    table
}

/// I3: when an UNMAP has returned, every use that began before it is over, and none begins.
#[test]
fn no_use_outlives_an_unmap() {
    explore(|| {
        let table = table();
        let is_unmapped = Shared::new(AtomicBool::new(false));
        let device = {
            let (table, is_unmapped) = (Shared::clone(&table), Shared::clone(&is_unmapped));
            thread::spawn(move || {
                let pin = pin();
                if physical(&table, 0x1000).is_some() {
                    assert!(!is_unmapped.load(Ordering::Relaxed), "used after it was unmapped");
                }
                drop(pin);
            })
        };
        assert_eq!(table.unmap(page(0x1000)), Ok(SMALLEST_PAGE));
        is_unmapped.store(true, Ordering::Relaxed);
        device.join().unwrap();
        assert_eq!(physical(&table, 0x1000), None);
    });
}

/// A lookup that misses while the mapping goes leaves nothing in the tree.
#[test]
fn nothing_is_filled_in_after_it_was_unmapped() {
    explore(|| {
        let table = Shared::new(Table::new(&std::sync::Arc::new(Arena::new(2)), BITS, 2));
        assert!(table.map(mapping(0x1000, 0x5000)));
        let device = {
            let table = Shared::clone(&table);
            thread::spawn(move || {
                let _pin = pin();
                assert!(matches!(physical(&table, 0x1000), None | Some(0x5000)));
            })
        };
        assert_eq!(table.unmap(page(0x1000)), Ok(SMALLEST_PAGE));
        device.join().unwrap();
        assert_eq!(physical(&table, 0x1000), None);
    });
}

/// A node that is used again for other addresses does not lead a lookup of the former ones astray.
#[test]
fn a_reclaimed_node_translates_nothing_of_before() {
    explore(|| {
        let table = table();
        let device = {
            let table = Shared::clone(&table);
            thread::spawn(move || {
                let _pin = pin();
                let found = physical(&table, 0x1000);
                assert!(matches!(found, None | Some(0x5000)), "{found:x?}");
            })
        };
        assert_eq!(table.unmap(page(0x1000)), Ok(SMALLEST_PAGE));
        // The same place in another part of the address space, in the only node that there is.
        assert!(table.map(mapping(0x4_1000, 0x9000)));
        assert_eq!(physical(&table, 0x4_1000), Some(0x9000));
        device.join().unwrap();
        assert_eq!(physical(&table, 0x1000), None);
    });
}

/// Two lookups that miss at once fill the tree once.
#[test]
fn lookups_that_miss_together_agree() {
    explore(|| {
        let table = Shared::new(Table::new(&std::sync::Arc::new(Arena::new(2)), BITS, 2));
        assert!(table.map(mapping(0x1000, 0x5000)));
        let device = {
            let table = Shared::clone(&table);
            thread::spawn(move || {
                let _pin = pin();
                assert_eq!(physical(&table, 0x1000), Some(0x5000));
            })
        };
        assert_eq!(physical(&table, 0x1000), Some(0x5000));
        device.join().unwrap();
        assert_eq!(table.unmap(page(0x1000)), Ok(SMALLEST_PAGE));
        assert_eq!(physical(&table, 0x1000), None);
    });
}

/// A node is not given to another table while somebody may still be in it.
#[test]
fn a_node_is_given_away_when_nobody_is_in_it() {
    explore(|| {
        // Two roots, and one node for both tables.
        let arena = std::sync::Arc::new(Arena::new(3));
        let tables = [0, 1].map(|_| Shared::new(Table::new(&arena, BITS, 2)));
        assert!(tables[0].map(mapping(0x1000, 0x5000)));
        assert!(tables[1].map(mapping(0x1000, 0x9000)));
        assert_eq!(physical(&tables[0], 0x1000), Some(0x5000));
        let devices = [0, 1].map(|index| {
            let table = Shared::clone(&tables[index]);
            thread::spawn(move || {
                let _pin = pin();
                let found = physical(&table, 0x1000);
                let expected = if index == 0 { 0x5000 } else { 0x9000 };
                assert!(found == Some(expected) || (index == 0 && found.is_none()), "{found:x?}");
            })
        });
        assert_eq!(tables[0].unmap(page(0x1000)), Ok(SMALLEST_PAGE));
        for device in devices {
            device.join().unwrap();
        }
    });
}
