// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A driver's virtqueue: chains of any shape, and what became of each.

use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::bench::UNWRITTEN;

pub type Memory = GuestMemoryMmap<()>;

const SIZE: u16 = 128;
/// Where tables of indirect descriptors are.
const TABLES: u64 = 0x1_0000;
/// Where buffers are, each in a slot of its own.
const BUFFERS: u64 = 0x2_0000;
const SLOT: u64 = 0x100;
const END: u64 = 0x10_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One descriptor.
#[derive(Clone, Debug)]
pub enum Piece {
    /// A buffer that the device may read, with these bytes.
    Readable(Vec<u8>),
    /// A buffer that the device may write, so large.
    Writable(usize),
    /// A table of further descriptors, marked as one that the device may write or not.
    Table { pieces: Vec<Piece>, writable: bool },
}

/// What became of a chain.
#[derive(Debug, PartialEq, Eq)]
pub struct Returned {
    /// Which one it is.
    pub chain: usize,
    pub used: u32,
    /// Its device-writable part.
    pub bytes: Vec<u8>,
}

/// The pieces of a request: its device-readable part, and so much to be written.
pub fn request(readable: &[u8], writable: usize) -> Vec<Piece> {
    vec![Piece::Readable(readable.to_vec()), Piece::Writable(writable)]
}

/// Guest memory with buffers in it.
struct Layout {
    memory: Memory,
    next_slot: u64,
    next_table: u64,
}

impl Layout {
    /// Puts pieces into memory; their descriptors, the first of which is at `index` of its table, and where the device may write.
    fn place(&mut self, pieces: &[Piece], index: u16) -> (Vec<RawDescriptor>, Vec<(u64, usize)>) {
        let (mut descriptors, mut writable) = (Vec::new(), Vec::new());
        for (at, piece) in pieces.iter().enumerate() {
            let (address, length, flags) = match piece {
                Piece::Readable(bytes) => {
                    let address = self.slot();
                    self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
                    (address, bytes.len(), 0)
                }
                Piece::Writable(length) => {
                    let address = self.slot();
                    writable.push((address, *length));
                    (address, *length, WRITE)
                }
                Piece::Table { pieces, writable: marked } => {
                    let (table, inside) = self.place(pieces, 0);
                    writable.extend(inside);
                    let address = self.next_table;
                    for (index, descriptor) in table.iter().enumerate() {
                        let place = GuestAddress(address + 16 * index as u64);
                        self.memory.write_obj(Descriptor::from(*descriptor), place).unwrap();
                    }
                    self.next_table += 16 * table.len() as u64;
                    (address, 16 * table.len(), if *marked { INDIRECT | WRITE } else { INDIRECT })
                }
            };
            let is_last = at + 1 == pieces.len();
            let next = if is_last { 0 } else { index + at as u16 + 1 };
            let flags = flags | if is_last { 0 } else { NEXT };
            descriptors.push(Descriptor::new(address, length as u32, flags, next).into());
        }
        (descriptors, writable)
    }

    fn slot(&mut self) -> u64 {
        let address = self.next_slot;
        self.next_slot += SLOT;
        address
    }
}

/// Makes chains available and has the device serve the queue; what it says of that, and which chains came back, in order. Memory
/// that the device may not write stays as it is.
pub fn serve<T>(chains: &[Vec<Piece>], device: impl FnOnce(&mut Queue, &Memory) -> T) -> (T, Vec<Returned>) {
    let memory = Memory::from_ranges(&[(GuestAddress(0), END as usize)]).unwrap();
    memory.write_slice(&vec![UNWRITTEN; (END - BUFFERS) as usize], GuestAddress(BUFFERS)).unwrap();
    let mut layout = Layout { memory: memory.clone(), next_slot: BUFFERS, next_table: TABLES };
    let mock = MockSplitQueue::new(&memory, SIZE);
    let (mut heads, mut writable, mut count) = (Vec::new(), Vec::new(), 0u16);
    for (chain, pieces) in chains.iter().enumerate() {
        heads.push(count);
        mock.avail().ring().ref_at(chain).unwrap().store(count.to_le());
        let (descriptors, buffers) = layout.place(pieces, count);
        writable.push(buffers);
        for descriptor in descriptors {
            mock.desc_table().store(count, descriptor).unwrap();
            count += 1;
        }
    }
    mock.avail().idx().store((chains.len() as u16).to_le());
    let mut queue: Queue = mock.create_queue().unwrap();
    queue.set_size(SIZE);

    let contents = || {
        let mut bytes = vec![0; END as usize];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    };
    let mut before = contents();
    let said = device(&mut queue, &memory);
    let mut after = contents();

    let used = (0..usize::from(mock.used().idx().load())).map(|at| mock.used().ring().ref_at(at).unwrap().load());
    let returned = used.map(|element| {
        let chain = heads.iter().position(|head| u32::from(*head) == element.id()).unwrap();
        let bytes = writable[chain].iter().flat_map(|(start, length)| {
            let start = *start as usize;
            after[start..start + length].to_vec()
        });
        Returned { chain, used: element.len(), bytes: bytes.collect() }
    });
    let returned = returned.collect();
    // Flags and index, the elements, and where the next notification is wanted.
    let used_ring = (mock.used_addr().0, 4 + 8 * usize::from(SIZE) + 2);
    for (start, length) in writable.iter().flatten().chain([&used_ring]) {
        let start = *start as usize;
        before[start..start + length].fill(0);
        after[start..start + length].fill(0);
    }
    assert!(before == after, "only what may be written is");
    (said, returned)
}
