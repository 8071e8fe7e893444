// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! VFIO type1: containers, in which whole groups share one address space.
//!
//! Facts of the kernel are from `include/uapi/linux/vfio.h` and `drivers/vfio/vfio_iommu_type1.c`.

// Ioctls on files that these types own.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_GROUP_FLAGS_VIABLE,
    VFIO_TYPE1v2_IOMMU, vfio_group_status, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};

use super::held::Held;
use super::linux::{failed, size, vfio_opcode};
use super::{HostError, HostErrorKind};
use crate::access::Access;
use crate::fd::{FileKind, WrongFile};
use crate::memory::HostMemory;
use crate::range::IovaRange;

mod container;
mod info;

pub use container::Container;
#[cfg(any(test, feature = "test-utils"))]
#[doc(hidden)]
pub use container::ContainerApi;
#[cfg(not(any(test, feature = "test-utils")))]
use container::ContainerApi;
#[doc(hidden)]
pub use info::{InfoError, Type1Info, parse};

const SET_IOMMU: Opcode = vfio_opcode(2);
const GROUP_GET_STATUS: Opcode = vfio_opcode(3);
const GROUP_SET_CONTAINER: Opcode = vfio_opcode(4);
const GROUP_GET_DEVICE_FD: Opcode = vfio_opcode(6);
const IOMMU_GET_INFO: Opcode = vfio_opcode(12);
const IOMMU_MAP_DMA: Opcode = vfio_opcode(13);
const IOMMU_UNMAP_DMA: Opcode = vfio_opcode(14);

/// Room for what the kernel may have to say of a container, in words of 8 bytes: far more than any needs.
const INFO_WORDS: usize = 1024;
/// The upper half of the address space but for its last page, which kernels without `VFIO_DMA_UNMAP_FLAG_ALL` cannot map.
const LAST_HALF: u64 = (1 << 63) - 0x1000;
/// The one address space that a container has.
const SPACE: u32 = 0;

/// Passes a structure to a file that takes it with this code.
///
/// # Safety
///
/// The file must be of the kind that the code belongs to (which the types below make sure of), and `argument` must be the
/// structure that the code takes, with its size field right and without an address that the kernel would write to.
unsafe fn call<const CODE: Opcode, T>(file: BorrowedFd<'_>, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: the caller vouches for code and structure.
    unsafe { ioctl(file, Updater::<CODE, T>::new(argument)) }
}

/// An open `/dev/vfio/vfio`, and the memory that was mapped in it.
#[derive(Debug)]
struct ContainerFile {
    file: OwnedFd,
    /// What is mapped there. Locked for as long as the kernel changes that: with the lock let go between, somebody else's mapping
    /// in the same place could be taken for one that is gone.
    held: Mutex<Held>,
}

impl ContainerFile {
    /// Takes an open `/dev/vfio/vfio`: the caller has made sure that it is one.
    fn new(file: OwnedFd) -> Self {
        Self { file, held: Mutex::default() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unmap(&self, flags: u32, iova: u64, size: u64) -> Result<u64, Errno> {
        let mut argument = vfio_iommu_type1_dma_unmap {
            argsz: self::size::<vfio_iommu_type1_dma_unmap>(),
            flags,
            iova,
            size,
            ..Default::default()
        };
        // SAFETY: the file is a container, and the structure has no addresses of this process.
        unsafe { call::<IOMMU_UNMAP_DMA, _>(self.file.as_fd(), &mut argument) }?;
        Ok(argument.size)
    }
}

/// Unmaps all that there is by calls of flags, first address and size.
fn unmap_all(unmap: impl Fn(u32, u64, u64) -> Result<u64, Errno>) -> Result<u64, Errno> {
    match unmap(VFIO_DMA_UNMAP_FLAG_ALL, 0, 0) {
        // Before Linux 5.12 there is no such flag: the two halves of the address space are all there is.
        Err(Errno::INVAL) => Ok(unmap(0, 0, 1 << 63)? + unmap(0, 1 << 63, LAST_HALF)?),
        result => result,
    }
}

impl ContainerApi for ContainerFile {
    fn number(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn set_iommu(&self) -> Result<(), Errno> {
        // SAFETY: the code takes a number.
        let setter = unsafe { IntegerSetter::<SET_IOMMU>::new_usize(VFIO_TYPE1v2_IOMMU as usize) };
        // SAFETY: the file is a container.
        unsafe { ioctl(self.file.as_fd(), setter) }
    }

    fn info(&self) -> Result<Vec<u8>, Errno> {
        // Aligned for the structure's largest field.
        let mut words = [0u64; INFO_WORDS];
        // The first field is the size.
        let length = size::<[u64; INFO_WORDS]>();
        words[0] = u64::from_ne_bytes(first_half(length));
        // SAFETY: the file is a container. The kernel reads the size from the first field and writes no more than that,
        // which is what the array has.
        unsafe { call::<IOMMU_GET_INFO, _>(self.file.as_fd(), &mut words) }?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        // With too little room the kernel leaves the capabilities out, and says how much they need.
        let needed = bytes.first_chunk().map(|needed| u32::from_ne_bytes(*needed));
        if needed.is_some_and(|needed| needed <= length) { Ok(bytes) } else { Err(Errno::MSGSIZE) }
    }

    fn map_dma(&self, iova: IovaRange, memory: &HostMemory, access: Access) -> Result<(), Errno> {
        let size = iova.length().filter(|length| *length <= memory.length()).ok_or(Errno::INVAL)?;
        let read = if access.read { VFIO_DMA_MAP_FLAG_READ } else { 0 };
        let write = if access.write { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
        let mut argument = vfio_iommu_type1_dma_map {
            argsz: self::size::<vfio_iommu_type1_dma_map>(),
            flags: read | write,
            vaddr: memory.address(),
            iova: iova.start(),
            size,
        };
        let mut held = self.held();
        // SAFETY: the file is a container. `memory` is mapped at this address for at least this length, and is held below for
        // as long as the kernel may look at the range.
        unsafe { call::<IOMMU_MAP_DMA, _>(self.file.as_fd(), &mut argument) }?;
        held.insert(SPACE, iova, memory);
        Ok(())
    }

    fn unmap_dma(&self, iova: IovaRange) -> Result<u64, Errno> {
        let mut held = self.held();
        let gone = match iova.length() {
            Some(size) => self.unmap(0, iova.start(), size)?,
            None => unmap_all(|flags, iova, size| self.unmap(flags, iova, size))?,
        };
        held.release(SPACE, iova);
        Ok(gone)
    }
}

/// A number followed by zeroes.
const fn first_half(number: u32) -> [u8; 8] {
    let [a, b, c, d] = number.to_ne_bytes();
    [a, b, c, d, 0, 0, 0, 0]
}

/// An open `/dev/vfio/N`: a whole IOMMU group.
#[derive(Debug)]
pub struct VfioGroup {
    file: OwnedFd,
}

impl VfioGroup {
    /// Takes an open `/dev/vfio/N`.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn new(file: OwnedFd) -> Result<Self, WrongFile> {
        FileKind::VfioGroup.check(&file)?;
        Ok(Self { file })
    }

    /// Puts the group into a container, where it stays until this value is dropped.
    ///
    /// # Errors
    ///
    /// Some device of the group is bound to a driver of the host, the group is in a container already, or the platform forbids
    /// it.
    pub fn join(&self, container: &Container) -> Result<(), HostError> {
        let action = "VFIO_GROUP_SET_CONTAINER";
        let mut status = vfio_group_status { argsz: size::<vfio_group_status>(), ..Default::default() };
        // SAFETY: the file is a group, and the structure has no addresses.
        unsafe { call::<GROUP_GET_STATUS, _>(self.file.as_fd(), &mut status) }
            .map_err(|errno| failed(errno, "VFIO_GROUP_GET_STATUS", HostErrorKind::Other))?;
        if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            let error = io::Error::other("a device of the group is bound to a driver of the host");
            return Err(HostError::new(HostErrorKind::Other, action, Some(error)));
        }
        let container = container.api.number();
        // SAFETY: the code takes a pointer to the number of a file, which is read and nothing else.
        let setter = unsafe { Setter::<GROUP_SET_CONTAINER, _>::new(container) };
        // SAFETY: the file is a group.
        unsafe { ioctl(self.file.as_fd(), setter) }.map_err(|errno| failed(errno, action, HostErrorKind::Other))
    }

    /// The file of one of the group's devices, by its address: to drive the device by. The group must be in a container with a
    /// type.
    ///
    /// # Errors
    ///
    /// There is no such device in the group, or it is open already.
    pub fn device(&self, address: &str) -> Result<OwnedFd, HostError> {
        let action = || format!("VFIO_GROUP_GET_DEVICE_FD of {address}");
        let name = CString::new(address)
            .map_err(|error| HostError::new(HostErrorKind::Other, action(), Some(io::Error::other(error))))?;
        // SAFETY: the file is a group.
        unsafe { ioctl(self.file.as_fd(), GetDeviceFile(&name)) }
            .map_err(|errno| failed(errno, action(), HostErrorKind::Other))
    }
}

/// Asks a group for a device's file.
struct GetDeviceFile<'a>(&'a CStr);

// SAFETY: the code takes the address of a string that ends with a zero, which is only read, and returns a new file of this
// process's.
unsafe impl Ioctl for GetDeviceFile<'_> {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        GROUP_GET_DEVICE_FD
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0.as_ptr().cast_mut().cast()
    }

    unsafe fn output_from_ptr(number: IoctlOutput, _: *mut c_void) -> Result<OwnedFd, Errno> {
        // SAFETY: the call did not fail, so this is the number of a file that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_unmapped_in_halves_by_kernels_without_the_flag() {
        let halves = |flags, iova, size| match (flags, iova, size) {
            (VFIO_DMA_UNMAP_FLAG_ALL, ..) => Err(Errno::INVAL),
            (0, 0, 0x8000_0000_0000_0000) => Ok(0x2000),
            (0, 0x8000_0000_0000_0000, 0x7fff_ffff_ffff_f000) => Ok(0x3000),
            other => panic!("{other:x?}"),
        };
        assert_eq!(unmap_all(halves), Ok(0x5000));
        assert_eq!(
            unmap_all(|flags, _, _| if flags == VFIO_DMA_UNMAP_FLAG_ALL { Ok(0x1000) } else { Ok(1) }),
            Ok(0x1000)
        );
        assert_eq!(unmap_all(|_, _, _| Err(Errno::NOMEM)), Err(Errno::NOMEM));
    }
}
