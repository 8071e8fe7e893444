// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the frontend comes from: a socket at a path, or one that was passed.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use super::activation::{self, ActivationError};
use super::args::Arguments;
use super::relay::Relay;
use super::socket::{Leftover, SocketError, bind, examine};
use crate::fd::{AdoptError, PassedSocket, adopt_socket};

/// A socket that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// No socket is named.
    #[error("there is no socket to serve: give --socket-path or --fd, or have the service manager pass one")]
    None,
    /// Two sockets are named, and somebody would wait at the other one.
    #[error("the service manager passes a socket, and --socket-path is given: choose one")]
    Both,
    /// Two control sockets are named.
    #[error("the service manager passes a control socket, and --control-path or --control-fd is given: choose one")]
    TwoControls,
    /// What the service manager passes cannot be used.
    #[error(transparent)]
    Activation(#[from] ActivationError),
    /// What the service manager passes is a connection.
    #[error("the service manager passes a connection, not a socket that listens: set Accept=no in the socket unit")]
    Accepted,
    /// The passed socket cannot be used.
    #[error(transparent)]
    Passed(#[from] AdoptError),
    /// The path cannot be listened on.
    #[error(transparent)]
    Path(#[from] SocketError),
    /// The passed socket is in order, and cannot be served.
    #[error("cannot serve the socket that was passed")]
    Serve(#[source] io::Error),
}

impl IncomingError {
    /// Whether the arguments are at fault, rather than what happens at run time.
    pub const fn is_usage(&self) -> bool {
        !matches!(self, Self::Path(SocketError::Io { .. }) | Self::Serve(_))
    }
}

/// A socket that nothing has been done with.
#[derive(Debug)]
pub(super) enum Source {
    Path(PathBuf),
    Listening(UnixListener),
    Connected(UnixStream),
}

impl Source {
    /// Takes over the socket that the arguments or the service manager name. From here on no other program inherits it.
    ///
    /// # Errors
    ///
    /// [`IncomingError`]
    pub fn find(arguments: &Arguments) -> Result<Self, IncomingError> {
        if let Some(number) = arguments.fd {
            return Ok(match adopt_socket(number)? {
                PassedSocket::Listening(listener) => Self::Listening(listener),
                PassedSocket::Connected(stream) => Self::Connected(stream),
            });
        }
        match (activation::passed()?.frontend, &arguments.socket_path) {
            (None, None) => Err(IncomingError::None),
            (Some(_), Some(_)) => Err(IncomingError::Both),
            (None, Some(path)) => Ok(Self::Path(path.clone())),
            (Some(number), None) => match adopt_socket(number)? {
                PassedSocket::Listening(listener) => Ok(Self::Listening(listener)),
                PassedSocket::Connected(_) => Err(IncomingError::Accepted),
            },
        }
    }

    /// What is wrong with it, as far as looking tells.
    ///
    /// # Errors
    ///
    /// [`IncomingError`]
    pub fn examine(&self) -> Result<(), IncomingError> {
        match self {
            Self::Path(path) => examine(path).map_err(Into::into),
            Self::Listening(_) | Self::Connected(_) => Ok(()),
        }
    }

    /// Makes it possible for a frontend to connect.
    ///
    /// # Errors
    ///
    /// [`IncomingError`]
    pub fn open(self) -> Result<Incoming, IncomingError> {
        Ok(match self {
            Self::Path(path) => {
                let listener = bind(&path)?;
                log::info!("listening on {}", path.display());
                let leftover = Leftover::at(path);
                Incoming { listener, relay: None, leftover: Some(leftover) }
            }
            Self::Listening(listener) => {
                listener.set_nonblocking(false).map_err(IncomingError::Serve)?;
                log::info!("listening on the socket that was passed");
                Incoming { listener, relay: None, leftover: None }
            }
            Self::Connected(stream) => {
                stream.set_nonblocking(false).map_err(IncomingError::Serve)?;
                let (listener, relay) = Relay::new(stream).map_err(IncomingError::Serve)?;
                log::info!("serving the connection that was passed");
                Incoming { listener, relay: Some(relay), leftover: None }
            }
        })
    }
}

/// A socket to which a frontend can connect, or has connected.
#[derive(Debug)]
pub(super) struct Incoming {
    pub listener: UnixListener,
    /// What is to be started for a connection to be accepted.
    pub relay: Option<Relay>,
    /// To be kept until nobody may connect any more.
    pub leftover: Option<Leftover>,
}
