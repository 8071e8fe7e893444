// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests to a device with emulated endpoints, whose every access is compared with a list of pages.

use std::collections::BTreeMap;
use std::sync::Arc;

use virtio_iommu::access::Access;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::spec::config;
use virtio_iommu::translate::{Limits, Translation, Translator};
use vm_memory::GuestAddress;

use crate::machine::encode;
use crate::wire::{self, Field, operations};

const ENDPOINTS: [EndpointId; 3] = [EndpointId(8), EndpointId(9), EndpointId(16)];
const PAGE: u64 = 0x1000;
/// Guest memory: two regions that touch and one far off.
const RAM: [(u64, u64); 3] = [(0, 0x8000), (0x8000, 0x40_8000), (1 << 32, 1 << 32)];
/// Where mappings begin: on either side of what nodes of the tree cover, and at the ends of the address space.
const CORNERS: [u64; 8] = [
    0,
    (1 << 18) - 0x8000,
    (1 << 21) - 0x8000,
    (1 << 24) - 0x8000,
    1 << 30,
    (1 << 36) - 0x1_0000,
    1 << 47,
    (1 << 48) - 0x10_0000,
];

operations! {
    /// What happens.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Step {
        /// ATTACH
        Attach { domain: u8, endpoint: u8, bypass: bool, },
        /// DETACH
        Detach { domain: u8, endpoint: u8, },
        /// MAP, from some pages behind a corner on, of pages or of larger blocks.
        Map { domain: u8, corner: u8, page: u8, pages: u16, block: bool, to: u16, far: bool, flags: u8, },
        /// UNMAP
        Unmap { domain: u8, corner: u8, page: u8, pages: u16, block: bool, },
        /// An access of so many bytes.
        Access { endpoint: u8, corner: u8, offset: u32, length: u32, write: bool, },
        /// The configuration's bypass is written.
        Bypass { value: bool, },
        /// The last region of guest memory leaves, or comes back.
        Memory { whole: bool, },
        /// The device is reset.
        Reset {},
    }
}

/// A mapping as the driver asked for it.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    last: u64,
    physical: u64,
    access: Access,
}

/// A domain as the driver knows it; `None` for a bypass domain.
type Domain = Option<BTreeMap<u64, Mapping>>;

/// A device with emulated endpoints, and what its driver concludes from the answers.
struct Run {
    device: VirtioIommu,
    translators: Vec<Translator>,
    places: [Option<u32>; 3],
    domains: BTreeMap<u32, Domain>,
    bypass: bool,
    ram: Vec<(u64, u64)>,
}

impl Run {
    fn new(nodes: u32) -> Self {
        let translation = Translation::new(Limits { nodes, nodes_per_domain: nodes.div_ceil(2), ..Limits::default() });
        let groups = ENDPOINTS.map(|id| Arc::new(translation.group(vec![id])));
        let translators = groups.iter().zip(ENDPOINTS).map(|(group, id)| group.translator(id).expect("a member"));
        let translators = translators.collect();
        let seen = groups.iter().map(|group| Arc::clone(group) as Arc<dyn HostGroup>).collect();
        let endpoints = ENDPOINTS.map(|id| (id, EndpointView::default())).to_vec();
        let settings = Settings::new("0-ffffffffffff".parse().expect("a range"), PAGE);
        let device = VirtioIommu::new(settings, endpoints, seen).expect("they fit each other");
        let (places, domains) = ([None; 3], BTreeMap::new());
        let mut run = Self { device, translators, places, domains, bypass: true, ram: Vec::new() };
        run.set_memory(true);
        run.device.set_driver_features(run.device.features());
        run
    }

    fn set_memory(&mut self, whole: bool) {
        self.ram = RAM[..if whole { 3 } else { 2 }].to_vec();
        let ranges: Vec<_> = self.ram.iter().map(|(start, length)| (GuestAddress(*start), *length)).collect();
        self.device.set_memory(GuestRam::in_software(&ranges).expect("disjoint regions"));
    }

    fn send(&mut self, request: &[u8]) -> bool {
        let mut reply = [0xaa; 4];
        assert_eq!(self.device.handle(request, &mut reply), 4);
        reply[0] == 0
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Attach { domain, endpoint, bypass } => {
                let (domain, which) = (u32::from(domain % 3), usize::from(endpoint % 3));
                if self.send(&encode::attach(domain, ENDPOINTS[which].0, u32::from(*bypass))) {
                    self.places[which] = Some(domain);
                    self.domains.entry(domain).or_insert_with(|| (!bypass).then(BTreeMap::new));
                    self.drop_empty();
                }
            }
            Step::Detach { domain, endpoint } => {
                let (domain, which) = (u32::from(domain % 3), usize::from(endpoint % 3));
                let done = self.send(&encode::detach(domain, ENDPOINTS[which].0));
                assert_eq!(done, self.places[which] == Some(domain), "DETACH of one that is in, and of no other");
                if done {
                    self.places[which] = None;
                    self.drop_empty();
                }
            }
            Step::Map { domain, corner, page, pages, block, to, far, flags } => {
                let (first, last) = range(*corner, *page, *pages, *block);
                let physical = if *far { 1 << 32 } else { 0 } + (u64::from(*to) << 12);
                self.map(u32::from(domain % 3), first, last, physical, u32::from(flags % 4));
            }
            Step::Unmap { domain, corner, page, pages, block } => {
                let (first, last) = range(*corner, *page, *pages, *block);
                self.unmap(u32::from(domain % 3), first, last);
            }
            Step::Access { endpoint, corner, offset, length, write } => {
                let iova = CORNERS[usize::from(corner % 8)] + u64::from(offset % (1 << 27));
                let access = if *write { Access::WRITE } else { Access::READ };
                self.access(usize::from(endpoint % 3), iova, (length % (1 << 25)) as usize, access);
            }
            Step::Bypass { value } => {
                self.device.write_config(config::BYPASS, &[u8::from(*value)]);
                self.bypass = *value;
            }
            Step::Memory { whole } => self.set_memory(*whole),
            Step::Reset {} => {
                self.device.reset();
                self.device.set_driver_features(self.device.features());
                self.places = [None; 3];
                self.domains.clear();
            }
        }
    }

    fn drop_empty(&mut self) {
        let places = self.places;
        self.domains.retain(|id, _| places.contains(&Some(*id)));
    }

    fn map(&mut self, id: u32, first: u64, last: u64, physical: u64, flags: u32) {
        let in_ram = covers(&self.ram, physical, last - first + 1);
        let done = self.send(&encode::map(id, first, last, physical, flags));
        let Some(Some(mappings)) = self.domains.get_mut(&id) else {
            return assert!(!done, "a MAP to no domain, or to a bypass domain");
        };
        let free = mappings.range(..=last).next_back().is_none_or(|(_, mapping)| mapping.last < first);
        assert_eq!(done, free && in_ram && last < 1 << 48, "MAP of {first:#x} to {last:#x}, {physical:#x}");
        if done {
            let access = Access { read: flags & 1 != 0, write: flags & 2 != 0 };
            mappings.insert(first, Mapping { last, physical, access });
        }
    }

    fn unmap(&mut self, id: u32, first: u64, last: u64) {
        let done = self.send(&encode::unmap(id, first, last));
        let Some(Some(mappings)) = self.domains.get_mut(&id) else {
            return assert!(!done, "an UNMAP of no domain, or of a bypass domain");
        };
        let reaches_out = |(start, mapping): (&u64, &Mapping)| {
            *start <= last && mapping.last >= first && (*start < first || mapping.last > last)
        };
        assert_eq!(done, !mappings.iter().any(reaches_out), "UNMAP of {first:#x} to {last:#x}");
        if done {
            mappings.retain(|start, _| *start < first || *start > last);
        }
    }

    /// What a byte is translated to; the same holds up to the address that comes with it.
    fn expected(&self, which: usize, iova: u64, access: Access) -> Option<(u64, u64)> {
        let identity = || {
            let (start, length) = self.ram.iter().find(|(start, length)| iova >= *start && iova - start < *length)?;
            Some((iova, start + (length - 1)))
        };
        match self.places[which].map(|domain| &self.domains[&domain]) {
            None if self.bypass => identity(),
            None => None,
            Some(None) => identity(),
            Some(Some(mappings)) => {
                let (start, mapping) = mappings.range(..=iova).next_back()?;
                let allowed = (mapping.access.read || !access.read) && (mapping.access.write || !access.write);
                let reached = covers(&self.ram, mapping.physical, mapping.last - start + 1);
                let hit = iova <= mapping.last && allowed && reached;
                hit.then(|| (mapping.physical + (iova - start), mapping.last))
            }
        }
    }

    /// The pieces of an access: adjacent ones are one. Where it ends early, the address that is refused.
    fn pieces(&self, which: usize, mut iova: u64, length: usize, access: Access) -> (Vec<(u64, usize)>, Option<u64>) {
        let (mut pieces, mut left): (Vec<(u64, usize)>, usize) = (Vec::new(), length);
        while left != 0 {
            let Some((physical, last)) = self.expected(which, iova, access) else { return (pieces, Some(iova)) };
            let taken = left.min((last - iova + 1) as usize);
            match pieces.last_mut() {
                Some((start, length)) if *start + *length as u64 == physical => *length += taken,
                _ => pieces.push((physical, taken)),
            }
            (iova, left) = (iova + taken as u64, left - taken);
        }
        (pieces, None)
    }

    fn access(&mut self, which: usize, iova: u64, length: usize, access: Access) {
        let expected = self.pieces(which, iova, length, access);
        // Once from the mappings, then from what was kept of them.
        for _ in 0..2 {
            let mut refused = None;
            let found = self.translators[which].with_translation(iova, length, access, |segments| {
                segments.fold(Vec::new(), |mut found, segment| {
                    match segment {
                        Ok(segment) => found.push((segment.start.0, segment.length)),
                        Err(fault) => refused = Some(fault.0.address),
                    }
                    found
                })
            });
            assert_eq!((&found, refused), (&expected.0, expected.1), "{length:#x} bytes at {iova:#x}, {access}");
            assert_eq!(self.told(), expected.1, "an event for what is refused, and for nothing else");
        }
    }

    fn told(&mut self) -> Option<u64> {
        let fault = self.device.take_fault();
        assert_eq!(self.device.take_fault(), None, "a second event");
        fault.and_then(|fault| fault.address)
    }

    /// Every endpoint reaches what it should, at the ends of each mapping and beside them.
    fn check(&self) {
        let domains = self.domains.values().flatten().flatten();
        let mut interesting: Vec<u64> = domains
            .flat_map(|(first, mapping)| [first.saturating_sub(1), *first, mapping.last, mapping.last + 1])
            .chain([0, 0x8000, 1 << 32])
            .collect();
        interesting.sort_unstable();
        interesting.dedup();
        for (which, translator) in self.translators.iter().enumerate() {
            let pinned = translator.pin();
            for iova in &interesting {
                for access in [Access::READ, Access::WRITE] {
                    let found = pinned.translate(*iova, 1, access).ok().map(|segment| segment.start.0);
                    let expected = self.expected(which, *iova, access).map(|(physical, _)| physical);
                    assert_eq!(found, expected, "endpoint {which}, {access} access to {iova:#x}");
                }
            }
        }
    }
}

/// Whether all of a range is guest memory.
fn covers(ram: &[(u64, u64)], start: u64, length: u64) -> bool {
    let (mut at, end) = (start, start + length);
    for (region, size) in ram {
        if (*region..region + size).contains(&at) {
            at = end.min(region + size);
        }
    }
    at == end
}

/// The first and the last address of so many pages, or blocks of 256 KiB, from a corner on.
fn range(corner: u8, page: u8, pages: u16, block: bool) -> (u64, u64) {
    let shift = if block { 18 } else { 12 };
    let first = CORNERS[usize::from(corner % 8)] + (u64::from(page) << shift);
    (first, first + ((u64::from(pages % 600) + 1) << shift) - 1)
}

/// Lets happen what the bytes say, with few nodes or with many.
pub fn check(mut bytes: &[u8]) {
    let nodes = u8::take(&mut bytes);
    let mut run = Run::new(u32::from(nodes) + 1);
    for step in wire::all::<Step>(bytes) {
        run.step(&step);
        run.check();
    }
}

/// Mappings side by side, large ones, and one domain after the other.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seed = |nodes: u8, steps: &[Step]| [vec![nodes], wire::bytes_of(steps)].concat();
    let attach = |domain, endpoint| Step::Attach { domain, endpoint, bypass: false };
    let map =
        |corner, page, pages, to| Step::Map { domain: 1, corner, page, pages, block: false, to, far: false, flags: 3 };
    let access = |corner, offset, length| Step::Access { endpoint: 0, corner, offset, length, write: true };
    vec![
        (
            "adjacent",
            seed(
                200,
                &[attach(1, 0), map(0, 1, 1, 6), map(0, 3, 1, 8), access(0, 0x1ffe, 0x2004), access(0, 0x1000, 0x9000)],
            ),
        ),
        (
            "blocks",
            seed(
                3,
                &[
                    attach(1, 0),
                    Step::Map { domain: 1, corner: 4, page: 0, pages: 511, block: true, to: 0, far: true, flags: 1 },
                    Step::Access { endpoint: 0, corner: 4, offset: 0x10_0000, length: 0x100_0000, write: false },
                    Step::Unmap { domain: 1, corner: 4, page: 0, pages: 511, block: true },
                    Step::Access { endpoint: 0, corner: 4, offset: 0x10_0000, length: 4, write: false },
                ],
            ),
        ),
        (
            "scarce",
            seed(0, &[attach(1, 0), map(1, 0, 20, 0), access(1, 0, 99999), map(5, 0, 20, 0), access(5, 0, 99999)]),
        ),
        (
            "moving",
            seed(
                20,
                &[
                    attach(1, 0),
                    attach(2, 1),
                    map(2, 7, 0, 3),
                    access(2, 0x7000, 8),
                    Step::Bypass { value: false },
                    attach(2, 0),
                    access(2, 0x7000, 8),
                    Step::Detach { domain: 2, endpoint: 0 },
                    Step::Attach { domain: 0, endpoint: 2, bypass: true },
                    Step::Memory { whole: false },
                    Step::Reset {},
                    Step::Bypass { value: true },
                ],
            ),
        ),
    ]
}
