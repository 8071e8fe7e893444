// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The library's daemon, and its end.

use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::{fmt, io};

use log::debug;
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vmm_sys_util::epoll::EventSet;

use super::backend::{CONTINUE_EVENT, IommuBackend};

/// The library's daemon for a backend, as [`IommuBackend::daemon`] makes it. Dropping it closes the connection and waits until no
/// thread of the library's calls the backend any more; a frontend's event file that blocks holds that up.
pub struct BackendDaemon {
    pub(super) library: VhostUserDaemon<Arc<IommuBackend>>,
    pub(super) backend: Arc<IommuBackend>,
}

/// What the thread that serves the rings does once.
#[cfg(feature = "daemon")]
pub(super) struct RingsJob(Box<dyn FnOnce() + Send>);

impl IommuBackend {
    /// A daemon of the library for this backend, whose event loop also continues batches that used up their budget. There can be one
    /// only: what the frontend said of features, rings and memory is not another's.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::AlreadyExists`] if there is one, or was; or the library cannot make its threads and events.
    pub fn daemon(self: &Arc<Self>, name: &str) -> Result<BackendDaemon, DaemonError> {
        if self.has_daemon.swap(true, Ordering::AcqRel) {
            let error = io::Error::new(io::ErrorKind::AlreadyExists, "a backend has one daemon: make another backend");
            return Err(DaemonError::StartDaemon(error));
        }
        let library = self.library(name).inspect_err(|_| self.has_daemon.store(false, Ordering::Release))?;
        Ok(BackendDaemon { library, backend: Arc::clone(self) })
    }

    fn library(self: &Arc<Self>, name: &str) -> Result<VhostUserDaemon<Arc<Self>>, DaemonError> {
        let library = VhostUserDaemon::new(name.to_owned(), Arc::clone(self), self.offered.clone())?;
        for handler in library.get_epoll_handlers() {
            let again = self.again.0.as_raw_fd();
            if let Err(error) = handler.register_listener(again, EventSet::IN, u64::from(CONTINUE_EVENT)) {
                // Dropping it waits for the rings' thread, which nothing would wake.
                std::mem::forget(library);
                return Err(DaemonError::StartDaemon(error));
            }
        }
        // So that the rings are known before the frontend asks whether they run.
        self.look_again();
        Ok(library)
    }

    pub(super) fn has_daemon(&self) -> bool {
        self.has_daemon.load(Ordering::Acquire)
    }

    /// Ends the library's event loop.
    pub(super) fn end_event_loop(&self) {
        self.loop_ends.store(true, Ordering::Release);
        self.look_again();
    }

    /// Has the thread that serves the rings, which the library made with the daemon, do something before it looks at them next.
    #[cfg(feature = "daemon")]
    pub(super) fn on_rings_thread(&self, work: impl FnOnce() + Send + 'static) {
        *self.rings_job.lock() = Some(RingsJob(Box::new(work)));
        self.look_again();
    }

    /// To be called by that thread.
    #[cfg(feature = "daemon")]
    pub(super) fn do_rings_job(&self) {
        let job = self.rings_job.lock().take();
        if let Some(RingsJob(work)) = job {
            work();
        }
    }
}

impl Deref for BackendDaemon {
    type Target = VhostUserDaemon<Arc<IommuBackend>>;

    fn deref(&self) -> &Self::Target {
        &self.library
    }
}

impl DerefMut for BackendDaemon {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.library
    }
}

impl Drop for BackendDaemon {
    fn drop(&mut self) {
        // The library alone would leave the connection's thread behind, and the rings' with it.
        self.library.request_shutdown();
        if let Err(error) = self.library.wait() {
            debug!("the connection ended: {error}");
        }
        // The library's own way to end its event loop leaves a descriptor open for each daemon.
        self.backend.end_event_loop();
    }
}

impl fmt::Debug for BackendDaemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackendDaemon").field("backend", &self.backend).finish_non_exhaustive()
    }
}
