// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is done with all mappings of a domain at once: a second group joins it, or the device is restored.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use virtio_iommu::access::Access;
use virtio_iommu::device::{DeviceState, DomainState, MappingState, VirtioIommu};
use virtio_iommu::host::fake::{FakeHost, Flavour};
use virtio_iommu::host::{AttachError, Constraints, HostError, HostGroup, IoPageTable, MapError, UnmapError};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::HostSegment;
use virtio_iommu::range::{IovaRange, RangeSet};

use crate::case::{Case, Layout, MAPPINGS, PAGE, Work};
use crate::driver::Request;
use crate::requests::{DOMAIN, ENDPOINT, Machine, OTHER_ENDPOINT, Ours, physical, software_group};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("attach/replay", MAPPINGS, || replay(Layout::Dense)),
        Case::new("attach/replay/sparse", MAPPINGS, || replay(Layout::Sparse)),
        Case::new("restore", MAPPINGS, restore),
    ]
}

/// How many calls of the host a second group costs.
pub fn measure(wanted: impl Fn(&str) -> bool) -> Vec<(String, Value)> {
    let mut figures = Vec::new();
    for (name, layout) in
        [("attach/replay/host_maps", Layout::Dense), ("attach/replay/sparse/host_maps", Layout::Sparse)]
    {
        if wanted(name) {
            let (mut device, group) = replayed(layout);
            attach(&mut device);
            figures.push((name.to_owned(), json!({ "calls": group.calls.maps.load(Ordering::Relaxed) })));
        }
    }
    let [name, asked] = ["attach/host_calls_iommufd", "attach/host_calls_iommufd/asked"];
    if wanted(name) {
        let calls = share();
        figures.push((name.to_owned(), json!({ "calls": calls.changes.load(Ordering::Relaxed) })));
        figures.push((asked.to_owned(), json!({ "calls": calls.questions.load(Ordering::Relaxed) })));
    }
    figures
}

fn attach(device: &mut VirtioIommu) {
    let mut reply = [0xff; 4];
    let used = device.handle(Request::attach(DOMAIN, OTHER_ENDPOINT).bytes(), &mut reply);
    assert_eq!((used, reply), (4, [0; 4]), "the second group is attached");
}

/// A domain in which one group is, and a group that will want a table of its own.
fn replayed(layout: Layout) -> (VirtioIommu, Arc<PrivateGroup>) {
    let group = Arc::new(PrivateGroup { members: [EndpointId(OTHER_ENDPOINT)], calls: Arc::default() });
    let ours = Ours::new(vec![software_group(ENDPOINT), Arc::clone(&group) as _]);
    (Machine::with(ours, &layout.pages(MAPPINGS)).device.device, group)
}

/// The second group joins: each round is a mapping.
fn replay(layout: Layout) -> Work {
    let (mut device, group) = replayed(layout);
    Box::new(move |meter| {
        meter.measure(|| attach(&mut device));
        assert_eq!(
            group.calls.bytes.load(Ordering::Relaxed),
            MAPPINGS * PAGE,
            "the group reaches what the domain maps"
        );
    })
}

/// A new device takes on a state: each round is a mapping.
fn restore() -> Work {
    let mut ours = Ours::in_software();
    let mapping = |page| {
        let first = page * PAGE;
        MappingState { first, last: first + (PAGE - 1), physical: physical(page), read: true, write: true }
    };
    let mappings = (0..MAPPINGS).map(mapping).collect();
    let domain = DomainState { id: DOMAIN, bypass: false, endpoints: vec![ENDPOINT], mappings };
    let driver_features = ours.device.features();
    let version = DeviceState::VERSION;
    let state = DeviceState { version, driver_features, bypass: true, domains: vec![domain], faults: Vec::new() };
    Box::new(move |meter| {
        meter.measure(|| ours.device.restore(&state).unwrap());
        assert!(ours.device.save() == state, "it was restored");
    })
}

/// The calls that a second group costs on a host like iommufd.
fn share() -> Arc<Calls> {
    let host = FakeHost::new(Flavour::Iommufd);
    let calls = Arc::<Calls>::default();
    let group = |endpoint| -> Arc<dyn HostGroup> {
        let host = host.group(&[EndpointId(endpoint)], RangeSet::from(IovaRange::ALL));
        Arc::new(CountedGroup { host, calls: Arc::clone(&calls) })
    };
    let ours = Ours::new(vec![group(ENDPOINT), group(OTHER_ENDPOINT)]);
    let mut device = Machine::with(ours, &Layout::Sequential.pages(MAPPINGS)).device.device;
    calls.changes.store(0, Ordering::Relaxed);
    calls.questions.store(0, Ordering::Relaxed);
    attach(&mut device);
    assert_eq!(
        host.mappings(EndpointId(OTHER_ENDPOINT)).len() as u64,
        MAPPINGS,
        "the group reaches what the domain maps"
    );
    calls
}

/// What a host was asked.
#[derive(Debug, Default)]
struct Calls {
    /// Whatever changes it.
    changes: AtomicU64,
    /// What it can do.
    questions: AtomicU64,
    maps: AtomicU64,
    /// How many bytes it maps.
    bytes: AtomicU64,
}

/// A group on a host that does nothing, with tables that no other group can use.
#[derive(Debug)]
struct PrivateGroup {
    members: [EndpointId; 1],
    calls: Arc<Calls>,
}

impl HostGroup for PrivateGroup {
    fn members(&self) -> &[EndpointId] {
        &self.members
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        Ok(Arc::new(PrivateTable { calls: Arc::clone(&self.calls) }))
    }

    fn can_share(&self, _table: &dyn IoPageTable) -> bool {
        false
    }

    fn attach(&self, _table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        Ok(())
    }

    fn block(&self) {}
}

#[derive(Debug)]
struct PrivateTable {
    calls: Arc<Calls>,
}

impl IoPageTable for PrivateTable {
    fn map(&self, iova: IovaRange, _to: &[HostSegment], _access: Access) -> Result<(), MapError> {
        self.calls.maps.fetch_add(1, Ordering::Relaxed);
        self.calls.bytes.fetch_add(iova.length().unwrap(), Ordering::Relaxed);
        Ok(())
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, UnmapError> {
        Ok(iova.length().unwrap())
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        Ok(Constraints { usable: RangeSet::from(IovaRange::ALL), granule: PAGE })
    }
}

/// A group that counts what is asked of the host behind it.
#[derive(Debug)]
struct CountedGroup {
    host: Arc<dyn HostGroup>,
    calls: Arc<Calls>,
}

/// A table that does.
#[derive(Debug)]
struct CountedTable {
    table: Arc<dyn IoPageTable>,
    calls: Arc<Calls>,
}

impl CountedTable {
    fn of(table: &dyn IoPageTable) -> &Self {
        let table: &dyn Any = table;
        table.downcast_ref().expect("all tables are counted")
    }
}

impl Calls {
    fn change(&self) {
        self.changes.fetch_add(1, Ordering::Relaxed);
    }
}

impl HostGroup for CountedGroup {
    fn members(&self) -> &[EndpointId] {
        self.host.members()
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        self.calls.change();
        Ok(Arc::new(CountedTable { table: self.host.new_table()?, calls: Arc::clone(&self.calls) }))
    }

    fn can_share(&self, table: &dyn IoPageTable) -> bool {
        self.host.can_share(CountedTable::of(table).table.as_ref())
    }

    fn attach(&self, table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        self.calls.change();
        self.host.attach(&CountedTable::of(table.as_ref()).table)
    }

    fn block(&self) {
        self.calls.change();
        self.host.block();
    }
}

impl IoPageTable for CountedTable {
    fn map(&self, iova: IovaRange, to: &[HostSegment], access: Access) -> Result<(), MapError> {
        self.calls.change();
        self.table.map(iova, to, access)
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, UnmapError> {
        self.calls.change();
        self.table.unmap(iova)
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        self.calls.questions.fetch_add(1, Ordering::Relaxed);
        self.table.constraints()
    }
}
