// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The real backends over a model of the kernel, which says no with its own error numbers.

use std::sync::Arc;

use rustix::io::Errno;
use virtio_iommu::access::Access;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::fake::kernel::{FakeKernel, KernelFailure};
use virtio_iommu::host::iommufd::IommufdGroup;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::RangeSet;
use virtio_iommu::reserved::EndpointView;

use crate::common::alone::{alone, open_files, resident_memory};
use crate::common::{Memory, attach, guest_memory, map, unmap};
use crate::machine::{DEVERR, FAULT, INVAL, NOMEM, OK, READ, WRITE, range};

/// Behind an iommufd.
const ASSIGNED: EndpointId = EndpointId(0x08);
/// In a container of type1.
const CONTAINED: EndpointId = EndpointId(0x10);

struct Machine {
    kernel: FakeKernel,
    device: VirtioIommu,
    _memory: Memory,
}

impl Machine {
    /// A device with both, of which the container may have so many mappings.
    fn new(entry_limit: u32, pinned_source: bool) -> Self {
        let kernel = FakeKernel::new();
        let usable = RangeSet::from(range("0-ffffffff"));
        let mut bound = IommufdGroup::bound(kernel.iommufd(), kernel.devices(&[ASSIGNED], &usable)).unwrap();
        if pinned_source {
            bound = bound.with_pinned_source().unwrap();
        }
        let contained = kernel.container(&[CONTAINED], usable, entry_limit).into_group(vec![CONTAINED]).unwrap();
        let groups: Vec<Arc<dyn HostGroup>> = vec![Arc::new(bound), Arc::new(contained)];
        let views = [ASSIGNED, CONTAINED].map(|id| (id, EndpointView::default())).to_vec();
        let settings = Settings { boot_bypass: false, ..Settings::new(range("0-ffffffff"), 0x1000) };
        let mut device = VirtioIommu::new(settings, views, groups).unwrap();
        let memory = guest_memory(0x10_0000);
        device.set_memory(GuestRam::from_mmap(&memory).unwrap());
        device.set_driver_features(device.features());
        Self { kernel, device, _memory: memory }
    }

    fn send(&mut self, bytes: &[u8]) -> u8 {
        let mut reply = [0xaa; 4];
        assert_eq!(self.device.handle(bytes, &mut reply), 4);
        assert_eq!(reply[1..], [0; 3]);
        reply[0]
    }

    fn reaches(&self, endpoint: EndpointId, iova: u64) -> bool {
        self.kernel.dma(endpoint, iova, Access::READ).is_some()
    }
}

#[test]
fn a_map_that_any_kernel_refuses_is_nowhere_and_says_why() {
    let answers = [
        (Errno::IO, DEVERR),
        (Errno::NOMEM, NOMEM),
        (Errno::NOSPC, NOMEM),
        (Errno::EXIST, INVAL),
        (Errno::INVAL, INVAL),
        (Errno::FAULT, FAULT),
        (Errno::PERM, DEVERR),
    ];
    for (errno, status) in answers {
        for call in 0..2 {
            let mut machine = Machine::new(65535, false);
            for endpoint in [ASSIGNED, CONTAINED] {
                assert_eq!(machine.send(&attach(1, endpoint.0, 0)), OK);
            }
            assert_eq!(machine.send(&map(1, 0x1000, 0x1000, 0, READ)), OK);
            let before = machine.device.save();
            machine.kernel.fail_after(call, KernelFailure::Errno(errno));
            assert_eq!(machine.send(&map(1, 0x5000, 0x1000, 0, READ)), status, "{errno} at {call}");
            assert_eq!(machine.device.save().domains, before.domains, "{errno} at {call}");
            for endpoint in [ASSIGNED, CONTAINED] {
                assert!(machine.reaches(endpoint, 0x1000) && !machine.reaches(endpoint, 0x5000), "{errno} at {call}");
            }
            let notice = machine.device.next_notice().unwrap().to_string();
            assert!(notice.contains("cannot map 0x5000-0x5fff") && notice.contains("0x1000 bytes"), "{notice}");
            assert_eq!(machine.send(&map(1, 0x5000, 0x1000, 0, READ)), OK, "it can be tried again");
        }
    }
}

#[test]
fn one_mapping_more_than_a_container_may_have_is_nomem() {
    let mut machine = Machine::new(666, false);
    assert_eq!(machine.send(&attach(1, CONTAINED.0, 0)), OK);
    for page in 0..666 {
        assert_eq!(machine.send(&map(1, page << 13, 0x1000, 0, READ)), OK, "mapping {page}");
    }
    assert_eq!(machine.send(&map(1, 0x100_0000, 0x1000, 0, READ)), NOMEM);
    assert!(!machine.reaches(CONTAINED, 0x100_0000) && machine.reaches(CONTAINED, 665 << 13));
    let notice = machine.device.next_notice().unwrap().to_string();
    assert!(notice.contains("dma_entry_limit"), "{notice}");
    // Mappings are not joined: each is unmapped alone, and makes room for one.
    assert_eq!(machine.send(&unmap(1, 0, 0x1000)), OK);
    assert_eq!(machine.send(&map(1, 0x100_0000, 0x1000, 0, READ)), OK);
    assert_eq!(machine.send(&map(1, 0, 0x1000, 0, READ)), NOMEM);
}

#[test]
fn an_unmap_over_holes_is_exact_on_every_kernel() {
    for endpoint in [ASSIGNED, CONTAINED] {
        let mut machine = Machine::new(65535, false);
        assert_eq!(machine.send(&attach(1, endpoint.0, 0)), OK);
        assert_eq!(machine.send(&unmap(1, 0, 1 << 32)), OK, "nothing is mapped");
        for page in [1, 2, 5, 9, 0xf_ffff] {
            assert_eq!(machine.send(&map(1, page << 12, 0x1000, 0, READ)), OK);
        }
        for (first, length) in
            [(0, 0x1000), (0x3000, 0x2000), (0x2000, 0x6000), (0, 0xb000), (0, 1 << 32), (0, 1 << 32)]
        {
            assert_eq!(machine.send(&unmap(1, first, length)), OK, "{length:#x} at {first:#x}");
            for page in [1, 2, 5, 9, 0xf_ffff] {
                let is_mapped = machine.device.save().domains[0].mappings.iter().any(|own| own.first == page << 12);
                assert_eq!(machine.reaches(endpoint, page << 12), is_mapped, "page {page}");
            }
        }
        assert_eq!(machine.device.save().domains[0].mappings, []);
        assert!(machine.device.next_notice().is_none(), "no kernel was asked for what it refuses");
    }
}

#[test]
fn memory_counts_once_for_each_domain_that_maps_it_unless_it_is_pinned_before() {
    for pinned_source in [false, true] {
        let mut machine = Machine::new(65535, pinned_source);
        let (before, _) = machine.kernel.mappings();
        for endpoint in [ASSIGNED, CONTAINED] {
            let domain = endpoint.0;
            assert_eq!(machine.send(&attach(domain, endpoint.0, 0)), OK);
            for times in 0..3 {
                assert_eq!(machine.send(&map(domain, times << 16, 0x4000, 0x8000, READ)), OK);
            }
        }
        // Those in the container are the container's.
        let copied = if pinned_source { 3 } else { 0 };
        assert_eq!(machine.kernel.mappings(), (before + 3, copied));
    }
}

#[test]
fn ten_thousand_resets_leave_nothing_behind() {
    alone("kernel::ten_thousand_resets_leave_nothing_behind", || {
        let mut machine = Machine::new(65535, false);
        let mut used = None;
        for turn in 0..10_000u32 {
            let bypass = turn % 3 == 0;
            machine.device.write_config(36, &[u8::from(bypass)]);
            for endpoint in [ASSIGNED, CONTAINED] {
                assert_eq!(machine.send(&attach(turn, endpoint.0, 0)), OK);
            }
            assert_eq!(machine.send(&map(turn, 0x40_0000, 0x8000, 0, READ | WRITE)), OK);
            assert!(machine.reaches(ASSIGNED, 0x40_0000) && machine.reaches(CONTAINED, 0x40_0000));
            machine.device.reset();
            machine.device.set_driver_features(machine.device.features());
            assert_eq!(machine.device.config()[36], u8::from(bypass), "a reset of the device keeps it");
            for endpoint in [ASSIGNED, CONTAINED] {
                assert!(!machine.reaches(endpoint, 0x40_0000), "turn {turn}");
                assert_eq!(machine.reaches(endpoint, 0x1000), bypass, "turn {turn}");
            }
            assert_eq!(machine.device.save().domains, []);
            if turn % 999 == 3 {
                let now = (machine.kernel.objects(), machine.kernel.mappings(), open_files());
                let (first, at_first) = *used.get_or_insert((now, resident_memory()));
                assert_eq!(now, first, "turn {turn}");
                assert!(
                    resident_memory() < at_first + (4 << 20),
                    "turn {turn}: {} bytes more",
                    resident_memory() - at_first
                );
            }
        }
        machine.device.write_config(36, &[1]);
        machine.device.system_reset();
        assert_eq!(machine.device.config()[36], 0, "a reset of the machine restores it");
        assert!(!machine.reaches(ASSIGNED, 0x1000));
    });
}

#[test]
fn a_reset_after_a_replay_leaves_nothing_of_it() {
    let mut machine = Machine::new(65535, false);
    assert_eq!(machine.send(&attach(1, ASSIGNED.0, 0)), OK);
    for page in 0..2000 {
        assert_eq!(machine.send(&map(1, page << 13, 0x1000, 0, READ)), OK);
    }
    assert_eq!(machine.send(&attach(1, CONTAINED.0, 0)), OK);
    assert!(machine.reaches(CONTAINED, 1999 << 13));
    machine.device.reset();
    for endpoint in [ASSIGNED, CONTAINED] {
        assert!((0..2000).all(|page| !machine.reaches(endpoint, page << 13)));
    }
    assert_eq!((machine.kernel.objects(), machine.kernel.mappings()), (0, (0, 0)));
}
