// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Configuration and initialization.

use virtio_iommu::device::Settings;
use virtio_iommu::host::fake::{Attachment, Flavour};

use crate::bench::{
    BYPASS, BYPASS_OFFSET, Bench, FLAVOURS, INVAL, LEFT, LONE, NOENT, OK, PAGE, RANGE, READ, RIGHT, settings,
};
use crate::requests::{attach, detach, map};

const F_VERSION_1: u64 = 1 << 32;

fn with_boot_bypass(boot_bypass: bool) -> Bench {
    Bench::with(Flavour::Iommufd, Settings { boot_bypass, ..settings() })
}

/// Whether the unattached endpoints' DMA is as the configuration says.
fn is_in_force(bench: &Bench, bypass: u8) -> bool {
    [LONE, LEFT, RIGHT].iter().all(|id| match bypass {
        0 => bench.attachment(*id) == Attachment::Blocked,
        _ => bench.attachment(*id) == Attachment::AsFound || bench.reaches_memory_as_it_is(*id),
    })
}

/// Statement 4 (5.13.4.2, MUST): "The device MUST set at least one bit in page_size_mask, describing the page granularity."
/// Answer: Granule, 2 MiB and 1 GiB; the lowest bit is what a MAP is a multiple of.
#[test]
fn page_size_mask_must_have_a_bit() {
    for granule in [PAGE, 0x1_0000] {
        let mut bench = Bench::with(Flavour::Iommufd, Settings { granule, ..settings() });
        let mask = u64::from_le_bytes(bench.device.config()[..8].try_into().unwrap());
        assert_eq!(mask & mask.wrapping_neg(), granule);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.status(&map(1, 0, granule / 2, 0, READ)), RANGE);
        assert_eq!(bench.status(&map(1, 0, granule, 0, READ)), OK);
    }
}

/// Statement (5.13.4.2, MAY): "If the device offers the VIRTIO_IOMMU_F_BYPASS_CONFIG feature, it MAY initialize the bypass field to
/// 1."
/// Answer: As the VMM wants it; 1 by default.
#[test]
fn bypass_is_initially_what_the_machine_wants() {
    assert!(settings().boot_bypass);
    for (boot_bypass, value) in [(true, 1), (false, 0)] {
        let bench = with_boot_bypass(boot_bypass);
        assert_eq!(bench.bypass(), value);
        assert!(is_in_force(&bench, value));
    }
}

/// Statement 5 (5.13.4.2, SHOULD NOT): "Field bypass SHOULD NOT change on device reset"
/// Answer: It keeps its value, and that is in force.
#[test]
fn bypass_should_not_change_on_device_reset() {
    for boot_bypass in [true, false] {
        for value in [0, 1] {
            let mut bench = with_boot_bypass(boot_bypass);
            bench.device.write_config(BYPASS_OFFSET, &[value]);
            assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
            bench.device.reset();
            assert_eq!(bench.bypass(), value);
            assert!(is_in_force(&bench, value));
        }
    }
}

/// Statement 6 (5.13.4.2, SHOULD): "but SHOULD be restored to its initial value on system reset."
/// Answer: It is, where the VMM tells a system reset from a device reset.
#[test]
fn bypass_should_be_restored_on_system_reset() {
    for (boot_bypass, initial) in [(true, 1), (false, 0)] {
        let mut bench = with_boot_bypass(boot_bypass);
        bench.device.write_config(BYPASS_OFFSET, &[1 - initial]);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        bench.device.system_reset();
        assert_eq!(bench.bypass(), initial);
        assert!(is_in_force(&bench, initial));
    }
}

/// Statement 7 (5.13.4.2, MUST NOT): "The device MUST NOT present a value different than 0 or 1 in bypass."
/// Driver (5.13.4.1, MUST NOT): "The driver MUST NOT write a value different than 0 or 1 to bypass."
/// Answer: Any other value is ignored; what can be read is what is in force.
/// Otherwise: cloud-hypervisor, which shows 0 at first and acts as if it were 1, and forgets the value in a snapshot.
#[test]
fn bypass_must_be_presented_as_0_or_1() {
    for before in [0, 1] {
        for written in 0..=u8::MAX {
            let mut bench = with_boot_bypass(true);
            bench.device.write_config(BYPASS_OFFSET, &[before]);
            bench.device.write_config(BYPASS_OFFSET, &[written]);
            let expected = if written <= 1 { written } else { before };
            assert_eq!(bench.bypass(), expected, "{written} over {before}");
            assert!(is_in_force(&bench, expected), "{written} over {before}");
        }
    }
}

/// Driver (5.13.4.1, MUST NOT): "The driver MUST NOT write to any other device configuration field."
/// Answer: Such a write is ignored, and so is one past the end; of a write over several fields, bypass counts.
#[test]
fn a_write_to_another_field_changes_nothing() {
    let mut bench = with_boot_bypass(true);
    let before = bench.picture();
    for offset in (0..BYPASS_OFFSET).chain(BYPASS_OFFSET + 1..48).chain([usize::MAX]) {
        bench.device.write_config(offset, &[0]);
        assert!(bench.picture() == before, "{offset}");
    }
    bench.device.write_config(0, &[0; BYPASS_OFFSET]);
    assert!(bench.picture() == before);
    let mut expected = bench.device.config();
    expected[BYPASS_OFFSET] = 0;
    bench.device.write_config(0, &[0; 40]);
    assert_eq!(bench.device.config(), expected);
    assert!(is_in_force(&bench, 0));
}

/// Driver (5.13.4.1, MAY): "When the VIRTIO_IOMMU_F_BYPASS_CONFIG feature is negotiated, the driver MAY write to bypass."
/// Answer: The field is there because the feature is offered; a driver that did not accept it is heard too.
#[test]
fn a_write_to_bypass_counts_without_the_feature() {
    let mut bench = with_boot_bypass(true);
    bench.device.set_driver_features(F_VERSION_1);
    for value in [0, 1] {
        bench.device.write_config(BYPASS_OFFSET, &[value]);
        assert_eq!(bench.bypass(), value);
        assert!(is_in_force(&bench, value));
    }
}

/// Statement (5.13.5, text): "When the device is reset, endpoints are not attached to any domain."
/// Answer: No endpoint is attached, and no domain, mapping or page table of one is left.
/// Otherwise: cloud-hypervisor (reset keeps all state) and crosvm (has no reset).
#[test]
fn after_a_reset_no_endpoint_is_attached() {
    for flavour in FLAVOURS {
        let mut bench = Bench::with(flavour, Settings { boot_bypass: false, ..settings() });
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.status(&map(1, 0x5000, PAGE, 0x1000, READ)), OK);
        assert_eq!(bench.status(&attach(2, LEFT, BYPASS)), OK);
        bench.device.reset();
        for endpoint in [LONE, LEFT, RIGHT] {
            assert_eq!(bench.attachment(endpoint), Attachment::Blocked);
        }
        assert_eq!(bench.host.table_count(), 0);
        assert_eq!(bench.status(&detach(1, LONE)), INVAL);
        assert_eq!(bench.status(&map(1, 0x6000, PAGE, 0x1000, READ)), NOENT);
        assert_eq!(bench.status(&attach(1, LONE, 0)), OK);
        assert_eq!(bench.read(LONE, 0x5000), None, "the new domain is empty");
    }
}
