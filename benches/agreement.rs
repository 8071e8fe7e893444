// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The yardstick does what the device does: it is no cheaper for leaving something out.

use std::collections::BTreeSet;

use crate::case::{PAGE, Random};
use crate::driver::{OK, Request};
use crate::machine::{DOMAIN, Device, LAST_INPUT, Machine, Ours, RAM, yardstick};

const REQUESTS: usize = 20_000;
/// The first addresses are below this, so that requests meet what others mapped.
const PAGES: u64 = 96;
/// The most that a MAP maps.
const MOST_PAGES: u64 = 4;
/// What requests are answered with: OK, INVAL, RANGE, NOENT and FAULT.
const STATUSES: [u8; 5] = [0, 4, 5, 6, 7];

/// Sends both the same requests, with faults of every kind among them, and compares the answers.
///
/// # Panics
///
/// An answer differs, or some kind of answer was never given.
pub fn check() {
    let mut random = Random(7);
    let (mut ours, mut theirs) = (Machine::new(Ours::in_software()), Machine::new(yardstick()));
    let mut seen = BTreeSet::new();
    let mut done = 0;
    for _ in 0..REQUESTS {
        let (description, request) = any_request(&mut random);
        let [ours, theirs] = [ours.statuses(&[request()])[0], theirs.statuses(&[request()])[0]];
        assert_eq!(ours, theirs, "the device's answer and the yardstick's to {description}");
        seen.insert(ours);
        done += usize::from(ours == OK);
    }
    assert!(seen.into_iter().eq(STATUSES), "not every answer was given");
    assert!(done > REQUESTS / 2, "only {done} requests were done");
    assert_eq!(ours.device.mappings(), theirs.device.mappings(), "what is mapped in the end");
}

/// Mostly a request that makes sense.
fn any_request(random: &mut Random) -> (String, impl Fn() -> Request + use<>) {
    let rarely = |random: &mut Random| random.below(16) == 0;
    let maps = random.below(2) == 0;
    // An UNMAP takes away as much as several MAPs add, so that there is room for others.
    let pages = 1 + random.below(if maps { MOST_PAGES } else { 8 * MOST_PAGES });
    let mut first = random.below(PAGES) * PAGE;
    let mut last = first + pages * PAGE - 1;
    let mut physical = random.below(RAM / PAGE - MOST_PAGES) * PAGE;
    if rarely(random) {
        // Misaligned, the wrong way round, or beyond what there is.
        match random.below(6) {
            0 => first += 1,
            1 => last -= 1,
            2 => (first, last) = (last, first),
            3 => physical += 1,
            4 => physical = RAM - PAGE,
            _ => last = LAST_INPUT + PAGE,
        }
    }
    let domain = if rarely(random) { DOMAIN + 1 } else { DOMAIN };
    let flags = if rarely(random) { 8 } else { 3 };
    let kind = if maps { "MAP" } else { "UNMAP" };
    let description = format!("{kind} domain {domain}: {first:#x}-{last:#x} to {physical:#x}, flags {flags}");
    let request = move || {
        if maps { Request::map(domain, first, last, physical, flags) } else { Request::unmap(domain, first, last) }
    };
    (description, request)
}
