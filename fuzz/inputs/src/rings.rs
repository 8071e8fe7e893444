// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A driver's side of a split virtqueue, good or bad, and what a device makes of it by virtio 1.3, 2.7: written anew, without a look
//! at the device's own.

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::machine::RAM;
use crate::wire::{self, Field, operations, record};

/// Guest memory.
pub type Memory = GuestMemoryMmap<()>;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// A buffer for a reply that is larger is returned unwritten.
const MOST_ROOM: usize = 64 << 10;
/// So is a chain of more descriptors.
const MOST_DESCRIPTORS: usize = 256;
/// Nor is more of a request looked at than the largest has: a PROBE.
const LARGEST_REQUEST: usize = 72;

record! {
    /// Where a queue is.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Layout {
        /// Its size is two to this power, modulo 9.
        pub order: u8,
        /// Whether notifications go by index.
        pub event_idx: bool,
        /// The descriptor table, in 16 bytes.
        pub table: u16,
        /// The available ring, in 4 bytes.
        pub available: u16,
        /// The used ring, in 4 bytes.
        pub used: u16,
        /// Both indices.
        pub start: u16,
    }
}

/// A queue in a place of its own.
pub const ORDERLY: Layout = Layout { order: 4, event_idx: true, table: 0x100, available: 0x800, used: 0xc00, start: 0 };

/// What is done to a queue.
pub struct Input<Step> {
    /// Whether the device's accesses are looked at.
    pub traced: bool,
    /// Where the queue is.
    pub layout: Layout,
    /// What is done, in order.
    pub steps: Vec<Step>,
}

impl<Step: Field> Input<Step> {
    /// Any bytes are an input.
    pub fn read(mut bytes: &[u8]) -> Self {
        let traced = bool::take(&mut bytes);
        let layout = Layout::take(&mut bytes);
        Self { traced, layout, steps: wire::all(bytes) }
    }

    /// What is read as this.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.traced.put(&mut bytes);
        self.layout.put(&mut bytes);
        bytes.extend(wire::bytes_of(&self.steps));
        bytes
    }
}

operations! {
    /// What a driver does to memory.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Touch {
        /// Writes anything anywhere.
        Bytes { at: u32, bytes: Vec<u8>, },
        /// Writes a descriptor of the queue's table.
        Descriptor { index: u8, address: u32, length: u32, flags: u8, next: u8, },
        /// Writes a descriptor of another table, whose address is given in 16 bytes.
        Indirect { table: u16, index: u8, address: u32, length: u32, flags: u8, next: u8, },
        /// Makes a chain available.
        Available { head: u16, },
        /// Writes the available index.
        Index { value: u16, },
        /// Writes flags of the available ring, or the used index to be notified at.
        Notify { value: u16, by_index: bool, },
    }
}

/// An address near either end of the address space.
fn far(address: u32) -> u64 {
    i64::from(address.cast_signed()).cast_unsigned()
}

impl Layout {
    /// How many descriptors there are.
    pub fn size(self) -> u16 {
        1 << (self.order % 9)
    }

    /// The table and both rings: first address and length.
    pub fn parts(self) -> [(u64, u64); 3] {
        let size = u64::from(self.size());
        [
            (u64::from(self.table) * 16, size * 16),
            (u64::from(self.available) * 4, 6 + size * 2),
            (u64::from(self.used) * 4, 6 + size * 8),
        ]
    }

    /// The queue, with its indices where they start in memory too.
    pub fn queue(self, memory: &Memory) -> Queue {
        let [table, available, used] = self.parts().map(|(start, _)| GuestAddress(start));
        let mut queue = Queue::new(256).expect("a power of two");
        queue.set_size(self.size());
        queue.try_set_desc_table_address(table).expect("aligned");
        queue.try_set_avail_ring_address(available).expect("aligned");
        queue.try_set_used_ring_address(used).expect("aligned");
        queue.set_event_idx(self.event_idx);
        queue.set_next_avail(self.start);
        queue.set_next_used(self.start);
        queue.set_ready(true);
        for ring in [available, used] {
            // A queue need not be in memory.
            let _ = memory.write_obj(0u16, ring);
            let _ = memory.write_obj(self.start, GuestAddress(ring.0 + 2));
        }
        queue
    }

    /// Whether all parts are in memory and none overlaps another.
    pub fn is_orderly(self) -> bool {
        let parts = self.parts();
        let apart = |(a, b): (usize, usize)| !overlap(parts[a], parts[b]);
        [(0, 1), (0, 2), (1, 2)].into_iter().all(apart)
            && parts.iter().all(|(start, length)| in_memory(*start, *length))
    }

    /// Whether something overlaps a part.
    fn is_hit_by(self, start: u64, length: u64) -> bool {
        self.parts().into_iter().any(|part| overlap(part, (start, length)))
    }
}

impl Touch {
    /// Does it, as far as there is memory.
    pub fn apply(&self, layout: Layout, memory: &Memory) {
        let [(table, _), (available, _), _] = layout.parts();
        let size = u64::from(layout.size());
        let write = |at: u64, bytes: &[u8]| _ = memory.write(bytes, GuestAddress(at));
        match self {
            Self::Bytes { at, bytes } => write(far(*at), bytes),
            Self::Descriptor { index, address, length, flags, next } => {
                write(table + u64::from(*index) * 16, &descriptor(*address, *length, *flags, *next));
            }
            Self::Indirect { table, index, address, length, flags, next } => {
                let at = (u64::from(*table) + u64::from(*index)) * 16;
                write(at, &descriptor(*address, *length, *flags, *next));
            }
            Self::Available { head } => {
                let index: u16 = memory.read_obj(GuestAddress(available + 2)).unwrap_or(0);
                write(available + 4 + u64::from(index) % size * 2, &head.to_le_bytes());
                write(available + 2, &index.wrapping_add(1).to_le_bytes());
            }
            Self::Index { value } => write(available + 2, &value.to_le_bytes()),
            Self::Notify { value, by_index } => {
                write(if *by_index { available + 4 + size * 2 } else { available }, &value.to_le_bytes());
            }
        }
    }
}

fn descriptor(address: u32, length: u32, flags: u8, next: u8) -> Vec<u8> {
    let mut bytes = far(address).to_le_bytes().to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend([flags, 0, next, 0]);
    bytes
}

fn overlap((a, a_length): (u64, u64), (b, b_length): (u64, u64)) -> bool {
    a_length != 0 && b_length != 0 && a < b.saturating_add(b_length) && b < a.saturating_add(a_length)
}

fn in_memory(start: u64, length: u64) -> bool {
    (start..start + length).all(is_memory)
}

/// Whether an address is one of guest memory's.
fn is_memory(address: u64) -> bool {
    RAM.iter().any(|(start, length)| (start.0..start.0 + length).contains(&address))
}

/// A copy of guest memory.
#[derive(Clone, PartialEq, Eq)]
pub struct Image(Vec<u8>);

impl Image {
    /// Memory as it is.
    pub fn of(memory: &Memory) -> Self {
        let end = RAM.iter().map(|(start, length)| start.0 + length).max().expect("there is memory");
        let mut bytes = vec![0; end as usize];
        for (start, length) in RAM {
            let region = &mut bytes[start.0 as usize..(start.0 + length) as usize];
            memory.read_slice(region, start).expect("guest memory");
        }
        Self(bytes)
    }

    /// What is there; `None` if not all of it is memory.
    pub fn read(&self, start: u64, length: usize) -> Option<Vec<u8>> {
        let all = (0..length as u64).map(|offset| start.checked_add(offset).filter(|at| is_memory(*at)));
        all.map(|at| at.map(|at| self.0[at as usize])).collect()
    }

    /// Writes, up to the first byte that is not memory; whether that was all.
    fn write(&mut self, start: u64, bytes: &[u8]) -> bool {
        for (offset, byte) in (0u64..).zip(bytes) {
            match start.checked_add(offset).filter(|at| is_memory(*at)) {
                Some(at) => self.0[at as usize] = *byte,
                None => return false,
            }
        }
        true
    }

    fn u16(&self, at: u64) -> u16 {
        self.read(at, 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    /// The addresses at which two differ.
    pub fn differences<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = u64> + 'a {
        // By and large they are the same: that is seen at once.
        let pieces = self.0.chunks(256).zip(other.0.chunks(256)).enumerate().filter(|(_, (a, b))| a != b);
        pieces.flat_map(|(piece, (a, b))| {
            let start = piece as u64 * 256;
            (start..).zip(a.iter().zip(b)).filter(|(_, (a, b))| a != b).map(|(at, _)| at)
        })
    }
}

/// A chain as the driver built it.
#[derive(Default)]
pub struct Walked {
    /// As much of the device-readable part as any request has.
    pub request: Vec<u8>,
    /// The device-writable buffers.
    pub buffers: Vec<(u64, usize)>,
}

impl Walked {
    /// How many bytes can be written.
    pub fn room(&self) -> usize {
        self.buffers.iter().map(|(_, length)| length).sum()
    }
}

/// What reads memory for a walk: of an address and a length.
pub type Read<'r> = dyn FnMut(u64, usize) -> Option<Vec<u8>> + 'r;

/// Follows a chain from its head; `None` for one that is to be returned unwritten.
pub fn walk(layout: Layout, head: u16, read: &mut Read<'_>) -> Option<Walked> {
    let (mut table, mut count) = (u64::from(layout.table) * 16, u64::from(layout.size()));
    let (mut index, mut indirect) = (u64::from(head), false);
    let (mut walked, mut total, mut descriptors) = (Walked::default(), 0u64, 0);
    loop {
        if index >= count {
            return None;
        }
        let bytes = read(table.checked_add(index * 16)?, 16)?;
        let address = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        let length = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
        let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
        if flags & INDIRECT != 0 {
            if indirect || !length.is_multiple_of(16) || length / 16 > u32::from(u16::MAX) {
                return None;
            }
            (table, count, index, indirect) = (address, u64::from(length / 16), 0, true);
            continue;
        }
        (total, descriptors) = (total + u64::from(length), descriptors + 1);
        if total > u64::from(u32::MAX) {
            return None;
        }
        if flags & WRITE != 0 {
            walked.buffers.push((address, length as usize));
        } else {
            let taken = (LARGEST_REQUEST - walked.request.len()).min(length as usize);
            if taken != 0 {
                walked.request.extend(read(address, taken)?);
            }
        }
        if descriptors > MOST_DESCRIPTORS || walked.room() > MOST_ROOM {
            return None;
        }
        if flags & NEXT == 0 {
            return Some(walked);
        }
        index = u64::from(u16::from_le_bytes([bytes[14], bytes[15]]));
    }
}

/// What became of a queue by the book.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// So many chains were returned.
    Returned(usize),
    /// The driver broke the queue.
    Broken,
    /// A chain has the device write to the queue itself, or read what it is writing there: nothing can be said of what comes.
    Wild,
}

/// A queue by the book, in memory of its own.
pub struct Model {
    /// Memory.
    pub image: Image,
    layout: Layout,
    next_available: u16,
    next_used: u16,
}

impl Model {
    /// A queue in memory as it is.
    pub fn new(layout: Layout, memory: &Memory) -> Self {
        Self { image: Image::of(memory), layout, next_available: layout.start, next_used: layout.start }
    }

    /// The next chain to be taken.
    pub const fn next_available(&self) -> u16 {
        self.next_available
    }

    /// The next chain to be returned.
    pub const fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Takes chains and returns each with what `answer` says to a chain (`None`: to be returned unwritten), and whether it could be
    /// written, as long as `goes_on`.
    pub fn serve<S>(
        &mut self,
        state: &mut S,
        goes_on: impl Fn(&S) -> bool,
        answer: impl Fn(&mut S, Option<&Walked>) -> Vec<u8>,
        written: impl Fn(&mut S, usize),
    ) -> Outcome {
        let [_, (available, _), (used, _)] = self.layout.parts();
        let size = self.layout.size();
        let mut returned = 0;
        while goes_on(state) {
            let waiting = self.image.u16(available + 2).wrapping_sub(self.next_available);
            if waiting > size {
                return Outcome::Broken;
            }
            if waiting == 0 {
                break;
            }
            let head = self.image.u16(available + 4 + u64::from(self.next_available % size) * 2);
            if head >= size {
                return Outcome::Broken;
            }
            self.next_available = self.next_available.wrapping_add(1);
            let mut wild = false;
            let chain = walk(self.layout, head, &mut |at, length| {
                wild |= overlap((at, length as u64), self.layout.parts()[2]);
                self.image.read(at, length)
            });
            let buffers = chain.as_ref().map_or(&[][..], |chain| &chain.buffers);
            if wild || buffers.iter().any(|(start, length)| self.layout.is_hit_by(*start, *length as u64)) {
                return Outcome::Wild;
            }
            let reply = answer(state, chain.as_ref());
            let length = self.fill(buffers, &reply);
            written(state, length);
            let slot = used + 4 + u64::from(self.next_used % size) * 8;
            self.image.write(slot, &[u32::from(head).to_le_bytes(), (length as u32).to_le_bytes()].concat());
            self.next_used = self.next_used.wrapping_add(1);
            self.image.write(used + 2, &self.next_used.to_le_bytes());
            returned += 1;
        }
        Outcome::Returned(returned)
    }

    /// Writes a reply; how much the driver is told of: all or nothing.
    fn fill(&mut self, buffers: &[(u64, usize)], reply: &[u8]) -> usize {
        let mut left = reply;
        for (start, length) in buffers {
            let (now, later) = left.split_at(left.len().min(*length));
            if !self.image.write(*start, now) {
                return 0;
            }
            left = later;
        }
        reply.len()
    }

    /// Memory is what it should be, but for what asks for kicks.
    pub fn compare(&self, memory: &Memory) {
        let [_, _, (used, _)] = self.layout.parts();
        let event = used + 4 + u64::from(self.layout.size()) * 8;
        let is_notification = |at: u64| (used..used + 2).contains(&at) || (event..event + 2).contains(&at);
        let image = Image::of(memory);
        if let Some(at) = self.image.differences(&image).find(|at| !is_notification(*at)) {
            let at_most = 16;
            let (expected, found) = (self.image.read(at, at_most), image.read(at, at_most));
            panic!("memory at {at:#x} is {found:x?}, and should be {expected:x?}");
        }
    }
}
