// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that notes how it is accessed, and changes under the device.

use std::cell::RefCell;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::rings::Memory;

/// An access of the device's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// It saw this.
    Read(u64, Vec<u8>),
    /// It wrote so many bytes.
    Wrote(u64, usize),
}

/// A change that another CPU makes at a certain access, right before it.
#[derive(Clone, Debug)]
pub struct Race {
    /// How many accesses come before.
    pub after: usize,
    /// Where.
    pub at: u64,
    /// What is there then.
    pub bytes: Vec<u8>,
}

/// The memory. To the device it is as if it was behind an IOMMU: each access goes its whole way.
pub struct TracedMemory<'m> {
    memory: &'m Memory,
    races: Vec<Race>,
    log: RefCell<Vec<Access>>,
}

impl<'m> TracedMemory<'m> {
    /// Memory that changes.
    pub const fn new(memory: &'m Memory, races: Vec<Race>) -> Self {
        Self { memory, races, log: RefCell::new(Vec::new()) }
    }

    /// What was accessed, in order.
    pub fn into_log(self) -> Vec<Access> {
        self.log.into_inner()
    }

    fn note(&self, start: GuestAddress, length: usize, permissions: Permissions) {
        let mut log = self.log.borrow_mut();
        for race in self.races.iter().filter(|race| race.after == log.len()) {
            let _ = self.memory.write(&race.bytes, GuestAddress(race.at));
        }
        log.push(if permissions == Permissions::Read {
            let mut bytes = vec![0; length];
            // What is not all there is not seen.
            let seen = self.memory.read(&mut bytes, start).unwrap_or(0);
            bytes.truncate(seen);
            Access::Read(start.0, bytes)
        } else {
            Access::Wrote(start.0, length)
        });
    }
}

impl GuestMemory for TracedMemory<'_> {
    type PhysicalMemory = Memory;
    type Bitmap = ();

    fn check_range(&self, start: GuestAddress, length: usize, permissions: Permissions) -> bool {
        GuestMemory::check_range(self.memory, start, length, permissions)
    }

    fn get_slices(
        &self,
        start: GuestAddress,
        length: usize,
        permissions: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'_, BS<'_, ()>>> {
        if length != 0 {
            self.note(start, length, permissions);
        }
        GuestMemory::get_slices(self.memory, start, length, permissions)
    }
}
