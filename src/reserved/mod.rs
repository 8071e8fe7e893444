// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest must not map, and why.
//!
//! [`HostFacts`] is what the host shows of one IOMMU group; [`plan::plan`] turns the facts of all endpoints into
//! what the guest is told, region by region, by the rules in `policy.rs`. Host bridge windows are no property of a group:
//! they are never reported and refuse nothing, unless the host enforces them.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::range::{IovaRange, ParseRangeError, RangeSet, parse_address};

mod advisory;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod arguments;
#[cfg(feature = "iommufd")]
mod bars;
#[cfg(feature = "iommufd")]
pub mod bridge;
#[cfg(feature = "iommufd")]
pub mod device_tree;
#[cfg(feature = "daemon")]
pub mod facts;
#[cfg(feature = "iommufd")]
pub mod gather;
#[cfg(feature = "iommufd")]
mod iommu;
#[cfg(feature = "iommufd")]
mod limited;
pub mod plan;
mod policy;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod report;
mod source;
#[cfg(feature = "iommufd")]
pub mod sysfs;
mod widen;
mod withheld;

pub use policy::WithheldReason;
pub use source::{Fact, ParseSourceError, Source};
pub use withheld::{Evidence, Withheld};

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

    /// A view with these addresses, and with a doorbell, which is cut out of them.
    pub(super) fn of(reserved: &RangeSet, msi: Option<IovaRange>) -> Self {
        let reserved = reserved.subtract(&msi.into_iter().collect());
        let region = |kind| move |range| ReservedRegion { range, kind };
        let mut reported: Vec<ReservedRegion> =
            reserved.ranges().iter().copied().map(region(ReservedKind::Reserved)).collect();
        reported.extend(msi.map(region(ReservedKind::Msi)));
        reported.sort_by_key(|region| region.range);
        let refused = reported.iter().map(|region| region.range).collect();
        Self { reported, refused }
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

impl fmt::Display for ReservedKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reserved => "reserved",
            Self::Msi => "msi",
        })
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

/// The driver of the IOMMU in front of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Driver {
    /// Intel VT-d.
    IntelVtd,
    /// AMD-Vi.
    AmdVi,
    /// Arm SMMU, versions 1 and 2.
    ArmSmmu,
    /// Arm SMMU, version 3.
    ArmSmmuV3,
    /// Apple DART.
    AppleDart,
    /// RISC-V IOMMU.
    Riscv,
    /// s390.
    S390,
    /// A virtio-iommu: the host is a guest itself.
    Virtio,
    /// Another one, or not known.
    #[default]
    Unknown,
}

impl Driver {
    const NAMES: [(Self, &'static str); 9] = [
        (Self::IntelVtd, "intel-vtd"),
        (Self::AmdVi, "amd-vi"),
        (Self::ArmSmmu, "arm-smmu"),
        (Self::ArmSmmuV3, "arm-smmu-v3"),
        (Self::AppleDart, "apple-dart"),
        (Self::Riscv, "riscv"),
        (Self::S390, "s390"),
        (Self::Virtio, "virtio"),
        (Self::Unknown, "unknown"),
    ];
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(driver, _)| driver == self);
        f.write_str(name.map_or("unknown", |(_, name)| name))
    }
}

/// A name of no driver.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the name of an IOMMU driver such as intel-vtd, arm-smmu-v3 or unknown")]
pub struct ParseDriverError(String);

impl FromStr for Driver {
    type Err = ParseDriverError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::NAMES.iter().find(|(_, name)| *name == text);
        known.map(|(driver, _)| *driver).ok_or_else(|| ParseDriverError(text.to_owned()))
    }
}

/// What the host shows of one group. All addresses are as devices see them on their bus.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// The kernel's release, such as `6.12.48`; `None` if not known.
    pub kernel: Option<String>,
    /// The IOMMU's driver.
    pub driver: Driver,
    /// The group's reserved regions; `None` if the host does not tell.
    pub reserved_regions: Option<Vec<HostRegion>>,
    /// The addresses that a page table for this group alone can map, as VFIO or iommufd tell once a device is
    /// attached; `None` if not known.
    pub usable: Option<RangeSet>,
    /// The addresses that the IOMMU can translate at all; `None` if not known.
    pub aperture: Option<IovaRange>,
    /// The memory windows of the host bridge that the group is behind, merged where they touch; `None` if not known.
    pub windows: Option<RangeSet>,
    /// BARs of devices behind the same host bridge; `None` if not known.
    pub bars: Option<Vec<IovaRange>>,
    /// The addresses at which devices behind the bridge can reach memory; `None` if not known.
    pub inbound: Option<RangeSet>,
    /// Whether the bridges in front of the group keep its devices from reaching each other; `None` if not known.
    pub acs_isolated: Option<bool>,
    /// Where the facts came from, as far as that is known.
    pub sources: BTreeMap<Fact, Source>,
}

impl HostFacts {
    /// Major and minor number of the kernel's release.
    pub(crate) fn kernel_version(&self) -> Option<(u32, u32)> {
        let mut numbers = self.kernel.as_ref()?.split(|character: char| !character.is_ascii_digit());
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }

    /// What an operator should know of a group whose devices are not kept apart.
    #[cfg(feature = "daemon")]
    pub(crate) fn peer_to_peer_warning(&self) -> Option<&'static str> {
        let warning = "devices of this group can reach each other's BARs: where a guest maps the address of such a BAR, DMA goes \
                       to the BAR. --p2p carve-bars keeps the guest off";
        (self.acs_isolated == Some(false)).then_some(warning)
    }
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
    fn drivers_have_names() {
        for (driver, name) in Driver::NAMES {
            assert_eq!((driver.to_string().as_str(), name.parse()), (name, Ok(driver)));
        }
        assert!("intel".parse::<Driver>().unwrap_err().to_string().contains("`intel`"));
    }

    #[test]
    fn kernels_are_compared_by_number() {
        let version =
            |kernel: &str| HostFacts { kernel: Some(kernel.to_owned()), ..HostFacts::default() }.kernel_version();
        assert_eq!(version("6.12.48-amd64"), Some((6, 12)));
        assert_eq!(version("7.3+"), Some((7, 3)));
        assert!(version("6.9.0") < Some((6, 15)));
        assert_eq!(version("next"), None);
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

    #[cfg(feature = "daemon")]
    #[test]
    fn devices_that_can_reach_each_other_are_warned_of() {
        let warning = |acs_isolated| HostFacts { acs_isolated, ..HostFacts::default() }.peer_to_peer_warning();
        assert!(warning(Some(false)).is_some_and(|text| text.contains("--p2p carve-bars")));
        assert_eq!((warning(Some(true)), warning(None)), (None, None));
    }
}
