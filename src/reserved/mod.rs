// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest must not map, and why.
//!
//! [`HostFacts`] is what the host shows of one IOMMU group; [`policy::plan`] turns the facts of all endpoints into
//! what the guest is told. Host bridge windows are no property of a group: they are never reported and refuse
//! nothing.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use crate::range::{IovaRange, ParseRangeError, RangeSet, parse_address};

#[cfg(feature = "daemon")]
pub mod facts;
pub mod policy;
#[cfg(feature = "iommufd")]
pub mod sysfs;

/// What a reserved region is to the guest (5.13.6.8.1, `VIRTIO_IOMMU_RESV_MEM_T_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReservedKind {
    /// It cannot be mapped.
    Reserved,
    /// It cannot be mapped, and is the doorbell for message-signalled interrupts.
    Msi,
}

/// A range of virtual addresses that the guest is told of and must not map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReservedRegion {
    /// The addresses.
    pub range: IovaRange,
    /// What they are.
    pub kind: ReservedKind,
}

/// What the guest is told of one endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointView {
    reported: Vec<ReservedRegion>,
    refused: RangeSet,
}

impl EndpointView {
    /// A view with these regions, in any order.
    ///
    /// # Errors
    ///
    /// [`ViewError`] if they overlap, or if two are MSI doorbells.
    pub fn new(mut reported: Vec<ReservedRegion>) -> Result<Self, ViewError> {
        reported.sort_by_key(|region| region.range);
        for (region, next) in reported.iter().zip(reported.iter().skip(1)) {
            // 5.13.6.8.1.2: "The device SHOULD NOT present multiple RESV_MEM properties that overlap each other for
            // the same endpoint."
            if region.range.overlaps(next.range) {
                return Err(ViewError::Overlap(region.range, next.range));
            }
        }
        // 5.13.6.8.1.2: "The device SHOULD NOT present more than one VIRTIO_IOMMU_RESV_MEM_T_MSI property per
        // endpoint."
        if reported.iter().filter(|region| region.kind == ReservedKind::Msi).count() > 1 {
            return Err(ViewError::SecondMsi);
        }
        let refused = reported.iter().map(|region| region.range).collect();
        Ok(Self { reported, refused })
    }

    /// The regions, ascending and disjoint, at most one of them MSI: what PROBE answers.
    pub fn reported(&self) -> &[ReservedRegion] {
        &self.reported
    }

    /// The addresses of all regions: what MAP refuses.
    pub const fn refused(&self) -> &RangeSet {
        &self.refused
    }
}

/// Regions that cannot be reported together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ViewError {
    /// Two regions have an address in common.
    #[error("the reserved regions {0} and {1} overlap")]
    Overlap(IovaRange, IovaRange),
    /// There is more than one MSI doorbell.
    #[error("more than one reserved region is an MSI doorbell")]
    SecondMsi,
}

/// What Linux calls a reserved region of a group (`/sys/kernel/iommu_groups/N/reserved_regions`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostRegionKind {
    /// Must be mapped to itself at all times. VFIO refuses the device.
    Direct,
    /// Must be mapped to itself while firmware uses it. VFIO ignores it.
    DirectRelaxable,
    /// Cannot be mapped.
    Reserved,
    /// An MSI doorbell, in hardware or chosen by software.
    Msi,
    /// A kind that this version does not know. It is kept, and taken for reserved.
    Other(String),
}

/// One line of `reserved_regions`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostRegion {
    /// The addresses.
    pub range: IovaRange,
    /// What the host says they are.
    pub kind: HostRegionKind,
}

/// A line of `reserved_regions` that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseRegionError {
    /// Not three fields.
    #[error("`{0}` is not `START END TYPE`")]
    Shape(String),
    /// A field is no address.
    #[error("in `{line}`")]
    Address {
        /// The line.
        line: String,
        /// What is wrong.
        source: ParseRangeError,
    },
    /// The end lies below the start.
    #[error("the region in `{0}` ends before it starts")]
    Inverted(String),
}

impl FromStr for HostRegion {
    type Err = ParseRegionError;

    /// Reads `0x00000000fee00000 0x00000000feefffff msi`; both addresses inclusive.
    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [start, last, kind] = fields[..] else {
            return Err(ParseRegionError::Shape(line.to_owned()));
        };
        let address =
            |text| parse_address(text).map_err(|source| ParseRegionError::Address { line: line.to_owned(), source });
        let range = IovaRange::new(address(start)?, address(last)?)
            .ok_or_else(|| ParseRegionError::Inverted(line.to_owned()))?;
        let kind = match kind {
            "direct" => HostRegionKind::Direct,
            "direct-relaxable" => HostRegionKind::DirectRelaxable,
            "reserved" => HostRegionKind::Reserved,
            "msi" => HostRegionKind::Msi,
            other => HostRegionKind::Other(other.to_owned()),
        };
        Ok(Self { range, kind })
    }
}

impl fmt::Display for HostRegionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::DirectRelaxable => "direct-relaxable",
            Self::Reserved => "reserved",
            Self::Msi => "msi",
            Self::Other(name) => name,
        })
    }
}

impl fmt::Display for HostRegion {
    /// As the host writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x} {:#018x} {}", self.range.start(), self.range.last(), self.kind)
    }
}

/// What the host shows of one group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// The kernel's release, such as `6.12.48`; `None` if not known.
    pub kernel: Option<String>,
    /// The IOMMU's driver, by the names of the facts format (`intel-vtd`, ..., `unknown`).
    pub driver: Option<String>,
    /// The group's reserved regions; `None` if the host does not tell.
    pub reserved_regions: Option<Vec<HostRegion>>,
    /// The addresses that a page table for this group alone can map, as VFIO or iommufd tell once a device is
    /// attached; `None` if not known.
    pub usable: Option<RangeSet>,
    /// The addresses that the IOMMU can translate at all; `None` if not known.
    pub aperture: Option<IovaRange>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(text: &str, kind: ReservedKind) -> ReservedRegion {
        ReservedRegion { range: text.parse().unwrap(), kind }
    }

    #[test]
    fn a_line_of_sysfs_is_read_and_written_back() {
        for line in [
            "0x00000000fee00000 0x00000000feefffff msi",
            "0x000000fd00000000 0x000000ffffffffff reserved",
            "0x0000000000000000 0x0000000000ffffff direct-relaxable",
            "0x00000000bdffd000 0x00000000bdffffff direct",
            "0x0000000000000000 0xffffffffffffffff translated-foo",
        ] {
            assert_eq!(line.parse::<HostRegion>().unwrap().to_string(), line);
        }
    }

    #[test]
    fn a_bad_line_is_named() {
        for bad in ["", "0x0 0x1", "0x0 0x1 msi msi", "0x1 0x0 msi", "zero 0x1 msi"] {
            assert!(bad.parse::<HostRegion>().unwrap_err().to_string().contains(bad));
        }
    }

    #[test]
    fn a_view_has_no_overlap_and_one_msi_at_most() {
        let msi = region("fee00000-feefffff", ReservedKind::Msi);
        let high = region("fd00000000-ffffffffff", ReservedKind::Reserved);
        let view = EndpointView::new(vec![high, msi]).unwrap();
        assert_eq!(view.reported(), [msi, high]);
        assert!(view.refused().covers(msi.range) && view.refused().covers(high.range));
        let touching = region("feefffff-fef00000", ReservedKind::Reserved);
        assert_eq!(EndpointView::new(vec![touching, msi]), Err(ViewError::Overlap(msi.range, touching.range)));
        let second = region("0-fff", ReservedKind::Msi);
        assert_eq!(EndpointView::new(vec![second, msi]), Err(ViewError::SecondMsi));
    }
}
