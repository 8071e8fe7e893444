// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host's I/O page tables, behind one seam.
//!
//! The device decides; a host carries out. A [`HostGroup`] is what can be attached, an [`IoPageTable`] is what it
//! can be attached to. Both are given to the device ready-made and hold whatever files they need.

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;

use crate::access::Access;
use crate::id::EndpointId;
use crate::memory::{GuestRam, HostSegment};
use crate::range::{IovaRange, RangeSet};

use refused::RefusedAccesses;

#[cfg(any(test, feature = "test-utils"))]
pub mod fake;
#[cfg(any(feature = "iommufd", feature = "type1"))]
mod held;
#[cfg(feature = "iommufd")]
pub mod iommufd;
#[cfg(any(feature = "iommufd", feature = "type1", feature = "vhost"))]
mod linux;
mod pieces;
pub mod refused;
pub mod replay;
pub mod software;
pub mod timed;
#[cfg(feature = "type1")]
pub mod type1;
#[cfg(feature = "vhost")]
pub mod vhost;

/// One IOMMU group of the host: the smallest set of devices that the host can isolate, and so the unit that is attached.
///
/// The device calls it from its own methods, one call at a time. Calls may take as long as the host needs.
pub trait HostGroup: fmt::Debug + Send + Sync {
    /// The endpoints whose devices are in the group.
    fn members(&self) -> &[EndpointId];

    /// Makes an empty page table that this group can be attached to.
    ///
    /// # Errors
    ///
    /// Whatever the host says. Nothing is left behind.
    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError>;

    /// Whether this group can be attached to a table that [`new_table`](Self::new_table) of another group made,
    /// as far as can be said beforehand. To see whether a table is of one's own kind: `let any: &dyn Any = table;` and
    /// `any.downcast_ref()`. It is never asked about the group's own table; a host whose tables cannot be shared says no.
    fn can_share(&self, table: &dyn IoPageTable) -> bool;

    /// Whether nothing is mapped for the group when the device gets it. By default whoever drives the devices has set up bypass
    /// until the device does something else.
    fn is_found_blocked(&self) -> bool {
        false
    }

    /// Attaches the whole group to a table. What was attached before is replaced.
    ///
    /// # Errors
    ///
    /// The error says what the group is left with: the table it had, or none.
    fn attach(&self, table: &Arc<dyn IoPageTable>) -> Result<(), AttachError>;

    /// Takes every device of the group off its table, so that all its DMA is refused. This cannot fail: a device
    /// that cannot be told so has no table, or is gone.
    fn block(&self);

    /// A member is no endpoint any more: takes its device off the group's table, so that it does not keep the group there, and
    /// closes whatever is open for it alone. Its DMA reaches what the group's other members reach; the group was blocked if there
    /// is none. By default nothing is done.
    fn release(&self, member: EndpointId) {
        let _ = member;
    }

    /// The accesses of the group that its table refused, for a host that tells. By default none does.
    fn refused_accesses(&self) -> Option<&RefusedAccesses> {
        None
    }

    /// Whether the guest can go on with this group's devices on another host, so that the state of the VM's IOMMU may be taken there.
    /// It can with devices that are emulated, if whoever emulates them takes their own state along. By default it cannot: so it is with
    /// devices that the host has.
    fn can_migrate(&self) -> bool {
        false
    }

    /// Guest memory is this now; no table maps any other. By default nothing is done.
    fn memory_changed(&self, ram: &GuestRam) {
        let _ = ram;
    }
}

/// One I/O address space of the host. Dropping it frees what it mapped; no group is attached to it then.
pub trait IoPageTable: Any + fmt::Debug + Send + Sync {
    /// Maps a range that has no address in common with any range mapped before to consecutive pieces of guest
    /// memory of the same total length, with no more permission than asked.
    ///
    /// # Errors
    ///
    /// [`MapError::Refused`] if nothing was changed.
    fn map(&self, iova: IovaRange, to: &[HostSegment], access: Access) -> Result<(), MapError>;

    /// Removes all that is mapped in a range, and returns how many bytes that were. No mapping is ever asked to be
    /// removed in part.
    ///
    /// # Errors
    ///
    /// The host refused; some mappings may be gone and some not.
    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError>;

    /// What can be mapped, for the groups that are attached now. Asked after each attach and compared with what the guest was
    /// told: whatever of the input range no attached endpoint reports as reserved must be usable, and the granule must not be
    /// larger than the device's. Otherwise the group is blocked and the guest's ATTACH answered with UNSUPP.
    ///
    /// # Errors
    ///
    /// Whatever the host says.
    fn constraints(&self) -> Result<Constraints, HostError>;

    /// Whether no host translates by this table, so that there is nothing to map or to unmap in it.
    fn in_software(&self) -> bool {
        false
    }
}

/// What a page table can map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constraints {
    /// The addresses that can be mapped.
    pub usable: RangeSet,
    /// The smallest page, in bytes: a power of two. Mappings are aligned to it.
    pub granule: u64,
}

/// What went wrong on the host's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostErrorKind {
    /// A mapping lies where the host cannot map.
    Unmappable,
    /// A mapping is already there. The device never asks for that: its books disagree with the host's.
    AlreadyMapped,
    /// Memory, locked memory or table entries are exhausted.
    NoMemory,
    /// Guest memory could not be reached.
    BadAddress,
    /// The regions that the host reserves for the group overlap what the table maps.
    ReservedConflict,
    /// The device has not been bound to the iommufd that the table is in.
    NotBound,
    /// The group cannot use this table.
    Incompatible,
    /// The host cannot keep to the permissions that were asked for.
    Unsupported,
    /// The device is being reset, and stayed so.
    Busy,
    /// The device is gone.
    Gone,
    /// What the program around the device asked for cannot be: a mistake in it.
    Misuse,
    /// Anything else.
    Other,
}

/// Members of a group, to be named in a message by the first of them.
pub(crate) struct Members<'m>(pub &'m [EndpointId]);

impl fmt::Display for Members<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.first() {
            Some(member) => write!(f, "the group of endpoint {member}"),
            None => f.write_str("a group without endpoints"),
        }
    }
}

/// A host that said no: which call, to what, why.
#[derive(Debug, thiserror::Error)]
#[error("{action}: {}", .kind.explain())]
pub struct HostError {
    /// The kind of failure.
    pub kind: HostErrorKind,
    action: String,
    source: Option<io::Error>,
}

impl HostError {
    /// A failure of the named action.
    pub fn new(kind: HostErrorKind, action: impl Into<String>, source: Option<io::Error>) -> Self {
        Self { kind, action: action.into(), source }
    }
}

impl HostErrorKind {
    /// What it means and what to do about it.
    fn explain(self) -> &'static str {
        match self {
            Self::Unmappable => "the host cannot map there",
            Self::AlreadyMapped => "something is mapped there already, which is a bug of this device",
            Self::NoMemory => "out of memory, or over the limit on locked memory (raise RLIMIT_MEMLOCK)",
            Self::BadAddress => "guest memory cannot be reached",
            Self::ReservedConflict => {
                "the host reserves addresses for this group that the domain has mapped: unmap them first"
            }
            Self::NotBound => {
                "the device is not bound to this iommufd: give the VMM the same iommufd and the same device file"
            }
            Self::Incompatible => "the group cannot use this page table",
            Self::Unsupported => "the host would allow more than was asked for",
            Self::Busy => "the device is being reset, and was not done in time: the guest may try again",
            Self::Gone => "the device is gone: take it out of the guest",
            Self::Misuse => "this cannot be asked for, which is a mistake of the program",
            Self::Other => "the host refused",
        }
    }
}

/// What a group is left with after an attach that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AfterFailure {
    /// The table that it had before.
    PreviousTable,
    /// None: its DMA is refused.
    Blocked,
}

/// An attach that failed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct AttachError {
    /// Why.
    #[source]
    pub error: HostError,
    /// What the group is left with.
    pub after: AfterFailure,
}

/// A map that failed.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The table is as it was.
    #[error("{0}")]
    Refused(#[source] HostError),
    /// A part of the range was mapped and could not be taken back.
    #[error("{0}, and what was mapped of the range could not be taken back")]
    LeftBehind(#[source] HostError),
}

impl From<MapError> for HostError {
    fn from(error: MapError) -> Self {
        match error {
            MapError::Refused(error) | MapError::LeftBehind(error) => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_failed_on_what_and_what_to_do() {
        let group = Members(&[EndpointId(8), EndpointId(9)]);
        let error = HostError::new(HostErrorKind::NoMemory, format!("mapping 0x0-0xfff for {group}"), None);
        assert_eq!(
            error.to_string(),
            "mapping 0x0-0xfff for the group of endpoint 0000:00:01.0: out of memory, or over the limit on locked memory (raise \
             RLIMIT_MEMLOCK)"
        );
        assert_eq!(Members(&[]).to_string(), "a group without endpoints");
    }
}
