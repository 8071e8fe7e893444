// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device on a model of the host, and the oracle beside it: both are told the same, and whatever one says, and wherever DMA
//! goes, is compared.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use virtio_iommu::access::Access;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::{Attachment, Failure, FakeHost, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};
use vm_memory::GuestAddress;

use super::model::{EndpointFacts, Facts, Oracle, Reach};
use super::operation::{Input, Operation, Rare, fields, pick};

pub const PAGE: u64 = 0x1000;
/// How far guest memory and mappings go, in pages.
const PAGES: u64 = 64;
const INPUT_RANGE: (u64, u64) = (PAGE, PAGES * PAGE - 1);
const DOMAIN_RANGE: (u32, u32) = (1, 4);
const PROBE_SIZE: u32 = 128;
const MAX_DOMAINS: usize = 3;
const MAX_MAPPINGS: usize = 5;
const MAX_MAPPINGS_IN_ALL: usize = 6;
/// The members of each host group.
const GROUPS: [&[u32]; 3] = [&[8], &[9, 10], &[11, 12]];
/// The one with reserved regions.
const NARROW: u32 = 11;
const RESERVED: (u64, u64) = (6 * PAGE, 7 * PAGE - 1);
const DOORBELL: (u64, u64) = (10 * PAGE, 12 * PAGE - 1);
/// Guest memories, by their first and last pages: two regions that touch; a part of them; others, under what is reserved; none.
const MEMORIES: [&[(u64, u64)]; 4] = [&[(16, 31), (32, 55)], &[(16, 31)], &[(4, 8), (12, 29)], &[]];

const OK: u8 = 0;
const DEVERR: u8 = 3;
/// What a host that fails can be the reason of: UNSUPP, DEVERR, INVAL, NOENT, FAULT, NOMEM.
const HOST_FAILED: [u8; 6] = [2, DEVERR, 4, 6, 7, 8];
const UNTOUCHED: u8 = 0xaa;

pub struct Machine {
    boot_bypass: bool,
    flavour: Flavour,
    host: FakeHost,
    device: VirtioIommu,
    oracle: Oracle,
    /// Which calls of the host are to fail.
    planned: Vec<u64>,
    /// A call failed since the host was new or the device reset: less may be reached than was mapped.
    host_failed: bool,
    memory: usize,
    /// All that the device answered and had the host do.
    seen: DefaultHasher,
}

/// Runs a sequence; panics at the first difference. What the device answered, and where DMA went after each step, in one number.
pub fn run(input: &Input) -> u64 {
    let mut machine = Machine::new(input.type1, input.boot_bypass);
    machine.check();
    for (bit, endpoint) in GROUPS.concat().into_iter().enumerate() {
        if input.attached & (1 << bit) != 0 {
            machine.send(&fields(1, &[1, endpoint, 0, 0]), 4);
        }
    }
    for operation in &input.operations {
        machine.take(operation);
        machine.check();
    }
    machine.seen.finish()
}

impl Machine {
    pub fn new(type1: bool, boot_bypass: bool) -> Self {
        let flavour = if type1 { Flavour::Type1 } else { Flavour::Iommufd };
        let (host, mut device) = device(flavour, boot_bypass);
        let mut oracle = Oracle::new(facts(boot_bypass));
        device.set_memory(ram(0));
        oracle.set_memory(regions(0));
        let features = device.features();
        device.set_driver_features(features);
        oracle.set_driver_features(features);
        let seen = DefaultHasher::new();
        Self { boot_bypass, flavour, host, device, oracle, planned: Vec::new(), host_failed: false, memory: 0, seen }
    }

    pub fn take(&mut self, operation: &Operation) {
        match (operation.request(), operation) {
            (Some((request, writable)), _) => self.send(&request, writable),
            (None, Operation::Fail { after, short, kind }) => {
                self.planned.push(self.host.calls() + u64::from(after % 8));
                let failure = if *short { Failure::Short } else { Failure::Error(error(*kind)) };
                self.host.fail_after(u64::from(after % 8), failure);
            }
            (None, Operation::Rare(rare)) => self.take_rare(rare),
            (None, _) => {}
        }
    }

    fn take_rare(&mut self, rare: &Rare) {
        let before = self.host.calls();
        match *rare {
            Rare::StopFailing => self.stop_failing(),
            Rare::Config { offset, value } => {
                let offset = pick(offset, &[36, 36, 36, 36, 35, 37, 0]);
                self.device.write_config(offset, &[value % 3]);
                self.oracle.write_config(offset, &[value % 3]);
            }
            Rare::Features { bypass_config } => {
                let mut features = self.device.features();
                if !bypass_config {
                    features &= !(1 << 6);
                }
                self.device.set_driver_features(features);
                self.oracle.set_driver_features(features);
            }
            Rare::Memory(which) => {
                self.memory = usize::from(which) % MEMORIES.len();
                self.device.set_memory(ram(self.memory));
                self.oracle.set_memory(regions(self.memory));
            }
            Rare::Reset => {
                self.device.reset();
                self.oracle.reset();
            }
            Rare::SystemReset => {
                self.device.system_reset();
                self.oracle.system_reset();
            }
            Rare::Move => self.move_to_another_host(),
            _ => {}
        }
        self.host_failed |= self.failed_since(before);
    }

    fn stop_failing(&mut self) {
        self.host.stop_failing();
        self.planned.clear();
    }

    fn failed_since(&self, before: u64) -> bool {
        self.planned.iter().any(|call| (before..self.host.calls()).contains(call))
    }

    fn move_to_another_host(&mut self) {
        let state = self.device.save();
        let (host, mut device) = device(self.flavour, self.boot_bypass);
        device.set_memory(ram(self.memory));
        device.restore(&state).expect("a state that a device was in is taken by another one");
        assert_eq!(device.save(), state, "what was restored is what was saved");
        self.planned.clear();
        // The host failed no more often than the one before: everything is there.
        (self.host, self.device, self.host_failed) = (host, device, false);
    }

    /// Sends a request to both.
    fn send(&mut self, request: &[u8], writable: usize) {
        let allowed = self.oracle.allowed(request, writable);
        let (mut reply, mut expected) = (vec![UNTOUCHED; writable], vec![UNTOUCHED; writable]);
        let before = self.host.calls();
        let used = self.device.handle(request, &mut reply);
        (used, &reply).hash(&mut self.seen);
        let failed = self.failed_since(before);
        self.host_failed |= failed;
        let untouched = self.oracle.clone();
        let expected_used = self.oracle.handle(request, &mut expected);
        assert_eq!(used, expected_used, "used length of {request:x?}");
        let Some(tail) = used.checked_sub(4) else {
            assert_eq!(reply, expected, "{request:x?} is not answered");
            return;
        };
        let (status, expected_status) = (reply[tail], expected[tail]);
        if status == expected_status {
            assert_eq!(reply, expected, "reply to {request:x?}");
            return;
        }
        let is_allowed = allowed.contains(&status) && (status == OK) == (expected_status == OK);
        // What a domain cannot have any more since the host failed, it is refused later, too.
        let is_hosts = failed && HOST_FAILED.contains(&status) || self.host_failed && status == DEVERR;
        assert!(is_allowed || is_hosts, "{request:x?} is answered with {status} instead of {allowed:?}");
        assert!(reply[..tail].iter().chain(&reply[tail + 1..]).all(|byte| *byte == 0), "reply to {request:x?}");
        // An UNMAP that the host failed is done all the same, as far as the domain's table goes; anything else is not.
        if is_hosts && (request[0], status) != (4, DEVERR) {
            self.oracle = untouched;
        }
    }

    /// Compares all that can be seen from outside without a request.
    pub fn check(&mut self) {
        assert_eq!(self.device.config(), self.oracle.config());
        for id in GROUPS.concat() {
            let attachment = self.host.attachment(EndpointId(id));
            if attachment == Attachment::AsFound {
                // What is mapped then is not the device's.
                assert!(self.is_in_bypass_unattached(id), "{id} is as it was found");
                continue;
            }
            let expected: BTreeMap<u64, Reach> =
                (0..PAGES).map(|page| (page, self.oracle.reaches(id, page * PAGE))).collect();
            let mapped = self.mapped(id);
            mapped.hash(&mut self.seen);
            for page in mapped.keys().chain(expected.keys()) {
                let expected = expected.get(page).copied().unwrap_or(Reach::Blocked);
                let found = mapped.get(page).copied().unwrap_or(Reach::Blocked);
                let less = self.host_failed && found == Reach::Blocked;
                assert!(
                    found == expected || less,
                    "endpoint {id} reaches {found:x?} at page {page}, not {expected:x?}"
                );
                self.check_dma(id, *page, found);
            }
        }
        assert!(self.host.table_count() <= GROUPS.len() + 1, "a table is left behind");
    }

    /// Whether no member of an endpoint's group is attached, and the configuration says bypass.
    fn is_in_bypass_unattached(&self, id: u32) -> bool {
        let is_attached = |member: &u32| {
            let mut domains = DOMAIN_RANGE.0..=DOMAIN_RANGE.1;
            domains.any(|domain| self.oracle.allowed(&fields(2, &[domain, *member, 0, 0]), 4) == [OK])
        };
        let group = GROUPS.iter().find(|members| members.contains(&id));
        self.oracle.config()[36] == 1 && !group.unwrap().iter().any(is_attached)
    }

    /// Where the model of the host sends a device's accesses in a page is where its table says.
    fn check_dma(&self, id: u32, page: u64, reach: Reach) {
        for offset in [0, PAGE - 1] {
            for access in [Access::READ, Access::WRITE] {
                let expected = match reach {
                    Reach::To { physical, read, write } if (access.read && read) || (access.write && write) => {
                        Some(physical + offset)
                    }
                    _ => None,
                };
                assert_eq!(self.host.dma(EndpointId(id), page * PAGE + offset, access), expected);
            }
        }
    }

    /// What the host's table of an endpoint's group has, by page.
    fn mapped(&self, id: u32) -> BTreeMap<u64, Reach> {
        let mut pages = BTreeMap::new();
        for mapping in self.host.mappings(EndpointId(id)) {
            let mut page = mapping.iova.start() / PAGE;
            let Access { read, write } = mapping.access;
            for (start, length) in mapping.to {
                for physical in (start..start + length).step_by(0x1000) {
                    pages.insert(page, Reach::To { physical, read, write });
                    page += 1;
                }
            }
            assert_eq!(page * PAGE - 1, mapping.iova.last());
        }
        pages
    }
}

fn device(flavour: Flavour, boot_bypass: bool) -> (FakeHost, VirtioIommu) {
    let host = FakeHost::new(flavour);
    let hole = [range(RESERVED), range(DOORBELL)].into_iter().collect();
    let narrow = RangeSet::from(IovaRange::ALL).subtract(&hole);
    let usable = |members: &[u32]| if members.contains(&NARROW) { narrow.clone() } else { IovaRange::ALL.into() };
    let ids = |members: &[u32]| members.iter().copied().map(EndpointId).collect::<Vec<_>>();
    let groups = GROUPS.map(|members| host.group(&ids(members), usable(members)));
    let reserved = vec![
        ReservedRegion { range: range(RESERVED), kind: ReservedKind::Reserved },
        ReservedRegion { range: range(DOORBELL), kind: ReservedKind::Msi },
    ];
    let view = |id| if id == NARROW { EndpointView::new(reserved.clone()).unwrap() } else { EndpointView::default() };
    let endpoints = GROUPS.concat().into_iter().map(|id| (EndpointId(id), view(id))).collect();
    let settings = Settings {
        domain_range: DOMAIN_RANGE.0..=DOMAIN_RANGE.1,
        probe_size: PROBE_SIZE,
        boot_bypass,
        max_domains: MAX_DOMAINS,
        max_mappings: MAX_MAPPINGS,
        max_mappings_in_all: MAX_MAPPINGS_IN_ALL,
        map_step: 2 * PAGE,
        ..Settings::new(range(INPUT_RANGE), PAGE)
    };
    let device = VirtioIommu::new(settings, endpoints, groups.to_vec()).unwrap();
    (host, device)
}

/// The same for the oracle.
fn facts(boot_bypass: bool) -> Facts {
    let reserved =
        |id| if id == NARROW { vec![(RESERVED.0, RESERVED.1, 0), (DOORBELL.0, DOORBELL.1, 1)] } else { vec![] };
    let members = GROUPS.iter().enumerate().flat_map(|(group, members)| members.iter().map(move |id| (group, *id)));
    Facts {
        granule: PAGE,
        input_range: INPUT_RANGE,
        domain_range: DOMAIN_RANGE,
        probe_size: PROBE_SIZE,
        boot_bypass,
        max_domains: MAX_DOMAINS,
        max_mappings: MAX_MAPPINGS,
        max_mappings_in_all: MAX_MAPPINGS_IN_ALL,
        ram: regions(0),
        endpoints: members.map(|(group, id)| EndpointFacts { id, group, reserved: reserved(id) }).collect(),
    }
}

fn range((start, last): (u64, u64)) -> IovaRange {
    IovaRange::new(start, last).unwrap()
}

fn ram(memory: usize) -> GuestRam {
    let ranges = regions(memory).into_iter().map(|(start, last)| (GuestAddress(start), last - start + 1));
    GuestRam::in_software(&ranges.collect::<Vec<_>>()).unwrap()
}

/// The first and last bytes of guest memory's regions.
fn regions(memory: usize) -> Vec<(u64, u64)> {
    MEMORIES[memory].iter().map(|(first, last)| (first * PAGE, (last + 1) * PAGE - 1)).collect()
}

fn error(kind: u8) -> HostErrorKind {
    match kind % 6 {
        0 => HostErrorKind::NoMemory,
        1 => HostErrorKind::Incompatible,
        2 => HostErrorKind::Gone,
        3 => HostErrorKind::Busy,
        4 => HostErrorKind::AlreadyMapped,
        _ => HostErrorKind::Other,
    }
}
