// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device against an oracle: a model that was written from the specification and docs/invariants.md alone, and shares nothing with the
//! device but the bytes of requests. Whatever sequence of operations comes, with the host failing at any call, both must give the same
//! answers and have DMA go to the same places.

#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

mod machine;
#[allow(clippy::from_iter_instead_of_collect, reason = "it says what is made")]
mod model;
mod operation;

use std::sync::atomic::{AtomicU64, Ordering};

use arbitrary::{Arbitrary, Unstructured};
use operation::{Input, Operation};
use proptest::prelude::*;

/// An operation from bytes of its own, so that a sequence that fails can be made shorter one by one.
fn operation() -> impl Strategy<Value = Operation> {
    proptest::collection::vec(any::<u8>(), 24)
        .prop_filter_map("no operation", |bytes| Operation::arbitrary(&mut Unstructured::new(&bytes)).ok())
}

fn input() -> impl Strategy<Value = Input> {
    (any::<bool>(), any::<bool>(), any::<u8>(), proptest::collection::vec(operation(), 1..100))
        .prop_map(|(type1, boot_bypass, attached, operations)| Input { type1, boot_bypass, attached, operations })
}

/// What was seen in all sequences.
static SEEN: AtomicU64 = AtomicU64::new(0);

proptest! {
    fn sequences(input in input()) {
        let seen = machine::run(&input);
        // Each in its place: two that change places are no agreement.
        SEEN.store(SEEN.load(Ordering::Relaxed).rotate_left(1) ^ seen, Ordering::Relaxed);
    }
}

#[test]
fn the_device_does_what_the_oracle_does() {
    sequences();
    println!("seen: {:016x}", SEEN.load(Ordering::Relaxed));
}
