// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What of iommufd and of VFIO's device files is used, call by call. The kernel is behind it, or a model of the kernel.
//!
//! Errors are the kernel's own numbers: what they mean depends on the call and is for the caller to say.

#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::os::fd::RawFd;

use rustix::io::Errno;

use crate::access::Access;
use crate::host::Constraints;
use crate::memory::{FileMemory, HostMemory};
use crate::range::IovaRange;

/// An iommufd: objects by numbers (`include/uapi/linux/iommufd.h`).
pub trait IommufdApi: Debug + Send + Sync {
    /// The number by which devices are told of it.
    fn number(&self) -> RawFd;

    /// `IOMMU_IOAS_ALLOC`: makes an empty address space.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn ioas_alloc(&self) -> Result<u32, Errno>;

    /// `IOMMU_DESTROY`: ends an object.
    ///
    /// # Errors
    ///
    /// EBUSY while something uses it.
    fn destroy(&self, object: u32) -> Result<(), Errno>;

    /// `IOMMU_IOAS_MAP`: maps memory of this process, which stays mapped here until it is unmapped there.
    ///
    /// # Errors
    ///
    /// EINVAL where nothing can be mapped, EEXIST where something is, ENOMEM, EFAULT.
    fn ioas_map(&self, ioas: u32, iova: IovaRange, memory: &HostMemory, access: Access) -> Result<(), Errno>;

    /// `IOMMU_IOAS_MAP_FILE`: maps a part of a file.
    ///
    /// # Errors
    ///
    /// As [`ioas_map`](Self::ioas_map), and ENOTTY before Linux 6.13.
    fn ioas_map_file(&self, ioas: u32, iova: IovaRange, memory: &FileMemory, access: Access) -> Result<(), Errno>;

    /// `IOMMU_IOAS_COPY`: maps what another address space has at `source`, sharing its pins.
    ///
    /// # Errors
    ///
    /// As [`ioas_map`](Self::ioas_map), and ENOENT where the other has nothing.
    fn ioas_copy(&self, to: u32, iova: IovaRange, from: u32, source: u64, access: Access) -> Result<(), Errno>;

    /// `IOMMU_IOAS_UNMAP`: removes all mappings in a range, and returns how many bytes that were. The whole address space is
    /// always taken for all that is mapped.
    ///
    /// # Errors
    ///
    /// ENOENT where nothing is mapped, or a mapping only in part: those before it are gone then.
    fn ioas_unmap(&self, ioas: u32, iova: IovaRange) -> Result<u64, Errno>;

    /// `IOMMU_IOAS_IOVA_RANGES`: what can be mapped. Before a device is attached that is everything, by single bytes.
    ///
    /// # Errors
    ///
    /// ENOENT if there is no such address space.
    fn ioas_iova_ranges(&self, ioas: u32) -> Result<Constraints, Errno>;

    /// `IOMMU_HWPT_ALLOC`: makes a hardware page table of an address space for a device. Everything that is mapped there is
    /// pinned as long as it exists.
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn hwpt_alloc(&self, device: u32, ioas: u32) -> Result<u32, Errno>;
}

/// A VFIO device file (`include/uapi/linux/vfio.h`).
pub trait VfioDeviceApi: Debug + Send + Sync {
    /// `VFIO_DEVICE_BIND_IOMMUFD`: binds the device to the iommufd with this number; the device's number there. Once for each
    /// file, before anything else.
    ///
    /// # Errors
    ///
    /// EINVAL if it is bound already, EBUSY if its group is used otherwise, EPERM without interrupt isolation.
    fn bind(&self, iommufd: RawFd) -> Result<u32, Errno>;

    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`: attaches the device to an address space or a hardware page table, in place of what it
    /// was attached to. All devices of its group move with it.
    ///
    /// # Errors
    ///
    /// EINVAL before the device is bound, ENOENT if there is no such object, EADDRINUSE if what is mapped lies where the device
    /// cannot reach. The device is attached to what it was.
    fn attach(&self, object: u32) -> Result<(), Errno>;

    /// `VFIO_DEVICE_DETACH_IOMMUFD_PT`: detaches the device, so that all its DMA is refused once its siblings are detached too.
    ///
    /// # Errors
    ///
    /// The device is not bound, or gone: it has nothing to be detached from.
    fn detach(&self) -> Result<(), Errno>;

    /// Whether the device has been bound: before that, every other call is invalid.
    fn is_bound(&self) -> bool;
}
