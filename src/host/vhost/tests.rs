// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vhost-vdpa device behind the IOMMU.

use std::sync::Arc;

use rustix::io::Errno;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::model::{Entry, Kernel};
use super::*;
use crate::device::{Settings, VirtioIommu};
use crate::host::HostGroup;
use crate::host::replay::ReplayGroup;
use crate::id::EndpointId;
use crate::memory::GuestRam;
use crate::range::RangeSet;
use crate::reserved::EndpointView;

const ENDPOINT: EndpointId = EndpointId(8);
const OK: u8 = 0;
const NOMEM: u8 = 8;
const RANGE: u8 = 5;

struct Machine {
    device: VirtioIommu,
    kernel: Kernel,
    memory: GuestMemoryMmap,
}

impl Machine {
    fn new() -> Self {
        let kernel = Kernel::vdpa();
        let usable: IovaRange = "0-ffffffff".parse().unwrap();
        let constraints = Constraints { usable: RangeSet::from(usable), granule: 0x1000 };
        let group = ReplayGroup::new(VhostMapper::new(kernel.clone(), constraints), vec![ENDPOINT]);
        let settings = Settings { boot_bypass: false, ..Settings::new(usable, 0x1000) };
        let groups: Vec<Arc<dyn HostGroup>> = vec![Arc::new(group)];
        let mut device = VirtioIommu::new(settings, vec![(ENDPOINT, EndpointView::default())], groups).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        device.set_memory(GuestRam::from_mmap(&memory).unwrap());
        device.set_driver_features(device.features());
        Self { device, kernel, memory }
    }

    fn send(&mut self, words: &[u32]) -> u8 {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut reply = [0xaa; 4];
        assert_eq!(self.device.handle(&bytes, &mut reply), 4);
        reply[0]
    }

    fn map(&mut self, iova: u32, physical: u32, flags: u32) -> u8 {
        self.send(&[3, 1, iova, 0, iova + 0xfff, 0, physical, 0, flags])
    }

    fn entry(&self, iova: u64, physical: u64, access: u8) -> Entry {
        let host_address = self.memory.get_host_address(GuestAddress(physical)).unwrap() as u64;
        Entry { iova, size: 0x1000, host_address, access }
    }
}

#[test]
fn a_device_that_does_not_ask_is_told_of_every_mapping() {
    let mut machine = Machine::new();
    assert_eq!(machine.send(&[1, 1, ENDPOINT.0, 0, 0]), OK);
    assert_eq!(machine.map(0x5000, 0x2000, 1), OK);
    assert_eq!(machine.map(0x6000, 0x3000, 2), OK);
    assert_eq!(machine.map(0x7000, 0x4000, 3), OK);
    let [first, second, third] =
        [(0x5000, 0x2000, 1), (0x6000, 0x3000, 2), (0x7000, 0x4000, 3)].map(|(i, p, a)| machine.entry(i, p, a));
    assert_eq!(machine.kernel.entries(), [first, second, third]);
    assert_eq!(machine.send(&[4, 1, 0x6000, 0, 0x6fff, 0, 0]), OK);
    assert_eq!(machine.kernel.entries(), [first, third]);
    assert_eq!(machine.send(&[1, 2, ENDPOINT.0, 0, 0]), OK);
    assert_eq!(machine.kernel.entries(), [], "another domain has nothing mapped");
    assert_eq!(machine.send(&[2, 2, ENDPOINT.0, 0, 0]), OK);
    assert_eq!(machine.map(0x5000, 0x2000, 1), 6, "the domain is gone with its last endpoint");
    assert_eq!(machine.kernel.entries(), []);
}

#[test]
fn what_is_forgotten_is_no_wider_than_what_is_mapped() {
    let mut machine = Machine::new();
    assert_eq!(machine.send(&[1, 1, ENDPOINT.0, 0, 0]), OK);
    assert_eq!(machine.map(0x5000, 0x2000, 1), OK);
    assert_eq!(machine.map(0x9000, 0x3000, 1), OK);
    assert_eq!(machine.send(&[2, 1, ENDPOINT.0, 0, 0]), OK);
    assert_eq!(machine.kernel.entries(), [], "all addresses are more than the device takes");
}

#[test]
fn a_device_that_has_nothing_mapped_is_not_asked_to_forget() {
    let mapper = VhostMapper::new(Kernel::vdpa(), Constraints { usable: RangeSet::new(), granule: 0x1000 });
    assert_eq!(mapper.unmap(IovaRange::ALL).unwrap(), 0);
}

#[test]
fn what_the_kernel_refuses_the_guest_is_told() {
    let mut machine = Machine::new();
    assert_eq!(machine.send(&[1, 1, ENDPOINT.0, 0, 0]), OK);
    machine.kernel.fail(Errno::NOMEM);
    assert_eq!(machine.map(0x5000, 0x2000, 1), NOMEM);
    assert_eq!(machine.kernel.entries(), []);
}

#[test]
fn what_the_device_cannot_map_is_not_asked_of_it() {
    let mut machine = Machine::new();
    assert_eq!(machine.send(&[1, 1, ENDPOINT.0, 0, 0]), OK);
    assert_eq!(machine.send(&[3, 1, 0, 1, 0xfff, 1, 0x2000, 0, 1]), RANGE);
    assert_eq!(machine.kernel.entries(), []);
}

/// A range of 2^64 bytes cannot be said.
#[test]
fn all_addresses_are_forgotten_in_halves_that_share_none() {
    let middle = 1 << 63;
    assert_eq!(halves(IovaRange::ALL), [IovaRange::new(0, middle - 1), IovaRange::new(middle, u64::MAX)]);
}
