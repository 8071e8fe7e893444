// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fewer regions where there is no room to report them all: none is ever left out, some become wider.

use crate::range::{IovaRange, RangeSet};

/// Fills gaps between reserved ranges, the smallest first, until at most `most` ranges are left. A gap that has an address of
/// `free` in it stays as it is. `None` if that is not enough.
pub(super) fn widen(reserved: &RangeSet, most: usize, free: &RangeSet) -> Option<RangeSet> {
    let mut widened = reserved.clone();
    while widened.ranges().len() > most {
        let gaps = widened.ranges().iter().zip(widened.ranges().iter().skip(1));
        // Ranges of a set never touch: between two of them is a gap.
        let gaps = gaps.filter_map(|(low, high)| IovaRange::new(low.last() + 1, high.start() - 1));
        let smallest = gaps.filter(|gap| free.overlapping(*gap).is_none()).min_by_key(|gap| gap.size())?;
        widened.insert(smallest);
    }
    Some(widened)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(ranges: &[&str]) -> RangeSet {
        ranges.iter().map(|range| range.parse::<IovaRange>().unwrap()).collect()
    }

    #[test]
    fn the_smallest_gaps_without_memory_are_filled() {
        let reserved = set(&["0-fff", "2000-2fff", "8000-8fff", "a000-afff"]);
        let widened = |most, free| widen(&reserved, most, &set(free)).map(|widened| widened.to_string());
        assert_eq!(widened(4, &[]).as_deref(), Some("0x0-0xfff, 0x2000-0x2fff, 0x8000-0x8fff, 0xa000-0xafff"));
        assert_eq!(widened(3, &[]).as_deref(), Some("0x0-0x2fff, 0x8000-0x8fff, 0xa000-0xafff"));
        assert_eq!(widened(3, &["1800-1fff"]).as_deref(), Some("0x0-0xfff, 0x2000-0x2fff, 0x8000-0xafff"));
        assert_eq!(widened(1, &[]).as_deref(), Some("0x0-0xafff"));
        assert_eq!(widened(1, &["1800-1fff"]), None);
        // Memory beside a gap is in no gap.
        assert_eq!(widened(3, &["fff-fff", "2000-2000"]).as_deref(), Some("0x0-0x2fff, 0x8000-0x8fff, 0xa000-0xafff"));
        let kept = Some("0x0-0xfff, 0x2000-0x2fff, 0x8000-0xafff");
        assert_eq!(widened(3, &["1000-1000"]).as_deref(), kept);
        assert_eq!(widened(3, &["1fff-1fff"]).as_deref(), kept);
        assert_eq!(widened(0, &[]), None);
    }

    proptest! {
        #[test]
        fn nothing_is_left_out_and_free_stays_free(
            cuts in proptest::collection::btree_set(0..200u64, 0..20),
            free in proptest::collection::btree_set(0..200u64, 0..3),
            most in 1..6usize,
        ) {
            let cuts: Vec<u64> = cuts.into_iter().collect();
            let reserved: RangeSet =
                cuts.chunks_exact(2).map(|pair| IovaRange::new(pair[0], pair[1]).unwrap()).collect();
            let free: RangeSet = free.into_iter().map(|at| IovaRange::new(at, at).unwrap()).collect();
            if let Some(widened) = widen(&reserved, most, &free) {
                prop_assert!(widened.ranges().len() <= most);
                prop_assert!(reserved.subtract(&widened).is_empty());
                prop_assert!(widened.subtract(&reserved).intersect(&free).is_empty());
            }
        }
    }
}
