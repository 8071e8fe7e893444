// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `VIRTIO_IOMMU_S_*`, by the numbers of the specification.

#![allow(dead_code, reason = "not every test uses everything")]

pub const OK: u8 = 0;
pub const UNSUPP: u8 = 2;
pub const DEVERR: u8 = 3;
pub const INVAL: u8 = 4;
pub const RANGE: u8 = 5;
pub const NOENT: u8 = 6;
pub const FAULT: u8 = 7;
pub const NOMEM: u8 = 8;
