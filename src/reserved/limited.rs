// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files of trees that may be copies of another host's, or made up: no more of them is read than such files have.

use std::fs::{File, metadata};
use std::io::{self, Read};
use std::path::Path;

/// The most bytes of a file of a host that are read: `/proc/iomem` of a large machine has some hundred thousand.
const LARGEST: u64 = 4 << 20;

/// Opens a file that ends. Whoever opens a pipe waits, and a device may go on for ever.
///
/// # Errors
///
/// It is not there, or something else than a file.
pub(super) fn open(path: &Path) -> io::Result<File> {
    if metadata(path)?.is_file() { File::open(path) } else { Err(io::Error::other("it is not a regular file")) }
}

/// The bytes of a file.
///
/// # Errors
///
/// Those of [`open`]; it is too large.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_from(open(path)?, LARGEST)
}

/// The text of a file.
///
/// # Errors
///
/// Those of [`read`]; it is not text.
pub(super) fn read_text(path: &Path) -> io::Result<String> {
    text(read(path)?)
}

/// The text of what is read from something, if that has at most so many bytes.
///
/// # Errors
///
/// It is larger, or not text.
#[cfg(feature = "daemon")]
pub(super) fn read_text_from(source: impl Read, largest: u64) -> io::Result<String> {
    text(read_from(source, largest)?)
}

fn read_from(source: impl Read, largest: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let length = source.take(largest.saturating_add(1)).read_to_end(&mut bytes)?;
    if length as u64 > largest {
        return Err(io::Error::other(format!("it is larger than {largest} bytes")));
    }
    Ok(bytes)
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::bars::bars;
    use super::super::bridge::{HostBridge, windows};
    use super::super::gather::Host;
    use super::super::sysfs::Sysfs;
    use super::super::{Driver, device_tree, iommu};
    use super::*;
    use crate::causes::with_causes;

    #[test]
    fn no_more_is_read_than_a_file_may_have() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = File::create(&path).unwrap();
        file.set_len(LARGEST).unwrap();
        assert_eq!(read(&path).unwrap().len() as u64, LARGEST);
        file.set_len(LARGEST + 1).unwrap();
        assert_eq!(read(&path).unwrap_err().to_string(), "it is larger than 4194304 bytes");
        let endless = directory.path().join("endless");
        symlink("/dev/zero", &endless).unwrap();
        assert_eq!(read_text(&endless).unwrap_err().to_string(), "it is not a regular file");
        assert_eq!(read(directory.path()).unwrap_err().to_string(), "it is not a regular file");
        assert_eq!(read(Path::new("/nothing")).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(&path, [0xff]).unwrap();
        assert_eq!(read_text(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    /// Whatever is read of a tree: each is too large, and nothing but zeroes. All but what may be missing is an error.
    #[test]
    fn every_file_of_a_tree_has_its_limit() {
        let tree = tempfile::tempdir().unwrap();
        let root = tree.path();
        let zeroes = |name: &str| {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            File::create(&path).unwrap().set_len(LARGEST + 1).unwrap();
        };
        let device = root.join("bus/pci/devices/0000:01:00.0");
        for name in ["bus/pci/devices/0000:01:00.0/class", "bus/pci/devices/0000:01:00.0/resource", "iomem"] {
            zeroes(name);
        }
        for name in ["kernel/iommu_groups/12/reserved_regions", "kernel/iommu_groups/12/name", "sys/kernel/osrelease"] {
            zeroes(name);
        }
        for name in ["base/pcie/ranges", "dmar0/intel-iommu/cap", "dmar0/intel-iommu/ecap"] {
            zeroes(name);
        }
        std::fs::create_dir(root.join("kernel/iommu_groups/12/devices")).unwrap();
        symlink("../../../../kernel/iommu_groups/12", device.join("iommu_group")).unwrap();
        symlink(root.join("dmar0"), device.join("iommu")).unwrap();
        let says = |error: &dyn std::error::Error| with_causes(error);
        let too_large = "it is larger than 4194304 bytes";
        let address = "01:00.0".parse().unwrap();
        let sysfs = Sysfs::new(root);
        assert!(says(&sysfs.group(address).unwrap_err()).ends_with(too_large));
        assert!(!sysfs.is_noiommu(12));
        assert!(says(&bars(&device).unwrap_err()).ends_with(too_large));
        assert!(says(&windows(root, HostBridge { segment: 0, bus: 0 }).unwrap_err()).ends_with(too_large));
        assert!(says(&device_tree::read(&root.join("base/pcie")).unwrap_err()).ends_with(too_large));
        assert_eq!((iommu::driver(&device), iommu::aperture(&device)), (Driver::IntelVtd, None));
        std::fs::remove_file(root.join("kernel/iommu_groups/12/reserved_regions")).unwrap();
        let host = Host { sysfs: root.to_owned(), proc: root.to_owned() };
        let (group, facts) = host.facts(address).unwrap();
        assert_eq!((facts.kernel, sysfs.is_isolated(&group).unwrap()), (None, true));
    }
}
