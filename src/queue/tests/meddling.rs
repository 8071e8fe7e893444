// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A driver that acts at the worst moments: whenever the device is about to look at the available index.

use std::cell::Cell;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result as MemoryResult};
use vm_memory::{GuestMemoryBackend, Permissions};

use super::*;

/// Guest memory in which the driver writes the available index each time before the device reads it.
struct Meddling<'m, F> {
    memory: &'m Memory,
    index: GuestAddress,
    /// From how many times the device has read it before.
    written: F,
    reads: Cell<u16>,
}

impl<'m, F: Fn(u16) -> u16> Meddling<'m, F> {
    fn new(bench: &Bench<'m>, written: F) -> Self {
        let index = GuestAddress(bench.queue.avail_ring() + 2);
        Self { memory: bench.memory, index, written, reads: Cell::new(0) }
    }
}

impl<F: Fn(u16) -> u16> GuestMemory for Meddling<'_, F> {
    type PhysicalMemory = Memory;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, count: usize, _access: Permissions) -> bool {
        GuestMemoryBackend::check_range(self.memory, address, count)
    }

    fn get_slices(
        &self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> MemoryResult<impl GuestMemorySliceIterator<'_, BS<'_, ()>>> {
        if address == self.index {
            let reads = self.reads.get();
            self.memory.write_obj((self.written)(reads).to_le(), self.index).unwrap();
            self.reads.set(reads + 1);
        }
        GuestMemory::get_slices(self.memory, address, count, access)
    }
}

#[test]
fn a_request_that_comes_when_kicks_are_asked_for_again_is_not_left() {
    let memory = memory();
    let mut bench = Bench::with_requests(&memory, 1);
    // The first look finds nothing; the one after the device asked for kicks does.
    let meddling = Meddling::new(&bench, |reads| u16::from(reads > 0));
    let batch = bench.requests.process(&mut bench.device, &mut bench.queue, &meddling, 64).unwrap();
    assert_eq!(batch, Batch { handled: 1, more: false, notify: true });
    assert_eq!((bench.used(), reply(&memory, 0, 4)), (vec![(0, 4)], vec![0; 4]));
}

#[test]
fn an_index_that_moves_to_and_fro_holds_the_device_no_longer_than_requests_would() {
    let memory = memory();
    let mut bench = Bench::with_requests(&memory, 1);
    // A request is there whenever kicks were asked for, and gone when it is to be taken.
    let meddling = Meddling::new(&bench, |reads| reads % 2);
    let batch = bench.requests.process(&mut bench.device, &mut bench.queue, &meddling, 5).unwrap();
    assert_eq!(batch, Batch { handled: 0, more: true, notify: false });
    assert_eq!(meddling.reads.get(), 10);
    assert_eq!((bench.used(), reply(&memory, 0, 4)), (vec![], vec![0xaa; 4]));
}
