// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The devices' nodes: when one goes, the host wants the device back, and waits until its last file is closed.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::Errno;

/// Where the nodes are.
pub(super) const DIRECTORY: &str = "/dev/vfio/devices";
/// How often a kernel without inotify is asked.
const INTERVAL: Duration = Duration::from_millis(500);

/// A watch over the nodes' directory.
#[derive(Debug)]
pub(super) struct NodeWatch {
    /// `None` if the kernel has no inotify.
    inotify: Option<OwnedFd>,
}

impl NodeWatch {
    /// Begins to watch a directory.
    ///
    /// # Errors
    ///
    /// The kernel has no watches left, or there is no directory.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let inotify = match init(CreateFlags::CLOEXEC) {
            Ok(inotify) => {
                add_watch(&inotify, directory, WatchFlags::DELETE | WatchFlags::MOVED_FROM)?;
                Some(inotify)
            }
            Err(Errno::NOSYS) => None,
            Err(errno) => return Err(errno.into()),
        };
        Ok(Self { inotify })
    }

    /// Has nodes looked at that may be gone, now and whenever one is, until that says to stop.
    pub fn watch(self, mut look: impl FnMut() -> bool) {
        // Some may have gone before the watch began.
        if !look() {
            return;
        }
        let Some(inotify) = self.inotify else {
            loop {
                std::thread::sleep(INTERVAL);
                if !look() {
                    return;
                }
            }
        };
        let mut buffer = [const { MaybeUninit::uninit() }; 4096];
        let mut events = Reader::new(inotify, &mut buffer);
        loop {
            match events.next() {
                Ok(_) if look() => (),
                Ok(_) => return,
                Err(Errno::INTR) => (),
                Err(errno) => return log::error!("the devices' nodes are not watched any more: {errno}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn whatever_goes_has_all_looked_at() {
        for with_inotify in [true, false] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("vfio0");
            fs::write(&path, "").unwrap();
            let mut watch = NodeWatch::new(directory.path()).unwrap();
            if !with_inotify {
                watch.inotify = None;
            }
            let (told, looked) = mpsc::channel();
            let watching = std::thread::spawn(move || {
                watch.watch(|| {
                    let is_there = path.exists();
                    told.send(is_there).unwrap();
                    is_there
                });
            });
            let next = || looked.recv_timeout(Duration::from_secs(10)).unwrap();
            assert!(next(), "at once");
            fs::remove_file(directory.path().join("vfio0")).unwrap();
            while next() {}
            watching.join().unwrap();
        }
    }
}
