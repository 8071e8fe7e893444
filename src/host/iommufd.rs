// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Linux's iommufd: one IOAS for each guest domain, groups attached to it by an atomic replace.
//!
//! A [`VfioDevice`] is the file of a VFIO device (`/dev/vfio/devices/vfioN`). Whoever drives the device binds it to an
//! iommufd and attaches it to an address space of its own; holding the same two files, this process then attaches it
//! to another one. This file has the ioctls; what is made of them is in the modules below. Facts of the kernel are from
//! `include/uapi/linux/iommufd.h`, `include/uapi/linux/vfio.h` and `drivers/iommu/iommufd/`.

// Ioctls on files that these types own.
#![allow(unsafe_code)]

use std::fs::File;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_DESTROY, IOMMUFD_CMD_HWPT_ALLOC, IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_COPY,
    IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP, IOMMUFD_CMD_IOAS_MAP_FILE, IOMMUFD_CMD_IOAS_UNMAP,
    IOMMUFD_TYPE, iommu_destroy, iommu_hwpt_alloc, iommu_ioas_alloc, iommu_ioas_copy, iommu_ioas_iova_ranges,
    iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap, iommu_iova_range,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as MAP_WRITEABLE,
};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use vfio_bindings::bindings::vfio::{
    vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, vfio_device_detach_iommufd_pt, vfio_device_info,
};

use super::Constraints;
use super::held::Held;
use super::linux::{size, size_before, vfio_opcode};
use crate::access::Access;
use crate::memory::{FileMemory, HostMemory};
use crate::range::{IovaRange, RangeSet};

#[cfg(any(test, feature = "test-utils"))]
#[doc(hidden)]
pub mod api;
#[cfg(not(any(test, feature = "test-utils")))]
mod api;
mod device;
mod group;
mod ioas;

use api::{IommufdApi, VfioDeviceApi};
pub use device::VfioDevice;
pub use group::IommufdGroup;
pub use ioas::{Ioas, Iommufd};

const DESTROY: Opcode = iommufd_opcode(IOMMUFD_CMD_DESTROY);
const IOAS_ALLOC: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_ALLOC);
const IOAS_COPY: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_COPY);
const IOAS_IOVA_RANGES: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_IOVA_RANGES);
const IOAS_MAP: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_MAP);
const IOAS_MAP_FILE: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_MAP_FILE);
const IOAS_UNMAP: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_UNMAP);
const HWPT_ALLOC: Opcode = iommufd_opcode(IOMMUFD_CMD_HWPT_ALLOC);
const DEVICE_GET_INFO: Opcode = vfio_opcode(7);
const DEVICE_BIND_IOMMUFD: Opcode = vfio_opcode(18);
const DEVICE_ATTACH_IOMMUFD_PT: Opcode = vfio_opcode(19);
const DEVICE_DETACH_IOMMUFD_PT: Opcode = vfio_opcode(20);

/// What is asked of an iommufd and of devices that whoever passed them has bound: all that this process needs to be allowed.
#[cfg(feature = "daemon")]
pub(crate) const SHARED_REQUESTS: &[u32] = &[
    DESTROY,
    IOAS_ALLOC,
    IOAS_IOVA_RANGES,
    IOAS_MAP,
    IOAS_MAP_FILE,
    IOAS_UNMAP,
    DEVICE_GET_INFO,
    DEVICE_ATTACH_IOMMUFD_PT,
    DEVICE_DETACH_IOMMUFD_PT,
];
/// The same for who does nothing but detach.
#[cfg(feature = "daemon")]
pub(crate) const DETACH_REQUEST: u32 = DEVICE_DETACH_IOMMUFD_PT;

/// How many usable ranges the kernel may report: far more than any host has holes.
const MOST_RANGES: u32 = 4096;

const fn iommufd_opcode(command: u32) -> Opcode {
    let [number, ..] = command.to_le_bytes();
    opcode::none(IOMMUFD_TYPE, number)
}

/// Passes a structure to a file that takes it with this code, and returns what the file wrote into it.
///
/// # Safety
///
/// The file must be of the kind that the code belongs to (which those who make the types below make sure of), `argument` must
/// be the structure that the code takes, with its size field right, and every address in it must point to what the kernel
/// expects there.
unsafe fn call<const CODE: Opcode, T>(file: BorrowedFd<'_>, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: the caller vouches for code, structure and addresses.
    unsafe { ioctl(file, Updater::<CODE, T>::new(argument)) }
}

fn map_flags(access: Access) -> u32 {
    let read = if access.read { MAP_READABLE } else { 0 };
    let write = if access.write { MAP_WRITEABLE } else { 0 };
    MAP_FIXED_IOVA | read | write
}

/// An open `/dev/iommu`, and the memory that address spaces of it were given by address.
#[derive(Debug)]
struct IommufdFile {
    file: OwnedFd,
    /// What is mapped by address; of memory mapped by file the kernel holds the file. Locked for as long as the kernel changes
    /// such mappings: with the lock let go between, somebody else's mapping in the same place could be taken for one that is gone.
    held: Mutex<Held>,
}

impl IommufdFile {
    /// Takes an open `/dev/iommu`: the caller has made sure that it is one.
    fn new(file: OwnedFd) -> Self {
        Self { file, held: Mutex::default() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IommufdApi for IommufdFile {
    fn number(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn ioas_alloc(&self) -> Result<u32, Errno> {
        let mut argument = iommu_ioas_alloc { size: size::<iommu_ioas_alloc>(), ..Default::default() };
        // SAFETY: the structure has no addresses.
        unsafe { call::<IOAS_ALLOC, _>(self.file.as_fd(), &mut argument) }?;
        Ok(argument.out_ioas_id)
    }

    fn destroy(&self, object: u32) -> Result<(), Errno> {
        let mut argument = iommu_destroy { size: size::<iommu_destroy>(), id: object };
        let mut held = self.held();
        // SAFETY: the structure has no addresses.
        unsafe { call::<DESTROY, _>(self.file.as_fd(), &mut argument) }?;
        held.release(object, IovaRange::ALL);
        Ok(())
    }

    fn ioas_map(&self, ioas: u32, iova: IovaRange, memory: &HostMemory, access: Access) -> Result<(), Errno> {
        let length = iova.length().filter(|length| *length <= memory.length()).ok_or(Errno::INVAL)?;
        let mut argument = iommu_ioas_map {
            size: size::<iommu_ioas_map>(),
            flags: map_flags(access),
            ioas_id: ioas,
            user_va: memory.address(),
            length,
            iova: iova.start(),
            ..Default::default()
        };
        let mut held = self.held();
        // SAFETY: `memory` is mapped at this address for at least this length, and is held below for as long as the kernel may
        // look at the range.
        unsafe { call::<IOAS_MAP, _>(self.file.as_fd(), &mut argument) }?;
        held.insert(ioas, iova, memory);
        Ok(())
    }

    fn ioas_map_file(&self, ioas: u32, iova: IovaRange, memory: &FileMemory, access: Access) -> Result<(), Errno> {
        let file: &File = memory.file();
        let mut argument = iommu_ioas_map_file {
            size: size::<iommu_ioas_map_file>(),
            flags: map_flags(access),
            ioas_id: ioas,
            fd: file.as_raw_fd(),
            start: memory.offset(),
            length: iova.length().ok_or(Errno::INVAL)?,
            iova: iova.start(),
        };
        // SAFETY: the structure has no addresses of this process; the kernel takes its own hold of the file.
        unsafe { call::<IOAS_MAP_FILE, _>(self.file.as_fd(), &mut argument) }
    }

    fn ioas_copy(&self, to: u32, iova: IovaRange, from: u32, source: u64, access: Access) -> Result<(), Errno> {
        let mut argument = iommu_ioas_copy {
            size: size::<iommu_ioas_copy>(),
            flags: map_flags(access),
            dst_ioas_id: to,
            src_ioas_id: from,
            length: iova.length().ok_or(Errno::INVAL)?,
            dst_iova: iova.start(),
            src_iova: source,
        };
        let mut held = self.held();
        // SAFETY: the structure has no addresses of this process. Memory that the source has by address is held below for the
        // copy, too: the source may be gone before it.
        unsafe { call::<IOAS_COPY, _>(self.file.as_fd(), &mut argument) }?;
        held.copy(to, iova, from, source);
        Ok(())
    }

    fn ioas_unmap(&self, ioas: u32, iova: IovaRange) -> Result<u64, Errno> {
        // A range of 2^64 bytes cannot be said, and the kernel takes this length for all there is.
        let length = iova.length().unwrap_or(u64::MAX);
        let mut argument =
            iommu_ioas_unmap { size: size::<iommu_ioas_unmap>(), ioas_id: ioas, iova: iova.start(), length };
        let mut held = self.held();
        // SAFETY: the structure has no addresses of this process.
        unsafe { call::<IOAS_UNMAP, _>(self.file.as_fd(), &mut argument) }?;
        held.release(ioas, iova);
        Ok(argument.length)
    }

    fn ioas_iova_ranges(&self, ioas: u32) -> Result<Constraints, Errno> {
        let mut ranges: Vec<iommu_iova_range> = Vec::new();
        let mut count = 0;
        loop {
            let mut argument = iommu_ioas_iova_ranges {
                size: size::<iommu_ioas_iova_ranges>(),
                ioas_id: ioas,
                num_iovas: count,
                allowed_iovas: ranges.as_mut_ptr().expose_provenance() as u64,
                ..Default::default()
            };
            // SAFETY: the address is that of `num_iovas` structures of the kind that the kernel writes there.
            let result = unsafe { call::<IOAS_IOVA_RANGES, _>(self.file.as_fd(), &mut argument) };
            match result {
                Ok(()) => {
                    let known = ranges.iter().take(argument.num_iovas as usize);
                    let usable: RangeSet = known.filter_map(|range| IovaRange::new(range.start, range.last)).collect();
                    return Ok(Constraints { usable, granule: argument.out_iova_alignment });
                }
                // There are more than that: the kernel says how many.
                Err(Errno::MSGSIZE) if count < argument.num_iovas && argument.num_iovas <= MOST_RANGES => {
                    count = argument.num_iovas;
                    ranges.resize(count as usize, iommu_iova_range::default());
                }
                Err(errno) => return Err(errno),
            }
        }
    }

    fn hwpt_alloc(&self, device: u32, ioas: u32) -> Result<u32, Errno> {
        let mut argument =
            iommu_hwpt_alloc { size: size::<iommu_hwpt_alloc>(), dev_id: device, pt_id: ioas, ..Default::default() };
        // SAFETY: the structure's address is null and its length zero.
        unsafe { call::<HWPT_ALLOC, _>(self.file.as_fd(), &mut argument) }?;
        Ok(argument.out_hwpt_id)
    }
}

/// An open `/dev/vfio/devices/vfioN`.
#[derive(Debug)]
struct VfioDeviceFile {
    /// Those who make one have made sure that it is one.
    file: OwnedFd,
}

impl VfioDeviceApi for VfioDeviceFile {
    fn bind(&self, iommufd: RawFd) -> Result<u32, Errno> {
        let mut argument = vfio_device_bind_iommufd {
            argsz: size_before(offset_of!(vfio_device_bind_iommufd, token_uuid_ptr)),
            iommufd,
            ..Default::default()
        };
        // SAFETY: the size leaves the only address out.
        unsafe { call::<DEVICE_BIND_IOMMUFD, _>(self.file.as_fd(), &mut argument) }?;
        Ok(argument.out_devid)
    }

    fn attach(&self, object: u32) -> Result<(), Errno> {
        let mut argument = vfio_device_attach_iommufd_pt {
            argsz: size_before(offset_of!(vfio_device_attach_iommufd_pt, pasid)),
            pt_id: object,
            ..Default::default()
        };
        // SAFETY: the structure has no addresses.
        unsafe { call::<DEVICE_ATTACH_IOMMUFD_PT, _>(self.file.as_fd(), &mut argument) }
    }

    fn detach(&self) -> Result<(), Errno> {
        let mut argument = vfio_device_detach_iommufd_pt {
            argsz: size_before(offset_of!(vfio_device_detach_iommufd_pt, pasid)),
            ..Default::default()
        };
        // SAFETY: the structure has no addresses.
        unsafe { call::<DEVICE_DETACH_IOMMUFD_PT, _>(self.file.as_fd(), &mut argument) }
    }

    fn is_bound(&self) -> bool {
        let mut argument = vfio_device_info { argsz: size::<vfio_device_info>(), ..Default::default() };
        // SAFETY: the structure has no addresses.
        unsafe { call::<DEVICE_GET_INFO, _>(self.file.as_fd(), &mut argument) }.is_ok()
    }
}
