// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which device node a file is.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::fs::{FileType, fstat, major, minor};
#[cfg(feature = "daemon")]
use rustix::fs::{OFlags, fcntl_getfl};
#[cfg(feature = "daemon")]
use rustix::net::{AddressFamily, SocketType, getpeername, sockopt};

/// What a passed file should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// `/dev/iommu`
    Iommufd,
    /// `/dev/vfio/devices/vfioN`
    VfioDevice,
    /// `/dev/vfio/vfio`
    VfioContainer,
    /// `/dev/vfio/N`
    VfioGroup,
}

impl FileKind {
    /// Makes sure that a file is of this kind, and says which device node it is and where sysfs describes it.
    pub(crate) fn check(self, file: &impl AsFd) -> Result<(String, PathBuf), WrongFile> {
        match device_node(file.as_fd()) {
            Ok((node, sysfs)) if self.matches(&node) => Ok((node, sysfs)),
            Ok((node, _)) => Err(WrongFile { found: format!("/dev/{node}"), expected: self.name() }),
            Err(found) => Err(WrongFile { found, expected: self.name() }),
        }
    }

    /// What it is called in messages.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Iommufd => "/dev/iommu",
            Self::VfioDevice => "/dev/vfio/devices/vfioN",
            Self::VfioContainer => "/dev/vfio/vfio",
            Self::VfioGroup => "/dev/vfio/N",
        }
    }

    /// Whether this is the name of such a device node, below `/dev`.
    fn matches(self, node: &str) -> bool {
        match self {
            Self::Iommufd => node == "iommu",
            Self::VfioDevice => node.starts_with("vfio/devices/"),
            Self::VfioContainer => node == "vfio/vfio",
            Self::VfioGroup => node.strip_prefix("vfio/").is_some_and(|number| number.parse::<u32>().is_ok()),
        }
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The kernel's list of how it numbers devices' files. It is opened while the process may open files, and can be read after that.
#[derive(Debug)]
pub struct DeviceNumbers(File);

impl DeviceNumbers {
    /// Opens `/proc/devices`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/devices").map(Self)
    }

    /// The number of VFIO devices' files as it is now; `None` if VFIO is not there, or has no device files.
    ///
    /// # Errors
    ///
    /// The list cannot be read.
    pub fn vfio(&self) -> io::Result<Option<VfioMajor>> {
        let (mut list, mut part) = (Vec::new(), [0; 4096]);
        loop {
            match self.0.read_at(&mut part, list.len() as u64)? {
                0 => return Ok(VfioMajor::in_list(&String::from_utf8_lossy(&list))),
                length => list.extend(part.iter().take(length)),
            }
        }
    }
}

/// How the kernel numbers the files of VFIO devices: it tells such files from others without looking anything up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VfioMajor(u32);

impl VfioMajor {
    /// Files with this number, which need not be VFIO's.
    #[cfg(test)]
    pub(crate) const fn for_tests(number: u32) -> Self {
        Self(number)
    }

    /// The number in a list such as `/proc/devices`.
    fn in_list(list: &str) -> Option<Self> {
        // A block device may have the same name or number.
        let characters = list.split_once("Block devices:").map_or(list, |(characters, _)| characters);
        // drivers/vfio/device_cdev.c
        let number = characters.lines().find_map(|line| line.trim().strip_suffix(" vfio-dev"))?;
        number.parse().ok().map(Self)
    }

    /// Makes sure that a file is a VFIO device's, and says which one's: two files have the same number only if they are the same
    /// device's.
    ///
    /// # Errors
    ///
    /// [`WrongFile`]
    pub fn check(self, file: &impl AsFd) -> Result<u64, WrongFile> {
        let wrong = |found| WrongFile { found, expected: FileKind::VfioDevice.name() };
        let stat = fstat(file).map_err(|errno| wrong(errno.to_string()))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice if major(stat.st_rdev) == self.0 => Ok(stat.st_rdev),
            FileType::CharacterDevice => {
                Err(wrong(format!("character device {}:{}", major(stat.st_rdev), minor(stat.st_rdev))))
            }
            other => Err(wrong(format!("a {}", describe(other)))),
        }
    }
}

/// A file that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found} is not {expected}")]
pub struct WrongFile {
    found: String,
    expected: &'static str,
}

/// What a passed socket must be, for messages.
#[cfg(feature = "daemon")]
pub(super) const SOCKET: &str = "a Unix stream socket that listens or is connected";
/// What a descriptor for readiness must be, for messages.
#[cfg(feature = "daemon")]
pub(super) const WRITABLE: &str = "a pipe or another file that can be written to";

/// What a socket that others connect to must be, for messages.
#[cfg(feature = "daemon")]
pub(super) const LISTENER: &str = "a Unix stream socket that listens";

/// Makes sure that a file is a Unix stream socket that listens.
#[cfg(feature = "daemon")]
pub(super) fn check_listens(file: BorrowedFd<'_>) -> Result<(), WrongFile> {
    let found = match listens(file) {
        Ok(true) => return Ok(()),
        Ok(false) => "a socket that does not listen".to_owned(),
        Err(wrong) => wrong.found,
    };
    Err(WrongFile { found, expected: LISTENER })
}

/// Whether a Unix stream socket listens, rather than being connected.
#[cfg(feature = "daemon")]
pub(super) fn listens(file: BorrowedFd<'_>) -> Result<bool, WrongFile> {
    let wrong = |found: &str| WrongFile { found: found.to_owned(), expected: SOCKET };
    let stat = fstat(file).map_err(|errno| wrong(&errno.to_string()))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Socket => (),
        FileType::CharacterDevice => return Err(wrong("a character device")),
        file_type => return Err(wrong(&format!("a {}", describe(file_type)))),
    }
    if sockopt::socket_domain(file) != Ok(AddressFamily::UNIX) {
        return Err(wrong("a socket of another family"));
    }
    if sockopt::socket_type(file) != Ok(SocketType::STREAM) {
        return Err(wrong("a Unix socket of another type"));
    }
    match (sockopt::socket_acceptconn(file), getpeername(file)) {
        (Ok(true), _) => Ok(true),
        (_, Ok(Some(_))) => Ok(false),
        _ => Err(wrong("a socket that is neither")),
    }
}

/// Makes sure that a file can be written to.
#[cfg(feature = "daemon")]
pub(super) fn check_writable(file: BorrowedFd<'_>) -> Result<(), WrongFile> {
    let flags = fcntl_getfl(file).map_err(|errno| WrongFile { found: errno.to_string(), expected: WRITABLE })?;
    if flags.intersects(OFlags::WRONLY | OFlags::RDWR) {
        return Ok(());
    }
    Err(WrongFile { found: "a file that can only be read".to_owned(), expected: WRITABLE })
}

/// The name of a character device's node below `/dev` and its place in sysfs; for anything else, what it is.
fn device_node(file: BorrowedFd<'_>) -> Result<(String, PathBuf), String> {
    let stat = fstat(file.as_fd()).map_err(|errno| errno.to_string())?;
    let file_type = FileType::from_raw_mode(stat.st_mode);
    if file_type != FileType::CharacterDevice {
        return Err(format!("a {}", describe(file_type)));
    }
    let number = format!("{}:{}", major(stat.st_rdev), minor(stat.st_rdev));
    let sysfs = PathBuf::from(format!("/sys/dev/char/{number}"));
    let uevent = fs::read_to_string(sysfs.join("uevent"))
        .map_err(|error| format!("character device {number}, of which sysfs says nothing ({error})"))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| format!("character device {number}, which has no name in sysfs"))?;
    Ok((name.to_owned(), sysfs))
}

fn describe(file_type: FileType) -> &'static str {
    match file_type {
        FileType::RegularFile => "regular file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::BlockDevice => "block device",
        _ => "file without a device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_vfio_are_told_by_number() {
        let list = "Character devices:\n  1 mem\n243 vfio\n242 vfio-dev\n\nBlock devices:\n  9 vfio-dev\n";
        assert_eq!(VfioMajor::in_list(list), Some(VfioMajor(242)));
        assert_eq!(VfioMajor::in_list("Character devices:\n243 vfio\n\nBlock devices:\n  9 vfio-dev\n"), None);
        let null = fs::File::open("/dev/null").unwrap();
        assert!(VfioMajor(1).check(&null).is_ok(), "memory devices have number 1");
        let text = |file: &fs::File| VfioMajor(242).check(file).unwrap_err().to_string();
        assert_eq!(text(&null), "character device 1:3 is not /dev/vfio/devices/vfioN");
        assert_eq!(text(&fs::File::open("/").unwrap()), "a directory is not /dev/vfio/devices/vfioN");
    }

    #[test]
    fn the_list_can_be_read_again() {
        let numbers = DeviceNumbers::open().unwrap();
        let now = VfioMajor::in_list(&fs::read_to_string("/proc/devices").unwrap());
        assert_eq!((numbers.vfio().unwrap(), numbers.vfio().unwrap()), (now, now));
        let list = tempfile::NamedTempFile::new().unwrap();
        let numbers = DeviceNumbers(list.reopen().unwrap());
        assert_eq!(numbers.vfio().unwrap(), None);
        // VFIO comes, far down in a long list.
        let others = "241 something-else\n".repeat(900);
        fs::write(list.path(), format!("Character devices:\n{others}242 vfio-dev\n")).unwrap();
        let found = Some(VfioMajor(242));
        assert_eq!((numbers.vfio().unwrap(), numbers.vfio().unwrap()), (found, found));
    }

    #[test]
    fn nodes_are_told_apart_by_name() {
        assert!(FileKind::Iommufd.matches("iommu") && !FileKind::Iommufd.matches("iommu0"));
        assert!(FileKind::VfioDevice.matches("vfio/devices/vfio3") && !FileKind::VfioDevice.matches("vfio/vfio"));
    }
}
