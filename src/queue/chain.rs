// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Descriptor chains.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemory};

use super::memory::{Memory, Part};
use super::ring::Ring;
use crate::device::{Progress, UnfinishedMap, VirtioIommu};
use crate::request::LARGEST_REPLY;
use crate::spec;

/// How many descriptors a chain may have. A request of one byte to a descriptor fits; an indirect table of 65535 empty ones
/// is returned unwritten.
const MOST_DESCRIPTORS: usize = 256;
/// `struct virtq_desc`.
const DESCRIPTOR_SIZE: usize = 16;

/// One descriptor chain: walked once, its device-readable part read once. Reused from chain to chain.
#[derive(Debug)]
pub(super) struct Chain {
    /// As much of the device-readable part as any request has.
    request: [u8; spec::LARGEST_REQUEST],
    /// How much of it there is.
    readable: usize,
    writable: Vec<Buffer>,
    /// How many bytes can be written.
    room: usize,
    /// How many bytes the chain has in all.
    length: u32,
    descriptors: usize,
    reply: Vec<u8>,
}

/// A piece of guest memory.
#[derive(Debug)]
struct Buffer {
    start: GuestAddress,
    length: usize,
}

/// A chain that breaks the rules, is not in guest memory, or is more than any request needs: it is returned unwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl Default for Chain {
    fn default() -> Self {
        let request = [0; spec::LARGEST_REQUEST];
        Self { request, readable: 0, writable: Vec::new(), room: 0, length: 0, descriptors: 0, reply: Vec::new() }
    }
}

impl Chain {
    /// Walks the chain that starts with this descriptor.
    pub fn read<M: GuestMemory>(&mut self, ring: &mut Ring<'_, M>, head: u16) -> Result<(), Malformed> {
        self.writable.clear();
        (self.readable, self.room, self.length, self.descriptors) = (0, 0, 0, 0);
        let mut indirect = None;
        let mut descriptor = ring.table.descriptor(head)?;
        loop {
            if descriptor.refers_to_indirect_table() {
                // 2.7.5.3.1: no table refers to another.
                if indirect.is_some() {
                    return Err(Malformed);
                }
                descriptor = indirect.insert(Table::indirect(&mut ring.memory, &descriptor)?).descriptor(0)?;
                continue;
            }
            self.add(&mut ring.memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            descriptor = indirect.as_ref().unwrap_or(&ring.table).descriptor(descriptor.next())?;
        }
    }

    /// Adds a descriptor: what the device may read is read, what it may write is noted.
    fn add<M: GuestMemory>(&mut self, memory: &mut Memory<'_, M>, descriptor: &Descriptor) -> Result<(), Malformed> {
        let (start, length) = (descriptor.addr(), descriptor.len() as usize);
        // 2.7.5.2: no chain is longer than 2^32 bytes.
        self.length = self.length.checked_add(descriptor.len()).ok_or(Malformed)?;
        self.descriptors += 1;
        if descriptor.is_write_only() {
            self.room += length;
            self.writable.push(Buffer { start, length });
        } else {
            let free = self.request.get_mut(self.readable..).unwrap_or_default();
            let taken = free.len().min(length);
            memory.read(start, free.get_mut(..taken).unwrap_or_default()).map_err(|_| Malformed)?;
            self.readable += taken;
        }
        if self.descriptors <= MOST_DESCRIPTORS && self.room <= LARGEST_REPLY { Ok(()) } else { Err(Malformed) }
    }

    /// Begins the request in the chain that starts with this descriptor.
    pub fn begin<M: GuestMemory>(&mut self, device: &mut VirtioIommu, ring: &mut Ring<'_, M>, head: u16) -> Progress {
        match self.read(ring, head) {
            Ok(()) => {
                // What was there is written over, or not shown.
                self.reply.resize(self.room, 0);
                device.begin(self.request.get(..self.readable).unwrap_or_default(), &mut self.reply)
            }
            // Nothing that the device could know.
            Err(Malformed) => device.begin(&[], &mut []),
        }
    }

    /// Goes on with the request in it.
    pub fn go_on(&mut self, device: &mut VirtioIommu, map: UnfinishedMap) -> Progress {
        device.go_on(map, &mut self.reply)
    }

    /// Writes so much of the reply; the used length. A reply that cannot be written is lost; what it answers has been done.
    pub fn reply<M: GuestMemory>(&self, ring: &mut Ring<'_, M>, used: usize) -> u32 {
        self.reply.get(..used).and_then(|bytes| self.write(ring, bytes)).unwrap_or(0)
    }

    /// How many bytes can be written.
    pub const fn room(&self) -> usize {
        self.room
    }

    /// Writes bytes to the start of the device-writable part; the used length, or `None` if it is not in guest memory.
    pub fn write<M: GuestMemory>(&self, ring: &mut Ring<'_, M>, bytes: &[u8]) -> Option<u32> {
        let mut left = bytes;
        for buffer in &self.writable {
            let (now, later) = left.split_at(left.len().min(buffer.length));
            ring.memory.write(buffer.start, now).ok()?;
            left = later;
        }
        u32::try_from(bytes.len() - left.len()).ok()
    }
}

/// A table of descriptors.
pub(super) struct Table<'m, M: GuestMemory> {
    part: Part<'m, M>,
    count: u16,
}

impl<'m, M: GuestMemory> Table<'m, M> {
    /// The table of a queue of this size.
    pub fn new(memory: &mut Memory<'m, M>, start: GuestAddress, count: u16) -> Self {
        Self { part: memory.part(start, usize::from(count) * DESCRIPTOR_SIZE), count }
    }

    /// The table that a descriptor refers to.
    fn indirect(memory: &mut Memory<'m, M>, descriptor: &Descriptor) -> Result<Self, Malformed> {
        let length = descriptor.len() as usize;
        let count = u16::try_from(length / DESCRIPTOR_SIZE).map_err(|_| Malformed)?;
        // 2.7.5.3: a table is made of whole descriptors.
        if !length.is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(Malformed);
        }
        Ok(Self::new(memory, descriptor.addr(), count))
    }

    fn descriptor(&self, index: u16) -> Result<Descriptor, Malformed> {
        if index >= self.count {
            return Err(Malformed);
        }
        self.part.read(usize::from(index) * DESCRIPTOR_SIZE).map_err(|_| Malformed)
    }
}
