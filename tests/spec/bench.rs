// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device over the model of a host, and a look at all that a request could change.

use virtio_iommu::access::Access;
use virtio_iommu::device::{DeviceState, Settings, VirtioIommu};
use virtio_iommu::host::fake::{Attachment, FakeHost, FakeMapping, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};
use vm_memory::GuestAddress;

pub use crate::status::*;

/// `VIRTIO_IOMMU_MAP_F_*`.
pub const READ: u32 = 1;
pub const WRITE: u32 = 2;
pub const MMIO: u32 = 4;

/// `VIRTIO_IOMMU_ATTACH_F_BYPASS`.
pub const BYPASS: u32 = 1;

/// What the device-writable part has in it before the device writes.
pub const UNWRITTEN: u8 = 0xaa;

/// Alone in its host group. It alone cannot reach [`HOLE`].
pub const LONE: u32 = 0x08;
/// In one host group with [`RIGHT`].
pub const LEFT: u32 = 0x10;
/// In one host group with [`LEFT`].
pub const RIGHT: u32 = 0x11;
/// No endpoint.
pub const NOBODY: u32 = 0x99;

/// The host's groups.
const GROUPS: [&[u32]; 2] = [&[LONE], &[LEFT, RIGHT]];

/// How the model of a host behaves: what holds for the device holds on both.
pub const FLAVOURS: [Flavour; 2] = [Flavour::Iommufd, Flavour::Type1];

/// The granule.
pub const PAGE: u64 = 0x1000;
/// Guest memory is from address 0 to here.
pub const RAM_SIZE: u64 = 0x100_0000;
/// The last address that can be mapped.
pub const LAST: u64 = 0xffff_ffff_ffff;
/// The doorbell for interrupts of every endpoint: the first address and the last.
pub const DOORBELL: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
/// What [`LONE`] has reserved besides.
pub const HOLE: (u64, u64) = (0xfd_0000_0000, 0xff_ffff_ffff);
/// How long the list of properties is: two of them, and 16 bytes.
pub const PROBE_SIZE: usize = 64;
/// Where `bypass` is in the configuration.
pub const BYPASS_OFFSET: usize = 36;

pub struct Bench {
    pub host: FakeHost,
    pub device: VirtioIommu,
}

/// What came back with a buffer.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub used: usize,
    /// The whole device-writable part.
    pub bytes: Vec<u8>,
}

/// All that a request could change: the device's side, and the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    config: [u8; 40],
    state: DeviceState,
    groups: Vec<(u32, Attachment, Vec<FakeMapping>)>,
    tables: usize,
}

/// A range of virtual addresses, the last one included.
pub fn range((start, last): (u64, u64)) -> IovaRange {
    IovaRange::new(start, last).unwrap()
}

pub fn region(addresses: (u64, u64), kind: ReservedKind) -> ReservedRegion {
    ReservedRegion { range: range(addresses), kind }
}

pub fn settings() -> Settings {
    Settings { probe_size: PROBE_SIZE as u32, ..Settings::new(range((0, LAST)), PAGE) }
}

/// What the guest is told of an endpoint.
fn view(endpoint: u32) -> EndpointView {
    let mut regions = vec![region(DOORBELL, ReservedKind::Msi)];
    if endpoint == LONE {
        regions.push(region(HOLE, ReservedKind::Reserved));
    }
    EndpointView::new(regions).unwrap()
}

impl Bench {
    /// A device whose driver has accepted all that is offered.
    pub fn new(flavour: Flavour) -> Self {
        Self::with(flavour, settings())
    }

    pub fn with(flavour: Flavour, settings: Settings) -> Self {
        Self::with_view_of_lone(flavour, settings, view(LONE))
    }

    pub fn with_view_of_lone(flavour: Flavour, settings: Settings, lone: EndpointView) -> Self {
        let host = FakeHost::new(flavour);
        // The host would map everything: what is refused is refused by the device.
        let group = |members: &&[u32]| {
            let members: Vec<EndpointId> = members.iter().copied().map(EndpointId).collect();
            host.group(&members, RangeSet::from(IovaRange::ALL))
        };
        let groups = GROUPS.iter().map(group).collect();
        let views = [(LONE, lone), (LEFT, view(LEFT)), (RIGHT, view(RIGHT))];
        let endpoints = views.map(|(id, view)| (EndpointId(id), view)).to_vec();
        let mut device = VirtioIommu::new(settings, endpoints, groups).unwrap();
        let half = RAM_SIZE / 2;
        device.set_memory(GuestRam::in_software(&[(GuestAddress(0), half), (GuestAddress(half), half)]).unwrap());
        device.set_driver_features(device.features());
        Self { host, device }
    }

    /// Sends a request and looks at nothing but what comes back.
    pub fn send(&mut self, request: &[u8], writable: usize) -> Reply {
        let mut bytes = vec![UNWRITTEN; writable];
        let used = self.device.handle(request, &mut bytes);
        Reply { used, bytes }
    }

    /// Sends a request with room for a status only, and returns the status. The rest is checked: the used length, that the tail's
    /// reserved bytes are zero, that a refusal changed nothing, and that a success changed nothing that it does not name.
    pub fn status(&mut self, request: &[u8]) -> u8 {
        let before = self.picture();
        let reply = self.send(request, 4);
        assert_eq!((reply.used, &reply.bytes[1..]), (4, &[0; 3][..]), "{request:x?}");
        let after = self.picture();
        if reply.bytes[0] == OK {
            assert_eq!(after.bystanders(request), before.bystanders(request), "{request:x?}");
        } else {
            assert_eq!(after, before, "{request:x?} was refused");
        }
        reply.bytes[0]
    }

    /// Sends a request that changes nothing, whatever the answer to it.
    pub fn inquire(&mut self, request: &[u8], writable: usize) -> Reply {
        let before = self.picture();
        let reply = self.send(request, writable);
        assert_eq!(self.picture(), before, "{request:x?}");
        reply
    }

    pub fn picture(&mut self) -> Picture {
        let group = |members: &&[u32]| {
            let first = EndpointId(members[0]);
            (first.0, self.host.attachment(first), self.host.mappings(first))
        };
        let groups = GROUPS.iter().map(group).collect();
        Picture { config: self.device.config(), state: self.device.save(), groups, tables: self.host.table_count() }
    }

    pub fn bypass(&self) -> u8 {
        self.device.config()[BYPASS_OFFSET]
    }

    pub fn attachment(&self, endpoint: u32) -> Attachment {
        self.host.attachment(EndpointId(endpoint))
    }

    /// Where an endpoint's read arrives; `None` if it is refused.
    pub fn read(&self, endpoint: u32, iova: u64) -> Option<u64> {
        self.host.dma(EndpointId(endpoint), iova, Access::READ)
    }

    /// Where an endpoint's write arrives; `None` if it is refused.
    pub fn write(&self, endpoint: u32, iova: u64) -> Option<u64> {
        self.host.dma(EndpointId(endpoint), iova, Access::WRITE)
    }

    /// Whether an endpoint reaches the first and the last byte of guest memory, each at its own address, and nothing behind.
    pub fn reaches_memory_as_it_is(&self, endpoint: u32) -> bool {
        let reaches = |address| self.host.dma(EndpointId(endpoint), address, Access::READ_WRITE) == Some(address);
        reaches(0) && reaches(RAM_SIZE - 1) && !reaches(RAM_SIZE)
    }
}

impl Picture {
    /// What a request that succeeded leaves alone: the configuration, the domains that it does not name, and the host groups that it
    /// does not reach.
    fn bystanders(&self, request: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes(request[at * 4..][..4].try_into().unwrap());
        let domain = word(1);
        let endpoint = matches!(request[0], 1 | 2).then(|| word(2));
        let in_domain = |id: &u32| self.state.domains.iter().any(|it| it.id == domain && it.endpoints.contains(id));
        let is_reached = |id: &u32| endpoint.map_or_else(|| in_domain(id), |endpoint| *id == endpoint);
        let reached: Vec<u32> =
            GROUPS.iter().filter(|members| members.iter().any(is_reached)).map(|members| members[0]).collect();
        let mut rest = self.clone();
        rest.groups.retain(|(first, ..)| !reached.contains(first));
        for domain in &mut rest.state.domains {
            domain.endpoints.retain(|id| Some(*id) != endpoint);
        }
        rest.state.domains.retain(|it| it.id != domain && !it.endpoints.is_empty());
        rest.tables = 0;
        rest
    }
}
