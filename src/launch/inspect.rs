// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Looking at a device of the host before a guest gets it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::fd::WrongFile;
use crate::host::iommufd::{Iommufd, VfioDevice};
use crate::host::type1::{Container, VfioGroup};
use crate::host::{Constraints, HostError};
use crate::id::PciAddress;
use crate::range::RangeSet;
use crate::reserved::gather::{GatherError, Host};
use crate::reserved::sysfs::{IommuGroup, Sysfs};
use crate::reserved::{Fact, HostFacts, Source};

const IOMMUFD: &str = "/dev/iommu";
const VFIO: &str = "/dev/vfio";

/// What was found of a device.
#[derive(Debug)]
pub struct Inspection {
    /// Its IOMMU group.
    pub group: IommuGroup,
    /// What the host shows of the group.
    pub facts: HostFacts,
    /// The smallest page that can be mapped for the group, in bytes, if the host tells.
    pub granule: Option<u64>,
    /// Why the usable addresses could not be found out, if so.
    pub usable_unknown: Option<UsableError>,
}

/// Why the addresses that a group can use are not known.
#[derive(Debug, thiserror::Error)]
pub enum UsableError {
    /// The host is a copy of another one.
    #[error("the device is on another machine")]
    Elsewhere,
    /// The device has no VFIO file.
    #[error("it is not bound to vfio-pci")]
    NotBound,
    /// The kernel is older than the question.
    #[error("the kernel does not tell (before Linux 5.4)")]
    NotTold,
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

/// Gathers what the host shows of a device's group. A device that is bound to VFIO and idle is attached to an empty
/// address space of its own for a moment, to see which addresses can be used.
///
/// # Errors
///
/// [`GatherError`]
pub fn inspect(host: &Host, address: PciAddress) -> Result<Inspection, GatherError> {
    let (group, mut facts) = host.facts(address)?;
    let (granule, usable_unknown) = match usable(host, address, group.number) {
        Ok(Usable { addresses, granule, source }) => {
            facts.usable = Some(addresses);
            facts.sources.insert(Fact::Usable, source);
            (granule, None)
        }
        Err(error) => (None, Some(error)),
    };
    Ok(Inspection { group, facts, granule, usable_unknown })
}

/// What a group can use.
struct Usable {
    addresses: RangeSet,
    granule: Option<u64>,
    source: Source,
}

/// What a group can use, by whichever interface this host has.
fn usable(host: &Host, address: PciAddress, group: u32) -> Result<Usable, UsableError> {
    if !host.is_here() {
        return Err(UsableError::Elsewhere);
    }
    let sysfs = Sysfs::new(&host.sysfs);
    if let Some(node) = sysfs.vfio_node(address).unwrap_or_default().filter(|_| Path::new(IOMMUFD).exists()) {
        let constraints = constraints_by_iommufd(address, &Path::new(VFIO).join("devices").join(node))?;
        let (addresses, granule) = (constraints.usable, Some(constraints.granule));
        return Ok(Usable { addresses, granule, source: Source::Iommufd });
    }
    if !sysfs.is_noiommu(group) && Path::new(VFIO).join(group.to_string()).exists() {
        return Ok(Usable { addresses: usable_by_type1(group)?, granule: None, source: Source::VfioType1 });
    }
    Err(UsableError::NotBound)
}

/// What a device can map, from an address space of iommufd made for that question.
///
/// # Errors
///
/// [`UsableError`]
fn constraints_by_iommufd(address: PciAddress, node: &Path) -> Result<Constraints, UsableError> {
    let iommufd = Arc::new(Iommufd::new(open(Path::new(IOMMUFD))?)?);
    let device = VfioDevice::new(open(node)?, address.to_string())?;
    device.bind(&iommufd)?;
    Ok(device.constraints(&iommufd)?)
}

/// The addresses that a group can use, from a container of VFIO type1 made for that question.
///
/// # Errors
///
/// [`UsableError`]
pub fn usable_by_type1(group: u32) -> Result<RangeSet, UsableError> {
    let container = Container::new(open(&Path::new(VFIO).join("vfio"))?)?;
    let group = VfioGroup::new(open(&Path::new(VFIO).join(group.to_string()))?)?;
    group.join(&container)?;
    container.set_iommu()?;
    container.info()?.usable.ok_or(UsableError::NotTold)
}

fn open(path: &Path) -> Result<OwnedFd, UsableError> {
    let file = File::options().read(true).write(true).open(path);
    file.map(Into::into).map_err(|source| UsableError::Open { path: path.to_owned(), source })
}
