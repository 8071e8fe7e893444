// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The library's daemon, and its end.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use log::debug;
use vhost_user_backend::VhostUserDaemon;

use super::backend::IommuBackend;

/// The library's daemon for a backend, as [`IommuBackend::daemon`] makes it. Dropping it closes the connection and waits until no
/// thread of the library's calls the backend any more; a frontend's event file that blocks holds that up.
pub struct BackendDaemon {
    pub(super) library: VhostUserDaemon<Arc<IommuBackend>>,
    pub(super) backend: Arc<IommuBackend>,
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
