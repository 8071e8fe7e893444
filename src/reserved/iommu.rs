// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The IOMMU in front of a device: which driver it has, and how far it translates.

use std::fs;
use std::path::Path;

use super::{Driver, limited};
use crate::range::{IovaRange, parse_address};

/// The driver of the IOMMU that a device's `iommu` link leads to.
///
/// The names are the drivers' choice (`iommu_device_sysfs_add()`). A virtio-iommu is named after its bus, and told by the
/// device that it belongs to.
pub(super) fn driver(device: &Path) -> Driver {
    let Ok(unit) = fs::read_link(device.join("iommu")) else {
        return Driver::Unknown;
    };
    let mut parts = unit.components().rev().filter_map(|part| part.as_os_str().to_str());
    let name = parts.next().unwrap_or_default();
    let known = [
        ("dmar", Driver::IntelVtd),
        ("ivhd", Driver::AmdVi),
        ("smmu3", Driver::ArmSmmuV3),
        ("smmu", Driver::ArmSmmu),
        ("apple-dart", Driver::AppleDart),
        ("riscv-iommu", Driver::Riscv),
        ("s390-iommu", Driver::S390),
    ];
    if let Some((_, driver)) = known.iter().find(|(prefix, _)| name.starts_with(prefix)) {
        return *driver;
    }
    // .../virtio0/iommu/NAME
    let is_virtio = parts.nth(1).is_some_and(|parent| parent.starts_with("virtio"));
    if is_virtio { Driver::Virtio } else { Driver::Unknown }
}

/// The addresses that the IOMMU in front of a device can translate at most, by its capability registers; `None` if its
/// driver does not show them, or if they leave it open.
pub(super) fn aperture(device: &Path) -> Option<IovaRange> {
    let register = |name: &str| {
        let text = limited::read_text(&device.join("iommu").join(name)).ok()?;
        // AMD's driver shows a second register after a colon.
        parse_address(text.trim().split(':').next()?).ok()
    };
    let width = match driver(device) {
        Driver::IntelVtd => vtd_width(register("intel-iommu/cap")?, register("intel-iommu/ecap")?)?,
        Driver::AmdVi => amd_width(register("amd-iommu/features")?)?,
        _ => return None,
    };
    let last = if width >= 64 { u64::MAX } else { (1 << width) - 1 };
    IovaRange::new(0, last)
}

/// VT-d specification, 10.4.2 and 10.4.3.
fn vtd_width(cap: u64, ecap: u64) -> Option<u32> {
    let maximum_guest_address_width = (cap >> 16 & 0x3f) as u32 + 1;
    let scalable_mode = ecap >> 43 & 1 == 1;
    let first_stage = ecap >> 47 & 1 == 1;
    // Linux may then choose the tables that CPUs use, which reach half as far: the register does not tell.
    (!(scalable_mode && first_stage)).then_some(maximum_guest_address_width)
}

/// AMD I/O Virtualization Technology specification, 3.4.8: by the most levels that host page tables may have.
fn amd_width(features: u64) -> Option<u32> {
    match features >> 10 & 3 {
        0 => Some(48),
        1 => Some(57),
        2 => Some(64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn device(target: &str, files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let unit = root.path().join("devices").join(target);
        fs::create_dir_all(&unit).unwrap();
        symlink(&unit, root.path().join("iommu")).unwrap();
        for (name, text) in files {
            let path = unit.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn drivers_are_told_by_the_names_they_give() {
        for (target, expected) in [
            ("virtual/iommu/dmar0", Driver::IntelVtd),
            ("0000:00:00.2/iommu/ivhd0", Driver::AmdVi),
            ("iommu/smmu3.0x0000000148000000", Driver::ArmSmmuV3),
            ("iommu/smmu.0x00000000fd800000", Driver::ArmSmmu),
            ("iommu/apple-dart.682008000", Driver::AppleDart),
            ("iommu/riscv-iommu@3010000.iommu", Driver::Riscv),
            ("iommu/s390-iommu.00000008", Driver::S390),
            ("0000:00:05.0/virtio2/iommu/0000:00:05.0", Driver::Virtio),
            ("soc/iommu/15000000.iommu", Driver::Unknown),
        ] {
            assert_eq!(driver(device(target, &[]).path()), expected, "{target}");
        }
        assert_eq!(driver(tempfile::tempdir().unwrap().path()), Driver::Unknown);
    }

    #[test]
    fn registers_say_how_far_an_iommu_translates() {
        let vtd = |cap: &str, ecap: &str| {
            let files = [("intel-iommu/cap", cap), ("intel-iommu/ecap", ecap)];
            aperture(device("iommu/dmar0", &files).path()).map(|range| range.to_string())
        };
        // Of a machine with 39 bits, and of QEMU's with 48.
        assert_eq!(vtd("1c0000c40660462\n", "19e2ff0505e\n").as_deref(), Some("0x0-0x7fffffffff"));
        assert_eq!(vtd("d2008c222f0606\n", "f00f1a\n").as_deref(), Some("0x0-0xffffffffffff"));
        assert_eq!(vtd("d2008c222f0606", "880000f00f1a"), None, "it may be half of that");
        for one_of_them in ["800000f00f1a", "80000f00f1a"] {
            assert!(vtd("d2008c222f0606", one_of_them).is_some());
        }
        assert_eq!(vtd("fish", "0"), None);
        let amd = |features: &str| {
            let device = device("iommu/ivhd0", &[("amd-iommu/features", features)]);
            aperture(device.path()).map(IovaRange::last)
        };
        assert_eq!(amd("29d3:0\n"), Some(u64::MAX));
        assert_eq!(amd("400"), Some((1 << 57) - 1));
        assert_eq!(amd("0"), Some((1 << 48) - 1));
        assert_eq!(amd("c00"), None);
        assert_eq!(aperture(device("iommu/smmu3.0x1", &[]).path()), None);
    }
}
