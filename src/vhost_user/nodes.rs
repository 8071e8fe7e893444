// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The devices' nodes: when one goes, the host wants the device back, and waits until its last file is closed.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::Errno;

use crate::id::EndpointId;

/// The node of an endpoint's device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNode {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The name below `/dev`, such as `vfio/devices/vfio0`.
    pub name: String,
}

/// Where the nodes are.
pub(super) const DIRECTORY: &str = "/dev/vfio/devices";
/// How often a kernel without inotify is asked.
const INTERVAL: Duration = Duration::from_millis(500);

/// A watch over the nodes' directory.
#[derive(Debug)]
pub(super) struct NodeWatch {
    directory: PathBuf,
    /// `None` if the kernel has no inotify.
    inotify: Option<OwnedFd>,
    nodes: Vec<Option<DeviceNode>>,
}

impl NodeWatch {
    /// Begins to watch a directory for the last parts of the nodes' names.
    ///
    /// # Errors
    ///
    /// The kernel has no watches left, or there is no directory.
    pub fn new(directory: &Path, nodes: Vec<DeviceNode>) -> io::Result<Self> {
        let inotify = match init(CreateFlags::CLOEXEC) {
            Ok(inotify) => {
                add_watch(&inotify, directory, WatchFlags::DELETE | WatchFlags::MOVED_FROM)?;
                Some(inotify)
            }
            Err(Errno::NOSYS) => None,
            Err(errno) => return Err(errno.into()),
        };
        Ok(Self { directory: directory.to_owned(), inotify, nodes: nodes.into_iter().map(Some).collect() })
    }

    /// Tells of each node that goes, by its place in the list and what it is, until all are gone.
    pub fn watch(mut self, mut gone: impl FnMut(usize, &DeviceNode)) {
        // Some may have gone before the watch began.
        self.tell(&mut gone, None);
        let Some(inotify) = self.inotify.take() else {
            while self.has_nodes() {
                std::thread::sleep(INTERVAL);
                self.tell(&mut gone, None);
            }
            return;
        };
        let mut buffer = [const { MaybeUninit::uninit() }; 4096];
        let mut events = Reader::new(inotify, &mut buffer);
        while self.has_nodes() {
            match events.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
                    self.tell(&mut gone, name.as_deref());
                }
                Err(Errno::INTR) => (),
                Err(errno) => return log::error!("the devices' nodes are not watched any more: {errno}"),
            }
        }
    }

    fn has_nodes(&self) -> bool {
        self.nodes.iter().any(Option::is_some)
    }

    /// Tells of the node that was said to be gone, whose name may be another device's already, and of those that are not there.
    fn tell(&mut self, gone: &mut impl FnMut(usize, &DeviceNode), said: Option<&str>) {
        let Self { directory, nodes, .. } = self;
        for (place, slot) in nodes.iter_mut().enumerate() {
            let is_gone = |node: &mut DeviceNode| {
                let name = Path::new(&node.name).file_name().unwrap_or_default();
                said.is_some_and(|said| name == said) || !directory.join(name).exists()
            };
            if let Some(node) = slot.take_if(is_gone) {
                gone(place, &node);
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
    fn each_node_that_goes_is_told_once() {
        for with_inotify in [true, false] {
            let directory = tempfile::tempdir().unwrap();
            let path = |name: &str| directory.path().join(name);
            for name in ["vfio0", "vfio10"] {
                fs::write(path(name), "").unwrap();
            }
            let node = |endpoint, name: &str| DeviceNode {
                endpoint: EndpointId(endpoint),
                name: format!("vfio/devices/{name}"),
            };
            let nodes = vec![node(1, "vfio0"), node(2, "vfio1"), node(3, "vfio10")];
            let mut watch = NodeWatch::new(directory.path(), nodes).unwrap();
            if !with_inotify {
                watch.inotify = None;
            }
            let (told, gone) = mpsc::channel();
            let watching = std::thread::spawn(move || {
                watch.watch(|place, node| told.send((place, node.endpoint.0)).unwrap());
            });
            let next = || gone.recv_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!(next(), (1, 2), "it was not there from the start");
            fs::remove_file(path("vfio0")).unwrap();
            if with_inotify {
                // Another device has the number at once.
                fs::write(path("vfio0"), "").unwrap();
            }
            assert_eq!(next(), (0, 1));
            fs::remove_file(path("vfio10")).unwrap();
            assert_eq!(next(), (2, 3));
            watching.join().unwrap();
        }
    }
}
