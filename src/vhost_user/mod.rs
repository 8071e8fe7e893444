// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device behind a vhost-user connection, and the daemon: arguments, set-up, the life of the process.
//!
//! With feature `vhost-user` alone there is [`IommuBackend`], for programs that have host groups of their own: say, of devices
//! that they emulate (feature `translate`). Such a program starts what [`IommuBackend::daemon`] makes, waits until the frontend is
//! gone, and calls [`IommuBackend::shut_down`] then. All else is the daemon's.

#[cfg(feature = "daemon")]
mod activation;
#[cfg(feature = "daemon")]
mod args;
mod backend;
mod counted;
mod daemon;
mod histogram;
#[cfg(feature = "daemon")]
mod incoming;
#[cfg(feature = "daemon")]
mod log_writer;
#[cfg(feature = "daemon")]
mod logging;
mod meter;
#[cfg(feature = "daemon")]
mod metrics;
#[cfg(feature = "daemon")]
mod metrics_file;
mod migration;
#[cfg(feature = "daemon")]
mod nodes;
mod operator;
#[cfg(feature = "daemon")]
mod readiness;
#[cfg(feature = "daemon")]
mod relay;
mod restart;
#[cfg(feature = "daemon")]
mod seals;
#[cfg(feature = "daemon")]
mod serve;
#[cfg(feature = "daemon")]
mod setup;
#[cfg(feature = "daemon")]
mod signals;
#[cfg(feature = "daemon")]
mod socket;
mod state;
mod throttle;
mod told;
mod transfer;
mod vring;
#[cfg(feature = "daemon")]
mod waiting;
#[cfg(feature = "daemon")]
mod watcher;

#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use activation::ActivationError;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use args::{
    Arguments, CAPABILITIES, EndpointArgument, OnOff, ParseEndpointError, asks_for_capabilities, log_levels,
};
pub use backend::{BackendOptions, IommuBackend, OnStop};
pub use counted::Counted;
pub use daemon::BackendDaemon;
pub use histogram::Histogram;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use incoming::IncomingError;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use log_writer::finish_log;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use logging::{LogFormat, start_log};
pub use meter::{RequestTimes, Times};
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use metrics_file::MetricsError;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use serve::{ServeError, check, serve};
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use setup::SetupError;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use socket::SocketError;
#[cfg(all(test, feature = "daemon"))]
pub(crate) use socket::close;
#[cfg(feature = "daemon")]
pub(crate) use socket::{bind, examine, make_room};
#[cfg(feature = "daemon")]
pub(crate) use throttle::{Pass, Throttle};
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use watcher::watch_if_asked;
