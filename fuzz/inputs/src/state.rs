// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Saved states: any text, and true ones with changes.

use virtio_iommu::device::{DeviceState, DomainState, FaultState, MappingState};
use virtio_iommu::host::fake::Flavour;
use virtio_iommu::memory::GuestRam;

use crate::machine::{GROUPS, LONE, Machine, PAIR, RAM, encode};
use crate::wire::{self, Field, operations};

operations! {
    /// A change to a state.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Change {
        /// Another version, seldom.
        Version { version: u8, },
        /// Flips one of the features.
        Feature { bit: u8, },
        /// Sets the configuration's bypass.
        Bypass { bypass: bool, },
        /// Adds a domain at the end.
        Domain { id: u32, bypass: bool, endpoint: u8, },
        /// Changes a domain's ID, to one of few.
        Rename { domain: u8, id: u8, },
        /// Puts an endpoint into a domain.
        Join { domain: u8, endpoint: u32, },
        /// Takes an endpoint out of a domain.
        Leave { domain: u8, which: u8, },
        /// Exchanges two domains.
        Swap { one: u8, other: u8, },
        /// Adds a mapping of pages.
        Map { domain: u8, page: u16, pages: u8, to: u16, access: u8, },
        /// Adds any mapping.
        MapRaw { domain: u8, first: u64, last: u64, physical: u64, },
        /// Removes a mapping.
        Unmap { domain: u8, which: u8, },
        /// Adds an event, so many times.
        Fault { reason: u8, endpoint: u8, address: u64, times: u8, },
    }
}

/// A state that a device was in: groups that have parted, a third domain, an event, and memory that has left.
fn busy(bypass: bool) -> DeviceState {
    let mut machine = Machine::new(Flavour::Iommufd, true);
    let [left, right] = PAIR.map(|id| id.0);
    for request in [
        encode::attach(7, left, 0),
        encode::attach(7, right, 0),
        encode::map(7, 0x1000, 0x2fff, 0x4000, 1),
        encode::map(7, 0x5000, 0xcfff, 0x4000, 3),
        encode::map(7, 0x4_0000, 0x4_0fff, 0x2_0000, 2),
        encode::attach(2, right, 0),
        encode::map(2, 0, 0xfff, 0, 0),
        encode::attach(3, LONE.0, bypass.into()),
    ] {
        let mut reply = [0xaa; 4];
        assert_eq!((machine.device.handle(&request, &mut reply), reply), (4, [0; 4]));
    }
    machine.device.set_memory(GuestRam::in_software(&RAM[..2]).expect("disjoint regions"));
    let mut state = machine.device.save();
    state.faults.push(FaultState { reason: 2, endpoint: left, address: Some(0x9000), read: false, write: true });
    state
}

impl Change {
    fn apply(&self, state: &mut DeviceState) {
        let count = state.domains.len().max(1);
        let domains = &mut state.domains;
        match self {
            Self::Version { version } => state.version = if *version < 8 { u32::from(*version) } else { 1 },
            Self::Feature { bit } => state.driver_features ^= 1 << (bit % 64),
            Self::Bypass { bypass } => state.bypass = *bypass,
            Self::Domain { id, bypass, endpoint } => domains.push(DomainState {
                id: *id,
                bypass: *bypass,
                endpoints: vec![known(*endpoint)],
                mappings: Vec::new(),
            }),
            Self::Rename { domain: index, id } => _ = nth(domains, *index).map(|domain| domain.id = u32::from(id % 10)),
            Self::Join { domain: index, endpoint } => {
                if let Some(domain) = nth(domains, *index) {
                    domain.endpoints.push(if *endpoint > 99 { *endpoint } else { known(*endpoint as u8) });
                }
            }
            Self::Leave { domain: index, which } => {
                if let Some(domain) = nth(domains, *index).filter(|domain| !domain.endpoints.is_empty()) {
                    domain.endpoints.remove(usize::from(*which) % domain.endpoints.len());
                }
            }
            Self::Swap { one, other } if !domains.is_empty() => {
                domains.swap(usize::from(*one) % count, usize::from(*other) % count);
            }
            Self::Swap { .. } => (),
            Self::Map { domain: index, page, pages, to, access } => {
                let first = u64::from(*page) << 12;
                let last = first + ((u64::from(*pages) + 1) << 12) - 1;
                let (read, write) = (access & 1 != 0, access & 2 != 0);
                let mapping = MappingState { first, last, physical: u64::from(*to) << 12, read, write };
                if let Some(domain) = nth(domains, *index) {
                    domain.mappings.push(mapping);
                }
            }
            Self::MapRaw { domain: index, first, last, physical } => {
                let mapping =
                    MappingState { first: *first, last: *last, physical: *physical, read: true, write: false };
                if let Some(domain) = nth(domains, *index) {
                    domain.mappings.push(mapping);
                }
            }
            Self::Unmap { domain: index, which } => {
                if let Some(domain) = nth(domains, *index).filter(|domain| !domain.mappings.is_empty()) {
                    domain.mappings.remove(usize::from(*which) % domain.mappings.len());
                }
            }
            Self::Fault { reason, endpoint, address, times } => {
                let fault = FaultState {
                    reason: reason % 4,
                    endpoint: known(*endpoint),
                    address: Some(*address).filter(|address| *address != 0),
                    read: true,
                    write: false,
                };
                state.faults.extend(std::iter::repeat_n(fault, usize::from(*times) + 1));
            }
        }
    }
}

/// One of the domains, if there is any.
fn nth(domains: &mut [DomainState], index: u8) -> Option<&mut DomainState> {
    let count = domains.len().max(1);
    domains.get_mut(usize::from(index) % count)
}

/// One of the endpoints, or one beside them.
fn known(endpoint: u8) -> u32 {
    let endpoints = GROUPS.concat();
    endpoints.get(usize::from(endpoint) % (endpoints.len() + 1)).map_or(99, |id| id.0)
}

/// The same state as a device writes it: what has no order is in order, and what it has no room for is gone.
fn in_order(mut state: DeviceState) -> DeviceState {
    for domain in &mut state.domains {
        domain.endpoints.sort_unstable();
        domain.mappings.sort_by_key(|mapping| mapping.first);
    }
    state.faults.truncate(256);
    state
}

fn restore(state: &DeviceState, flavour: Flavour, boot_bypass: bool) {
    let mut machine = Machine::new(flavour, boot_bypass);
    let (before, calls) = (machine.snapshot(), machine.host.calls());
    match machine.device.restore(state) {
        Ok(()) => {
            machine.check();
            let saved = machine.device.save();
            assert_eq!(saved, in_order(state.clone()), "another state is restored");
            let known: Vec<u32> = GROUPS.concat().iter().map(|id| id.0).collect();
            assert!(saved.faults.iter().all(|fault| known.contains(&fault.endpoint)), "an event is of no endpoint");
            let mut other = Machine::new(Flavour::Type1, !boot_bypass);
            other.device.restore(&saved).expect("what was saved can be restored");
            assert_eq!(other.device.save(), saved, "it is another one by the second time");
            other.check();
        }
        Err(error) => {
            assert_eq!(machine.host.calls(), calls, "a host was asked: {error}");
            assert!(machine.snapshot() == before, "something is changed: {error}");
            machine.device.restore(&busy(true)).expect("it is as good as new");
        }
    }
}

/// Restores the state that the bytes stand for: JSON, or changes to a true one.
pub fn check(mut bytes: &[u8]) {
    let options = u8::take(&mut bytes);
    let flavour = if options & 2 == 0 { Flavour::Iommufd } else { Flavour::Type1 };
    let state = if options & 1 == 0 {
        let mut state = busy(options & 8 == 0);
        for change in wire::all::<Change>(bytes) {
            change.apply(&mut state);
        }
        state
    } else {
        match serde_json::from_slice(bytes) {
            Ok(state) => state,
            Err(error) => return assert!(error.line() > 0, "an error says where: {error}"),
        }
    };
    restore(&state, flavour, options & 4 == 0);
    if bytes.len() < 64 {
        let text = serde_json::to_vec(&state).expect("numbers and names");
        assert_eq!(serde_json::from_slice::<DeviceState>(&text).expect("what was written is read"), state);
    }
}

/// The state itself, as text too, and changes of all kinds.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seed = |options: u8, changes: &[Change]| [vec![options], wire::bytes_of(changes)].concat();
    let text = serde_json::to_vec(&busy(true)).expect("numbers and names");
    vec![
        ("as-saved", seed(0, &[])),
        ("text", [vec![1], text].concat()),
        (
            "moved",
            seed(
                2,
                &[
                    Change::Leave { domain: 0, which: 0 },
                    Change::Join { domain: 2, endpoint: 2 },
                    Change::Unmap { domain: 2, which: 1 },
                    Change::Map { domain: 2, page: 0x60, pages: 1, to: 1, access: 3 },
                ],
            ),
        ),
        (
            "refused",
            seed(
                4,
                &[
                    Change::MapRaw { domain: 2, first: 0xfee0_0000, last: 0xfee0_0fff, physical: 0 },
                    Change::Rename { domain: 1, id: 2 },
                    Change::Domain { id: 9, bypass: true, endpoint: 3 },
                    Change::Swap { one: 0, other: 1 },
                    Change::Feature { bit: 7 },
                ],
            ),
        ),
        (
            "told",
            seed(
                0,
                &[Change::Fault { reason: 1, endpoint: 0, address: 1, times: 255 }, Change::Bypass { bypass: false }],
            ),
        ),
        ("together", seed(8, &[Change::Leave { domain: 2, which: 0 }, Change::Join { domain: 1, endpoint: 1 }])),
        ("early", seed(6, &[Change::Version { version: 2 }])),
    ]
}
