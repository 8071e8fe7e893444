// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices by their files, as the registry needs them.

use std::fmt;
use std::fs::Metadata;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use crate::fd::{DeviceNumbers, VfioMajor, WrongFile};
use crate::host::HostGroup;
use crate::host::iommufd::{Iommufd, IommufdGroup, VfioDevice};
use crate::id::EndpointId;

/// A device that is to be an endpoint: its ID, its file, and what it is called in messages.
pub type DeviceFile = (EndpointId, OwnedFd, String);

/// What makes host groups of devices' files.
pub trait DeviceFiles: fmt::Debug + Send + Sync {
    /// Makes sure that a file is a device's, and says which one's: two files have the same number only if they are the same device's.
    ///
    /// # Errors
    ///
    /// [`FileError`]
    fn identify(&self, file: BorrowedFd<'_>) -> Result<u64, FileError>;

    /// Whether a node in the devices' directory is that of the device with this number: a character device's, and no link to it.
    fn is_node(&self, node: &Metadata, number: u64) -> bool {
        is_node_of(node, number)
    }

    /// Makes a host group of files that were identified.
    ///
    /// # Errors
    ///
    /// [`FileError`]; the files are closed.
    fn group(&self, devices: Vec<DeviceFile>) -> Result<Arc<dyn HostGroup>, FileError>;
}

/// Whether a node is the character device with this number.
pub(crate) fn is_node_of(node: &Metadata, number: u64) -> bool {
    node.file_type().is_char_device() && node.rdev() == number
}

/// A file that no device can be had of.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is something else.
    #[error(transparent)]
    WrongFile(#[from] WrongFile),
    /// The kernel does not say how it numbers such files.
    #[error("how this host numbers VFIO's files is not known")]
    Unknown(#[source] io::Error),
}

/// Devices whose files are VFIO's, on one iommufd.
#[derive(Debug)]
pub struct VfioFiles {
    iommufd: Arc<Iommufd>,
    /// Opened when the process started: later it may open nothing.
    numbers: io::Result<DeviceNumbers>,
}

impl VfioFiles {
    /// Devices that are bound to this iommufd, or will be.
    pub fn new(iommufd: Arc<Iommufd>) -> Self {
        Self { iommufd, numbers: DeviceNumbers::open() }
    }

    fn major(&self) -> Result<VfioMajor, FileError> {
        let numbers = self.numbers.as_ref().map_err(|error| FileError::Unknown(io::Error::from(error.kind())))?;
        // VFIO may have come since.
        let major = numbers.vfio().map_err(FileError::Unknown)?;
        major.ok_or_else(|| FileError::Unknown(io::Error::other("there is no VFIO with device files")))
    }
}

impl DeviceFiles for VfioFiles {
    fn identify(&self, file: BorrowedFd<'_>) -> Result<u64, FileError> {
        Ok(self.major()?.check(&file.as_fd())?)
    }

    fn group(&self, devices: Vec<DeviceFile>) -> Result<Arc<dyn HostGroup>, FileError> {
        let major = self.major()?;
        let device = |(id, file, name)| Ok((id, VfioDevice::of_major(file, major, name)?));
        let devices: Result<Vec<_>, FileError> = devices.into_iter().map(device).collect();
        Ok(Arc::new(IommufdGroup::shared(Arc::clone(&self.iommufd), devices?)))
    }
}

/// Somebody else who does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// It has ended. Whatever it held is closed.
    #[error("it is gone; start the daemon anew")]
    Gone,
    /// It has not answered in time. What it was asked it does later.
    #[error("it has not answered yet, as while the host resets a device that it closes; wait a minute")]
    Late,
    /// It cannot hold more.
    #[error("it cannot hold the file")]
    Refused,
    /// It cannot be asked.
    #[error("it cannot be asked: {0}")]
    Io(#[source] io::Error),
}

/// Somebody else who holds the devices' files, to detach the devices when this process is killed.
pub trait Keeper: fmt::Debug + Send {
    /// Has it hold one more file; the place that it has there.
    ///
    /// # Errors
    ///
    /// [`KeeperError`]; it does not, or not for long.
    fn hold(&mut self, file: BorrowedFd<'_>) -> Result<u8, KeeperError>;

    /// Has it close the file that has a place. When this returns it has.
    ///
    /// # Errors
    ///
    /// [`KeeperError`]; it did not say so.
    fn release(&mut self, place: u8) -> Result<(), KeeperError>;
}

#[cfg(test)]
mod tests {
    use std::fs::{self, symlink_metadata};
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_the_device_itself_is_its_node() {
        let null = symlink_metadata("/dev/null").unwrap();
        assert!(is_node_of(&null, null.rdev()));
        assert!(!is_node_of(&null, null.rdev() + 1));
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        fs::write(&file, "").unwrap();
        symlink("/dev/null", &link).unwrap();
        for other in [file, link, directory.path().to_owned()] {
            let other = symlink_metadata(other).unwrap();
            assert!(!is_node_of(&other, other.rdev()) && !is_node_of(&other, null.rdev()));
        }
    }
}
