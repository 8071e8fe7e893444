// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What sysfs tells of a device's IOMMU group. Works on a copied tree as well as on `/sys`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::bridge::HostBridge;
use super::{Driver, HostFacts, HostRegion, ParseRegionError};
use crate::id::PciAddress;
use crate::range::{IovaRange, parse_address};

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
    #[error("the device {0} is in no IOMMU group: the host's IOMMU is off, or does not cover it")]
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
    /// The kernel shows no more than a page, and this file fills one.
    #[error("{} fills a page: the kernel may have left regions out. Give the facts of this host from another source", .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
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

    /// The host bridge that a device is behind; `None` if the tree does not tell.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub fn host_bridge(&self, address: PciAddress) -> Result<Option<HostBridge>, SysfsError> {
        Ok(bridge_in(&self.device(address)?))
    }

    /// The memory BARs of all devices behind a host bridge, ascending.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    fn bars(&self, bridge: HostBridge) -> Result<Vec<IovaRange>, SysfsError> {
        let directory = self.root.join("bus/pci/devices");
        let mut bars = Vec::new();
        for name in names(&directory)? {
            let device = directory.join(name);
            if bridge_in(&device) == Some(bridge) {
                bars.extend(resources(&device.join("resource"))?);
            }
        }
        bars.sort_unstable();
        bars.dedup();
        Ok(bars)
    }

    /// What the host shows of a device's group. Usable addresses and aperture are not in sysfs, nor are windows.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub fn facts(&self, address: PciAddress) -> Result<HostFacts, SysfsError> {
        let bars = self.host_bridge(address)?.map(|bridge| self.bars(bridge)).transpose()?;
        Ok(HostFacts {
            driver: self.iommu_driver(address)?,
            reserved_regions: self.group(address)?.reserved_regions,
            bars,
            ..HostFacts::default()
        })
    }
}

/// The host bridge in the path that a device's name leads to: `.../devices/pci0000:00/0000:00:02.0`.
fn bridge_in(device: &Path) -> Option<HostBridge> {
    let path = fs::canonicalize(device).ok()?;
    let name = path.components().find_map(|part| part.as_os_str().to_str()?.strip_prefix("pci")?.split_once(':'))?;
    let (segment, bus) = name;
    Some(HostBridge { segment: u16::from_str_radix(segment, 16).ok()?, bus: u8::from_str_radix(bus, 16).ok()? })
}

/// The memory BARs in a device's `resource` file: of its lines, `START END FLAGS`, the first six. A device without the file
/// has none.
fn resources(path: &Path) -> Result<Vec<IovaRange>, SysfsError> {
    // include/linux/ioport.h
    const IORESOURCE_MEM: u64 = 0x200;
    const BARS: usize = 6;
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(SysfsError::Read { path: path.to_owned(), source }),
    };
    let mut bars = Vec::new();
    for line in text.lines().take(BARS) {
        let bad = || SysfsError::Name { path: path.to_owned(), expected: "a list of START END FLAGS" };
        let fields: Vec<u64> =
            line.split_whitespace().map(parse_address).collect::<Result<_, _>>().map_err(|_| bad())?;
        let [start, last, flags] = fields[..] else {
            return Err(bad());
        };
        if flags & IORESOURCE_MEM != 0 && start != 0 {
            bars.push(IovaRange::new(start, last).ok_or_else(bad)?);
        }
    }
    Ok(bars)
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

/// The kernel fills one page and leaves out what does not fit (`iommu_group_show_resv_regions()`): a list that another line
/// would not fit may have lost some.
const LONGEST_LIST: usize = 4096 - 64;

fn reserved_regions(path: &Path) -> Result<Option<Vec<HostRegion>>, SysfsError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(SysfsError::Read { path: path.to_owned(), source }),
    };
    if text.len() > LONGEST_LIST {
        return Err(SysfsError::Truncated { path: path.to_owned() });
    }
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
    fn bars_of_all_devices_behind_the_same_bridge_are_found() {
        let (tree, sysfs) = tree("");
        let root = tree.path();
        let lines = |first: &str| {
            format!("{first}\n0x000000000000c000 0x000000000000c01f 0x0000000000040101\n{}", "0x0 0x0 0x0\n".repeat(4))
        };
        for (bridge, device, bar) in [
            ("pci0000:00", "0000:03:00.0", "0x00000000c0000000 0x00000000c000ffff 0x0000000000040200"),
            ("pci0000:00", "0000:04:00.0", "0x0000380000000000 0x000038000000ffff 0x000000000014220c"),
            ("pci0001:00", "0001:03:00.0", "0x00000000d0000000 0x00000000d000ffff 0x0000000000040200"),
        ] {
            let real = root.join("devices").join(bridge).join("0000:00:1c.0").join(device);
            fs::create_dir_all(&real).unwrap();
            fs::write(real.join("resource"), lines(bar)).unwrap();
            symlink(Path::new("../../../kernel/iommu_groups/12"), real.join("iommu_group")).unwrap();
            symlink(&real, root.join("bus/pci/devices").join(device)).unwrap();
        }
        let third = address("03:00.0");
        assert_eq!(sysfs.host_bridge(third).unwrap(), Some(HostBridge { segment: 0, bus: 0 }));
        let bars = sysfs.bars(HostBridge { segment: 0, bus: 0 }).unwrap();
        let expected = ["c0000000-c000ffff", "380000000000-38000000ffff"].map(|range| range.parse().unwrap());
        assert_eq!(bars, expected);
        assert_eq!(sysfs.host_bridge(address("01:00.0")).unwrap(), None, "the tree does not tell");
        fs::write(root.join("bus/pci/devices/0000:03:00.0/resource"), "0x1 0x2\n").unwrap();
        assert!(sysfs.bars(HostBridge { segment: 0, bus: 0 }).is_err());
    }

    #[test]
    fn a_file_that_fills_a_page_is_not_trusted() {
        let (_tree, sysfs) = tree(&"0x0000000000001000 0x0000000000001fff reserved\n".repeat(86));
        let error = sysfs.group(address("01:00.0")).unwrap_err();
        assert!(matches!(error, SysfsError::Truncated { .. }), "{error}");
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
