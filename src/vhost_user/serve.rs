// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The life of the daemon: one frontend is served, until it is gone or a signal says to stop.

use std::fs::{self, File};
use std::io::{self, Read};
use std::mem::ManuallyDrop;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{error, info, warn};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as DaemonError, ShutdownHandle};

use super::args::Arguments;
use super::backend::{BackendOptions, IommuBackend};
use super::incoming::{Incoming, IncomingError, Source};
use super::metrics_file::{MetricsError, MetricsFile};
use super::nodes::{self, NodeWatch};
use super::readiness::{Readiness, ServiceManager};
use super::setup::{BuiltDevice, SetupError, build_device};
use super::watcher::Watcher;
use crate::control::{ControlServer, DeviceFiles, Keeper, Limits, ListenError, Pluggable, Registry, VfioFiles, listen};
use crate::fd::{AdoptError, adopt_writable};
use crate::reserved::plan::Plan;

/// How long the connection's thread has to end after a signal.
const GRACE: Duration = Duration::from_secs(1);

/// A daemon that could not start, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The device cannot be set up.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The socket cannot be had.
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    /// Whoever waits for this process cannot be told.
    #[error("--ready-fd")]
    Ready(#[source] AdoptError),
    /// The control socket cannot be had.
    #[error("control socket: {0}")]
    Listen(#[from] ListenError),
    /// Metrics cannot be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The control socket cannot be served.
    #[error("cannot serve the control socket")]
    Control(#[source] io::Error),
    /// Nobody would hold the devices after this process.
    #[error("cannot start a watcher for the devices")]
    Watcher(#[source] io::Error),
    /// Events or signals cannot be had.
    #[error("cannot set up events and signals")]
    Events(#[source] io::Error),
    /// The library failed.
    #[error("vhost-user: {0}")]
    Daemon(DaemonError),
    /// The frontend does not speak the protocol.
    #[error("the frontend broke the protocol, every endpoint was blocked: {0}")]
    Protocol(DaemonError),
}

impl ServeError {
    /// The exit code: 1 run time, 2 usage, 3 host, 4 protocol. 5 is kept for a process that cannot be confined.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setup(error) if error.is_usage() => 2,
            Self::Setup(_) => 3,
            Self::Incoming(error) if error.is_usage() => 2,
            Self::Ready(_) | Self::Metrics(_) => 2,
            Self::Protocol(_) => 4,
            Self::Listen(error) if error.is_usage() => 2,
            Self::Incoming(_)
            | Self::Listen(_)
            | Self::Control(_)
            | Self::Watcher(_)
            | Self::Events(_)
            | Self::Daemon(_) => 1,
        }
    }
}

/// Checks all that can be checked without serving, and returns what the guest would be told. Nothing is changed, but the files that
/// the arguments name are taken over.
///
/// # Errors
///
/// What [`serve`] would answer.
pub fn check(arguments: &Arguments) -> Result<Plan, ServeError> {
    let (source, _ready) = take_passed(arguments)?;
    let BuiltDevice { plan, .. } = build_device(arguments)?;
    source.examine()?;
    arguments.metrics_file.as_deref().map(MetricsFile::open).transpose()?;
    Ok(plan)
}

/// Sets the device up, serves one frontend, and blocks every endpoint when it is gone. For the program's `main` alone, after
/// [`watch_if_asked`](super::watch_if_asked), as this program is started once more to watch the devices; and the process is to end
/// when this returns: some threads are left to end with it.
///
/// # Errors
///
/// [`ServeError`]
pub fn serve(arguments: &Arguments) -> Result<(), ServeError> {
    if arguments.exit_with_parent {
        follow_parent().map_err(ServeError::Events)?;
    }
    // Before the watcher, which must not hold them.
    let (source, ready) = take_passed(arguments)?;
    let readiness = Readiness::new(ready, ServiceManager::from_environment());
    let control = arguments.control_place().map(listen).transpose()?;
    let result = serve_controlled(arguments, source, readiness, control);
    if let Some(path) = &arguments.control_path {
        // That it is gone already is no failure.
        let _ = fs::remove_file(path);
    }
    result
}

/// Takes over the socket, and the file by which readiness is told.
fn take_passed(arguments: &Arguments) -> Result<(Source, Option<File>), ServeError> {
    let source = Source::find(arguments)?;
    let ready = arguments.ready_fd.map(adopt_writable).transpose().map_err(ServeError::Ready)?;
    Ok((source, ready))
}

fn serve_controlled(
    arguments: &Arguments,
    source: Source,
    readiness: Readiness,
    control: Option<UnixListener>,
) -> Result<(), ServeError> {
    // Before the files are adopted: it inherits them as they are.
    let files: Vec<_> = arguments.endpoint.iter().map(|endpoint| endpoint.cdev_fd).collect();
    let is_needed = !files.is_empty() || control.is_some() && arguments.iommufd_fd.is_some();
    let watcher = is_needed.then(|| Watcher::start(&files)).transpose().map_err(ServeError::Watcher)?;

    let metrics = arguments.metrics_file.as_deref().map(MetricsFile::open).transpose()?;
    let BuiltDevice { device, endpoints, iommufd, host_time, .. } = build_device(arguments)?;
    let options = BackendOptions { on_stop: arguments.on_stop, polling: arguments.poll_us };
    let backend = Arc::new(IommuBackend::new(device, options).map_err(ServeError::Events)?);
    if let Some(host_time) = host_time {
        backend.measure(host_time);
    }
    let interval = Duration::from_secs(arguments.metrics_interval.into());
    let _metrics = metrics.map(|metrics| metrics.keep(&backend, interval)).transpose()?;
    let pluggable = Pluggable {
        files: iommufd.map(|iommufd| Box::new(VfioFiles::new(iommufd)) as Box<dyn DeviceFiles>),
        keeper: watcher.map(|watcher| Box::new(watcher) as Box<dyn Keeper>),
        policy: arguments.policy.clone(),
        directory: nodes::DIRECTORY.into(),
    };
    let registry = Arc::new(Registry::new(Arc::clone(&backend), endpoints, pluggable));
    let result = serve_endpoints(source, readiness, &backend, &registry, control);
    // What was to be let go was.
    registry.close();
    result
}

fn serve_endpoints(
    source: Source,
    readiness: Readiness,
    backend: &Arc<IommuBackend>,
    registry: &Arc<Registry>,
    control: Option<UnixListener>,
) -> Result<(), ServeError> {
    let can_add = control.is_some();
    if !registry.is_empty() || can_add && Path::new(nodes::DIRECTORY).exists() {
        watch_nodes(registry, can_add).map_err(ServeError::Events)?;
    }
    let mut signals = Signals::new().map_err(ServeError::Events)?;
    // A path that this process listens on is removed when this returns: nobody else can connect.
    let Incoming { listener, leftover: _leftover } = source.open()?;
    if let Some(control) = control {
        serve_control(control, registry).map_err(ServeError::Control)?;
    }
    let manager = readiness.ready();
    if signals.wait_for_frontend(&listener).map_err(ServeError::Events)? {
        serve_frontend(backend, listener, signals, &manager)
    } else {
        manager.stopping();
        Ok(())
    }
}

fn serve_control(listener: UnixListener, registry: &Arc<Registry>) -> io::Result<()> {
    let server = ControlServer::new(listener, Arc::clone(registry), Limits::default())?;
    std::thread::Builder::new().name("control".to_owned()).spawn(move || server.run())?;
    Ok(())
}

/// Has endpoints removed whose devices the host wants back; for ever, if more can be added.
fn watch_nodes(registry: &Arc<Registry>, can_add: bool) -> io::Result<()> {
    let watch = NodeWatch::new(nodes::DIRECTORY.as_ref())?;
    registry.set_watched(true);
    let registry = Arc::clone(registry);
    let looking = Arc::clone(&registry);
    let look = move || {
        looking.remove_those_gone();
        can_add || !looking.is_empty()
    };
    let watching = move || {
        watch.watch(look);
        registry.set_watched(false);
    };
    std::thread::Builder::new().name("nodes".to_owned()).spawn(watching)?;
    Ok(())
}

/// Asks for SIGHUP when the parent ends. Not for SIGTERM: a parent with threads ends one thread at a time, and each of them that had
/// this process handed over sends the signal again, but a second SIGTERM ends the process at once.
fn follow_parent() -> io::Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::HUP))?;
    // It may have ended before.
    if rustix::process::getppid() != parent {
        return Err(io::Error::other("the process that started this one is gone"));
    }
    Ok(())
}

fn serve_frontend(
    backend: &Arc<IommuBackend>,
    listener: UnixListener,
    signals: Signals,
    manager: &ServiceManager,
) -> Result<(), ServeError> {
    // Never dropped: that waits for the library's threads, which files of the frontend's may hold up. They end with the process.
    let mut daemon = ManuallyDrop::new(backend.daemon("vhost-user").map_err(ServeError::Daemon)?);
    daemon.start(&mut Listener::from(listener)).map_err(ServeError::Daemon)?;
    info!("a frontend connected");
    manager.serving();
    let ended = Arc::new(AtomicBool::new(false));
    if let Some(handle) = daemon.shutdown_handle() {
        let (stopped, ended) = (Arc::clone(backend), Arc::clone(&ended));
        let stop = move || signals.then(|| stop_now(&handle, &stopped, &ended));
        if let Err(error) = std::thread::Builder::new().name("signals".to_owned()).spawn(stop) {
            daemon.request_shutdown();
            block_all(backend);
            return Err(ServeError::Events(error));
        }
    }
    let result = daemon.wait();
    ended.store(true, Ordering::Release);
    manager.stopping();
    block_all(backend);
    match result {
        Ok(()) => info!("the connection is closed"),
        Err(DaemonError::HandleRequest(ProtocolError::Disconnected | ProtocolError::PartialMessage)) => {
            info!("the frontend is gone");
        }
        Err(error @ DaemonError::HandleRequest(_)) => return Err(ServeError::Protocol(error)),
        Err(error) => return Err(ServeError::Daemon(error)),
    }
    Ok(())
}

/// What the watcher is told when the process ends is so.
fn block_all(backend: &IommuBackend) {
    let statistics = backend.shut_down();
    info!("every endpoint is blocked; {statistics}");
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

/// SIGTERM and SIGINT: the first asks for an orderly end, the second ends the process at once. SIGHUP asks for an orderly end, however
/// often it comes.
struct Signals {
    pipe: UnixStream,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let (pipe, write_end) = UnixStream::pair()?;
        let seen = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&seen))?;
            signal_hook::flag::register(signal, Arc::clone(&seen))?;
            signal_hook::low_level::pipe::register(signal, write_end.try_clone()?)?;
        }
        signal_hook::low_level::pipe::register(SIGHUP, write_end)?;
        Ok(Self { pipe })
    }

    /// Waits for a connection; whether there is one, rather than a signal.
    fn wait_for_frontend(&mut self, listener: &UnixListener) -> io::Result<bool> {
        loop {
            let mut waiting = [PollFd::new(&self.pipe, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            match poll(&mut waiting, None) {
                Ok(_) if !waiting[0].revents().is_empty() => return Ok(false),
                Ok(_) if !waiting[1].revents().is_empty() => return Ok(true),
                Ok(_) | Err(Errno::INTR) => (),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits for a signal, then acts.
    fn then(mut self, act: impl FnOnce()) {
        loop {
            match self.pipe.read(&mut [0]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Ok(_) => return act(),
                Err(error) => return error!("signals are not heard any more: {error}"),
            }
        }
    }
}
