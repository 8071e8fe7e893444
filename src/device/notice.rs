// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the operator should hear of: things that went wrong outside the guest, and requests that were refused for
//! reasons the guest cannot see. The device logs nothing itself; whoever drives it takes the notices and logs them
//! as sparingly as it likes.

use std::collections::VecDeque;
use std::fmt;

use crate::id::{DomainId, EndpointId};
use crate::range::{IovaRange, RangeSet};

/// One thing that the operator should hear of.
#[derive(Debug)]
pub enum Notice {
    /// The host refused to map what the guest asked for.
    MapFailed {
        /// The domain.
        domain: DomainId,
        /// The addresses.
        iova: IovaRange,
        /// What the host said.
        error: String,
    },
    /// The host failed to follow the mappings of a domain: its endpoints were blocked.
    OutOfStep {
        /// The domain.
        domain: DomainId,
        /// What the host said.
        error: String,
        /// Whether a fresh page table took the place of the one that failed; otherwise DMA stays blocked until
        /// the domain is emptied.
        rebuilt: bool,
    },
    /// A group could not be attached to a domain, or to guest memory as it is.
    AttachFailed {
        /// The endpoint that was to be attached, or one of its group.
        endpoint: EndpointId,
        /// The domain; `None` for bypass of an endpoint that is in no domain.
        domain: Option<DomainId>,
        /// What the host said.
        error: String,
        /// Whether the group's DMA is refused now.
        blocked: bool,
    },
    /// The host can map less than the guest was told: the group is blocked.
    NarrowerThanPromised {
        /// An endpoint of the group.
        endpoint: EndpointId,
        /// What the guest was told it can map, and cannot.
        missing: RangeSet,
    },
    /// The host maps in larger pages than the guest was told: the group is blocked.
    CoarserThanPromised {
        /// An endpoint of the group.
        endpoint: EndpointId,
        /// The smallest page of the host, in bytes.
        granule: u64,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MapFailed { domain, iova, error } => write!(f, "domain {domain}: cannot map {iova}: {error}"),
            Self::OutOfStep { domain, error, rebuilt } => {
                let outcome = if *rebuilt { "rebuilt in a fresh page table" } else { "DMA stays blocked" };
                write!(f, "domain {domain}: the host did not follow: {error}; {outcome}")
            }
            Self::AttachFailed { endpoint, domain, error, blocked } => {
                let left = if *blocked { "its DMA is blocked" } else { "it stays as it was" };
                match domain {
                    Some(domain) => write!(f, "endpoint {endpoint}: cannot attach to domain {domain}: {error}; {left}"),
                    None => write!(f, "endpoint {endpoint}: cannot attach to guest memory: {error}; {left}"),
                }
            }
            Self::NarrowerThanPromised { endpoint, missing } => write!(
                f,
                "endpoint {endpoint}: the host cannot map {missing}, which the guest was told it can; its DMA is \
                 blocked. Give the facts of this host, or a narrower input range"
            ),
            Self::CoarserThanPromised { endpoint, granule } => write!(
                f,
                "endpoint {endpoint}: the host maps in pages of {granule:#x} bytes, larger than the guest was told; \
                 its DMA is blocked"
            ),
        }
    }
}

/// Notices that wait to be taken: the oldest are kept, later ones are counted when there is no room.
#[derive(Debug, Default)]
pub(super) struct NoticeQueue {
    waiting: VecDeque<Notice>,
    dropped: u64,
}

impl NoticeQueue {
    const CAPACITY: usize = 32;

    pub fn push(&mut self, notice: Notice) {
        if self.waiting.len() < Self::CAPACITY {
            self.waiting.push_back(notice);
        } else {
            self.dropped = self.dropped.saturating_add(1);
        }
    }

    pub fn pop(&mut self) -> Option<Notice> {
        self.waiting.pop_front()
    }

    pub const fn dropped(&self) -> u64 {
        self.dropped
    }
}
