// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `viommuctl inspect` on the host VM's own devices.

use std::process::Command;

use virtio_iommu::id::{EndpointId, PciAddress};
use virtio_iommu::launch::inspect::usable_by_type1;
use virtio_iommu::reserved::facts::FactsFile;
use virtio_iommu::reserved::sysfs::Sysfs;
use virtio_iommu::reserved::{Driver, Fact, Source};

use crate::pci::{EDU, bind_to_vfio, find, host_iommu};

/// Gathers the facts of a device into a file.
pub fn facts_of(address: PciAddress, path: &str) -> String {
    let address = address.to_string();
    let output = Command::new("/bin/viommuctl").args(["inspect", &address, "--facts-out", path]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What each of the three kinds of hosts says of its `edu` device.
struct Expected {
    driver: Driver,
    regions: &'static [&'static str],
    usable: &'static str,
    /// By the IOMMU's registers, where they tell.
    aperture: Option<&'static str>,
}

fn expected() -> Expected {
    const MSI: &str = "0x00000000fee00000 0x00000000feefffff msi";
    match host_iommu().as_str() {
        "vtd" => Expected {
            driver: Driver::IntelVtd,
            regions: &[MSI],
            usable: "0x0-0xfedfffff, 0xfef00000-0xffffffffffff",
            aperture: Some("0x0-0xffffffffffff"),
        },
        "amd" => Expected {
            driver: Driver::AmdVi,
            regions: &[MSI, "0x000000fd00000000 0x000000ffffffffff reserved"],
            usable: "0x0-0xfedfffff, 0xfef00000-0xfcffffffff, 0x10000000000-0xffffffffffffffff",
            aperture: Some("0x0-0xffffffffffffffff"),
        },
        _ => Expected {
            driver: Driver::Virtio,
            regions: &[MSI],
            usable: "0x0-0xfedfffff, 0xfef00000-0x7fffffffff",
            aperture: None,
        },
    }
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn an_idle_device_shows_what_the_kernel_can_map() {
    let edu = find(EDU);
    bind_to_vfio(edu);
    let shown = facts_of(edu, "/tmp/facts.json");
    println!("{shown}");
    let expected = expected();
    let file = FactsFile::read("/tmp/facts.json".as_ref()).unwrap();
    let facts = file.get(EndpointId::from(edu)).unwrap();
    assert_eq!(facts.driver, expected.driver);
    let regions: Vec<_> = facts.reserved_regions.iter().flatten().map(ToString::to_string).collect();
    assert_eq!(regions, expected.regions);
    assert_eq!(facts.usable.as_ref().unwrap().to_string(), expected.usable);
    assert_eq!(facts.aperture.map(|aperture| aperture.to_string()).as_deref(), expected.aperture);
    assert_eq!(facts.acs_isolated, Some(true));
    // The registers of `edu` say where its BAR is.
    assert_eq!(facts.sources.get(&Fact::Bars), Some(&Source::PciConfig));
    let windows = facts.windows.as_ref().unwrap();
    assert!(facts.bars.iter().flatten().all(|bar| windows.covers(*bar)), "{facts:?}");
    assert_eq!(facts.sources.get(&Fact::Usable), Some(&Source::Iommufd));
    // It let go of the device: it can do it again, and VFIO type1 says the same.
    facts_of(edu, "/tmp/facts.json");
    let group = Sysfs::new("/sys").group(edu).unwrap().number;
    assert_eq!(usable_by_type1(group).unwrap().to_string(), expected.usable);
}
