// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Before a guest runs: looking at the host, saying whether it is ready, starting QEMU and the daemon together.

pub mod check;
mod directory;
#[cfg(test)]
mod fake_monitor;
pub mod inspect;
pub mod memlock;
pub mod operate;
pub mod output;
pub mod picture;
pub mod plugging;
pub mod qemu;
pub mod qmp;
mod run;
pub mod show;
mod size;
mod status;

pub use directory::{Directory, DirectoryError};
pub use run::{Assignment, Launch, LaunchError};
pub use size::{ParseSizeError, Size};
