// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be measured, and what all cases are made of.

use std::hint::black_box;
use std::time::{Duration, Instant};

/// The size of a page, in bytes.
pub const PAGE: u64 = 0x1000;
/// How many mappings there are, where a case does not say otherwise.
pub const MAPPINGS: u64 = 65536;

/// Does all rounds of a case, and has the meter at what is measured of them.
pub type Work = Box<dyn FnMut(&mut Meter)>;

/// One thing that is done many times.
pub struct Case {
    pub name: String,
    /// How often it is done in one run: a figure is a run's divided by this.
    pub rounds: u64,
    pub set_up: Box<dyn Fn() -> Work>,
    /// Whether the work can be done again without setting it up again.
    pub repeatable: bool,
    /// How many runs are timed.
    pub runs: usize,
}

impl Case {
    /// A case that is set up for each run.
    pub fn new(name: impl Into<String>, rounds: u64, set_up: impl Fn() -> Work + 'static) -> Self {
        Self { name: name.into(), rounds, set_up: Box::new(set_up), repeatable: false, runs: 9 }
    }

    /// The same with fewer runs, because setting it up takes long.
    pub fn runs(self, runs: usize) -> Self {
        Self { runs, ..self }
    }

    /// The same, set up once for all runs.
    pub fn repeatable(self) -> Self {
        Self { repeatable: true, ..self }
    }
}

/// Measures some of what a case does.
#[derive(Default)]
pub struct Meter {
    pub elapsed: Duration,
}

impl Meter {
    /// Does something, and counts it.
    pub fn measure(&mut self, mut work: impl FnMut()) {
        let start = Instant::now();
        counted_by_callgrind(&mut work);
        self.elapsed += start.elapsed();
    }
}

/// Callgrind counts instructions from the entry to this function to its return, and no others: it finds it by name.
#[inline(never)]
fn counted_by_callgrind(work: &mut dyn FnMut()) {
    work();
    // Whatever is last in a function may be jumped to, and then the function has returned.
    black_box(());
}

/// Pseudo-random numbers, the same each time.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            items.swap(index, self.below(index as u64 + 1) as usize);
        }
    }
}

/// Where mappings of one page are, and in which order they come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Side by side, ascending.
    Sequential,
    /// Side by side, shuffled.
    Dense,
    /// All over a TiB, in no order.
    Sparse,
}

impl Layout {
    /// The first so many pages. Allocates nothing else, so that it can precede a measurement of memory.
    pub fn pages(self, count: u64) -> Vec<u64> {
        let mut pages: Vec<u64> =
            if self == Self::Sparse { (0..count).map(scattered).collect() } else { (0..count).collect() };
        if self == Self::Dense {
            Random(0x9e37_79b9_7f4a_7c15).shuffle(&mut pages);
        }
        pages
    }
}

/// A page of the TiB for each number: another one for another number, since each step can be undone.
fn scattered(number: u64) -> u64 {
    const MASK: u64 = (1 << 28) - 1;
    let mut page = number & MASK;
    for _ in 0..3 {
        page = page.wrapping_mul(0x9e3_779b) & MASK;
        page ^= page >> 14;
    }
    page
}
