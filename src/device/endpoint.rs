// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Endpoints.

use crate::id::DomainId;
use crate::reserved::EndpointView;

/// A device that the guest knows.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// What the guest is told about it.
    pub view: EndpointView,
    /// Where its host group is in the device's list.
    pub group: usize,
    /// The domain that it is attached to.
    pub domain: Option<DomainId>,
}
