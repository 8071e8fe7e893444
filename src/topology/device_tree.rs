// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device tree says of the IOMMU: which functions of a PCI host bridge are behind it, and where it is.
//!
//! Linux, `Documentation/devicetree/bindings/virtio/pci-iommu.yaml` and `mmio.yaml` there.

use vm_fdt::{Error, FdtWriter};

use crate::id::PciAddress;
use crate::spec::PCI_DEVICE_ID;

/// How many functions a PCI segment has room for.
const FUNCTIONS: u32 = 1 << 16;

/// The cells of the property `iommu-map` of the host bridge of a PCI segment: all of its functions are behind the IOMMU whose node
/// has this phandle, each as the endpoint whose [`EndpointId`](crate::id::EndpointId) is made from its address. If the IOMMU is a
/// function of the segment itself, it is left out: its own accesses are not translated.
pub fn iommu_map(segment: u16, phandle: u32, iommu: Option<PciAddress>) -> Vec<u32> {
    let first_id = u32::from(segment) << 16;
    let own = iommu.filter(|iommu| iommu.segment() == segment).map(|iommu| u32::from(iommu.requester_id()));
    let parts = match own {
        Some(own) => [(0, own), (own + 1, FUNCTIONS - 1 - own)],
        None => [(0, FUNCTIONS), (FUNCTIONS, 0)],
    };
    // From which function on, which IOMMU, from which endpoint on, how many.
    let entries = parts.into_iter().filter(|(_, length)| *length != 0);
    entries.flat_map(|(start, length)| [start, phandle, first_id + start, length]).collect()
}

/// Writes the node of an IOMMU that is a PCI function, to be called where the nodes of its host bridge's children are written.
///
/// # Errors
///
/// Whatever the writer says.
pub fn write_pci_node(fdt: &mut FdtWriter, iommu: PciAddress, phandle: u32) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("iommu@{:x},{:x}", iommu.device(), iommu.function()))?;
    fdt.property_string("compatible", &format!("pci1af4,{PCI_DEVICE_ID:x}"))?;
    fdt.property_array_u32("reg", &[u32::from(iommu.requester_id()) << 8, 0, 0, 0, 0])?;
    write_iommu_properties(fdt, phandle)?;
    fdt.end_node(node)
}

/// Writes the properties that make the node of a virtio device, on MMIO or PCI, one of an IOMMU. Devices that are behind it and not
/// on PCI have the property `iommus`, of the phandle and their endpoint ID.
///
/// # Errors
///
/// Whatever the writer says.
pub fn write_iommu_properties(fdt: &mut FdtWriter, phandle: u32) -> Result<(), Error> {
    fdt.property_u32("#iommu-cells", 1)?;
    fdt.property_phandle(phandle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_leaves_the_iommu_itself_out() {
        let at = |text: &str| Some(text.parse().unwrap());
        assert_eq!(iommu_map(0, 7, at("00:01.0")), [0, 7, 0, 8, 9, 7, 9, 0xfff7]);
        assert_eq!(iommu_map(1, 7, at("00:01.0")), [0, 7, 0x1_0000, 0x1_0000]);
        assert_eq!(iommu_map(0xffff, 7, None), [0, 7, 0xffff_0000, 0x1_0000]);
        assert_eq!(iommu_map(0, 7, at("00:00.0")), [1, 7, 1, 0xffff]);
        assert_eq!(iommu_map(0, 7, at("ff:1f.7")), [0, 7, 0, 0xffff]);
        assert_eq!(iommu_map(2, 7, at("2:00:01.0")), [0, 7, 0x2_0000, 8, 9, 7, 0x2_0009, 0xfff7]);
    }

    #[test]
    fn a_node_is_what_the_binding_says() {
        let mut fdt = FdtWriter::new().unwrap();
        let root = fdt.begin_node("").unwrap();
        write_pci_node(&mut fdt, "00:01.0".parse().unwrap(), 7).unwrap();
        fdt.end_node(root).unwrap();
        let bytes = fdt.finish().unwrap();
        let has = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        assert!(has(b"\0\0\0\x01iommu@1,0\0"));
        // FDT_PROP, length, name, value.
        assert!(has(b"pci1af4,1057\0"));
        let reg = [0x800u32, 0, 0, 0, 0].map(u32::to_be_bytes);
        assert!(has(&[&3u32.to_be_bytes()[..], &20u32.to_be_bytes()].concat()) && has(reg.as_flattened()));
        assert!(has(b"#iommu-cells\0") && has(b"phandle\0"));
    }
}
