// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's control socket: what an operator asks and changes while a guest runs.
//!
//! [`protocol`] has what is said. A [`ControlServer`] serves clients in a thread of its own and never holds a lock while it reads or
//! writes; what a client asks of the [`Registry`] is done under the device's lock, as one request of the guest is, so that the request
//! queue waits for the work and never for the client. The daemon opens nothing for a client: the files of devices come with the
//! request, and the facts too.

mod add;
mod client;
mod connection;
mod counters;
mod faults;
mod files;
mod level;
pub(crate) mod lines;
mod listener;
pub(crate) mod passing;
pub mod protocol;
mod registry;
mod server;
mod service;

#[doc(hidden)]
pub use add::AddError;
pub use client::{Client, ClientError};
pub(crate) use files::is_node_of;
#[doc(hidden)]
pub use files::{DeviceFile, DeviceFiles, FileError, Keeper, KeeperError, VfioFiles};
#[doc(hidden)]
pub use listener::{ListenError, Place, examine, listen};
pub(crate) use registry::MOST_ENDPOINTS;
#[doc(hidden)]
pub use registry::{AssignedDevice, Pluggable, Registry, RemoveError};
#[doc(hidden)]
pub use server::{ControlServer, Limits};
