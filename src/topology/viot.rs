// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The ACPI Virtual I/O Translation table: which devices, on PCI or MMIO, are behind a virtio-iommu that is on either.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use acpi_tables::Aml;
use acpi_tables::viot::{MmioEndpoint, PciDevice, PciRange, VIOT, VirtIoMmioIommu, VirtIoPciIommu};
use vm_memory::GuestAddress;

use crate::id::{EndpointId, ParsePciAddressError, PciAddress};

/// Where an IOMMU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuAddress {
    /// It is a function on the root bus of PCI segment 0.
    Pci(PciAddress),
    /// Its registers start here. An ACPI device (`LNRO0005`) has them among its resources.
    Mmio(GuestAddress),
}

/// Devices that are behind an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoints {
    /// PCI functions, each the endpoint whose [`EndpointId`] is made from its address.
    Pci(PciFunctions),
    /// A device with registers in memory.
    Mmio {
        /// Where its registers start: Linux finds the device by the first range of memory among its ACPI resources.
        base: GuestAddress,
        /// The endpoint that it is; any that no other device is.
        id: EndpointId,
    },
}

/// PCI functions from one address to another, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciFunctions {
    first: PciAddress,
    last: PciAddress,
}

/// A table that cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ViotError {
    /// A text is no address.
    #[error(transparent)]
    Address(#[from] ParsePciAddressError),
    /// A range ends before it starts.
    #[error("the range {0} ends before it starts")]
    Inverted(PciFunctions),
    /// No device is given.
    #[error("no endpoint is given")]
    NoEndpoint,
    /// Two devices would be the same endpoint, or have the same registers.
    #[error("{0} and {1} overlap")]
    Overlap(Endpoints, Endpoints),
    /// The IOMMU would be behind itself.
    #[error("{0} covers the IOMMU itself, at {1}")]
    CoversIommu(Endpoints, IommuAddress),
    /// An address is in a segment that the table maker cannot express.
    #[error("{0} is not in PCI segment 0")]
    Segment(PciAddress),
    /// The IOMMU is not where a guest looks for it.
    #[error("the IOMMU at {0} is not on bus 0: Linux needs it there before the devices behind it")]
    NotOnRootBus(PciAddress),
}

impl From<PciAddress> for PciFunctions {
    /// A single function.
    fn from(address: PciAddress) -> Self {
        Self { first: address, last: address }
    }
}

impl FromStr for PciFunctions {
    type Err = ViotError;

    /// Reads `BDF` or `BDF-BDF`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let functions = Self { first: first.parse()?, last: last.parse()? };
        if functions.first <= functions.last { Ok(functions) } else { Err(ViotError::Inverted(functions)) }
    }
}

impl fmt::Display for PciFunctions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl From<PciAddress> for IommuAddress {
    fn from(address: PciAddress) -> Self {
        Self::Pci(address)
    }
}

impl fmt::Display for IommuAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::Mmio(base) => write!(f, "{:#x}", base.0),
        }
    }
}

impl From<PciFunctions> for Endpoints {
    fn from(functions: PciFunctions) -> Self {
        Self::Pci(functions)
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(functions) => functions.fmt(f),
            Self::Mmio { base, id } => write!(f, "endpoint {:#x} at {:#x}", id.0, base.0),
        }
    }
}

impl Endpoints {
    /// The first and the last endpoint.
    fn ids(self) -> (EndpointId, EndpointId) {
        match self {
            Self::Pci(functions) => (functions.first.into(), functions.last.into()),
            Self::Mmio { id, .. } => (id, id),
        }
    }

    /// Where the registers start, if that is how the devices are found.
    const fn base(self) -> Option<GuestAddress> {
        match self {
            Self::Pci(_) => None,
            Self::Mmio { base, .. } => Some(base),
        }
    }

    fn covers(self, iommu: IommuAddress) -> bool {
        match (self, iommu) {
            (Self::Pci(functions), IommuAddress::Pci(iommu)) => functions.first <= iommu && iommu <= functions.last,
            (Self::Mmio { base, .. }, IommuAddress::Mmio(iommu)) => base == iommu,
            _ => false,
        }
    }
}

/// The bytes of a table that puts these devices behind an IOMMU.
///
/// # Errors
///
/// [`ViotError`]
pub fn table(
    iommu: impl Into<IommuAddress>,
    endpoints: impl IntoIterator<Item: Into<Endpoints>>,
) -> Result<Vec<u8>, ViotError> {
    let iommu = iommu.into();
    let mut endpoints: Vec<Endpoints> = endpoints.into_iter().map(Into::into).collect();
    endpoints.sort_by_key(|endpoints| endpoints.ids());
    let mut viot = VIOT::new(*b"VIOMMU", *b"VIRTIOMM", 1);
    let node = match iommu {
        IommuAddress::Pci(address) if address.segment() != 0 => return Err(ViotError::Segment(address)),
        IommuAddress::Pci(address) if address.bus() != 0 => return Err(ViotError::NotOnRootBus(address)),
        IommuAddress::Pci(address) => viot.add_virtio_pci_iommu(VirtIoPciIommu::new(pci_device(address))),
        IommuAddress::Mmio(base) => viot.add_virtio_mmio_iommu(VirtIoMmioIommu::new(base.0)),
    };
    check_endpoints(iommu, &endpoints)?;
    for endpoints in endpoints {
        match endpoints {
            Endpoints::Pci(functions) if functions.last.segment() != 0 => {
                return Err(ViotError::Segment(functions.last));
            }
            Endpoints::Pci(PciFunctions { first, last }) => {
                viot.add_pci_range(PciRange::new(pci_device(first), pci_device(last), &node));
            }
            Endpoints::Mmio { base, id } => viot.add_mmio_endpoint(MmioEndpoint::new(id.0, base.0, &node)),
        }
    }
    let mut bytes = Vec::new();
    viot.to_aml_bytes(&mut bytes);
    Ok(bytes)
}

/// Whether every endpoint is one device, and not the IOMMU. They are sorted.
fn check_endpoints(iommu: IommuAddress, endpoints: &[Endpoints]) -> Result<(), ViotError> {
    if endpoints.is_empty() {
        return Err(ViotError::NoEndpoint);
    }
    let mut bases = BTreeMap::new();
    for (index, current) in endpoints.iter().enumerate() {
        if let Some(next) = endpoints.get(index + 1).filter(|next| current.ids().1 >= next.ids().0) {
            return Err(ViotError::Overlap(*current, *next));
        }
        if let Some(other) = current.base().and_then(|base| bases.insert(base, *current)) {
            return Err(ViotError::Overlap(other, *current));
        }
        if current.covers(iommu) {
            return Err(ViotError::CoversIommu(*current, iommu));
        }
    }
    Ok(())
}

fn pci_device(address: PciAddress) -> PciDevice {
    PciDevice::new(address.segment(), address.bus(), address.device(), address.function())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(iommu: &str, endpoints: &[&str]) -> Result<Vec<u8>, ViotError> {
        let endpoints: Result<Vec<PciFunctions>, _> = endpoints.iter().map(|text| text.parse()).collect();
        table(iommu.parse::<PciAddress>()?, endpoints?)
    }

    #[test]
    fn the_bytes_are_those_of_the_acpi_specification() {
        let bytes = make("00:01.0", &["00:03.0", "00:04.0-00:05.7"]).unwrap();
        assert_eq!(&bytes[..4], b"VIOT");
        assert_eq!(bytes[4..8], 112u32.to_le_bytes());
        assert_eq!(bytes.len(), 112);
        assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
        // Three nodes, from offset 48 on.
        assert_eq!(bytes[36..40], [3, 0, 48, 0]);
        // A virtio-iommu on PCI, 16 bytes, segment 0, 00:01.0.
        assert_eq!(bytes[48..56], [3, 0, 16, 0, 0, 0, 8, 0]);
        // A PCI range, 24 bytes: first endpoint, segments, BDFs, the node that translates.
        assert_eq!(bytes[64..82], [1, 0, 24, 0, 0x18, 0, 0, 0, 0, 0, 0, 0, 0x18, 0, 0x18, 0, 48, 0]);
        assert_eq!(bytes[88..106], [1, 0, 24, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0x2f, 0, 48, 0]);
    }

    const IOMMU: IommuAddress = IommuAddress::Mmio(GuestAddress(0xd000_0000));

    fn at(base: u64, id: u32) -> Endpoints {
        Endpoints::Mmio { base: GuestAddress(base), id: EndpointId(id) }
    }

    #[test]
    fn devices_on_mmio_have_nodes_of_their_own() {
        let bytes = table(IOMMU, [at(0xd000_1000, 0x1_0007), at(0x12_3456_7000, 3)]).unwrap();
        assert_eq!(bytes[4..8], 112u32.to_le_bytes());
        assert_eq!(bytes.len(), 112);
        assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
        assert_eq!(bytes[36..40], [3, 0, 48, 0]);
        // A virtio-iommu on MMIO, 16 bytes, its base.
        assert_eq!(bytes[48..64], [4, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0xd0, 0, 0, 0, 0]);
        // Single endpoints, 24 bytes: the endpoint, its base, the node that translates.
        assert_eq!(bytes[64..82], [2, 0, 24, 0, 3, 0, 0, 0, 0, 0x70, 0x56, 0x34, 0x12, 0, 0, 0, 48, 0]);
        assert_eq!(bytes[88..106], [2, 0, 24, 0, 7, 0, 1, 0, 0, 0x10, 0, 0xd0, 0, 0, 0, 0, 48, 0]);
    }

    #[test]
    fn devices_on_pci_and_mmio_can_be_behind_one_iommu() {
        let functions: PciFunctions = "00:03.0".parse().unwrap();
        let bytes = table(IOMMU, [at(0xd000_1000, 0x1_0000), functions.into()]).unwrap();
        assert_eq!([bytes[48], bytes[64], bytes[88]], [4, 1, 2]);
        assert_eq!(
            table(IOMMU, [at(0xd000_1000, 0x18), functions.into()]).unwrap_err().to_string(),
            "\
            endpoint 0x18 at 0xd0001000 and 0000:00:03.0 overlap"
        );
    }

    #[test]
    fn devices_on_mmio_that_cannot_be_told_apart_are_refused() {
        assert!(matches!(table(IOMMU, [at(0x1000, 1), at(0x2000, 1)]), Err(ViotError::Overlap(..))));
        assert!(matches!(table(IOMMU, [at(0x1000, 1), at(0x2000, 2), at(0x1000, 3)]), Err(ViotError::Overlap(..))));
        assert!(matches!(table(IOMMU, [at(0xd000_0000, 1)]), Err(ViotError::CoversIommu(..))));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert_eq!(make("00:01.0", &[]), Err(ViotError::NoEndpoint));
        assert!(matches!(make("00:01.0", &["x"]), Err(ViotError::Address(_))));
        assert!(matches!(make("00:01.0", &["00:03.0-00:02.0"]), Err(ViotError::Inverted(_))));
        assert!(matches!(make("00:01.0", &["00:03.0-00:05.0", "00:04.0"]), Err(ViotError::Overlap(..))));
        assert!(matches!(make("00:01.0", &["00:00.0-00:05.0"]), Err(ViotError::CoversIommu(..))));
        assert!(matches!(make("00:01.0", &["0001:00:05.0"]), Err(ViotError::Segment(_))));
        assert!(matches!(make("01:01.0", &["00:05.0"]), Err(ViotError::NotOnRootBus(_))));
    }
}
