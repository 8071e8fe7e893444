// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio-iommu device (virtio device 23).
pub mod access;
pub mod device;
pub mod host;
pub mod id;
pub mod memory;
pub mod range;
pub mod request;
pub mod reserved;
pub mod spec;
