// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What each fuzz target does with an input, so that inputs can be replayed by any toolchain.
//!
//! A target is a module with `check`, which takes any bytes and panics where something does not hold, and `seeds`, the inputs that
//! fuzzing starts from. They name the invariants by what breaks.

// A check stops at its first contradiction.
#![allow(clippy::expect_used, clippy::missing_panics_doc, clippy::cast_possible_truncation)]

pub mod vhost_user;
