// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What each fuzz target does with an input, so that inputs can be replayed by any toolchain.
//!
//! A target is a module with `check`, which takes any bytes and panics where something does not hold, and `seeds`, the inputs that
//! fuzzing starts from. They name the invariants by what breaks.

// A check stops at its first contradiction.
#![allow(clippy::expect_used, clippy::missing_panics_doc, clippy::cast_possible_truncation)]

mod machine;
mod rings;
mod traced;
mod wire;

pub mod control;
pub mod events;
pub mod facts;
pub mod host_text;
pub mod operations;
pub mod requests;
pub mod ring;
pub mod state;
pub mod translations;
pub mod vhost_user;

/// A target, its check, and the seeds it starts from, by name.
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Checks an input.
    pub check: fn(&[u8]),
    /// Its seeds: names and bytes.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "operations", check: operations::check, seeds: Vec::new },
    Target { name: "requests", check: requests::check, seeds: requests::seeds },
    Target { name: "ring", check: ring::check, seeds: ring::seeds },
    Target { name: "events", check: events::check, seeds: events::seeds },
    Target { name: "state", check: state::check, seeds: state::seeds },
    Target { name: "facts", check: facts::check, seeds: facts::seeds },
    Target { name: "host_text", check: host_text::check, seeds: host_text::seeds },
    Target { name: "translations", check: translations::check, seeds: translations::seeds },
    Target { name: "vhost_user", check: vhost_user::check, seeds: vhost_user::seeds },
    Target { name: "control", check: control::check, seeds: control::seeds },
];
