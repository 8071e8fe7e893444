// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `viommuctl inspect` on the host VM's own devices.

use std::process::Command;

use virtio_iommu::id::EndpointId;
use virtio_iommu::range::IovaRange;
use virtio_iommu::reserved::Driver;
use virtio_iommu::reserved::facts::FactsFile;

use crate::pci::{EDU, bind_to_vfio, find};

/// Gathers the facts of a device into a file.
pub fn facts_of(address: virtio_iommu::id::PciAddress, path: &str) -> String {
    let address = address.to_string();
    let output = Command::new("/bin/viommuctl").args(["inspect", &address, "--facts-out", path]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn an_idle_device_shows_what_the_kernel_can_map() {
    let edu = find(EDU);
    bind_to_vfio(edu);
    let shown = facts_of(edu, "/tmp/facts.json");
    assert!(shown.contains("0xfee00000-0xfeefffff"), "{shown}");
    let file = FactsFile::read("/tmp/facts.json".as_ref()).unwrap();
    let facts = file.get(EndpointId::from(edu)).unwrap();
    let regions: Vec<_> = facts.reserved_regions.iter().flatten().map(ToString::to_string).collect();
    assert_eq!(regions, ["0x00000000fee00000 0x00000000feefffff msi"]);
    let usable = facts.usable.as_ref().unwrap();
    assert_eq!(usable.to_string(), "0x0-0xfedfffff, 0xfef00000-0xffffffffffff");
    assert!(!usable.covers(IovaRange::new(0xfee0_0000, 0xfee0_0fff).unwrap()));
    assert_eq!(facts.driver, Driver::IntelVtd);
    // It let go of the device: it can do it again.
    facts_of(edu, "/tmp/facts.json");
}
