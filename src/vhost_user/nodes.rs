// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the daemon must see happen to its devices: that a node goes, by which the host says that it wants the device back and waits
//! until its last file is closed; and that the watcher ends, after which nobody would detach the devices if the daemon were killed.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::warn;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use rustix::io::{Errno, read};

/// Where the nodes are.
pub(super) const DIRECTORY: &str = "/dev/vfio/devices";
/// How often is looked where the kernel does not tell.
const INTERVAL: Duration = Duration::from_millis(500);

/// A watch over the nodes' directory, which need not be there: it goes with its last node and comes with the next.
#[derive(Debug)]
pub(super) struct NodeWatch {
    directory: PathBuf,
    /// `None` if the kernel does not tell.
    inotify: Option<OwnedFd>,
    /// Its other end is closed when the watcher ends.
    watcher: Option<UnixStream>,
}

impl NodeWatch {
    /// Begins to watch a directory, and the watcher at the other end of a socket.
    ///
    /// # Errors
    ///
    /// The kernel's, unless it is that it has no inotify.
    pub fn new(directory: &Path, watcher: Option<UnixStream>) -> io::Result<Self> {
        let inotify = match init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK) {
            Ok(inotify) => Some(inotify),
            Err(Errno::NOSYS) => None,
            Err(errno) => return Err(errno.into()),
        };
        let mut watch = Self { directory: directory.to_owned(), inotify, watcher };
        watch.renew();
        Ok(watch)
    }

    /// Has nodes looked at that may be gone, now and whenever one is, until that says to stop; and says when the watcher has ended.
    pub fn watch(mut self, mut look: impl FnMut() -> bool, watcher_ended: impl Fn()) {
        // Some may have gone before the watch began, or before it was renewed.
        while look() {
            self.wait(&watcher_ended);
            self.renew();
        }
    }

    /// Watches what there is of the directory and the two above it, so that it is seen when it comes.
    fn renew(&mut self) {
        const CHANGES: WatchFlags = WatchFlags::CREATE
            .union(WatchFlags::DELETE)
            .union(WatchFlags::MOVED_FROM)
            .union(WatchFlags::MOVED_TO)
            .union(WatchFlags::ONLYDIR);
        let Some(inotify) = &self.inotify else { return };
        // The innermost last: what is made in between is seen.
        let watched: Vec<&Path> = self.directory.ancestors().take(3).collect();
        for directory in watched.into_iter().rev() {
            match add_watch(inotify, directory, CHANGES) {
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => (),
                Err(errno) => {
                    warn!(
                        "{} cannot be watched ({errno}): it is looked at twice a second instead",
                        directory.display()
                    );
                    self.inotify = None;
                    return;
                }
            }
        }
    }

    /// Waits until something may have changed. If it cannot wait, it was a while.
    fn wait(&mut self, watcher_ended: impl Fn()) {
        let timeout = self.inotify.is_none().then_some(INTERVAL);
        let timeout = timeout.and_then(|interval| Timespec::try_from(interval).ok());
        let mut files = Vec::new();
        files.extend(self.watcher.as_ref().map(|watcher| PollFd::new(watcher, PollFlags::empty())));
        files.extend(self.inotify.as_ref().map(|inotify| PollFd::new(inotify, PollFlags::IN)));
        match poll(&mut files, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => (),
            Err(_) => std::thread::sleep(INTERVAL),
        }
        let is_gone =
            self.watcher.is_some() && files.first().is_some_and(|file| file.revents().contains(PollFlags::HUP));
        drop(files);
        if is_gone {
            watcher_ended();
            self.watcher = None;
        }
        // What happened is looked at, however it is called.
        while self.inotify.as_ref().is_some_and(|inotify| read(inotify, &mut [0; 4096]).is_ok_and(|length| length > 0))
        {
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn whatever_goes_has_all_looked_at_even_when_the_directory_went_and_came() {
        for with_inotify in [true, false] {
            let place = tempfile::tempdir().unwrap();
            let directory = place.path().join("vfio/devices");
            let node = directory.join("vfio0");
            let mut watch = NodeWatch::new(&directory, None).unwrap();
            if !with_inotify {
                watch.inotify = None;
            }
            let (told, looked) = mpsc::channel();
            let path = node.clone();
            let watching = std::thread::spawn(move || watch.watch(|| told.send(path.exists()).is_ok(), || ()));
            let wait_until = |is_there| while looked.recv_timeout(PATIENCE).unwrap() != is_there {};
            wait_until(false);
            for _ in 0..3 {
                fs::create_dir_all(&directory).unwrap();
                fs::write(&node, "").unwrap();
                wait_until(true);
                fs::remove_file(&node).unwrap();
                wait_until(false);
                fs::remove_dir_all(directory.parent().unwrap()).unwrap();
            }
            drop(looked);
            fs::create_dir(directory.parent().unwrap()).unwrap();
            watching.join().unwrap();
        }
    }

    #[test]
    fn the_end_of_the_watcher_is_seen_once_and_the_nodes_are_watched_still() {
        let place = tempfile::tempdir().unwrap();
        let (socket, theirs) = UnixStream::pair().unwrap();
        let mut watch = NodeWatch::new(place.path(), Some(socket)).unwrap();
        drop(theirs);
        let ended = Cell::new(0);
        watch.wait(|| ended.set(ended.get() + 1));
        assert_eq!(ended.get(), 1);
        fs::write(place.path().join("vfio0"), "").unwrap();
        watch.wait(|| ended.set(ended.get() + 1));
        assert_eq!(ended.get(), 1);
    }
}
