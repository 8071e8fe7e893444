// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What sysfs tells of a device's IOMMU group. Works on a copied tree as well as on `/sys`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::bars::{Bar, bars};
use super::bridge::HostBridge;
use super::iommu;
use super::limited;
use super::{Driver, HostRegion, ParseRegionError};
use crate::id::PciAddress;
use crate::range::IovaRange;

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
    #[cfg(any(test, feature = "daemon"))]
    pub(crate) fn is_noiommu(&self, group: u32) -> bool {
        let name = self.root.join("kernel/iommu_groups").join(group.to_string()).join("name");
        limited::read_text(&name).is_ok_and(|name| name.trim() == "vfio-noiommu")
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
    #[cfg(any(test, feature = "daemon"))]
    pub(crate) fn vfio_node(&self, address: PciAddress) -> Result<Option<String>, SysfsError> {
        let directory = self.device(address)?.join("vfio-dev");
        if !directory.exists() {
            return Ok(None);
        }
        Ok(names(&directory)?.into_iter().find(|name| name.starts_with("vfio")))
    }

    /// Whether a device is VFIO's to hand out: bound to vfio-pci, or to a driver for its kind that builds on it (`mlx5_vfio_pci`).
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    #[cfg(any(test, feature = "daemon"))]
    pub(crate) fn is_vfio(&self, address: PciAddress) -> Result<bool, SysfsError> {
        // From Linux 6.1 on VFIO has a device of its own below each (drivers/vfio/vfio_main.c). Before, only the name tells.
        let is_named_so = || Ok(self.driver(address)?.is_some_and(|driver| driver.contains("vfio")));
        if self.vfio_node(address)?.is_some() { Ok(true) } else { is_named_so() }
    }

    /// The members of a group that are VFIO's to hand out.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    #[cfg(any(test, feature = "daemon"))]
    pub(crate) fn vfio_members(&self, group: &IommuGroup) -> Result<Vec<PciAddress>, SysfsError> {
        let mut found = Vec::new();
        for member in &group.members {
            if self.is_vfio(*member)? {
                found.push(*member);
            }
        }
        Ok(found)
    }

    /// Which driver the IOMMU in front of a device has.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub(crate) fn iommu_driver(&self, address: PciAddress) -> Result<Driver, SysfsError> {
        Ok(iommu::driver(&self.device(address)?))
    }

    /// The addresses that the IOMMU in front of a device can translate at most; `None` if the tree does not tell.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub(super) fn aperture(&self, address: PciAddress) -> Result<Option<IovaRange>, SysfsError> {
        Ok(iommu::aperture(&self.device(address)?))
    }

    /// Whether the kernel isolates a device from all others: it puts those that could reach each other, for want of ACS in
    /// the bridges before them, into one group (`pci_device_group()`). Bridges in the group do not count.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub fn is_isolated(&self, group: &IommuGroup) -> Result<bool, SysfsError> {
        let mut endpoints = 0;
        for member in &group.members {
            endpoints += usize::from(!self.is_bridge(*member)?);
        }
        Ok(endpoints <= 1)
    }

    fn is_bridge(&self, address: PciAddress) -> Result<bool, SysfsError> {
        // Base class 6, sub-class 4: include/linux/pci_ids.h, PCI_CLASS_BRIDGE_PCI.
        let class = limited::read_text(&self.device(address)?.join("class")).unwrap_or_default();
        Ok(class.starts_with("0x0604"))
    }

    /// The host bridge that a device is behind; `None` if the tree does not tell.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub(super) fn host_bridge(&self, address: PciAddress) -> Result<Option<HostBridge>, SysfsError> {
        Ok(bridge_in(&self.device(address)?))
    }

    /// The node of a device's host bridge in the device tree; `None` if the host has none.
    ///
    /// # Errors
    ///
    /// [`SysfsError`]
    pub(super) fn bridge_node(&self, address: PciAddress) -> Result<Option<PathBuf>, SysfsError> {
        let device = self.device(address)?;
        let Ok(path) = fs::canonicalize(&device) else {
            return Ok(None);
        };
        // The link is in the directory of the root bus, or of the platform device that the bridge is.
        let bridge = path.ancestors().find(|path| bridge_named(path).is_some());
        let candidates = bridge.into_iter().flat_map(Path::ancestors).take(2);
        Ok(candidates.map(|path| path.join("of_node")).find_map(|link| fs::canonicalize(link).ok()))
    }

    /// The memory BARs of all devices behind a host bridge.
    pub(super) fn bars(&self, bridge: HostBridge) -> Result<Vec<Bar>, SysfsError> {
        let directory = self.root.join("bus/pci/devices");
        let mut found = Vec::new();
        for name in names(&directory)? {
            let device = directory.join(name);
            if bridge_in(&device) == Some(bridge) {
                found.extend(bars(&device)?);
            }
        }
        Ok(found)
    }
}

/// The host bridge in the path that a device's name leads to: `.../devices/pci0000:00/0000:00:02.0`.
fn bridge_in(device: &Path) -> Option<HostBridge> {
    let path = fs::canonicalize(device).ok()?;
    path.ancestors().find_map(bridge_named)
}

/// The host bridge whose directory this is.
fn bridge_named(directory: &Path) -> Option<HostBridge> {
    let (segment, bus) = directory.file_name()?.to_str()?.strip_prefix("pci")?.split_once(':')?;
    Some(HostBridge { segment: u16::from_str_radix(segment, 16).ok()?, bus: u8::from_str_radix(bus, 16).ok()? })
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
    let text = match limited::read_text(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(SysfsError::Read { path: path.to_owned(), source }),
    };
    regions_in(&text, path).map(Some)
}

/// The regions in the text of a group's `reserved_regions`; `path` is where it came from, for errors.
///
/// # Errors
///
/// [`SysfsError::Region`] names the line; [`SysfsError::Truncated`] if lines may be missing.
#[doc(hidden)]
pub fn regions_in(text: &str, path: &Path) -> Result<Vec<HostRegion>, SysfsError> {
    if text.len() > LONGEST_LIST {
        return Err(SysfsError::Truncated { path: path.to_owned() });
    }
    let region = |(index, line): (usize, &str)| {
        line.parse().map_err(|source| SysfsError::Region { path: path.to_owned(), line: index + 1, source })
    };
    text.lines().enumerate().map(region).collect()
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
        assert_eq!(sysfs.iommu_driver(first).unwrap(), Driver::IntelVtd);
    }

    #[test]
    fn vfio_has_what_any_driver_of_its_kind_has() {
        let (tree, sysfs) = tree("");
        let group = sysfs.group(address("01:00.0")).unwrap();
        let device = |function| tree.path().join("bus/pci/devices").join(function);
        let bind = |function, driver: &str| {
            fs::remove_file(device(function).join("driver")).unwrap();
            symlink(Path::new("../../../../bus/pci/drivers").join(driver), device(function).join("driver")).unwrap();
        };
        assert_eq!(sysfs.vfio_members(&group).unwrap(), group.members);
        // Whatever the driver is called.
        bind("0000:01:00.0", "mlx5_passthrough");
        assert_eq!(sysfs.vfio_members(&group).unwrap(), group.members);
        // Before Linux 6.1.
        fs::remove_dir_all(device("0000:01:00.1").join("vfio-dev")).unwrap();
        for driver in ["vfio-pci", "mlx5_vfio_pci", "nvgrace-gpu-vfio-pci", "hisi-acc-vfio-pci"] {
            bind("0000:01:00.1", driver);
            assert_eq!(sysfs.vfio_members(&group).unwrap(), group.members, "{driver}");
        }
        bind("0000:01:00.1", "mlx5_core");
        assert_eq!(sysfs.vfio_members(&group).unwrap(), [address("01:00.0")]);
        fs::remove_file(device("0000:01:00.1").join("driver")).unwrap();
        assert!(!sysfs.is_vfio(address("01:00.1")).unwrap());
        assert!(sysfs.is_vfio(address("03:00.0")).is_err());
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
        assert_eq!(bars.iter().map(|bar| bar.cpu).collect::<Vec<_>>(), expected);
        assert_eq!(sysfs.host_bridge(address("01:00.0")).unwrap(), None, "the tree does not tell");
        fs::write(root.join("bus/pci/devices/0000:03:00.0/resource"), "0x1 0x2\n").unwrap();
        assert!(sysfs.bars(HostBridge { segment: 0, bus: 0 }).is_err());
    }

    #[test]
    fn devices_of_one_group_are_not_isolated_and_bridges_do_not_count() {
        let (tree, sysfs) = tree("");
        let group = sysfs.group(address("01:00.0")).unwrap();
        assert!(!sysfs.is_isolated(&group).unwrap());
        let class = tree.path().join("bus/pci/devices/0000:01:00.1/class");
        fs::write(&class, "0x060400\n").unwrap();
        assert!(sysfs.is_isolated(&group).unwrap());
        fs::write(class, "0x060100\n").unwrap();
        assert!(!sysfs.is_isolated(&group).unwrap());
    }

    #[test]
    fn a_bridge_is_found_in_the_device_tree() {
        let (tree, sysfs) = tree("");
        let node = tree.path().join("firmware/devicetree/base/pcie@0");
        let platform = tree.path().join("devices/platform/pcie");
        let device = platform.join("pci0000:00/0000:03:00.0");
        fs::create_dir_all(&node).unwrap();
        fs::create_dir_all(&device).unwrap();
        symlink(&device, tree.path().join("bus/pci/devices/0000:03:00.0")).unwrap();
        let third = address("03:00.0");
        assert_eq!(sysfs.bridge_node(third).unwrap(), None);
        symlink(&node, tree.path().join("devices/platform/of_node")).unwrap();
        assert_eq!(sysfs.bridge_node(third).unwrap(), None, "it is of something else");
        symlink(&node, platform.join("of_node")).unwrap();
        assert_eq!(sysfs.bridge_node(third).unwrap(), Some(fs::canonicalize(&node).unwrap()));
        fs::remove_file(platform.join("of_node")).unwrap();
        symlink(&node, platform.join("pci0000:00/of_node")).unwrap();
        assert_eq!(sysfs.bridge_node(third).unwrap(), Some(fs::canonicalize(&node).unwrap()));
    }

    #[test]
    fn a_file_that_fills_a_page_is_not_trusted() {
        let (_tree, sysfs) = tree(&"0x0000000000001000 0x0000000000001fff reserved\n".repeat(86));
        let error = sysfs.group(address("01:00.0")).unwrap_err();
        assert!(matches!(error, SysfsError::Truncated { .. }), "{error}");
        // Of 42 bytes each: 96 are as many as are believed.
        let lines = |count| "0x0000000000001000 0x0000000000001fff msi\n".repeat(count);
        assert_eq!(regions_in(&lines(96), Path::new("list")).unwrap().len(), 96);
        let error = regions_in(&lines(97), Path::new("list")).unwrap_err();
        assert!(matches!(error, SysfsError::Truncated { .. }), "{error}");
    }

    #[test]
    fn a_group_without_an_iommu_is_known_by_its_name() {
        let (tree, sysfs) = tree("");
        assert!(!sysfs.is_noiommu(12), "it has no name");
        for (name, expected) in [("vfio-noiommu\n", true), ("mdev\n", false)] {
            fs::write(tree.path().join("kernel/iommu_groups/12/name"), name).unwrap();
            assert_eq!(sysfs.is_noiommu(12), expected, "{name}");
        }
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
