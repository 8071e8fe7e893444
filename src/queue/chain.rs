// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Descriptor chains.

use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::QueueError;
use crate::device::{Progress, UnfinishedMap, VirtioIommu};
use crate::request::LARGEST_REPLY;
use crate::spec;

/// How many descriptors a chain may have. A request of one byte to a descriptor fits; an indirect table of 65535 empty ones
/// is returned unwritten.
const MOST_DESCRIPTORS: usize = 256;

/// One descriptor chain: its buffers, walked once. Reused from chain to chain.
#[derive(Debug, Default)]
pub(super) struct Chain {
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
    /// It has more descriptors than any request.
    too_long: bool,
    reply: Vec<u8>,
}

/// A piece of guest memory.
#[derive(Debug)]
struct Buffer {
    start: GuestAddress,
    length: usize,
}

impl Chain {
    /// Takes the next available chain and notes its buffers; its head.
    pub fn take<Q: QueueT, M: GuestMemory>(&mut self, queue: &mut Q, memory: &M) -> Result<u16, QueueError> {
        let chain: DescriptorChain<&M> = queue.pop_descriptor_chain(memory).ok_or(QueueError::Unreadable)?;
        let head = chain.head_index();
        self.readable.clear();
        self.writable.clear();
        self.too_long = false;
        for descriptor in chain {
            if self.readable.len() + self.writable.len() == MOST_DESCRIPTORS {
                self.too_long = true;
                break;
            }
            let buffer = Buffer { start: descriptor.addr(), length: descriptor.len() as usize };
            let part = if descriptor.is_write_only() { &mut self.writable } else { &mut self.readable };
            part.push(buffer);
        }
        Ok(head)
    }

    /// Begins the request in it. Every byte of the request is read once.
    pub fn begin<M: GuestMemory>(&mut self, device: &mut VirtioIommu, memory: &M) -> Progress {
        let mut request = [0; spec::LARGEST_REQUEST];
        let readable = self.read(memory, &mut request);
        let (Some(readable), Some(length)) = (readable, self.writable_length()) else {
            return Progress::Answered { used: 0 };
        };
        self.reply.clear();
        self.reply.resize(length, 0);
        device.begin(readable, &mut self.reply)
    }

    /// Goes on with the request in it.
    pub fn go_on(&mut self, device: &mut VirtioIommu, map: UnfinishedMap) -> Progress {
        device.go_on(map, &mut self.reply)
    }

    /// Writes so much of the reply; the used length. A reply that cannot be written is lost; what it answers has been done.
    pub fn reply<M: GuestMemory>(&self, memory: &M, used: usize) -> u32 {
        self.reply.get(..used).and_then(|bytes| self.write(memory, bytes)).unwrap_or(0)
    }

    /// Reads as much of the device-readable part as any request has; `None` if it is not all in guest memory.
    fn read<'a, M: GuestMemory>(&self, memory: &M, bytes: &'a mut [u8; spec::LARGEST_REQUEST]) -> Option<&'a [u8]> {
        let mut filled = 0;
        for buffer in &self.readable {
            let free = bytes.get_mut(filled..)?;
            let length = free.len().min(buffer.length);
            memory.read_slice(free.get_mut(..length)?, buffer.start).ok()?;
            filled += length;
        }
        bytes.get(..filled)
    }

    /// The length of the device-writable part; `None` if the chain is more than any request needs.
    pub fn writable_length(&self) -> Option<usize> {
        let mut length = 0usize;
        for buffer in &self.writable {
            length = length.checked_add(buffer.length).filter(|length| *length <= LARGEST_REPLY)?;
        }
        (!self.too_long).then_some(length)
    }

    /// Writes bytes to the start of the device-writable part; the used length, or `None` if it is not in guest memory.
    pub fn write<M: GuestMemory>(&self, memory: &M, bytes: &[u8]) -> Option<u32> {
        let mut left = bytes;
        for buffer in &self.writable {
            let (now, later) = left.split_at(left.len().min(buffer.length));
            memory.write_slice(now, buffer.start).ok()?;
            left = later;
        }
        u32::try_from(bytes.len() - left.len()).ok()
    }
}
