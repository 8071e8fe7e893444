// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Telling the guest which devices are behind the IOMMU.

pub mod viot;
