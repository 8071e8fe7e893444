// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests, frontends, states and hosts that mean no good: cases of docs/hostile-cases.md that no other test shows in full.

#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod bypass;
mod chains;
mod events;
mod fields;
mod host;
mod kernel;
mod limits;
mod list;
mod machine;
mod mapping;
mod probe;
mod socket;
mod states;
mod unplug;
