// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ranges of 64-bit addresses, both ends inclusive, and sets of them.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

/// A non-empty range of I/O virtual addresses, both ends inclusive: the last byte of the address space can be
/// in it without overflow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IovaRange {
    start: u64,
    last: u64,
}

impl IovaRange {
    /// Every 64-bit address.
    pub const ALL: Self = Self { start: 0, last: u64::MAX };

    /// The range from `start` to `last`, both included; `None` if `last` is below `start`.
    pub const fn new(start: u64, last: u64) -> Option<Self> {
        if start <= last { Some(Self { start, last }) } else { None }
    }

    /// The `length` bytes from `start` on; `None` if that is none, or if they would pass the end of the
    /// address space.
    pub fn from_length(start: u64, length: u64) -> Option<Self> {
        let last = start.checked_add(length.checked_sub(1)?)?;
        Some(Self { start, last })
    }

    /// The first address in the range.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The last address in the range.
    pub const fn last(self) -> u64 {
        self.last
    }

    /// How many bytes the range has, from 1 to 2^64.
    pub const fn size(self) -> u128 {
        (self.last - self.start) as u128 + 1
    }

    /// How many bytes the range has; `None` if it is the whole address space.
    pub const fn length(self) -> Option<u64> {
        (self.last - self.start).checked_add(1)
    }

    /// Whether `other` lies wholly in this range.
    pub const fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// Whether some address is in both ranges.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// The addresses in both ranges, if any.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.last.min(other.last))
    }

    /// Whether start and size are multiples of `granule`, a power of two.
    pub const fn is_aligned(self, granule: u64) -> bool {
        let low = granule.wrapping_sub(1);
        self.start & low == 0 && self.last.wrapping_add(1) & low == 0
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.last)
    }
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not a range or an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseRangeError {
    /// Not a number in hex.
    #[error("`{0}` is not a hexadecimal address such as 0xfee00000")]
    Address(String),
    /// Not two addresses.
    #[error("`{0}` is not a range START-END such as 0xfee00000-0xfeefffff")]
    Shape(String),
    /// The end lies below the start.
    #[error("the range `{0}` ends before it starts")]
    Inverted(String),
}

/// Reads an address: hexadecimal digits, with or without `0x`.
///
/// # Errors
///
/// [`ParseRangeError::Address`] if the text has anything else in it or does not fit 64 bits.
pub(crate) fn parse_address(text: &str) -> Result<u64, ParseRangeError> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    // from_str_radix would take a sign.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(ParseRangeError::Address(text.to_owned()));
    }
    u64::from_str_radix(digits, 16).map_err(|_| ParseRangeError::Address(text.to_owned()))
}

impl FromStr for IovaRange {
    type Err = ParseRangeError;

    /// Reads `START-END`, hexadecimal, both inclusive.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (start, last) = text.split_once('-').ok_or_else(|| ParseRangeError::Shape(text.to_owned()))?;
        Self::new(parse_address(start)?, parse_address(last)?).ok_or_else(|| ParseRangeError::Inverted(text.to_owned()))
    }
}

/// A set of addresses, kept as ranges that are sorted, disjoint and never touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: Vec<IovaRange>,
}

impl RangeSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self { ranges: Vec::new() }
    }

    /// The ranges, ascending; no two of them overlap or touch.
    pub fn ranges(&self) -> &[IovaRange] {
        &self.ranges
    }

    /// Whether the set has no address.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The lowest range, if any.
    pub fn first(&self) -> Option<IovaRange> {
        self.ranges.first().copied()
    }

    /// The highest range, if any.
    pub fn last(&self) -> Option<IovaRange> {
        self.ranges.last().copied()
    }

    /// Adds all addresses of a range.
    pub fn insert(&mut self, range: IovaRange) {
        // Those that overlap or touch it stand together.
        let first = self.ranges.partition_point(|old| old.last.checked_add(1).is_some_and(|next| next < range.start));
        let behind = range
            .last
            .checked_add(1)
            .map_or(self.ranges.len(), |next| self.ranges.partition_point(|old| old.start <= next));
        let touched = self.ranges.get(first..behind).unwrap_or_default();
        let start = touched.first().map_or(range.start, |old| old.start.min(range.start));
        let last = touched.last().map_or(range.last, |old| old.last.max(range.last));
        self.ranges.splice(first..behind, [IovaRange { start, last }]);
    }

    /// The addresses that are in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        self.ranges.iter().chain(&other.ranges).copied().collect()
    }

    /// The addresses that are in this set and not in the other.
    #[must_use]
    pub fn subtract(&self, other: &Self) -> Self {
        self.intersect(&other.complement())
    }

    /// The addresses that are in both sets.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Self {
        let (mut own, mut others) = (self.ranges.iter().peekable(), other.ranges.iter().peekable());
        let mut ranges = Vec::new();
        while let (Some(one), Some(two)) = (own.peek(), others.peek()) {
            ranges.extend(one.intersection(**two));
            // Whichever ends first has met all that it can.
            if one.last < two.last {
                own.next()
            } else {
                others.next()
            };
        }
        Self { ranges }
    }

    /// The addresses that are not in the set.
    fn complement(&self) -> Self {
        let mut ranges = Vec::with_capacity(self.ranges.len() + 1);
        let mut start = Some(0);
        for range in &self.ranges {
            let gap = start.zip(range.start.checked_sub(1)).and_then(|(start, last)| IovaRange::new(start, last));
            ranges.extend(gap);
            start = range.last.checked_add(1);
        }
        ranges.extend(start.and_then(|start| IovaRange::new(start, u64::MAX)));
        Self { ranges }
    }

    /// The first range of the set that has an address of `range` in it.
    pub fn overlapping(&self, range: IovaRange) -> Option<IovaRange> {
        let at = self.ranges.partition_point(|own| own.last < range.start);
        self.ranges.get(at).copied().filter(|own| own.overlaps(range))
    }

    /// Whether all addresses of `range` are in the set.
    pub fn covers(&self, range: IovaRange) -> bool {
        self.overlapping(range).is_some_and(|own| own.covers(range))
    }
}

impl From<IovaRange> for RangeSet {
    fn from(range: IovaRange) -> Self {
        Self { ranges: vec![range] }
    }
}

impl FromIterator<IovaRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = IovaRange>>(ranges: I) -> Self {
        let mut sorted: Vec<IovaRange> = ranges.into_iter().collect();
        // Stable, as that is linear where sets follow on each other that are sorted each.
        sorted.sort();
        let mut ranges: Vec<IovaRange> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match ranges.last_mut() {
                Some(before) if range.start <= before.last.saturating_add(1) => {
                    before.last = before.last.max(range.last);
                }
                _ => ranges.push(range),
            }
        }
        Self { ranges }
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing");
        }
        for (index, range) in self.ranges.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{range}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(start, last).unwrap()
    }

    #[test]
    fn a_range_holds_the_whole_address_space() {
        assert_eq!(IovaRange::ALL.size(), 1 << 64);
        assert_eq!(IovaRange::ALL.length(), None);
        assert!(IovaRange::ALL.is_aligned(4096));
        assert_eq!(range(0, 4095).length(), Some(4096));
    }

    #[test]
    fn an_inverted_or_wrapping_range_is_none() {
        assert_eq!(IovaRange::new(1, 0), None);
        assert_eq!(IovaRange::from_length(0, 0), None);
        assert_eq!(IovaRange::from_length(u64::MAX, 2), None);
        assert_eq!(IovaRange::from_length(u64::MAX, 1), Some(range(u64::MAX, u64::MAX)));
    }

    #[test]
    fn alignment_looks_at_both_ends() {
        assert!(range(0x1000, 0x1fff).is_aligned(0x1000));
        assert!(!range(0x1001, 0x1fff).is_aligned(0x1000));
        assert!(!range(0x1000, 0x1ffe).is_aligned(0x1000));
        assert!(range(u64::MAX - 0xfff, u64::MAX).is_aligned(0x1000));
    }

    #[test]
    fn text_is_read_as_hex_and_refused_with_its_reason() {
        assert_eq!("fee00000-0xfeefffff".parse(), Ok(range(0xfee0_0000, 0xfeef_ffff)));
        assert!(matches!("fee00000".parse::<IovaRange>(), Err(ParseRangeError::Shape(_))));
        assert!(matches!("2-1".parse::<IovaRange>(), Err(ParseRangeError::Inverted(_))));
        for bad in ["", "0x", "+1", "-1", "1g", "10000000000000000"] {
            assert!(matches!(parse_address(bad), Err(ParseRangeError::Address(_))), "{bad}");
        }
    }

    #[test]
    fn touching_ranges_become_one() {
        let set: RangeSet = [range(8, 9), range(0, 3), range(4, 7), range(u64::MAX, u64::MAX)].into_iter().collect();
        assert_eq!(set.ranges(), &[range(0, 9), range(u64::MAX, u64::MAX)]);
        assert_eq!(set.to_string(), "0x0-0x9, 0xffffffffffffffff-0xffffffffffffffff");
    }

    /// Small addresses, both at the bottom and at the top of the address space.
    fn small_range() -> impl Strategy<Value = IovaRange> {
        (0..24u64, 0..24u64, any::<bool>()).prop_map(|(a, b, top)| {
            let base = if top { u64::MAX - 23 } else { 0 };
            range(base + a.min(b), base + a.max(b))
        })
    }

    fn addresses() -> impl Iterator<Item = u64> {
        (0..26).chain(u64::MAX - 25..=u64::MAX)
    }

    proptest! {
        #[test]
        fn set_algebra_agrees_with_single_addresses(
            a in proptest::collection::vec(small_range(), 0..5),
            b in proptest::collection::vec(small_range(), 0..5),
            probe in small_range(),
        ) {
            let has = |ranges: &[IovaRange], at: u64| ranges.iter().any(|r| r.start <= at && at <= r.last);
            let (set_a, set_b): (RangeSet, RangeSet) = (a.iter().copied().collect(), b.iter().copied().collect());
            let (union, less, both) = (set_a.union(&set_b), set_a.subtract(&set_b), set_a.intersect(&set_b));
            for at in addresses() {
                prop_assert_eq!(has(union.ranges(), at), has(&a, at) || has(&b, at));
                prop_assert_eq!(has(less.ranges(), at), has(&a, at) && !has(&b, at));
                prop_assert_eq!(has(both.ranges(), at), has(&a, at) && has(&b, at));
            }
            let mut inserted = RangeSet::new();
            for range in a.iter().chain(&b) {
                inserted.insert(*range);
            }
            prop_assert_eq!(&inserted, &union);
            for set in [&set_a, &union, &less, &both] {
                prop_assert!(set.ranges().windows(2).all(|pair| pair[0].last < pair[1].start - 1));
            }
            let inside = addresses().filter(|at| probe.start <= *at && *at <= probe.last);
            let (hit, missed): (Vec<u64>, Vec<u64>) = inside.partition(|at| has(&a, *at));
            prop_assert_eq!(set_a.overlapping(probe).is_some(), !hit.is_empty());
            prop_assert_eq!(set_a.covers(probe), missed.is_empty());
        }
    }
}
