// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest and the device say to each other, for whoever traces it.

use std::fmt;

use super::{Fault, VirtioIommu};
use crate::request::{Request, RequestKind, Status};

/// One exchange between guest and device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// A request was answered.
    Request {
        /// What it is.
        kind: RequestKind,
        /// What it asks for; `None` if it could not be read.
        request: Option<Request>,
        /// The answer.
        status: Status,
    },
    /// A fault event was taken for the guest.
    Fault(Fault),
}

/// What is called for each exchange.
type Trace = dyn Fn(&Exchange) + Send + Sync;

/// Whom to tell of exchanges.
#[derive(Default)]
pub(super) struct Tracer(Option<Box<Trace>>);

impl Tracer {
    pub fn tell(&self, exchange: &Exchange) {
        if let Some(trace) = &self.0 {
            trace(exchange);
        }
    }
}

impl VirtioIommu {
    /// Has something called after each request that is answered with a status, and for each fault event that is taken. A guest can
    /// cause any number of calls.
    pub fn on_exchange(&mut self, trace: impl Fn(&Exchange) + Send + Sync + 'static) {
        self.tracer = Tracer(Some(Box::new(trace)));
    }
}

impl fmt::Display for Exchange {
    /// On one line: `MAP domain 1: 0xfffff000-0xffffffff to 0x1234000, read-only: OK`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Request { request: Some(request), status, .. } => write!(f, "{request}: {status}"),
            Self::Request { kind, request: None, status } => write!(f, "{kind}, malformed: {status}"),
            Self::Fault(fault) => write!(f, "fault: {fault}"),
        }
    }
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "on" } else { "off" })
    }
}
