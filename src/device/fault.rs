// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fault events for the guest, in a queue that cannot grow.

use std::collections::VecDeque;
use std::fmt;

use super::VirtioIommu;
use crate::access::Access;
use crate::host::refused::{RefusalReason, RefusedAccess, RefusedAccesses};
use crate::id::EndpointId;
use crate::spec::fault;

/// Why an access did not get through (5.13.6.9, `VIRTIO_IOMMU_FAULT_R_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FaultReason {
    /// An internal error, or one that the others do not describe.
    Unknown = fault::R_UNKNOWN,
    /// The endpoint is not attached to a domain.
    Domain = fault::R_DOMAIN,
    /// The address is not mapped, or not for this access.
    Mapping = fault::R_MAPPING,
}

/// An event for the guest. It carries guest values only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Why.
    pub reason: FaultReason,
    /// Whose access it was.
    pub endpoint: EndpointId,
    /// The first virtual address, if one is known.
    pub address: Option<u64>,
    /// What was tried; [`Access::NONE`] if that is not known.
    pub access: Access,
}

impl Fault {
    /// `struct virtio_iommu_fault`.
    pub fn to_bytes(&self) -> [u8; fault::SIZE] {
        let mut flags = 0;
        for (set, flag) in [
            (self.access.read, fault::F_READ),
            (self.access.write, fault::F_WRITE),
            (self.address.is_some(), fault::F_ADDRESS),
        ] {
            if set {
                flags |= flag;
            }
        }
        // 5.13.6.9.2: "The device SHOULD set reserved and reserved1 to zero", "undefined flags to zero".
        let mut bytes = [0; fault::SIZE];
        bytes[0] = self.reason as u8;
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.endpoint.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.address.unwrap_or(0).to_le_bytes());
        bytes
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "endpoint {}: ", self.endpoint)?;
        match self.address {
            Some(address) => write!(f, "{} access to {address:#x}", self.access)?,
            None => f.write_str("access")?,
        }
        f.write_str(match self.reason {
            FaultReason::Unknown => " refused",
            FaultReason::Domain => " refused: the endpoint is in no domain, or blocked",
            FaultReason::Mapping => " refused: nothing is mapped there, or not for this access",
        })
    }
}

/// A fault with its number: faults are counted from 1 on, in the order in which they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedFault {
    /// Its number.
    pub number: u64,
    /// The fault.
    pub fault: Fault,
}

/// Faults that wait for a buffer of the guest: the oldest are kept, later ones are counted when there is no room. Beside them the
/// latest, for the operator.
#[derive(Debug, Default)]
pub(super) struct FaultQueue {
    waiting: VecDeque<Fault>,
    dropped: u64,
    recent: VecDeque<RecordedFault>,
    recorded: u64,
}

impl FaultQueue {
    /// How many faults can wait.
    const CAPACITY: usize = 256;

    pub fn push(&mut self, fault: Fault) {
        self.recorded += 1;
        if self.recent.len() == Self::CAPACITY {
            self.recent.pop_front();
        }
        self.recent.push_back(RecordedFault { number: self.recorded, fault });
        if self.waiting.len() < Self::CAPACITY {
            self.waiting.push_back(fault);
        } else {
            self.dropped = self.dropped.saturating_add(1);
        }
    }

    pub fn pop(&mut self) -> Option<Fault> {
        self.waiting.pop_front()
    }

    pub fn first(&self) -> Option<&Fault> {
        self.waiting.front()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Fault> {
        self.waiting.iter()
    }

    pub const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The latest faults, in their order.
    pub fn recent(&self) -> impl Iterator<Item = &RecordedFault> {
        self.recent.iter()
    }

    /// How many there were.
    pub const fn recorded(&self) -> u64 {
        self.recorded
    }

    /// Drops the faults of an endpoint.
    pub fn forget(&mut self, endpoint: EndpointId) {
        self.waiting.retain(|fault| fault.endpoint != endpoint);
        self.recent.retain(|recorded| recorded.fault.endpoint != endpoint);
    }

    pub fn clear(&mut self) {
        self.waiting.clear();
    }
}

impl VirtioIommu {
    /// Makes events of the accesses that hosts refused, of as many as can wait with a host: devices may add to them all the time.
    pub(super) fn collect_refused_accesses(&mut self) {
        for queue in self.groups.iter().filter_map(|group| group.host.refused_accesses()) {
            for refused in std::iter::from_fn(|| queue.pop()).take(RefusedAccesses::CAPACITY) {
                // A device whose endpoint was removed may not know of it yet.
                if self.endpoints.contains_key(&refused.endpoint) {
                    self.faults.push(refused.into());
                }
            }
        }
    }
}

impl From<RefusedAccess> for Fault {
    fn from(refused: RefusedAccess) -> Self {
        let reason = match refused.reason {
            RefusalReason::NoTable => FaultReason::Domain,
            RefusalReason::NotMapped | RefusalReason::NotAllowed => FaultReason::Mapping,
        };
        Self { reason, endpoint: refused.endpoint, address: Some(refused.address), access: refused.access }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_laid_out_as_the_driver_reads_it() {
        let fault = Fault {
            reason: FaultReason::Mapping,
            endpoint: EndpointId(0x0102_0304),
            address: Some(0x1122_3344_5566_7788),
            access: Access::WRITE,
        };
        let mut expected = [0; 24];
        expected[0] = 2;
        expected[4..6].copy_from_slice(&[2, 1]);
        expected[8..12].copy_from_slice(&[4, 3, 2, 1]);
        expected[16..].copy_from_slice(&[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        assert_eq!(fault.to_bytes(), expected);
        let bare = Fault { address: None, access: Access::NONE, ..fault };
        assert_eq!(bare.to_bytes()[4..8], [0; 4]);
        assert_eq!(bare.to_bytes()[16..], [0; 8]);
    }

    #[test]
    fn the_queue_keeps_the_oldest_and_counts_the_rest() {
        let mut queue = FaultQueue::default();
        for endpoint in 0..FaultQueue::CAPACITY as u32 + 3 {
            let endpoint = EndpointId(endpoint);
            queue.push(Fault { reason: FaultReason::Domain, endpoint, address: None, access: Access::READ });
        }
        assert_eq!(queue.dropped(), 3);
        assert_eq!(queue.pop().unwrap().endpoint, EndpointId(0));
        assert_eq!(std::iter::from_fn(|| queue.pop()).last().unwrap().endpoint, EndpointId(255));
        assert_eq!(queue.first(), None);
    }
}
