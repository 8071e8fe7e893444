// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The statements of virtio 1.3 about an IOMMU device, one test each, end to end: requests by their bytes, and what becomes of
//! DMA on a model of a host.
//!
//! The comment of a test quotes the statement, says what the device does, and which other devices do not. `docs/conformance.md`
//! is made of these comments (`make conformance`), so a test and its row cannot come apart. See [`statements`] for their form.

#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]
#![allow(clippy::doc_markdown, reason = "the specification is quoted as it is")]

mod attach;
mod bench;
mod configuration;
mod detach;
mod disagreements;
mod document;
mod faults;
mod features;
mod framing;
mod map;
mod operations;
mod probe;
#[path = "../common/requests.rs"]
mod requests;
mod reserved_memory;
mod ring;
mod statements;
#[path = "../common/status.rs"]
mod status;
mod unmap;
