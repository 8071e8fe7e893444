// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio-iommu device (virtio device 23).
pub mod access;
pub mod device;
#[cfg(feature = "iommufd")]
pub mod fd;
pub mod host;
pub mod id;
#[cfg(feature = "daemon")]
pub mod inspect;
pub mod memory;
#[cfg(feature = "queue")]
pub mod queue;
pub mod range;
pub mod request;
pub mod reserved;
pub mod spec;
#[cfg(feature = "acpi")]
pub mod topology;
#[cfg(feature = "daemon")]
pub mod vhost_user;
