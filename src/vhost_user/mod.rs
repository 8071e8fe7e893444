// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as a vhost-user process: arguments, set-up, the backend, the life of the daemon.

mod args;
mod backend;
mod nodes;
mod restart;
mod serve;
mod setup;
mod socket;
mod throttle;
mod watcher;

pub use args::{Arguments, EndpointArgument, OnOff, OnStop, ParseEndpointError};
pub use backend::{BackendOptions, IommuBackend};
pub use nodes::DeviceNode;
pub use serve::{ServeError, serve};
pub use setup::{BuiltDevice, SetupError, build_device};
pub use socket::{SocketError, bind};
pub use watcher::watch_if_asked;
