// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How many durations were how long.

use std::time::Duration;

/// The upper end of the first bucket is 2 to this power of nanoseconds: 256 ns.
const FIRST: u32 = 8;
/// How many buckets there are, each twice as long as the one before: the last but one ends at 17 seconds, the last has the rest.
const BUCKETS: usize = 28;

/// Durations by size, in buckets that end at powers of two of nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: [u64; BUCKETS],
    /// In nanoseconds.
    sum: u64,
}

impl Histogram {
    /// Counts a duration.
    pub(super) fn record(&mut self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        // The smallest power that is not less: what is exactly 256 ns is in the bucket that ends there.
        let power = u64::BITS - nanoseconds.saturating_sub(1).leading_zeros();
        let index = (power.saturating_sub(FIRST) as usize).min(BUCKETS - 1);
        if let Some(count) = self.counts.get_mut(index) {
            *count = count.saturating_add(1);
        }
        self.sum = self.sum.saturating_add(nanoseconds);
    }

    /// The buckets, ascending: how long a duration in it is at most, which is not said of the last, and how many are.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<Duration>, u64)> {
        let end = |index: usize| (index + 1 < BUCKETS).then(|| Duration::from_nanos(1 << (FIRST as usize + index)));
        self.counts.iter().enumerate().map(move |(index, count)| (end(index), *count))
    }

    /// How many durations there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// All of them together.
    pub const fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_the_bucket_that_ends_at_the_next_power_of_two() {
        for (nanoseconds, end) in [
            (0, Some(256)),
            (1, Some(256)),
            (256, Some(256)),
            (257, Some(512)),
            (512, Some(512)),
            (1000, Some(1024)),
            (1 << 34, Some(1 << 34)),
            ((1 << 34) + 1, None),
            (u64::MAX, None),
        ] {
            let mut histogram = Histogram::default();
            histogram.record(Duration::from_nanos(nanoseconds));
            let (found, _) = histogram.buckets().find(|(_, count)| *count == 1).unwrap();
            assert_eq!(found, end.map(Duration::from_nanos), "{nanoseconds}");
            assert_eq!((histogram.count(), histogram.sum()), (1, Duration::from_nanos(nanoseconds)));
        }
    }
}
