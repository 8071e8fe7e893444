// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Telling the guest which devices are behind the IOMMU.

#[cfg(feature = "fdt")]
pub mod device_tree;
#[cfg(feature = "acpi")]
pub mod viot;
