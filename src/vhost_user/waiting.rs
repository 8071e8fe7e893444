// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waiting for the frontend, and for signals, on a thread of its own: the connection's thread is started by it, and has the confinement
//! that it has, not that of the main thread.

use std::mem::ManuallyDrop;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use log::warn;
use vhost::vhost_user::Listener;
use vhost_user_backend::ShutdownHandle;

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
    pub daemon: Daemon,
    /// To be set when the connection has ended.
    pub ended: Arc<AtomicBool>,
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
        signals: Signals,
    ) -> Result<Self, ServeError> {
        let daemon = ManuallyDrop::new(backend.daemon("vhost-user").map_err(ServeError::Daemon)?);
        confine_rings(sandbox, backend)?;
        let (go, may_go) = mpsc::channel();
        let (tell, came) = mpsc::channel();
        let backend = Arc::clone(backend);
        let wait = move || {
            // Whoever does not say so has failed.
            if may_go.recv().is_ok() {
                serve_until_signal(&backend, daemon, listener, signals, &tell);
            }
        };
        sandbox.spawn(ThreadKind::Connection, "signals", wait)?;
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

fn serve_until_signal(
    backend: &IommuBackend,
    daemon: Daemon,
    listener: UnixListener,
    signals: Signals,
    tell: &mpsc::Sender<Result<Option<Serving>, ServeError>>,
) {
    let ended = Arc::new(AtomicBool::new(false));
    let started = start(daemon, listener, &signals);
    let handle = started.as_ref().ok().and_then(|daemon| daemon.as_ref()?.shutdown_handle());
    let told = started.map(|daemon| daemon.map(|daemon| Serving { daemon, ended: Arc::clone(&ended) }));
    if tell.send(told).is_ok()
        && let Some(handle) = handle
    {
        signals.then(|| stop_now(&handle, backend, &ended));
    }
}

/// Waits for a frontend and starts to serve it; `None` if a signal came first.
fn start(mut daemon: Daemon, listener: UnixListener, signals: &Signals) -> Result<Option<Daemon>, ServeError> {
    if !signals.wait_for_frontend(&listener).map_err(ServeError::Events)? {
        return Ok(None);
    }
    daemon.start(&mut Listener::from(listener)).map_err(ServeError::Daemon)?;
    Ok(Some(daemon))
}

/// Ends what a signal asked to end, even if the library's threads are held up by files of the frontend's.
fn stop_now(connection: &ShutdownHandle, backend: &IommuBackend, ended: &AtomicBool) {
    connection.shutdown();
    backend.shut_down();
    std::thread::sleep(GRACE);
    if !ended.load(Ordering::Acquire) {
        warn!("the frontend holds up the connection's thread: ending without it");
        std::process::exit(0);
    }
}
