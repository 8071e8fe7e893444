// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tables against plain lists of mappings.

use proptest::prelude::*;

use super::super::arena::Arena;
use super::super::table::{Hit, Table};
use super::*;
use crate::mapping::Mapping;

#[derive(Clone, Debug)]
enum Step {
    Map(Mapping),
    /// All that overlaps, and a bit around it.
    Unmap(usize, u64),
    /// Addresses around both ends and in the middle, of a mapping that was once made.
    Look(usize, u64),
}

/// Where mappings begin: around what blocks of the tree begin with, and at both ends of the address space.
fn start() -> impl Strategy<Value = u64> {
    let corner =
        prop::sample::select(vec![0u64, 1 << 18, 1 << 21, 1 << 24, 1 << 30, 1 << 36, 1 << 47, u64::MAX - 0xffff_ffff]);
    (corner, 0..80u64, prop::sample::select(vec![12, 18, 21, 30]))
        .prop_map(|(corner, count, shift)| corner.saturating_add(count << shift) & !(PAGE - 1))
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => Just(PAGE),
        1 => Just(1 << 21),
        1 => Just(1 << 30),
        2 => (1..600u64).prop_map(|pages| pages * PAGE),
        1 => (1..9000u64).prop_map(|blocks| (blocks << 18) + PAGE),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let access = prop::sample::select(vec![Access::READ, Access::WRITE, Access::READ_WRITE]);
    let map = (start(), length(), 0..1u64 << 40, access).prop_map(|(start, length, page, access)| {
        let iova = IovaRange::from_length(start, length.min(u64::MAX - start)).unwrap();
        let iova = if iova.is_aligned(PAGE) { iova } else { IovaRange::new(start, start | 0xfff).unwrap() };
        Step::Map(Mapping { iova, physical: GuestAddress(page << 12), access })
    });
    prop_oneof![
        4 => map,
        1 => (any::<usize>(), 0..0x10_0000u64).prop_map(|(index, more)| Step::Unmap(index, more)),
        4 => (any::<usize>(), any::<u64>()).prop_map(|(index, offset)| Step::Look(index, offset)),
    ]
}

/// What a table of these mappings has to say.
fn expected(mappings: &[Mapping], iova: u64) -> Option<(u64, Access)> {
    let mapping = mappings.iter().find(|mapping| mapping.iova.start() <= iova && iova <= mapping.iova.last())?;
    Some((mapping.physical.0.wrapping_add(iova - mapping.iova.start()), mapping.access))
}

fn check(table: &Table, mappings: &[Mapping], iova: u64) {
    // Once from the mappings, then from the tree.
    for _ in 0..2 {
        let found = table.lookup(iova);
        assert_eq!(found.map(|hit| (hit.physical, hit.access)), expected(mappings, iova), "{iova:#x}");
        if let Some(Hit { physical, length, access }) = found {
            let last = iova + (length - 1);
            assert_eq!(expected(mappings, last), Some((physical + (length - 1), access)), "{iova:#x} to {last:#x}");
        }
    }
}

fn compare(steps: &[Step], nodes: u32, per_domain: u32) {
    let arena = Arc::new(Arena::new(nodes));
    let table = Table::new(&arena, per_domain);
    let mut mappings: Vec<Mapping> = Vec::new();
    let mut ever: Vec<IovaRange> = Vec::new();
    for step in steps {
        match step {
            Step::Map(mapping) => {
                let free = !mappings.iter().any(|other| other.iova.overlaps(mapping.iova));
                assert_eq!(table.map(*mapping), free);
                if free {
                    mappings.push(*mapping);
                    ever.push(mapping.iova);
                }
            }
            Step::Unmap(index, more) if !ever.is_empty() => {
                let around = ever[index % ever.len()];
                let iova =
                    IovaRange::new(around.start().saturating_sub(*more), around.last().saturating_add(*more)).unwrap();
                let overlapping = mappings.iter().filter(|mapping| mapping.iova.overlaps(iova));
                let inside: Vec<_> = overlapping.clone().filter(|mapping| iova.covers(mapping.iova)).copied().collect();
                if inside.len() == overlapping.count() {
                    let bytes: u128 = inside.iter().map(|mapping| mapping.iova.size()).sum();
                    assert_eq!(u128::from(table.unmap(iova).unwrap()), bytes);
                    mappings.retain(|mapping| !iova.overlaps(mapping.iova));
                    for gone in inside {
                        check(&table, &mappings, gone.iova.start());
                        check(&table, &mappings, gone.iova.last());
                    }
                } else {
                    assert!(table.unmap(iova).is_err());
                }
            }
            Step::Look(index, offset) if !ever.is_empty() => {
                let iova = ever[index % ever.len()];
                let inside = iova.start() + (u128::from(*offset) % iova.size()) as u64;
                for at in [iova.start(), iova.last(), inside] {
                    check(&table, &mappings, at);
                    check(&table, &mappings, at.saturating_add(1));
                    check(&table, &mappings, at.saturating_sub(1));
                }
            }
            Step::Unmap(..) | Step::Look(..) => (),
        }
        assert!(arena.in_use() <= per_domain as usize);
    }
    for iova in &ever {
        check(&table, &mappings, iova.start());
        check(&table, &mappings, iova.last());
    }
    if !ever.is_empty() {
        table.unmap(IovaRange::ALL).unwrap();
        assert!(arena.in_use() <= 1, "an empty tree is its root");
        assert!(ever.iter().all(|iova| table.lookup(iova.start()).is_none()));
    }
    drop(table);
    assert_eq!(arena.in_use(), 0);
}

proptest! {
    #[test]
    fn tables_translate_as_their_mappings_say(steps in proptest::collection::vec(step(), 0..200)) {
        compare(&steps, 4096, 4096);
    }

    #[test]
    fn tables_with_few_nodes_do_too(
        steps in proptest::collection::vec(step(), 0..200), nodes in 0..24u32, per_domain in 0..24u32,
    ) {
        compare(&steps, nodes, per_domain);
    }
}

#[test]
fn a_small_mapping_in_what_was_a_large_block_is_seen() {
    let arena = Arc::new(Arena::new(64));
    let table = Table::new(&arena, 64);
    let mapping = |iova: &str, physical| Mapping {
        iova: iova.parse().unwrap(),
        physical: GuestAddress(physical),
        access: Access::READ,
    };
    assert!(table.map(mapping("40000000-7fffffff", 0)));
    assert_eq!(table.lookup(0x5555_5000).unwrap().physical, 0x1555_5000);
    assert_eq!(arena.in_use(), 4, "a GiB is one entry in the highest node");
    assert_eq!(table.unmap("0-ffffffff".parse().unwrap()), Ok(1 << 30));
    assert!(table.map(mapping("55555000-55555fff", 0x9000)));
    assert_eq!(table.lookup(0x5555_5000).unwrap(), Hit { physical: 0x9000, length: PAGE, access: Access::READ });
    assert_eq!(table.lookup(0x5555_6000), None);
    assert_eq!(table.lookup(0x4000_0000), None);
}
