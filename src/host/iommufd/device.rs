// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device by its VFIO file.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::VfioDeviceFile;
use super::api::VfioDeviceApi;
use super::ioas::{Ioas, Iommufd};
use crate::fd::{FileKind, VfioMajor, WrongFile};
use crate::host::linux::failed;
use crate::host::{Constraints, HostError, HostErrorKind, IoPageTable};

/// How long an attach waits for a device that is being reset.
const RESET_PATIENCE: Duration = Duration::from_millis(100);

/// The file of a VFIO device.
#[derive(Debug)]
pub struct VfioDevice {
    api: Box<dyn VfioDeviceApi>,
    name: String,
}

impl VfioDevice {
    /// Takes an open `/dev/vfio/devices/vfioN`, and a name for messages.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn new(file: OwnedFd, name: String) -> Result<Self, WrongFile> {
        FileKind::VfioDevice.check(&file)?;
        Ok(Self { api: Box::new(VfioDeviceFile { file }), name })
    }

    /// Takes an open `/dev/vfio/devices/vfioN`, and a name for messages. Only the file itself is looked at.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn of_major(file: OwnedFd, major: VfioMajor, name: String) -> Result<Self, WrongFile> {
        major.check(&file)?;
        Ok(Self { api: Box::new(VfioDeviceFile { file }), name })
    }

    /// Over another kernel, or a model of one.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn over(api: Box<dyn VfioDeviceApi>, name: String) -> Self {
        Self { api, name }
    }

    /// The calls that it takes.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn api(&self) -> &dyn VfioDeviceApi {
        self.api.as_ref()
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Binds the device to an iommufd, and returns its number there. Needed once for each device file, before anything else can
    /// be done with it.
    ///
    /// # Errors
    ///
    /// The device is in use, its group is not VFIO's alone, or the platform forbids it.
    pub fn bind(&self, iommufd: &Iommufd) -> Result<u32, HostError> {
        let result = self.api.bind(iommufd.api.number());
        result.map_err(|errno| failed(errno, format!("binding {} to the iommufd", self.name), HostErrorKind::Other))
    }

    /// Attaches the device to an address space, in place of whatever it is attached to.
    ///
    /// # Errors
    ///
    /// What the device is attached to has not changed.
    pub fn attach(&self, ioas: &Ioas) -> Result<(), HostError> {
        self.attach_to(ioas.id())
    }

    /// Attaches the device to an address space or a hardware page table.
    pub(super) fn attach_to(&self, object: u32) -> Result<(), HostError> {
        let started = Instant::now();
        loop {
            match self.api.attach(object) {
                Ok(()) => return Ok(()),
                // The device is being reset.
                Err(Errno::BUSY) if started.elapsed() < RESET_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(errno) => return Err(self.attach_error(errno)),
            }
        }
    }

    /// What can be mapped for the device's group alone. The device, which must be bound to this iommufd, is attached to an
    /// empty address space for a moment, and detached: to be asked before anybody uses it.
    ///
    /// # Errors
    ///
    /// Whatever the kernel says.
    pub fn constraints(&self, iommufd: &Iommufd) -> Result<Constraints, HostError> {
        let fresh = iommufd.new_ioas()?;
        self.attach(&fresh)?;
        let constraints = fresh.constraints();
        // An address space with a device cannot be freed.
        self.detach();
        constraints
    }

    fn attach_error(&self, errno: Errno) -> HostError {
        let kind = match errno {
            Errno::ADDRINUSE => HostErrorKind::ReservedConflict,
            Errno::NOMEM => HostErrorKind::NoMemory,
            Errno::BUSY => HostErrorKind::Busy,
            Errno::NODEV => HostErrorKind::Gone,
            // No such address space: the device is bound to another iommufd.
            Errno::NOENT => HostErrorKind::NotBound,
            Errno::INVAL if !self.api.is_bound() => HostErrorKind::NotBound,
            Errno::INVAL => HostErrorKind::Incompatible,
            _ => HostErrorKind::Other,
        };
        failed(errno, format!("attaching {}", self.name), kind)
    }

    /// Detaches the device from whatever it is attached to: all its DMA is refused. A device that is not bound, or
    /// gone, has nothing to be detached from.
    pub fn detach(&self) {
        if let Err(errno) = self.api.detach() {
            log::debug!("detaching {}: {errno}", self.name);
        }
    }
}
