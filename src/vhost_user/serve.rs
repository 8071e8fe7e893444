// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The life of the daemon: one frontend is served, until it is gone or a signal says to stop.

use std::fs;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use log::{error, info};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGINT, SIGTERM};
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::args::Arguments;
use super::backend::{BackendOptions, CONTINUE_EVENT, IommuBackend};
use super::setup::{SetupError, build_device};
use super::socket::{SocketError, bind};

/// A daemon that could not start, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The device cannot be set up.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
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
    /// The exit code: 1 run time, 2 usage, 3 host, 4 protocol.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setup(error) if error.is_usage() => 2,
            Self::Setup(_) => 3,
            Self::Socket(SocketError::NotASocket(_) | SocketError::InUse(_)) => 2,
            Self::Protocol(_) => 4,
            Self::Socket(_) | Self::Events(_) | Self::Daemon(_) => 1,
        }
    }
}

/// Sets the device up, serves one frontend, and blocks every endpoint when it is gone.
///
/// # Errors
///
/// [`ServeError`]
pub fn serve(arguments: &Arguments) -> Result<(), ServeError> {
    if arguments.exit_with_parent {
        follow_parent().map_err(ServeError::Events)?;
    }
    let device = build_device(arguments)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let options = BackendOptions { on_stop: arguments.on_stop };
    let backend = Arc::new(IommuBackend::new(device, memory.clone(), options).map_err(ServeError::Events)?);

    let mut signals = Signals::new().map_err(ServeError::Events)?;
    let listener = bind(&arguments.socket_path)?;
    info!("listening on {}", arguments.socket_path.display());
    let connected = signals.wait_for_frontend(&listener).map_err(ServeError::Events)?;
    let result = if connected { serve_frontend(&backend, memory, listener, signals) } else { Ok(()) };
    // Nobody else can connect. That the socket is gone already is no failure.
    let _ = fs::remove_file(&arguments.socket_path);

    let statistics = backend.shut_down();
    info!("every endpoint is blocked; {statistics}");
    result
}

/// Asks for SIGTERM when the parent ends.
fn follow_parent() -> io::Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    // It may have ended before.
    if rustix::process::getppid() != parent {
        return Err(io::Error::other("the process that started this one is gone"));
    }
    Ok(())
}

fn serve_frontend(
    backend: &Arc<IommuBackend>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    listener: UnixListener,
    signals: Signals,
) -> Result<(), ServeError> {
    let name = "vhost-user".to_owned();
    let mut daemon = VhostUserDaemon::new(name, Arc::clone(backend), memory).map_err(ServeError::Daemon)?;
    for handler in daemon.get_epoll_handlers() {
        handler
            .register_listener(backend.again().as_raw_fd(), EventSet::IN, u64::from(CONTINUE_EVENT))
            .map_err(ServeError::Events)?;
    }
    daemon.start(&mut Listener::from(listener)).map_err(ServeError::Daemon)?;
    info!("a frontend connected");
    if let Some(handle) = daemon.shutdown_handle() {
        let stop = move || signals.then(|| handle.shutdown());
        std::thread::Builder::new().name("signals".to_owned()).spawn(stop).map_err(ServeError::Events)?;
    }
    match daemon.wait() {
        Ok(()) => info!("the connection is closed"),
        Err(DaemonError::HandleRequest(ProtocolError::Disconnected | ProtocolError::PartialMessage)) => {
            info!("the frontend is gone");
        }
        Err(error @ DaemonError::HandleRequest(_)) => return Err(ServeError::Protocol(error)),
        Err(error) => return Err(ServeError::Daemon(error)),
    }
    Ok(())
}

/// SIGTERM and SIGINT: the first asks for an orderly end, the second ends the process at once.
struct Signals {
    pipe: UnixStream,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let (pipe, write_end) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT] {
            let seen = Arc::new(AtomicBool::new(false));
            signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&seen))?;
            signal_hook::flag::register(signal, seen)?;
            signal_hook::low_level::pipe::register(signal, write_end.try_clone()?)?;
        }
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
