// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The ACPI Virtual I/O Translation table: which PCI functions are behind a virtio-iommu that is a PCI function itself.

use std::fmt;
use std::str::FromStr;

use acpi_tables::Aml;
use acpi_tables::viot::{PciDevice, PciRange, VIOT, VirtIoPciIommu};

use crate::id::{ParsePciAddressError, PciAddress};

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
    /// No function is given.
    #[error("no endpoint is given")]
    NoEndpoint,
    /// Two ranges have a function in common.
    #[error("{0} and {1} overlap")]
    Overlap(PciFunctions, PciFunctions),
    /// The IOMMU would be behind itself.
    #[error("{0} covers the IOMMU itself, at {1}")]
    CoversIommu(PciFunctions, PciAddress),
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

/// The bytes of a table that puts these functions behind an IOMMU. Each is the endpoint whose
/// [`EndpointId`](crate::id::EndpointId) is made from its address.
///
/// # Errors
///
/// [`ViotError`]
pub fn table(iommu: PciAddress, endpoints: &[PciFunctions]) -> Result<Vec<u8>, ViotError> {
    if iommu.segment() != 0 {
        return Err(ViotError::Segment(iommu));
    }
    if iommu.bus() != 0 {
        return Err(ViotError::NotOnRootBus(iommu));
    }
    let mut endpoints = endpoints.to_vec();
    endpoints.sort_unstable();
    if endpoints.is_empty() {
        return Err(ViotError::NoEndpoint);
    }
    for (functions, next) in endpoints.iter().zip(endpoints.iter().skip(1)) {
        if functions.last >= next.first {
            return Err(ViotError::Overlap(*functions, *next));
        }
    }
    let mut viot = VIOT::new(*b"VIOMMU", *b"VIRTIOMM", 1);
    let node = viot.add_virtio_pci_iommu(VirtIoPciIommu::new(pci_device(iommu)));
    for functions in endpoints {
        if functions.last.segment() != 0 {
            return Err(ViotError::Segment(functions.last));
        }
        if functions.first <= iommu && iommu <= functions.last {
            return Err(ViotError::CoversIommu(functions, iommu));
        }
        viot.add_pci_range(PciRange::new(pci_device(functions.first), pci_device(functions.last), &node));
    }
    let mut bytes = Vec::new();
    viot.to_aml_bytes(&mut bytes);
    Ok(bytes)
}

fn pci_device(address: PciAddress) -> PciDevice {
    PciDevice::new(address.segment(), address.bus(), address.device(), address.function())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(iommu: &str, endpoints: &[&str]) -> Result<Vec<u8>, ViotError> {
        let endpoints: Result<Vec<_>, _> = endpoints.iter().map(|text| text.parse()).collect();
        table(iommu.parse()?, &endpoints?)
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
