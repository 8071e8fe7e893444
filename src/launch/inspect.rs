// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Looking at a device of the host before a guest gets it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::fd::WrongFile;
use crate::host::HostError;
use crate::host::iommufd::{Iommufd, VfioDevice};
use crate::id::PciAddress;
use crate::range::RangeSet;
use crate::reserved::HostFacts;
use crate::reserved::bridge::{self, IomemError};
use crate::reserved::sysfs::{IommuGroup, Sysfs, SysfsError};

/// What was found of a device.
#[derive(Debug)]
pub struct Inspection {
    /// Its IOMMU group.
    pub group: IommuGroup,
    /// What the host shows of the group.
    pub facts: HostFacts,
    /// Why the usable addresses could not be found out, if so.
    pub usable_unknown: Option<UsableError>,
}

/// Why the addresses that a group can use are not known.
#[derive(Debug, thiserror::Error)]
pub enum UsableError {
    /// The host is a copy of another one.
    #[error("the device is on another machine")]
    Elsewhere,
    /// The device has no VFIO device file.
    #[error("it is not bound to vfio-pci, or the kernel has no VFIO device files (CONFIG_VFIO_DEVICE_CDEV)")]
    NoVfioDevice,
    /// A file cannot be opened.
    #[error("cannot open {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A device node is something else.
    #[error(transparent)]
    WrongFile(#[from] WrongFile),
    /// The host refused.
    #[error("the device is in use, or the host refuses it")]
    Host(#[from] HostError),
}

/// Where a host is looked at: its own file systems, or copies of them.
#[derive(Clone, Debug)]
pub struct Host {
    /// sysfs
    pub sysfs: PathBuf,
    /// proc
    pub proc: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { sysfs: "/sys".into(), proc: "/proc".into() }
    }
}

impl Host {
    /// Whether this is the machine that we are on, with devices that can be opened.
    fn is_here(&self) -> bool {
        self.sysfs == Path::new("/sys")
    }

    /// The kernel's release.
    fn kernel(&self) -> Option<String> {
        let release = std::fs::read_to_string(self.proc.join("sys/kernel/osrelease")).ok()?;
        Some(release.trim().to_owned())
    }
}

/// A host that does not tell what it should.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// sysfs
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// proc
    #[error(transparent)]
    Iomem(#[from] IomemError),
}

/// Gathers what the host shows of a device's group. A device that is bound to VFIO and idle is attached to an empty
/// address space of its own for a moment, to see which addresses can be used.
///
/// # Errors
///
/// [`InspectError`]
pub fn inspect(host: &Host, address: PciAddress) -> Result<Inspection, InspectError> {
    let sysfs = Sysfs::new(&host.sysfs);
    let group = sysfs.group(address)?;
    let mut facts = sysfs.facts(address)?;
    facts.kernel = host.kernel();
    if let Some(bridge) = sysfs.host_bridge(address)? {
        facts.windows = bridge::windows(&host.proc, bridge)?;
    }
    let found = match sysfs.vfio_node(address)? {
        _ if !host.is_here() => Err(UsableError::Elsewhere),
        None => Err(UsableError::NoVfioDevice),
        Some(node) => usable(&Path::new("/dev/vfio/devices").join(node), address),
    };
    let usable_unknown = match found {
        Ok(usable) => {
            facts.usable = Some(usable);
            None
        }
        Err(error) => Some(error),
    };
    Ok(Inspection { group, facts, usable_unknown })
}

/// The addresses that a device can use, from an address space made for that question.
fn usable(node: &Path, address: PciAddress) -> Result<RangeSet, UsableError> {
    let open = |path: &Path| {
        let file = File::options().read(true).write(true).open(path);
        file.map_err(|source| UsableError::Open { path: path.to_owned(), source })
    };
    let iommufd = Arc::new(Iommufd::new(open(Path::new("/dev/iommu"))?.into())?);
    let device = VfioDevice::new(open(node)?.into(), address.to_string())?;
    device.bind(&iommufd)?;
    Ok(device.constraints(&iommufd)?.usable)
}
