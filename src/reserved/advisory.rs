// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a plan has to say beside what the guest is told.

use std::fmt;

use crate::range::IovaRange;

/// Something that the operator should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advisory {
    /// The addresses.
    pub range: IovaRange,
    /// What of them.
    pub kind: AdvisoryKind,
}

/// Kinds of advisories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AdvisoryKind {
    /// The firmware uses the region at times.
    Relaxable,
    /// The kind of the region is not known.
    UnknownType,
    /// The host enforces a host bridge window.
    WindowEnforced,
    /// Devices cannot reach the doorbell.
    SwMsiOutsideInbound,
    /// Guest memory cannot be mapped to itself.
    RamInReserved,
    /// A BAR cannot be mapped.
    BarInReserved,
    /// The guest's doorbell is not reported.
    MsiOutsideRange,
}

impl fmt::Display for AdvisoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Relaxable => "the firmware may use this region by DMA until a driver has taken over the device",
            Self::UnknownType => "the host calls this region something that is not known here: it is taken for reserved",
            Self::WindowEnforced => {
                "this host's kernel shows a host bridge window as reserved, and enforces it: guest memory there cannot be \
                 reached by DMA. Use another kernel"
            }
            Self::SwMsiOutsideInbound => {
                "devices cannot reach the doorbell that the host's kernel chose: interrupts cannot work on this host"
            }
            Self::RamInReserved => "guest memory lies here: it cannot be mapped to itself for this endpoint",
            Self::BarInReserved => "a device's BAR lies here: devices cannot reach each other there",
            Self::MsiOutsideRange => "the guest's doorbell does not lie in the input range, and is not reported",
        })
    }
}
