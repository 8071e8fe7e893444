// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! VFIO type1: containers, in which whole groups share one address space.
//!
//! Facts of the kernel are from `include/uapi/linux/vfio.h` and `drivers/vfio/vfio_iommu_type1.c`.

// Ioctls on files that these types own.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl, opcode};
use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_GROUP_FLAGS_VIABLE, VFIO_TYPE1v2_IOMMU, vfio_group_status};

use super::{HostError, HostErrorKind};
use crate::fd::{FileKind, WrongFile};

mod info;

pub use info::{InfoError, Type1Info, parse};

const SET_IOMMU: Opcode = vfio_opcode(2);
const GROUP_GET_STATUS: Opcode = vfio_opcode(3);
const GROUP_SET_CONTAINER: Opcode = vfio_opcode(4);
const IOMMU_GET_INFO: Opcode = vfio_opcode(12);

/// Room for what the kernel may have to say of a container, in words of 8 bytes: far more than any needs.
const INFO_WORDS: usize = 1024;
/// `VFIO_TYPE`
const VFIO_TYPE: u8 = b';';

const fn vfio_opcode(number: u32) -> Opcode {
    let [number, ..] = (VFIO_BASE + number).to_le_bytes();
    opcode::none(VFIO_TYPE, number)
}

#[expect(clippy::cast_possible_truncation, reason = "structures of the kernel's interface have tens of bytes")]
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

fn failed(errno: Errno, action: &str, kind: HostErrorKind) -> HostError {
    HostError::new(kind, action, Some(errno.into()))
}

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

/// An open `/dev/vfio/vfio`.
#[derive(Debug)]
pub struct Container {
    file: OwnedFd,
}

impl Container {
    /// Takes an open `/dev/vfio/vfio`.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn new(file: OwnedFd) -> Result<Self, WrongFile> {
        FileKind::VfioContainer.check(&file)?;
        Ok(Self { file })
    }

    /// Makes it a container of type1, version 2. It must have a group.
    ///
    /// # Errors
    ///
    /// It has no group or a type already, or the group's IOMMU cannot be used.
    pub fn set_iommu(&self) -> Result<(), HostError> {
        // SAFETY: the code takes a number.
        let setter = unsafe { IntegerSetter::<SET_IOMMU>::new_usize(VFIO_TYPE1v2_IOMMU as usize) };
        // SAFETY: the file is a container.
        unsafe { ioctl(self.file.as_fd(), setter) }
            .map_err(|errno| failed(errno, "VFIO_SET_IOMMU of type1v2", HostErrorKind::Incompatible))
    }

    /// What the container can map, for the groups that are in it.
    ///
    /// # Errors
    ///
    /// The container has no type, or the kernel's answer cannot be understood.
    pub fn info(&self) -> Result<Type1Info, HostError> {
        const ACTION: &str = "VFIO_IOMMU_GET_INFO";
        let failed = |error| HostError::new(HostErrorKind::Other, ACTION, Some(error));
        // Aligned for the structure's largest field.
        let mut words = [0u64; INFO_WORDS];
        // The first field is the size: the lower half of a word on a machine with the lower half first.
        let length = size::<[u64; INFO_WORDS]>();
        words[0] = u64::from_ne_bytes(first_half(length));
        // SAFETY: the file is a container. The kernel reads the size from the first field and writes no more than that,
        // which is what the array has.
        unsafe { call::<IOMMU_GET_INFO, _>(self.file.as_fd(), &mut words) }.map_err(|errno| failed(errno.into()))?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        // With too little room the kernel leaves the capabilities out, and says how much they need.
        match bytes.first_chunk().map(|needed| u32::from_ne_bytes(*needed)) {
            Some(needed) if needed <= length => parse(&bytes).map_err(|error| failed(io::Error::other(error))),
            needed => Err(failed(io::Error::other(format!("{needed:?} bytes of answer")))),
        }
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
            return Err(HostError::new(HostErrorKind::Incompatible, action, Some(error)));
        }
        let container = container.file.as_raw_fd();
        // SAFETY: the code takes a pointer to the number of a file, which is read and nothing else.
        let setter = unsafe { Setter::<GROUP_SET_CONTAINER, _>::new(container) };
        // SAFETY: the file is a group.
        unsafe { ioctl(self.file.as_fd(), setter) }.map_err(|errno| failed(errno, action, HostErrorKind::Incompatible))
    }
}
