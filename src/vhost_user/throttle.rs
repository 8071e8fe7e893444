// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A limit on what a guest, a frontend or a client of the control socket can make the daemon log.

use std::time::{Duration, Instant};

/// Lets so many lines pass in a second and counts the others.
#[derive(Debug)]
pub(crate) struct Throttle {
    since: Instant,
    passed: u32,
    held_back: u64,
}

/// Whether a line may be logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Yes; so many were not since the last time.
    Yes {
        held_back: u64,
    },
    No,
}

impl Throttle {
    const LINES: u32 = 10;
    const PERIOD: Duration = Duration::from_secs(1);

    pub const fn new(now: Instant) -> Self {
        Self { since: now, passed: 0, held_back: 0 }
    }

    pub fn ask(&mut self, now: Instant) -> Pass {
        if now.duration_since(self.since) >= Self::PERIOD {
            self.since = now;
            self.passed = 0;
        }
        if self.passed == Self::LINES {
            self.held_back += 1;
            return Pass::No;
        }
        self.passed += 1;
        Pass::Yes { held_back: std::mem::take(&mut self.held_back) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_a_second_pass_and_the_rest_is_counted() {
        let start = Instant::now();
        let mut throttle = Throttle::new(start);
        let passed = (0..1000).filter(|_| throttle.ask(start) != Pass::No).count();
        assert_eq!(passed, 10);
        assert_eq!(throttle.ask(start + Duration::from_millis(999)), Pass::No);
        assert_eq!(throttle.ask(start + Duration::from_secs(1)), Pass::Yes { held_back: 991 });
        assert_eq!(throttle.ask(start + Duration::from_secs(1)), Pass::Yes { held_back: 0 });
    }
}
