// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is done with all mappings of a domain at once: a second group joins it, or the device is restored.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use virtio_iommu::device::{DeviceState, DomainState, MappingState, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::fake::{FakeHost, Flavour};
use virtio_iommu::id::EndpointId;
use virtio_iommu::range::{IovaRange, RangeSet};

use crate::case::{Case, Layout, MAPPINGS, PAGE, Work};
use crate::driver::Request;
use crate::hosts::{Calls, CountedGroup, PrivateGroup};
use crate::machine::{DOMAIN, ENDPOINT, Machine, OTHER_ENDPOINT, Ours, physical, software_group};

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
        let (changes, questions) = share();
        figures.push((name.to_owned(), json!({ "calls": changes })));
        figures.push((asked.to_owned(), json!({ "calls": questions })));
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

/// What a second group costs on a host like iommufd: calls that change something, and calls that ask what it can do.
fn share() -> (u64, u64) {
    let host = FakeHost::new(Flavour::Iommufd);
    let calls = Arc::<Calls>::default();
    let group = |endpoint| -> Arc<dyn HostGroup> {
        let host = host.group(&[EndpointId(endpoint)], RangeSet::from(IovaRange::ALL));
        Arc::new(CountedGroup { host, calls: Arc::clone(&calls) })
    };
    let ours = Ours::new(vec![group(ENDPOINT), group(OTHER_ENDPOINT)]);
    let mut device = Machine::with(ours, &Layout::Sequential.pages(MAPPINGS)).device.device;
    let so_far = || [&calls.changes, &calls.questions].map(|count| count.load(Ordering::Relaxed));
    let before = so_far();
    attach(&mut device);
    let after = so_far();
    assert_eq!(
        host.mappings(EndpointId(OTHER_ENDPOINT)).len() as u64,
        MAPPINGS,
        "the group reaches what the domain maps"
    );
    (after[0] - before[0], after[1] - before[1])
}
