// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What needs a real IOMMU. These tests run as root inside the host VM, which `tests/hostvm/run` boots; elsewhere they
//! are left out.

#![cfg(feature = "daemon")]
#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod calls;
mod check;
mod contender;
mod costs;
mod daemon;
mod demo;
mod edu;
mod embedded;
mod felt;
mod guest;
mod hotplug;
mod inspect;
mod leaving;
mod microvm;
mod model;
mod operate;
mod pci;
mod rmrr;
#[cfg(feature = "vhost")]
mod vhost_net;
