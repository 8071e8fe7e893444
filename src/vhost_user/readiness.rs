// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Telling whoever started the process when a frontend can connect, and what it does after that.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use log::warn;

/// Who is told, if anybody.
#[derive(Debug)]
pub(super) struct Readiness {
    /// Written to once (`--ready-fd`).
    file: Option<File>,
    manager: ServiceManager,
}

impl Readiness {
    pub const fn new(file: Option<File>, manager: ServiceManager) -> Self {
        Self { file, manager }
    }

    /// A frontend can connect now.
    pub fn ready(self) -> ServiceManager {
        // Closed when it is dropped. Whoever waited may be gone; the frontend may come all the same.
        if let Some(Err(error)) = self.file.map(|mut file| file.write_all(b"\n")) {
            warn!("--ready-fd cannot be written to: {error}");
        }
        self.manager.tell("READY=1\nSTATUS=Waiting for the frontend");
        self.manager
    }
}

/// The service manager's end of `sd_notify(3)`.
#[derive(Debug)]
pub(super) struct ServiceManager(Option<UnixDatagram>);

impl ServiceManager {
    /// The one that `NOTIFY_SOCKET` names.
    pub fn from_environment() -> Self {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        Self(name.and_then(|name| match connect(&name) {
            Ok(socket) => Some(socket),
            Err(error) => {
                warn!("NOTIFY_SOCKET={} cannot be reached, nobody is notified: {error}", name.display());
                None
            }
        }))
    }

    /// A frontend is there.
    pub fn serving(&self) {
        self.tell("STATUS=Serving a frontend");
    }

    /// The process is about to end.
    pub fn stopping(&self) {
        self.tell("STOPPING=1\nSTATUS=Blocking every endpoint");
    }

    /// Never waits: a service manager that does not listen misses it.
    fn tell(&self, state: &str) {
        if let Some(Err(error)) = self.0.as_ref().map(|socket| socket.send(state.as_bytes())) {
            warn!("the service manager is not notified: {error}");
        }
    }
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    match name.as_bytes() {
        [b'@', name @ ..] => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        [b'/', ..] => socket.connect(name)?,
        _ => return Err(io::Error::other("it is neither an absolute path nor an abstract name (@...)")),
    }
    Ok(socket)
}
