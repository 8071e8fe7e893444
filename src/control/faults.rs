// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The latest faults with the time at which they were seen, for clients that ask and those that follow.

use std::time::{SystemTime, UNIX_EPOCH};

use super::protocol::{Address, Fault, FaultReason, Faults};
use crate::access::Access;
use crate::device::{self, RecordedFault, VirtioIommu};
use crate::reserved::facts::Text;
use crate::vhost_user::IommuBackend;

/// The latest faults: those that the device remembers.
#[derive(Debug, Default)]
pub(super) struct FaultLog {
    seen: u64,
    faults: Vec<Fault>,
}

impl FaultLog {
    /// Takes over what the device has recorded since, and forgets what it has forgotten.
    pub fn follow(&mut self, backend: &IommuBackend) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let look = |device: &VirtioIommu| {
            let kept: Vec<u64> = device.recorded_faults(0).map(|recorded| recorded.number).collect();
            let new: Vec<RecordedFault> = device.recorded_faults(self.seen).copied().collect();
            (device.faults_recorded(), kept, new)
        };
        let (recorded, kept, new) = backend.inspect(look);
        self.seen = recorded;
        self.faults.retain(|fault| kept.binary_search(&fault.number).is_ok());
        self.faults.extend(new.iter().map(|recorded| fault(recorded, time)));
    }

    /// Those with a higher number.
    pub fn after(&self, number: u64) -> impl Iterator<Item = &Fault> {
        self.faults.iter().filter(move |fault| fault.number > number)
    }

    /// What is known of those with a higher number.
    pub fn tell(&self, after: u64) -> Faults {
        Faults { recorded: self.seen, faults: self.after(after).cloned().collect() }
    }
}

impl From<&Fault> for device::Fault {
    fn from(fault: &Fault) -> Self {
        Self {
            reason: match fault.reason {
                FaultReason::Domain => device::FaultReason::Domain,
                FaultReason::Mapping => device::FaultReason::Mapping,
                FaultReason::Unknown => device::FaultReason::Unknown,
            },
            endpoint: fault.endpoint.0,
            address: fault.address.map(|address| address.0.0),
            access: Access { read: fault.read, write: fault.write },
        }
    }
}

fn fault(recorded: &RecordedFault, time: u64) -> Fault {
    let device::Fault { reason, endpoint, address, access } = recorded.fault;
    Fault {
        number: recorded.number,
        time,
        endpoint: Text(endpoint),
        reason: match reason {
            device::FaultReason::Domain => FaultReason::Domain,
            device::FaultReason::Mapping => FaultReason::Mapping,
            device::FaultReason::Unknown => FaultReason::Unknown,
        },
        address: address.map(|address| Text(Address(address))),
        read: access.read,
        write: access.write,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::EndpointId;

    #[test]
    fn what_is_told_of_a_fault_is_the_fault() {
        for reason in [device::FaultReason::Domain, device::FaultReason::Mapping, device::FaultReason::Unknown] {
            for (address, access) in
                [(None, Access::NONE), (Some(0x5000), Access::READ), (Some(u64::MAX), Access::WRITE)]
            {
                let own = device::Fault { reason, endpoint: EndpointId(8), address, access };
                let told = fault(&RecordedFault { number: 3, fault: own }, 7);
                assert_eq!((told.number, told.time), (3, 7));
                assert_eq!(device::Fault::from(&told), own);
            }
        }
    }
}
