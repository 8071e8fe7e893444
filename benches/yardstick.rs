// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The yardstick: a virtio-iommu device as one would write it first. Mappings in a `BTreeMap`, virtio-queue as it is, a buffer
//! allocated for each request. It does ATTACH, MAP and UNMAP for one domain, with the checks that the specification asks for, and
//! maps nothing on any host.

use std::collections::{BTreeMap, BTreeSet};

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::Bytes;

use crate::case::PAGE;
use crate::driver::Memory;
use crate::machine::Device;

const ATTACH: u8 = 1;
const MAP: u8 = 3;
const UNMAP: u8 = 4;

const OK: u8 = 0;
const INVALID: u8 = 4;
const RANGE: u8 = 5;
const NO_ENTRY: u8 = 6;
const FAULT: u8 = 7;

const TAIL: usize = 4;
/// A mapping may be read, and written.
const MAP_FLAGS: u32 = 3;

/// A device with one endpoint and at most one domain.
pub struct Yardstick {
    endpoint: u32,
    /// The last address that can be mapped.
    last_input: u64,
    memory_size: u64,
    domain: Option<Domain>,
}

struct Domain {
    id: u32,
    endpoints: BTreeSet<u32>,
    /// By first address.
    mappings: BTreeMap<u64, Mapping>,
}

#[expect(dead_code, reason = "nobody asks this device for a translation")]
struct Mapping {
    last: u64,
    physical: u64,
    flags: u32,
}

impl Yardstick {
    pub const fn new(endpoint: u32, last_input: u64, memory_size: u64) -> Self {
        Self { endpoint, last_input, memory_size, domain: None }
    }

    /// Handles the request in a chain; the used length.
    fn handle(&mut self, chain: DescriptorChain<&Memory>, memory: &Memory) -> u32 {
        let mut request = Vec::new();
        let mut writable = Vec::new();
        for descriptor in chain {
            if descriptor.is_write_only() {
                writable.push(descriptor);
                continue;
            }
            let start = request.len();
            request.resize(start + descriptor.len() as usize, 0);
            if memory.read_slice(&mut request[start..], descriptor.addr()).is_err() {
                return 0;
            }
        }
        let length: usize = writable.iter().map(|descriptor| descriptor.len() as usize).sum();
        if length < TAIL {
            return 0;
        }
        let Some(status) = self.status_of(&request) else {
            return 0;
        };
        let mut reply = vec![0; length];
        reply[length - TAIL] = status;
        let mut left = &reply[..];
        for descriptor in writable {
            let (now, later) = left.split_at(descriptor.len() as usize);
            if memory.write_slice(now, descriptor.addr()).is_err() {
                return 0;
            }
            left = later;
        }
        length as u32
    }

    /// Does what a request asks for; `None` if it is of an unknown kind.
    fn status_of(&mut self, request: &[u8]) -> Option<u8> {
        let result = match *request.first()? {
            ATTACH => self.attach(request),
            MAP => self.map(request),
            UNMAP => self.unmap(request),
            _ => return None,
        };
        Some(result.unwrap_or(INVALID))
    }

    /// The status; `None` for a request that is too short.
    fn attach(&mut self, request: &[u8]) -> Option<u8> {
        let (id, endpoint, flags) = (u32_at(request, 4)?, u32_at(request, 8)?, u32_at(request, 12)?);
        if flags != 0 || u32_at(request, 16)? != 0 {
            return Some(INVALID);
        }
        if endpoint != self.endpoint {
            return Some(NO_ENTRY);
        }
        match &mut self.domain {
            Some(domain) if domain.id == id => _ = domain.endpoints.insert(endpoint),
            _ => {
                self.domain = Some(Domain { id, endpoints: BTreeSet::from([endpoint]), mappings: BTreeMap::new() });
            }
        }
        Some(OK)
    }

    fn map(&mut self, request: &[u8]) -> Option<u8> {
        let (first, last) = (u64_at(request, 8)?, u64_at(request, 16)?);
        let (physical, flags) = (u64_at(request, 24)?, u32_at(request, 32)?);
        if flags & !MAP_FLAGS != 0 {
            return Some(INVALID);
        }
        if last < first || physical.checked_add(last - first).is_none() {
            return Some(RANGE);
        }
        let Some(domain) = find(&mut self.domain, u32_at(request, 4)?) else {
            return Some(NO_ENTRY);
        };
        let aligned = [first, last.wrapping_add(1), physical].iter().all(|address| address.is_multiple_of(PAGE));
        if !aligned || last > self.last_input {
            return Some(RANGE);
        }
        if domain.last_before(last).is_some_and(|(_, mapping)| mapping.last >= first) {
            return Some(INVALID);
        }
        if physical + (last - first) >= self.memory_size {
            return Some(FAULT);
        }
        domain.mappings.insert(first, Mapping { last, physical, flags });
        Some(OK)
    }

    fn unmap(&mut self, request: &[u8]) -> Option<u8> {
        let (first, last) = (u64_at(request, 8)?, u64_at(request, 16)?);
        if u32_at(request, 24)? != 0 {
            return Some(INVALID);
        }
        if last < first {
            return Some(RANGE);
        }
        let Some(domain) = find(&mut self.domain, u32_at(request, 4)?) else {
            return Some(NO_ENTRY);
        };
        let split_before =
            domain.last_before(first).is_some_and(|(start, mapping)| start < first && mapping.last >= first);
        let split_behind = domain.last_before(last).is_some_and(|(_, mapping)| mapping.last > last);
        if split_before || split_behind {
            return Some(RANGE);
        }
        let inside: Vec<u64> = domain.mappings.range(first..=last).map(|(start, _)| *start).collect();
        for start in inside {
            domain.mappings.remove(&start);
        }
        Some(OK)
    }
}

impl Domain {
    /// The last mapping that starts at this address or before.
    fn last_before(&self, address: u64) -> Option<(u64, &Mapping)> {
        self.mappings.range(..=address).next_back().map(|(start, mapping)| (*start, mapping))
    }
}

fn find(domain: &mut Option<Domain>, id: u32) -> Option<&mut Domain> {
    domain.as_mut().filter(|domain| domain.id == id)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

impl Device for Yardstick {
    fn process(&mut self, queue: &mut Queue, memory: &Memory) {
        loop {
            queue.disable_notification(memory).unwrap();
            while let Some(chain) = queue.pop_descriptor_chain(memory) {
                let head = chain.head_index();
                let used = self.handle(chain, memory);
                queue.add_used(memory, head, used).unwrap();
            }
            if !queue.enable_notification(memory).unwrap() {
                break;
            }
        }
        // Whether the driver wants to hear of it, as it is for the device beside it, which asks too.
        queue.needs_notification(memory).unwrap();
    }

    fn handle(&mut self, request: &[u8]) -> u8 {
        self.status_of(request).expect("a request of a known kind")
    }

    fn mappings(&mut self) -> usize {
        self.domain.as_ref().expect("a domain").mappings.len()
    }
}
