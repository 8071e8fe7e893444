// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Names of things: endpoints, domains, PCI functions.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

/// What the guest calls a device whose DMA goes through the IOMMU. For a PCI function it is the function's
/// address as the guest sees it: segment in bits 31 to 16, bus, device and function below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(pub u32);

/// What the guest calls an I/O address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(pub u32);

/// The address of a PCI function: `SSSS:BB:DD.F`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    segment: u16,
    bus: u8,
    device_function: u8,
}

impl PciAddress {
    /// The PCI segment.
    pub const fn segment(self) -> u16 {
        self.segment
    }

    /// The bus number.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// The device number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.device_function >> 3
    }

    /// The function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.device_function & 7
    }

    /// Bus, device and function as they go with an access: the endpoint's ID without the segment.
    pub const fn requester_id(self) -> u16 {
        ((self.bus as u16) << 8) | self.device_function as u16
    }
}

impl From<PciAddress> for EndpointId {
    fn from(address: PciAddress) -> Self {
        let [high, low] = address.segment.to_be_bytes();
        Self(u32::from_be_bytes([high, low, address.bus, address.device_function]))
    }
}

impl From<EndpointId> for PciAddress {
    fn from(id: EndpointId) -> Self {
        let [high, low, bus, device_function] = id.0.to_be_bytes();
        Self { segment: u16::from_be_bytes([high, low]), bus, device_function }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.segment, self.bus, self.device(), self.function())
    }
}

impl fmt::Debug for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for EndpointId {
    /// As a PCI address: `0000:00:03.0`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        PciAddress::from(*self).fmt(f)
    }
}

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A text that is not a PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a PCI address such as 0000:00:03.0 or 00:03.0")]
pub struct ParsePciAddressError(String);

impl FromStr for PciAddress {
    type Err = ParsePciAddressError;

    /// Reads `SSSS:BB:DD.F`, or `BB:DD.F` in segment 0; all numbers hexadecimal.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_pci_address(text).ok_or_else(|| ParsePciAddressError(text.to_owned()))
    }
}

fn parse_pci_address(text: &str) -> Option<PciAddress> {
    let (segment, rest) = match text.matches(':').count() {
        1 => ("0", text),
        _ => text.split_once(':')?,
    };
    let (bus, rest) = rest.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    let (device, function) = (hex(device, 0x1f)?, hex(function, 7)?);
    Some(PciAddress {
        segment: hex(segment, 0xffff)?,
        bus: u8::try_from(hex(bus, 0xff)?).ok()?,
        device_function: u8::try_from(device << 3 | function).ok()?,
    })
}

/// A hexadecimal number of one to four digits, no more than `most`.
fn hex(digits: &str, most: u16) -> Option<u16> {
    // from_str_radix would take a sign.
    let plain = digits.len() <= 4 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = u16::from_str_radix(digits, 16).ok().filter(|_| plain)?;
    (number <= most).then_some(number)
}

impl FromStr for EndpointId {
    type Err = ParsePciAddressError;

    /// Reads a PCI address.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<PciAddress>().map(Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_its_pci_address() {
        let id: EndpointId = "00:03.0".parse().unwrap();
        assert_eq!(id, EndpointId(0x18));
        assert_eq!(id.to_string(), "0000:00:03.0");
        let far: EndpointId = "abcd:ef:1f.7".parse().unwrap();
        assert_eq!(far, EndpointId(0xabcd_efff));
        assert_eq!(far.to_string(), "abcd:ef:1f.7");
        let address = PciAddress::from(far);
        assert_eq!((address.segment(), address.bus(), address.device(), address.function()), (0xabcd, 0xef, 0x1f, 7));
        assert_eq!(address.requester_id(), 0xefff);
    }

    #[test]
    fn what_is_no_pci_address_is_refused() {
        for bad in ["", "3", "00:20.0", "00:1f.8", "100:00.0", "10000:00:00.0", "0:0:0:0.0", "+0:+1.0", "00:03"] {
            let error = bad.parse::<PciAddress>().unwrap_err();
            assert!(error.to_string().contains(&format!("`{bad}`")));
        }
    }
}
