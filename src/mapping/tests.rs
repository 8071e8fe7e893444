// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of mappings against a plain map, and how its leaves are kept.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::leaf::Leaf;
use super::*;

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(start, last).unwrap()
}

fn mapping(iova: IovaRange, physical: u64, access: Access) -> Mapping {
    Mapping { iova, physical: GuestAddress(physical), access }
}

fn table(ranges: &[IovaRange]) -> MappingTable {
    let mut table = MappingTable::default();
    for iova in ranges {
        table.insert(mapping(*iova, 0, Access::READ));
    }
    table
}

proptest! {
    #[test]
    fn lookups_agree_with_single_addresses(
        cuts in proptest::collection::btree_set(0..40u64, 0..16), start in 0..40u64, more in 0..40u64,
    ) {
        // Every other stretch between two cuts is mapped.
        let cuts: Vec<u64> = cuts.into_iter().collect();
        let mapped: Vec<_> = cuts.chunks_exact(2).map(|pair| range(pair[0], pair[1] - 1)).collect();
        let table = table(&mapped);
        let probe = range(start, start + more);
        let touched: Vec<_> = mapped.iter().copied().filter(|iova| iova.overlaps(probe)).collect();
        let split = touched.iter().any(|iova| !probe.covers(*iova));
        prop_assert_eq!(table.overlapping(probe).map(|mapping| mapping.iova), touched.last().copied());
        match table.covered(probe) {
            Ok(covered) => {
                prop_assert!(!split);
                prop_assert_eq!(covered.map(|mapping| mapping.iova).collect::<Vec<_>>(), touched);
            }
            Err(WouldSplit) => prop_assert!(split),
        }
        let behind = mapped.iter().copied().filter(|iova| iova.last() >= start);
        prop_assert_eq!(table.from(start).map(|mapping| mapping.iova).collect::<Vec<_>>(), behind.collect::<Vec<_>>());
    }
}

const ACCESSES: [Access; 4] = [Access::NONE, Access::READ, Access::WRITE, Access::READ_WRITE];

/// Insertions and removals in any order, against a plain map.
fn compare(steps: impl Iterator<Item = (u64, u64, bool)>, spread: u64) -> MappingTable {
    let mut table = MappingTable::default();
    let mut plain: BTreeMap<u64, Mapping> = BTreeMap::new();
    for (index, (first, more, removes)) in steps.enumerate() {
        let iova = range(first * spread, (first + more) * spread + (spread - 1));
        if removes {
            let inside: Vec<_> = plain.range(iova.start()..=iova.last()).map(|(_, mapping)| *mapping).collect();
            if let Ok(covered) = table.covered(iova) {
                assert_eq!(covered.collect::<Vec<_>>(), inside);
            }
            table.remove(iova);
            plain.retain(|start, _| !(iova.start()..=iova.last()).contains(start));
        } else if table.overlapping(iova).is_none() {
            let new = mapping(iova, index as u64 * SMALLEST_PAGE, ACCESSES[index % 4]);
            table.insert(new);
            assert_eq!(plain.insert(iova.start(), new), None);
        }
        assert_eq!(table.len(), plain.len());
    }
    assert!(table.iter().eq(plain.values().copied()));
    for address in plain.values().flat_map(|mapping| [mapping.iova.start(), mapping.iova.last()]) {
        let found = plain.range(..=address).next_back().map(|(_, mapping)| *mapping);
        assert_eq!(table.at(address), found);
    }
    // Two leaves side by side have more than a leaf has room for, or the second is not sparse.
    assert!(table.leaves.len() <= plain.len() / Leaf::SPARSE + 1, "{} in {}", plain.len(), table.leaves.len());
    table
}

proptest! {
    #[test]
    fn leaves_are_split_and_joined_unseen(
        steps in proptest::collection::vec((0..400u64, 0..3u64, prop::bool::weighted(0.3)), 0..1500),
        wide in proptest::collection::vec((0..400u64, 0..300u64, Just(true)), 0..4),
    ) {
        let middle = steps.len() / 2;
        let (first, second) = steps.split_at(middle);
        let all = first.iter().chain(&wide).chain(second).copied();
        compare(all, u64::MAX / 1024);
    }
}

#[test]
fn memory_follows_the_number_of_mappings() {
    let dense = table(&(0..65536).map(|page| range(page << 12, (page << 12) | 0xfff)).collect::<Vec<_>>());
    assert!(dense.bytes() / 65536 <= 25, "{}", dense.bytes() / 65536);
    // One mapping stays of each leaf that there was.
    let mut table = dense;
    for leaf in 0..1024u64 {
        table.remove(range((leaf << 18) | 0x1000, (leaf << 18) | 0x3_ffff));
    }
    assert_eq!(table.len(), 1024);
    assert!(table.bytes() / 1024 <= 4 * 25, "{}", table.bytes() / 1024);
    // Shuffled.
    let mut page = 0u64;
    let shuffled = (0..65536).map(|_| {
        page = (page * 40961 + 12345) % 65536;
        range(page << 12, (page << 12) | 0xfff)
    });
    let shuffled: Vec<_> = shuffled.collect();
    let table = self::table(&shuffled);
    assert_eq!(table.len(), 65536);
    assert!(table.bytes() / 65536 <= 36, "{}", table.bytes() / 65536);
}

fn page(number: u64) -> IovaRange {
    range(number << 12, (number << 12) | 0xfff)
}

/// How many mappings each leaf has.
fn leaves(table: &MappingTable) -> Vec<usize> {
    table.leaves.iter().map(|entry| entry.leaf.len()).collect()
}

#[test]
fn the_next_search_is_likely_to_end_where_the_last_one_did() {
    let mut table = table(&(0..100).map(|number| page(2 * number)).collect::<Vec<_>>());
    assert_eq!(leaves(&table), [64, 36]);
    assert_eq!(table.recent.get(), Place { leaf: 1, behind: 36 });
    table.at(0x4000);
    assert_eq!(table.recent.get(), Place { leaf: 0, behind: 3 });
    // In the leaf that is full, between the two halves, which it goes to the lower one of.
    table.insert(mapping(page(63), 0, Access::READ));
    assert_eq!((leaves(&table), table.recent.get()), (vec![33, 32, 36], Place { leaf: 0, behind: 33 }));
    table.insert(mapping(page(65), 0, Access::READ));
    assert_eq!((leaves(&table), table.recent.get()), (vec![33, 33, 36], Place { leaf: 1, behind: 2 }));
    assert!(table.iter().map(|mapping| mapping.iova.start()).is_sorted());
}

#[test]
fn leaves_that_lose_most_are_joined_with_a_neighbour() {
    let full = || table(&(0..192).map(page).collect::<Vec<_>>());
    let mut table = full();
    assert_eq!(leaves(&table), [64, 64, 64]);
    // The middle one becomes sparse, and both neighbours are full.
    table.remove(range(64 << 12, (114 << 12) - 1));
    assert_eq!(leaves(&table), [64, 14, 64]);
    // The next one can take it now, or the one before.
    table.remove(range(160 << 12, (192 << 12) - 1));
    assert_eq!(leaves(&table), [64, 14, 32]);
    table.remove(range(114 << 12, (115 << 12) - 1));
    assert_eq!(leaves(&table), [64, 45]);
    let mut table = full();
    table.remove(range(30 << 12, (64 << 12) - 1));
    table.remove(range(64 << 12, (114 << 12) - 1));
    assert_eq!(leaves(&table), [44, 64]);
    // From the middle of one to the end of another, which is gone, as is one that is sparse then.
    for (end, left) in [(192, vec![40]), (180, vec![40, 12]), (150, vec![40, 42])] {
        let mut table = full();
        table.remove(range(40 << 12, (end << 12) - 1));
        assert_eq!(leaves(&table), left, "{end}");
    }
    // From the middle of one to the middle of another: both are joined, and what was between them is gone.
    let mut table = full();
    table.remove(range(10 << 12, (180 << 12) - 1));
    assert_eq!(leaves(&table), [22]);
    assert_eq!(table.len(), 22);
}

#[test]
fn memory_for_leaves_is_given_back() {
    let mut table = table(&(0..64 * 64).map(page).collect::<Vec<_>>());
    let before = table.leaves.capacity();
    table.remove(range(16 << 18, (64 << 18) - 1));
    assert_eq!((table.leaves.len(), table.leaves.capacity()), (16, before), "a quarter is in use");
    table.remove(range(15 << 18, (16 << 18) - 1));
    assert_eq!((table.leaves.len(), table.leaves.capacity()), (15, 30));
}

#[test]
fn room_is_for_one_mapping_wherever_it_is() {
    let mut table = MappingTable::default();
    assert!(!table.has_room());
    table.make_room().unwrap();
    assert!(table.has_room());
    table.insert(mapping(page(0), 0, Access::READ));
    assert!(!table.has_room(), "its leaf was the spare one");
    table.make_room().unwrap();
    table.insert(mapping(page(1), 0, Access::READ));
    assert!(table.has_room(), "there was room in the leaf");
    while table.leaves.len() < table.leaves.capacity() {
        table.make_room().unwrap();
        table.insert(mapping(page(table.len() as u64), 0, Access::READ));
    }
    table.spare = Some(OwnLeaf::default());
    assert!(!table.has_room(), "the list of leaves is full");
    table.make_room().unwrap();
    assert!(table.has_room());
}

#[test]
fn a_mapping_can_grow() {
    let mut table = table(&[range(0x1000, 0x1fff), range(0x8000, 0x8fff)]);
    table.insert(mapping(range(0x1000, 0x4fff), 0, Access::READ));
    assert_eq!((table.len(), table.at(0x4fff).map(|mapping| mapping.iova)), (2, Some(range(0x1000, 0x4fff))));
}

#[test]
fn the_top_of_the_address_space_can_be_looked_up() {
    let top = range(u64::MAX - 0xfff, u64::MAX);
    let mut table = table(&[top]);
    assert_eq!(table.covered(IovaRange::ALL).unwrap().count(), 1);
    assert!(table.covered(range(u64::MAX, u64::MAX)).is_err());
    assert!(table.overlapping(range(0, u64::MAX - 0x1000)).is_none());
    table.remove(IovaRange::ALL);
    assert!(table.is_empty() && table.leaves.is_empty());
}
