// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests, resets and host failures in any order, on the model of a host: whatever comes, an endpoint's DMA goes where
//! the guest said or nowhere, and while the host refuses nothing, all that the guest mapped is there.

use std::collections::BTreeMap;

use arbitrary::{Arbitrary, Unstructured};
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::{Attachment, Failure, FakeHost, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::spec::config;
use vm_memory::GuestAddress;

const ENDPOINTS: [EndpointId; 2] = [EndpointId(8), EndpointId(9)];
const RAM: u64 = 0x10_0000;
const PAGE: u64 = 0x1000;
const ATTACH_BYPASS: u32 = 1;
const UNTOUCHED: u8 = 0xaa;

#[derive(Arbitrary, Debug)]
enum Operation {
    Raw { bytes: Vec<u8>, writable: u16 },
    Attach { domain: u8, endpoint: u8, flags: u8 },
    Detach { domain: u8, endpoint: u8 },
    Map { domain: u8, page: u8, pages: u8, to: u8, flags: u8 },
    Unmap { domain: u8, page: u8, pages: u8 },
    Probe { endpoint: u8, writable: u16 },
    Fail { after: u8, short: bool, kind: u8 },
    StopFailing,
    Bypass { value: u8 },
    Reset,
    SystemReset,
}

#[derive(Arbitrary, Debug)]
struct Input {
    type1: bool,
    boot_bypass: bool,
    operations: Vec<Operation>,
}

/// What the guest was told of an endpoint.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Nowhere,
    In(u32),
    /// The host failed in the middle of an ATTACH or DETACH.
    Unknown,
}

/// A domain as the guest knows it.
#[derive(Default)]
struct Domain {
    bypass: bool,
    /// Page numbers to guest-physical addresses and flags.
    pages: BTreeMap<u64, (u64, u32)>,
}

/// The device, and what the guest concludes from its answers alone.
struct Machine {
    host: FakeHost,
    device: VirtioIommu,
    boot_bypass: bool,
    bypass: bool,
    places: [Place; 2],
    domains: BTreeMap<u32, Domain>,
    host_refused: bool,
}

impl Machine {
    fn new(input: &Input) -> Self {
        let host = FakeHost::new(if input.type1 { Flavour::Type1 } else { Flavour::Iommufd });
        let groups = ENDPOINTS.map(|id| host.group(&[id], RangeSet::from(IovaRange::ALL)));
        let endpoints = ENDPOINTS.map(|id| (id, EndpointView::default()));
        let input_range = IovaRange::new(0, 0xffff_ffff).unwrap();
        let settings = Settings { boot_bypass: input.boot_bypass, ..Settings::new(input_range, PAGE) };
        let mut device = VirtioIommu::new(settings, endpoints.to_vec(), groups.to_vec()).unwrap();
        device.set_memory(GuestRam::in_software(&[(GuestAddress(0), RAM)]).unwrap());
        device.set_driver_features(device.features());
        Self {
            host,
            device,
            boot_bypass: input.boot_bypass,
            bypass: input.boot_bypass,
            places: [Place::Nowhere; 2],
            domains: BTreeMap::new(),
            host_refused: false,
        }
    }

    fn run(&mut self, operation: Operation) {
        match operation {
            Operation::Raw { bytes, writable } => self.send(&bytes, usize::from(writable)),
            Operation::Attach { domain, endpoint, flags } => {
                self.send(&fields(1, &[few(domain), near(endpoint), flags.into(), 0]), 4);
            }
            Operation::Detach { domain, endpoint } => self.send(&fields(2, &[few(domain), near(endpoint), 0, 0]), 4),
            Operation::Map { domain, page, pages, to, flags } => {
                let mut bytes = range(3, domain, page, pages);
                bytes.extend((u64::from(to) * PAGE).to_le_bytes());
                bytes.extend(u32::from(flags).to_le_bytes());
                self.send(&bytes, 4);
            }
            Operation::Unmap { domain, page, pages } => {
                let mut bytes = range(4, domain, page, pages);
                bytes.extend([0; 4]);
                self.send(&bytes, 4);
            }
            Operation::Probe { endpoint, writable } => {
                let mut bytes = fields(5, &[near(endpoint)]);
                bytes.resize(72, 0);
                self.send(&bytes, usize::from(writable));
            }
            Operation::Fail { after, short, kind } => {
                self.host_refused = true;
                let kind = match kind % 4 {
                    0 => HostErrorKind::NoMemory,
                    1 => HostErrorKind::Incompatible,
                    2 => HostErrorKind::Gone,
                    _ => HostErrorKind::Other,
                };
                self.host.fail_after(after.into(), if short { Failure::Short } else { Failure::Error(kind) });
            }
            Operation::StopFailing => self.host.stop_failing(),
            Operation::Bypass { value } => {
                self.device.write_config(config::BYPASS, &[value]);
                if value < 2 {
                    self.bypass = value == 1;
                }
                assert_eq!(self.device.config()[config::BYPASS], u8::from(self.bypass));
            }
            Operation::Reset => {
                self.device.reset();
                self.forget();
            }
            Operation::SystemReset => {
                self.device.system_reset();
                self.bypass = self.boot_bypass;
                self.forget();
            }
        }
    }

    fn forget(&mut self) {
        self.places = [Place::Nowhere; 2];
        self.domains.clear();
        self.device.set_driver_features(self.device.features());
    }

    fn send(&mut self, request: &[u8], writable: usize) {
        let mut reply = vec![UNTOUCHED; writable];
        let used = self.device.handle(request, &mut reply);
        if used == 0 {
            assert!(reply.iter().all(|byte| *byte == UNTOUCHED), "an unused buffer was written");
            return;
        }
        assert_eq!(used, writable, "the whole buffer is used");
        let tail = &reply[used - 4..];
        assert_eq!(tail[1..], [0; 3]);
        self.conclude(request, tail[0] == 0);
    }

    /// What a guest makes of an answer.
    fn conclude(&mut self, request: &[u8], done: bool) {
        let word = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
        match (request[0], done) {
            (1, true) => {
                let (domain, endpoint) = (word(4), word(8));
                self.place(endpoint, Place::In(domain));
                self.domains.entry(domain).or_default().bypass |= word(12) & ATTACH_BYPASS != 0;
                self.drop_empty_domains();
            }
            (2, true) => {
                self.place(word(8), Place::Nowhere);
                self.drop_empty_domains();
            }
            (1 | 2, false) if self.host_refused && request.len() >= 12 => self.place(word(8), Place::Unknown),
            (3, true) => {
                let (start, last, physical) = (long(8), long(16), long(24));
                assert!(last - start < RAM && physical < RAM, "more than guest memory was mapped");
                let domain = self.domains.get_mut(&word(4)).expect("a MAP to no domain was accepted");
                for iova in (start..=last).step_by(PAGE as usize) {
                    domain.pages.insert(iova / PAGE, (physical + (iova - start), word(32)));
                }
            }
            (4, true) => {
                let domain = self.domains.get_mut(&word(4)).expect("an UNMAP of no domain was accepted");
                domain.pages.retain(|page, _| !(long(8)..=long(16)).contains(&(page * PAGE)));
            }
            _ => {}
        }
    }

    fn place(&mut self, endpoint: u32, place: Place) {
        if let Some(index) = ENDPOINTS.iter().position(|id| id.0 == endpoint) {
            self.places[index] = place;
        }
    }

    /// A domain ends with its last endpoint; one whose state is not known may be in any.
    fn drop_empty_domains(&mut self) {
        if !self.places.contains(&Place::Unknown) {
            let places = self.places;
            self.domains.retain(|id, _| places.contains(&Place::In(*id)));
        }
    }

    fn check(&self) {
        for (id, place) in ENDPOINTS.into_iter().zip(self.places) {
            let identity = match place {
                Place::Unknown => continue,
                Place::Nowhere => self.bypass,
                Place::In(domain) => self.domains[&domain].bypass,
            };
            assert!(identity || self.host.attachment(id) != Attachment::AsFound, "{id} is not translated");
            let mut reached = 0;
            for mapping in self.host.mappings(id) {
                if identity {
                    assert_eq!(mapping.to, [(mapping.iova.start(), mapping.iova.last() - mapping.iova.start() + 1)]);
                    continue;
                }
                let Place::In(domain) = place else { panic!("{id} is in no domain and reaches {}", mapping.iova) };
                for iova in (mapping.iova.start()..=mapping.iova.last()).step_by(PAGE as usize) {
                    let (physical, flags) =
                        self.domains[&domain].pages.get(&(iova / PAGE)).expect("what is not mapped");
                    let said = (flags & 1 != 0, flags & 2 != 0);
                    assert_eq!((mapping.access.read, mapping.access.write), said, "other permissions at {iova:#x}");
                    assert_eq!(self.host.dma(id, iova, mapping.access), Some(*physical), "another place at {iova:#x}");
                    reached += 1;
                }
            }
            if let (Place::In(domain), false, false) = (place, identity, self.host_refused) {
                // A mapping without permissions is nothing to the host.
                let said = self.domains[&domain].pages.values().filter(|(_, flags)| *flags != 0).count();
                assert_eq!(reached, said, "something mapped is not reached");
            }
        }
    }
}

/// One of a few domains, so that operations meet.
fn few(domain: u8) -> u32 {
    u32::from(domain % 3)
}

/// An endpoint of the device, or one next to them.
fn near(endpoint: u8) -> u32 {
    u32::from(7 + endpoint % 4)
}

fn fields(kind: u8, fields: &[u32]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    bytes
}

fn range(kind: u8, domain: u8, page: u8, pages: u8) -> Vec<u8> {
    let start = u64::from(page) * PAGE;
    let mut bytes = fields(kind, &[few(domain)]);
    bytes.extend(start.to_le_bytes());
    bytes.extend((start + u64::from(pages) * PAGE).wrapping_sub(1).to_le_bytes());
    bytes
}

/// Takes the operations that the bytes stand for, and compares after each.
pub fn check(bytes: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    let mut machine = Machine::new(&input);
    for operation in input.operations {
        machine.run(operation);
        machine.check();
    }
}
