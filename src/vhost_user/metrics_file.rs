// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file that metrics are written to, now and again, for a collector that reads text files (`node_exporter`'s `textfile`).
//!
//! Only the directory is opened by its path, when the daemon starts; all else is done through that, so that it goes on where nothing
//! can be opened any more. Who reads the file has all of it, or all of the one before.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use log::{info, warn};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

use super::backend::IommuBackend;
use super::metrics::encode;
use crate::paths::directory_of;
use crate::sandbox::{Sandbox, StartError, ThreadKind};

/// Metrics cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// It is no name of a file.
    #[error("--metrics-file: {} does not end in the name of a file", .0.display())]
    Name(PathBuf),
    /// The directory cannot be used.
    #[error("--metrics-file: cannot use the directory {}", .0.display())]
    Directory(PathBuf, #[source] io::Error),
    /// Something else is there.
    #[error("--metrics-file: {} is there already and no regular file: remove it, or choose another path", .0.display())]
    Taken(PathBuf),
    /// The file cannot be written.
    #[error("--metrics-file: cannot write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
}

/// A file in a directory that is open.
#[derive(Debug)]
pub(super) struct MetricsFile {
    path: PathBuf,
    directory: OwnedFd,
    name: OsString,
    /// What it is called until it is complete.
    unfinished: OsString,
}

impl MetricsFile {
    /// Opens the directory; nothing is written.
    ///
    /// # Errors
    ///
    /// [`MetricsError`]
    pub fn open(path: &Path) -> Result<Self, MetricsError> {
        let name = path.file_name().ok_or_else(|| MetricsError::Name(path.to_owned()))?.to_owned();
        let parent = directory_of(path);
        let failed = |errno: Errno| MetricsError::Directory(parent.to_owned(), errno.into());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, parent, flags, Mode::empty()).map_err(failed)?;
        match statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile => {
                return Err(MetricsError::Taken(path.to_owned()));
            }
            Ok(_) | Err(Errno::NOENT) => (),
            Err(errno) => return Err(failed(errno)),
        }
        // Not one that a collector takes for metrics (`*.prom`).
        let unfinished = [OsStr::new("."), &name, OsStr::new(".new")].iter().copied().collect();
        Ok(Self { path: path.to_owned(), directory, name, unfinished })
    }

    /// Puts a text in the place of what is there.
    fn write(&self, text: &str) -> io::Result<()> {
        let Self { directory, name, unfinished, .. } = self;
        match unlinkat(directory, unfinished, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => (),
            Err(errno) => return Err(errno.into()),
        }
        // Whatever somebody puts there in between is not followed, or waited for.
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        File::from(openat(directory, unfinished, flags, mode)?).write_all(text.as_bytes())?;
        Ok(renameat(directory, unfinished, directory, name)?)
    }

    fn write_metrics(&self, backend: &IommuBackend) -> io::Result<()> {
        self.write(&encode(backend.counted()).map_err(io::Error::other)?)
    }

    /// Writes it for the first time. From here on it is this process's.
    ///
    /// # Errors
    ///
    /// [`MetricsError::Write`]
    pub fn begin(self, backend: &IommuBackend) -> Result<OwnMetricsFile, MetricsError> {
        match self.write_metrics(backend) {
            Ok(()) => Ok(OwnMetricsFile(self)),
            Err(error) => Err(MetricsError::Write(self.path, error)),
        }
    }
}

/// A file that this process has written. When this is dropped it is removed, so that nobody takes a daemon that is gone, or did not
/// start, for one that is idle.
#[derive(Debug)]
pub(super) struct OwnMetricsFile(MetricsFile);

impl Drop for OwnMetricsFile {
    fn drop(&mut self) {
        let _ = unlinkat(&self.0.directory, &self.0.name, AtFlags::empty());
    }
}

impl OwnMetricsFile {
    /// Writes it at each interval, on a thread of its own, until what is returned is dropped.
    ///
    /// # Errors
    ///
    /// There is no thread left, or it cannot be confined.
    pub fn keep(
        self,
        sandbox: Sandbox,
        backend: &Arc<IommuBackend>,
        interval: Duration,
    ) -> Result<MetricsWriter, StartError> {
        let (sender, ends) = sync_channel(0);
        let (tell, ended) = sync_channel(1);
        let backend = Arc::clone(backend);
        let work = move || {
            self.write_until(&ends, &backend, interval);
            // The file goes before anybody is told that it is gone.
            drop(self);
            // Whoever waits no longer has ended.
            let _ = tell.send(());
        };
        sandbox.spawn(ThreadKind::Metrics, "metrics", work)?;
        Ok(MetricsWriter { ends: Some(sender), ended })
    }

    fn write_until(&self, ends: &Receiver<()>, backend: &IommuBackend, interval: Duration) {
        let path = self.0.path.display();
        let mut is_failing = false;
        while ends.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
            let result = self.0.write_metrics(backend);
            match &result {
                Ok(()) if is_failing => info!("{path} is written again"),
                Err(error) if !is_failing => warn!("{path} cannot be written, and is as it was: {error}"),
                Ok(()) | Err(_) => (),
            }
            is_failing = result.is_err();
        }
    }
}

/// The file is written until this is dropped.
#[derive(Debug)]
pub(super) struct MetricsWriter {
    ends: Option<SyncSender<()>>,
    ended: Receiver<()>,
}

impl Drop for MetricsWriter {
    fn drop(&mut self) {
        drop(self.ends.take());
        // It panicked, if it did, on its own.
        let _ = self.ended.recv();
    }
}
