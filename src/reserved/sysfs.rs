// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What sysfs tells of a device's IOMMU group. Works on a copied tree as well as on `/sys`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Driver, HostFacts, HostRegion, ParseRegionError};
use crate::id::PciAddress;

/// A sysfs tree.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

/// An IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IommuGroup {
    /// The kernel's number for it.
    pub number: u32,
    /// The PCI functions in it, ascending.
    pub members: Vec<PciAddress>,
    /// What the group must not map; `None` on kernels that do not tell (before 4.11).
    pub reserved_regions: Option<Vec<HostRegion>>,
}

/// Something in sysfs that is not there, or not as expected.
#[derive(Debug, thiserror::Error)]
pub enum SysfsError {
    /// The device does not exist.
    #[error("there is no PCI device {address} (no {})", .path.display())]
    NoDevice {
        /// The device.
        address: PciAddress,
        /// Where it should be.
        path: PathBuf,
    },
    /// The device is in no IOMMU group.
    #[error(
        "the device {0} is in no IOMMU group: the host's IOMMU is off or does not cover it (intel_iommu=on or \
         amd_iommu=on on the kernel's command line, VT-d or AMD-Vi in the firmware)"
    )]
    NoGroup(PciAddress),
    /// A file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line cannot be understood.
    #[error("{}, line {line}", .path.display())]
    Region {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
        /// What is wrong with it.
        source: ParseRegionError,
    },
    /// A name is not what it should be.
    #[error("{} is not {expected}", .path.display())]
    Name {
        /// The name.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
}

impl Sysfs {
    /// The tree at `root`, usually `/sys`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn device(&self, address: PciAddress) -> Result<PathBuf, SysfsError> {
        let path = self.root.join("bus/pci/devices").join(address.to_string());
        if path.exists() { Ok(path) } else { Err(SysfsError::NoDevice { address, path }) }
    }

    /// The IOMMU group of a device.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub fn group(&self, address: PciAddress) -> Result<IommuGroup, SysfsError> {
        let link = self.device(address)?.join("iommu_group");
        let target = fs::read_link(&link).map_err(|_| SysfsError::NoGroup(address))?;
        let number: u32 = target
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok())
            .ok_or_else(|| SysfsError::Name { path: target.clone(), expected: "the directory of an IOMMU group" })?;
        let directory = self.root.join("kernel/iommu_groups").join(number.to_string());
        Ok(IommuGroup {
            number,
            members: members(&directory.join("devices"))?,
            reserved_regions: reserved_regions(&directory.join("reserved_regions"))?,
        })
    }

    /// Whether a group is one that VFIO made up for a device without an IOMMU (`enable_unsafe_noiommu_mode`).
    pub fn is_noiommu(&self, group: u32) -> bool {
        let name = self.root.join("kernel/iommu_groups").join(group.to_string()).join("name");
        fs::read_to_string(name).is_ok_and(|name| name.trim() == "vfio-noiommu")
    }

    /// The name of the driver that a device is bound to.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub fn driver(&self, address: PciAddress) -> Result<Option<String>, SysfsError> {
        Ok(link_name(&self.device(address)?.join("driver")))
    }

    /// The name of a device's VFIO node below `/dev/vfio/devices`, if it has one.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub fn vfio_node(&self, address: PciAddress) -> Result<Option<String>, SysfsError> {
        let directory = self.device(address)?.join("vfio-dev");
        if !directory.exists() {
            return Ok(None);
        }
        Ok(names(&directory)?.into_iter().find(|name| name.starts_with("vfio")))
    }

    /// Which driver the IOMMU in front of a device has.
    fn iommu_driver(&self, address: PciAddress) -> Result<Driver, SysfsError> {
        // A link to /sys/class/iommu/NAME, where the name is the driver's choice.
        let name = link_name(&self.device(address)?.join("iommu")).unwrap_or_default();
        let known = [
            ("dmar", Driver::IntelVtd),
            ("ivhd", Driver::AmdVi),
            ("smmu3", Driver::ArmSmmuV3),
            ("smmu", Driver::ArmSmmu),
        ];
        let driver = known.iter().find(|(prefix, _)| name.starts_with(prefix));
        Ok(driver.map_or(Driver::Unknown, |(_, driver)| *driver))
    }

    /// What the host shows of a device's group. Usable addresses and aperture are not in sysfs.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub fn facts(&self, address: PciAddress) -> Result<HostFacts, SysfsError> {
        Ok(HostFacts {
            driver: self.iommu_driver(address)?,
            reserved_regions: self.group(address)?.reserved_regions,
            ..HostFacts::default()
        })
    }
}

fn link_name(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}

fn names(directory: &Path) -> Result<Vec<String>, SysfsError> {
    let read = |source| SysfsError::Read { path: directory.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(read)? {
        names.push(entry.map_err(read)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn members(directory: &Path) -> Result<Vec<PciAddress>, SysfsError> {
    let address = |name: &String| {
        let path = directory.join(name);
        name.parse().map_err(|_| SysfsError::Name { path, expected: "a PCI device" })
    };
    let mut members: Vec<PciAddress> = names(directory)?.iter().map(address).collect::<Result<_, _>>()?;
    members.sort_unstable();
    Ok(members)
}

fn reserved_regions(path: &Path) -> Result<Option<Vec<HostRegion>>, SysfsError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(SysfsError::Read { path: path.to_owned(), source }),
    };
    let region = |(index, line): (usize, &str)| {
        line.parse().map_err(|source| SysfsError::Region { path: path.to_owned(), line: index + 1, source })
    };
    text.lines().enumerate().map(region).collect::<Result<_, _>>().map(Some)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A tree with 0000:01:00.0 and .1 in group 12.
    fn tree(regions: &str) -> (tempfile::TempDir, Sysfs) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let group = root.join("kernel/iommu_groups/12");
        fs::create_dir_all(group.join("devices")).unwrap();
        fs::write(group.join("reserved_regions"), regions).unwrap();
        for function in ["0000:01:00.0", "0000:01:00.1"] {
            let device = root.join("bus/pci/devices").join(function);
            fs::create_dir_all(device.join("vfio-dev/vfio7")).unwrap();
            symlink("../../../../kernel/iommu_groups/12", device.join("iommu_group")).unwrap();
            symlink("../../../../bus/pci/drivers/vfio-pci", device.join("driver")).unwrap();
            symlink("../../virtual/iommu/dmar0", device.join("iommu")).unwrap();
            fs::write(group.join("devices").join(function), "").unwrap();
        }
        fs::create_dir_all(root.join("bus/pci/devices/0000:02:00.0")).unwrap();
        let sysfs = Sysfs::new(root);
        (directory, sysfs)
    }

    fn address(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    #[test]
    fn a_group_is_read_whole() {
        let (_tree, sysfs) = tree("0x00000000fee00000 0x00000000feefffff msi\n");
        let first = address("0000:01:00.0");
        let group = sysfs.group(first).unwrap();
        assert_eq!(group.number, 12);
        assert_eq!(group.members, [first, address("0000:01:00.1")]);
        assert_eq!(group.reserved_regions.unwrap()[0].to_string(), "0x00000000fee00000 0x00000000feefffff msi");
        assert_eq!(sysfs.driver(first).unwrap().as_deref(), Some("vfio-pci"));
        assert_eq!(sysfs.vfio_node(first).unwrap().as_deref(), Some("vfio7"));
        assert_eq!(sysfs.facts(first).unwrap().driver, Driver::IntelVtd);
    }

    #[test]
    fn no_regions_is_not_the_same_as_no_file() {
        let (tree, sysfs) = tree("");
        assert_eq!(sysfs.group(address("01:00.0")).unwrap().reserved_regions, Some(vec![]));
        fs::remove_file(tree.path().join("kernel/iommu_groups/12/reserved_regions")).unwrap();
        assert_eq!(sysfs.group(address("01:00.0")).unwrap().reserved_regions, None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let (_tree, sysfs) = tree("0x0 0x1 msi\n0x0 0x1\n");
        let text = |bdf| sysfs.group(address(bdf)).unwrap_err().to_string();
        assert!(text("01:00.0").ends_with("reserved_regions, line 2"));
        assert!(text("02:00.0").contains("0000:02:00.0 is in no IOMMU group"));
        assert!(text("03:00.0").contains("no PCI device 0000:03:00.0"));
    }
}
