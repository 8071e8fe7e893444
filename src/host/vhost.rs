// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vhost-vdpa: devices of the host's that are told of mappings by IOTLB messages, and never ask.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use vhost::{Error, VhostAccess, VhostIotlbBackend, VhostIotlbMsg, VhostIotlbType};

use super::linux::map_error_kind;
use super::replay::DmaMapper;
use super::{Constraints, HostError, HostErrorKind};
use crate::access::Access;
use crate::memory::HostSegment;
use crate::range::IovaRange;

#[cfg(test)]
pub(crate) mod model;
#[cfg(test)]
mod tests;

/// Maps for a vhost-vdpa device: a [`ReplayGroup`](super::replay::ReplayGroup) of it is what the endpoint is attached by. Nobody
/// else sends the device IOTLB messages.
pub struct VhostMapper<B> {
    device: B,
    constraints: Constraints,
    /// The lengths of what is mapped, by first address: the kernel does not say what it removes.
    mapped: Mutex<BTreeMap<u64, u64>>,
}

impl<B: VhostIotlbBackend> VhostMapper<B> {
    /// Maps for a device that can map so much: what `VHOST_VDPA_GET_IOVA_RANGE` says, by pages of the host.
    pub const fn new(device: B, constraints: Constraints) -> Self {
        Self { device, constraints, mapped: Mutex::new(BTreeMap::new()) }
    }

    /// The device.
    pub const fn device(&self) -> &B {
        &self.device
    }
}

impl<B: VhostIotlbBackend + Send + Sync> DmaMapper for VhostMapper<B> {
    fn map(&self, iova: u64, memory: &HostSegment, access: Access) -> Result<(), HostError> {
        let found = memory.host().zip(IovaRange::from_length(iova, memory.length()));
        let Some((host, range)) = found else {
            let action = format!("mapping {:#x} bytes at {iova:#x}", memory.length());
            return Err(HostError::new(HostErrorKind::BadAddress, action, None));
        };
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        update(&self.device, range, host.address(), access)?;
        mapped.insert(iova, memory.length());
        Ok(())
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let inside: Vec<(u64, u64)> =
            mapped.range(iova.start()..=iova.last()).map(|(start, length)| (*start, *length)).collect();
        // No wider than what is mapped: from Linux 5.19 to 6.3 the kernel refuses ranges that reach past what the device can
        // map. And it has no address space for the device before it was told of a mapping, and refuses then.
        let (Some((first, _)), Some((start, length))) = (inside.first(), inside.last()) else {
            return Ok(0);
        };
        let hull = IovaRange::new(*first, start.saturating_add(length - 1)).unwrap_or(iova);
        invalidate(&self.device, hull)?;
        for (start, _) in &inside {
            mapped.remove(start);
        }
        Ok(inside.iter().map(|(_, length)| length).sum())
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        Ok(self.constraints.clone())
    }
}

impl<B> fmt::Debug for VhostMapper<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostMapper").field("constraints", &self.constraints).finish_non_exhaustive()
    }
}

/// Gives a device a translation.
pub(crate) fn update(
    device: &impl VhostIotlbBackend,
    iova: IovaRange,
    host_address: u64,
    access: Access,
) -> Result<(), HostError> {
    let size = iova
        .length()
        .ok_or_else(|| HostError::new(HostErrorKind::Unmappable, format!("VHOST_IOTLB_UPDATE of {iova}"), None))?;
    let perm = match (access.read, access.write) {
        (true, true) => VhostAccess::ReadWrite,
        (false, true) => VhostAccess::WriteOnly,
        (true, false) => VhostAccess::ReadOnly,
        (false, false) => VhostAccess::No,
    };
    let message = VhostIotlbMsg {
        iova: iova.start(),
        size,
        userspace_addr: host_address,
        perm,
        msg_type: VhostIotlbType::Update,
    };
    send(device, &message).map_err(|error| {
        let errno = error.raw_os_error().map(Errno::from_raw_os_error);
        let kind = errno.map_or(HostErrorKind::Other, map_error_kind);
        HostError::new(kind, format!("VHOST_IOTLB_UPDATE of {iova}"), Some(error))
    })
}

/// Has a device forget the translations in a range. A device that has no IOTLB, because it was not started or is reset, has nothing
/// to forget.
pub(crate) fn invalidate(device: &impl VhostIotlbBackend, iova: IovaRange) -> Result<(), HostError> {
    // The size of all addresses does not fit: they are forgotten in two halves.
    let halves = if iova.length().is_some() { [Some(iova), None] } else { halves(iova) };
    for half in halves.into_iter().flatten() {
        let message = VhostIotlbMsg {
            iova: half.start(),
            size: half.length().unwrap_or(u64::MAX),
            userspace_addr: 0,
            perm: VhostAccess::No,
            msg_type: VhostIotlbType::Invalidate,
        };
        match send(device, &message) {
            // vhost_process_iotlb_msg, drivers/vhost/vhost.c: there is no IOTLB.
            Err(error) if error.raw_os_error() == Some(Errno::FAULT.raw_os_error()) => (),
            result => result.map_err(|error| {
                HostError::new(HostErrorKind::Other, format!("VHOST_IOTLB_INVALIDATE of {half}"), Some(error))
            })?,
        }
    }
    Ok(())
}

fn halves(iova: IovaRange) -> [Option<IovaRange>; 2] {
    const MIDDLE: u64 = 1 << 63;
    [IovaRange::new(iova.start(), MIDDLE - 1), IovaRange::new(MIDDLE, iova.last())]
}

fn send(device: &impl VhostIotlbBackend, message: &VhostIotlbMsg) -> io::Result<()> {
    device.send_iotlb_msg(message).map_err(|error| match error {
        Error::IOError(error) | Error::IoctlError(error) => error,
        error => io::Error::other(error),
    })
}
