// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The life of the daemon: one frontend is served, until it is gone or a signal says to stop.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use log::{error, info, warn};
use vhost::vhost_user::Error as ProtocolError;
use vhost_user_backend::Error as DaemonError;

use super::activation;
use super::args::Arguments;
use super::backend::{BackendOptions, IommuBackend};
use super::incoming::{Incoming, IncomingError, Source};
use super::log_writer::write_in_background;
use super::metrics_file::{MetricsError, MetricsFile};
use super::nodes::{self, NodeWatch};
use super::readiness::{Readiness, ServiceManager};
use super::setup::{BuiltDevice, SetupError, build_device};
use super::signals::Signals;
use super::socket::Leftover;
use super::waiting::{Serving, Waiting};
use super::watcher::Watcher;
use crate::control::{
    ControlServer, DeviceFiles, Keeper, Limits, ListenError, Place, Pluggable, Registry, VfioFiles, examine, listen,
};
use crate::fd::{AdoptError, adopt_writable};
use crate::reserved::plan::Plan;
use crate::sandbox::{Sandbox, SandboxError, StartError, ThreadKind, end_at_missing_memory};

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
    /// The watcher holds the devices, and did not give up what it does not need for that.
    #[error("the watcher of the devices did not say that it is confined (--sandbox off does without)")]
    WatcherUnconfined,
    /// The process did not give up what it does not need.
    #[error("this process cannot be confined (--sandbox off does without)")]
    Sandbox(#[from] SandboxError),
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

impl From<StartError> for ServeError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Thread(error) => Self::Events(error),
            StartError::Sandbox(error) => Self::Sandbox(error),
        }
    }
}

impl ServeError {
    /// The exit code: 1 run time, 2 usage, 3 host, 4 protocol, 5 a process that cannot be confined.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setup(error) if error.is_usage() => 2,
            Self::Setup(_) => 3,
            Self::Incoming(error) if error.is_usage() => 2,
            Self::Ready(_) | Self::Metrics(_) => 2,
            Self::Protocol(_) => 4,
            Self::Listen(error) if error.is_usage() => 2,
            Self::WatcherUnconfined | Self::Sandbox(_) => 5,
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
/// the arguments name are taken over, and this process, which must have one thread, has given up what a daemon gives up.
///
/// # Errors
///
/// What [`serve`] would answer.
pub fn check(arguments: &Arguments) -> Result<Plan, ServeError> {
    let (source, _ready) = take_passed(arguments)?;
    control_place(arguments)?.map(examine).transpose()?;
    let BuiltDevice { plan, .. } = build_device(arguments)?;
    source.examine()?;
    arguments.metrics_file.as_deref().map(MetricsFile::open).transpose()?;
    confine(arguments)?.confine_thread(ThreadKind::Main)?;
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
    end_at_missing_memory().map_err(ServeError::Events)?;
    // Before the watcher, which must not hold them.
    let (source, ready) = take_passed(arguments)?;
    let readiness = Readiness::new(ready, ServiceManager::from_environment());
    let control = control_place(arguments)?.map(listen).transpose()?;
    let _leftover = arguments.control_path.clone().map(Leftover::at);
    serve_controlled(arguments, source, readiness, control)
}

/// Takes over the socket, and the file by which readiness is told.
fn take_passed(arguments: &Arguments) -> Result<(Source, Option<File>), ServeError> {
    let source = Source::find(arguments)?;
    let ready = arguments.ready_fd.map(adopt_writable).transpose().map_err(ServeError::Ready)?;
    Ok((source, ready))
}

/// Where the control socket is to be, as the arguments or the service manager say. With `--fd` nothing of a service manager's is taken.
fn control_place(arguments: &Arguments) -> Result<Option<Place<'_>>, ServeError> {
    if arguments.fd.is_some() {
        return Ok(arguments.control_place());
    }
    let passed = activation::passed().map_err(IncomingError::from)?.control;
    match (arguments.control_place(), passed) {
        (Some(_), Some(_)) => Err(IncomingError::TwoControls.into()),
        (None, passed) => Ok(passed.map(Place::Fd)),
        (place, None) => Ok(place),
    }
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
    let start_watcher = || Watcher::start(&files, arguments.confined());
    let mut watcher = is_needed.then(start_watcher).transpose().map_err(ServeError::Watcher)?;

    let metrics = arguments.metrics_file.as_deref().map(MetricsFile::open).transpose()?;
    let BuiltDevice { device, endpoints, iommufd, host_time, .. } = build_device(arguments)?;
    if watcher.as_mut().is_some_and(|watcher| !watcher.is_confined()) {
        return Err(ServeError::WatcherUnconfined);
    }
    let options = BackendOptions { on_stop: arguments.on_stop, polling: arguments.poll_us };
    let backend = Arc::new(IommuBackend::new(device, options).map_err(ServeError::Events)?);
    if let Some(host_time) = host_time {
        backend.measure(host_time);
    }
    let watcher_ends = watcher.as_ref().map(Watcher::end).transpose().map_err(ServeError::Watcher)?;
    let pluggable = Pluggable {
        files: iommufd.map(|iommufd| Box::new(VfioFiles::new(iommufd)) as Box<dyn DeviceFiles>),
        keeper: watcher.map(|watcher| Box::new(watcher) as Box<dyn Keeper>),
        policy: arguments.policy.clone(),
        directory: nodes::DIRECTORY.into(),
    };
    let registry = Arc::new(Registry::new(Arc::clone(&backend), endpoints, pluggable));
    let is_watched = !registry.is_empty() || registry.can_add();
    let watch = || NodeWatch::new(nodes::DIRECTORY.as_ref(), watcher_ends);
    let watch = is_watched.then(watch).transpose().map_err(ServeError::Events)?;
    let opened = Opened { control, metrics, watch };
    let result = serve_endpoints(arguments, source, readiness, &backend, &registry, opened);
    // Every endpoint is blocked, or none was served: the watcher can let go.
    registry.close();
    result
}

/// What is open before anything is given up.
struct Opened {
    control: Option<UnixListener>,
    metrics: Option<MetricsFile>,
    watch: Option<NodeWatch>,
}

/// First opens what is to be opened, then gives up what is not needed, then starts the threads, each with what it needs alone.
fn serve_endpoints(
    arguments: &Arguments,
    source: Source,
    readiness: Readiness,
    backend: &Arc<IommuBackend>,
    registry: &Arc<Registry>,
    Opened { control, metrics, watch }: Opened,
) -> Result<(), ServeError> {
    let signals = Arc::new(Signals::new().map_err(ServeError::Events)?);
    // A path that this process listens on is removed when this returns: nobody else can connect.
    let Incoming { listener, relay, leftover: _leftover } = source.open()?;
    // Not before the socket is open: another daemon may have been started with the same options, whose file it is.
    let metrics = metrics.map(|metrics| metrics.begin(backend)).transpose()?;
    let control = control.map(|listener| ControlServer::new(listener, Arc::clone(registry), Limits::default()));
    let control = control.transpose().map_err(ServeError::Control)?;

    let sandbox = confine(arguments)?;
    write_in_background(sandbox)?;
    if let Some(watch) = watch {
        watch_nodes(sandbox, watch, registry)?;
    }
    if let Some(control) = control {
        sandbox.spawn(ThreadKind::Control, "control", move || control.run())?;
    }
    let interval = Duration::from_secs(arguments.metrics_interval.into());
    let _metrics = metrics.map(|metrics| metrics.keep(sandbox, backend, interval)).transpose()?;
    relay.map_or(Ok(()), |relay| relay.start(sandbox))?;
    let waiting = Waiting::start(sandbox, backend, listener, signals)?;
    sandbox.confine_thread(ThreadKind::Main)?;
    let manager = readiness.ready();
    match waiting.wait() {
        Ok(Some(serving)) => serve_frontend(backend, &serving, &manager),
        Ok(None) => {
            manager.stopping();
            Ok(())
        }
        Err(error) => {
            manager.stopping();
            block_all(backend);
            Err(error)
        }
    }
}

/// Gives up what holds for the whole process.
fn confine(arguments: &Arguments) -> Result<Sandbox, SandboxError> {
    let Some(mode) = arguments.confined() else {
        warn!("--sandbox off: a frontend that finds a mistake in this process has all that the process may do");
        return Ok(Sandbox::off());
    };
    let sockets = arguments.socket_path.iter().chain(&arguments.control_path).cloned();
    Sandbox::enter(mode, &sockets.collect::<Vec<_>>(), arguments.metrics_file.as_deref())
}

/// Has endpoints removed whose devices the host wants back; for ever, if more can be added.
fn watch_nodes(sandbox: Sandbox, watch: NodeWatch, registry: &Arc<Registry>) -> Result<(), StartError> {
    let registry = Arc::clone(registry);
    let watch = move || {
        let look = || {
            registry.remove_those_gone();
            registry.can_add() || !registry.is_empty()
        };
        let watcher_ended = || {
            // At the end of this process it is told to.
            if registry.is_kept() {
                error!(
                    "the watcher is gone: if this process is killed too, the devices stay on the guest's mappings until the VMM ends"
                );
            }
        };
        watch.watch(look, watcher_ended);
    };
    sandbox.spawn(ThreadKind::Nodes, "nodes", watch)
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

fn serve_frontend(backend: &IommuBackend, serving: &Serving, manager: &ServiceManager) -> Result<(), ServeError> {
    info!("a frontend connected");
    manager.serving();
    let ended = serving.wait();
    manager.stopping();
    serving.close();
    block_all(backend);
    match ended.map_err(ServeError::Events)?.or_else(|| serving.end()) {
        Some(Ok(())) => info!("the connection is closed"),
        Some(Err(DaemonError::HandleRequest(ProtocolError::Disconnected | ProtocolError::PartialMessage))) => {
            info!("the frontend is gone");
        }
        Some(Err(error @ DaemonError::HandleRequest(_))) => return Err(ServeError::Protocol(error)),
        Some(Err(error)) => return Err(ServeError::Daemon(error)),
        None => warn!("the frontend holds up the connection's thread: ending without it"),
    }
    Ok(())
}

/// Blocks every endpoint. That is so before the watcher is told, or sees, that this process is done.
fn block_all(backend: &IommuBackend) {
    let statistics = backend.shut_down();
    info!("every endpoint is blocked; {statistics}");
}
