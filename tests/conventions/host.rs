// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host with a device to assign, in a name space of its own: a copied sysfs says that two files that can always be had are
//! `/dev/iommu` and the device's.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::common::left_out::left_out;
use super::{Ended, Start};

pub struct Host {
    directory: tempfile::TempDir,
}

impl Host {
    /// A host with VT-d, and the device 0000:01:00.0 in group 7; `None`, said aloud, where name spaces cannot be had.
    pub fn new() -> Option<Self> {
        let can = Command::new("unshare").args(["--user", "--map-root-user", "--mount", "true"]).status();
        if !can.is_ok_and(|status| status.success()) {
            left_out("user name spaces");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let host = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/vtd/sys");
        let copied = Command::new("cp").arg("-a").arg(host).arg(directory.path()).status().unwrap();
        assert!(copied.success());
        let host = Self { directory };
        // /dev/null and /dev/zero.
        host.write("dev/char/1:3/uevent", "DEVNAME=iommu\n");
        host.write("dev/char/1:5/uevent", "DEVNAME=vfio/devices/vfio0\n");
        symlink("../../../devices/pci0000:00/0000:01:00.0", host.path("dev/char/1:5/device")).unwrap();
        Some(host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("sys").join(name)
    }

    /// Has a file in its sysfs say something else.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Runs a daemon that ends by itself on this host.
    pub fn daemon(&self, start: Start) -> Ended {
        self.inside(start).run()
    }

    /// To be started on this host, with `/dev/iommu` as number 3 and the device as number 4. `NODE` is the name of the one node that is
    /// there, instead of the device's; `OF` is the file that it is, instead of the device.
    pub fn inside(&self, start: Start) -> Start {
        let sys = self.path("").display().to_string();
        start.environment("FAKE_SYS", sys).script(
            "[ -n \"$INSIDE\" ] || INSIDE=1 exec unshare --user --map-root-user --mount \
             sh -c 'exec 3<>/dev/null 4<>/dev/zero && mount --bind \"$FAKE_SYS\" /sys && new=\"$FAKE_SYS\"/../dev && \
             mkdir -p \"$new\" && mount -t tmpfs none \"$new\" && mkdir -p \"$new\"/vfio/devices && : >\"$new\"/null && \
             node=\"$new\"/vfio/devices/${NODE:-vfio0} && : >\"$node\" && mount --bind \"${OF:-/dev/zero}\" \"$node\" && \
             mount --rbind \"$new\" /dev && \
             exec \"$0\" \"$@\" --iommufd-fd=3' \"$0\" \"$@\";",
        )
    }
}
