// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waiting for the frontend and its end, on a thread of its own: the connection's thread is started by it, and has the confinement
//! that it has, not that of the main thread.

use std::io;
use std::mem::ManuallyDrop;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use vhost::vhost_user::Listener;
use vhost_user_backend::{Error as DaemonError, ShutdownHandle};

use super::backend::IommuBackend;
use super::daemon::BackendDaemon;
use super::serve::ServeError;
use super::signals::Signals;
use crate::sandbox::{Sandbox, SandboxError, ThreadKind};

/// How long the connection's thread has to end after a signal.
const GRACE: Duration = Duration::from_secs(1);

/// A daemon of the library's that serves. It is never dropped: that waits for the library's threads, which files of the frontend's may
/// hold up. They end with the process.
type Daemon = ManuallyDrop<BackendDaemon>;

/// A frontend that is served.
pub(super) struct Serving {
    connection: ShutdownHandle,
    signals: Arc<Signals>,
    /// Its other end is closed when the connection has ended.
    has_ended: UnixStream,
    ended: mpsc::Receiver<Result<(), DaemonError>>,
}

impl Serving {
    /// Waits until the connection has ended, and how; `None` if a signal came before.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn wait(&self) -> io::Result<Option<Result<(), DaemonError>>> {
        Ok(if self.signals.wait_for(&self.has_ended)? { self.end() } else { None })
    }

    /// Closes the connection.
    pub fn close(&self) {
        self.connection.shutdown();
    }

    /// How the connection ended, which was closed; `None` if its thread does not end, because files of the frontend's hold it up.
    pub fn end(&self) -> Option<Result<(), DaemonError>> {
        self.ended.recv_timeout(GRACE).ok()
    }
}

/// A thread that is ready to wait for the frontend.
pub(super) struct Waiting {
    go: mpsc::Sender<()>,
    came: mpsc::Receiver<Result<Option<Serving>, ServeError>>,
}

impl Waiting {
    /// Starts the thread, and the one that serves the rings. When this returns both are confined, and no frontend is listened to.
    ///
    /// # Errors
    ///
    /// [`ServeError`]
    pub fn start(
        sandbox: Sandbox,
        backend: &Arc<IommuBackend>,
        listener: UnixListener,
        signals: Arc<Signals>,
    ) -> Result<Self, ServeError> {
        let daemon = ManuallyDrop::new(backend.daemon("vhost-user").map_err(ServeError::Daemon)?);
        confine_rings(sandbox, backend)?;
        let (go, may_go) = mpsc::channel();
        let (tell, came) = mpsc::channel();
        let ends = UnixStream::pair().map_err(ServeError::Events)?;
        let wait = move || {
            // Whoever does not say so has failed.
            if may_go.recv().is_ok() {
                serve(daemon, listener, signals, ends, &tell);
            }
        };
        sandbox.spawn(ThreadKind::Connection, "frontend", wait)?;
        Ok(Self { go, came })
    }

    /// Waits until a frontend is served; `None` if a signal came before.
    ///
    /// # Errors
    ///
    /// [`ServeError`]
    pub fn wait(self) -> Result<Option<Serving>, ServeError> {
        let gone = || ServeError::Events(std::io::Error::other("the thread that waits for the frontend is gone"));
        self.go.send(()).map_err(|_| gone())?;
        self.came.recv().unwrap_or_else(|_| Err(gone()))
    }
}

fn confine_rings(sandbox: Sandbox, backend: &IommuBackend) -> Result<(), SandboxError> {
    let (tell, confined) = mpsc::sync_channel(1);
    backend.on_rings_thread(move || {
        // Whoever waits no longer has given up.
        let _ = tell.send(sandbox.confine_thread(ThreadKind::Rings));
    });
    Sandbox::wait(ThreadKind::Rings, &confined)
}

fn serve(
    mut daemon: Daemon,
    listener: UnixListener,
    signals: Arc<Signals>,
    (has_ended, closed_then): (UnixStream, UnixStream),
    tell: &mpsc::Sender<Result<Option<Serving>, ServeError>>,
) {
    let (tell_end, ended) = mpsc::channel();
    let started = start(&mut daemon, listener, &signals);
    let serving = |connection| Serving { connection, signals, has_ended, ended };
    let serving = started.map(|connection| connection.map(serving));
    let is_served = matches!(serving, Ok(Some(_)));
    // Whoever waits no longer ends the process.
    if tell.send(serving).is_ok() && is_served {
        let _ = tell_end.send(daemon.wait());
        drop(closed_then);
    }
}

/// Waits for a frontend and starts to serve it; `None` if a signal came first.
fn start(daemon: &mut Daemon, listener: UnixListener, signals: &Signals) -> Result<Option<ShutdownHandle>, ServeError> {
    if !signals.wait_for(&listener).map_err(ServeError::Events)? {
        return Ok(None);
    }
    daemon.start(&mut Listener::from(listener)).map_err(ServeError::Daemon)?;
    let gone = || ServeError::Events(io::Error::other("the connection has no handle"));
    daemon.shutdown_handle().map(Some).ok_or_else(gone)
}
