// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A model of the kernel below the backends: iommufd, VFIO's device files, and type1 containers, call by call with the
//! kernel's error numbers. It can be told to fail at any call, and says where a device's DMA would land.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;

use super::iommufd_rules::Iommufds;
use super::type1_rules::FakeContainer;
use crate::access::Access;
use crate::host::iommufd::{Iommufd, VfioDevice};
use crate::host::type1::Container;
use crate::id::EndpointId;
use crate::memory::{FileMemory, HostMemory};
use crate::range::{IovaRange, RangeSet};

/// A page of the model, in bytes.
pub(super) const PAGE: u64 = 0x1000;

/// A model of the kernel. Clones are the same kernel.
#[derive(Clone, Debug)]
pub struct FakeKernel {
    pub(super) state: Arc<Mutex<State>>,
}

/// How a call is to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFailure {
    /// It returns this error and changes nothing.
    Errno(Errno),
    /// An unmap removes the first mapping in the range only; any other call fails with EIO.
    Short,
}

/// Where DMA lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// An address of this process.
    Address(u64),
    /// A file, by device and inode number, and the offset in it.
    File((u64, u64), u64),
}

#[derive(Debug)]
pub(super) struct State {
    pub iommufds: Iommufds,
    pub containers: Vec<FakeContainer>,
    calls: u64,
    failures: BTreeMap<u64, KernelFailure>,
}

/// What is mapped at a range.
#[derive(Clone, Debug)]
pub(super) struct Area {
    pub iova: IovaRange,
    pub to: Target,
    pub access: Access,
    /// Whether it was copied from another address space.
    pub is_copy: bool,
}

impl Area {
    /// Whether a hardware page table can have it: whole pages on both sides (`iopt_area_alignment()`).
    pub fn is_aligned(&self) -> bool {
        let (Place::Address(start) | Place::File(_, start)) = self.to.at(0);
        self.iova.is_aligned(PAGE) && start.is_multiple_of(PAGE)
    }
}

/// Memory as it was given: held, as the kernel holds it.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Memory(HostMemory),
    File(FileMemory),
}

impl Target {
    /// The place so many bytes further on.
    pub fn at(&self, offset: u64) -> Place {
        match self {
            Self::Memory(memory) => Place::Address(memory.address() + offset),
            Self::File(file) => Place::File(file.identity(), file.offset() + offset),
        }
    }
}

/// Mappings by first address.
pub(super) type Areas = BTreeMap<u64, Area>;

/// The mappings that have an address of a range in them.
pub(super) fn overlapping(areas: &Areas, range: IovaRange) -> Vec<IovaRange> {
    let before = areas.range(..range.start()).next_back().into_iter();
    let inside = before.chain(areas.range(range.start()..=range.last()));
    inside.map(|(_, area)| area.iova).filter(|iova| iova.overlaps(range)).collect()
}

/// Where an access through these mappings lands.
pub(super) fn translate(areas: &Areas, iova: u64, access: Access) -> Option<Place> {
    let (_, area) = areas.range(..=iova).next_back()?;
    let allowed = (area.access.read || !access.read) && (area.access.write || !access.write);
    (iova <= area.iova.last() && allowed).then(|| area.to.at(iova - area.iova.start()))
}

/// Removes mappings that lie in a range; how many bytes they were.
pub(super) fn remove(areas: &mut Areas, inside: impl Iterator<Item = IovaRange>) -> u64 {
    let removed = inside.filter_map(|iova| areas.remove(&iova.start()));
    removed.filter_map(|area| area.iova.length()).sum()
}

impl State {
    /// Counts a call; the failure that is planned for it.
    pub fn call(&mut self) -> Option<KernelFailure> {
        let failure = self.failures.remove(&self.calls);
        self.calls += 1;
        failure
    }

    /// Counts a call that cannot be short.
    pub fn call_or_fail(&mut self) -> Result<(), Errno> {
        match self.call() {
            None => Ok(()),
            Some(KernelFailure::Errno(errno)) => Err(errno),
            Some(KernelFailure::Short) => Err(Errno::IO),
        }
    }
}

impl Default for FakeKernel {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeKernel {
    /// A kernel without devices.
    pub fn new() -> Self {
        let state =
            State { iommufds: Iommufds::default(), containers: Vec::new(), calls: 0, failures: BTreeMap::new() };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// An iommufd.
    pub fn iommufd(&self) -> Arc<Iommufd> {
        let number = self.lock().iommufds.open();
        Arc::new(Iommufd::over(Arc::new(FakeIommufd { kernel: self.clone(), number })))
    }

    /// The files of a group's devices, which can use these addresses.
    pub fn devices(&self, members: &[EndpointId], usable: &RangeSet) -> Vec<(EndpointId, VfioDevice)> {
        self.lock().iommufds.add_group(members, usable);
        members.iter().map(|member| (*member, self.device_file(*member))).collect()
    }

    /// One more file of a device: a duplicate of those that there are, as a VMM has one. The device stays bound and attached
    /// until the last is closed.
    pub fn device_file(&self, member: EndpointId) -> VfioDevice {
        self.lock().iommufds.open_device(member);
        let api = FakeDevice { kernel: self.clone(), endpoint: member };
        VfioDevice::over(Box::new(api), member.to_string())
    }

    /// A container of type1 with the group of these endpoints in it, which can use these addresses and may have so many
    /// mappings.
    pub fn container(&self, members: &[EndpointId], usable: RangeSet, entry_limit: u32) -> Container {
        let mut state = self.lock();
        let index = state.containers.len();
        state.containers.push(FakeContainer::new(
            members.iter().copied().collect::<BTreeSet<_>>(),
            usable,
            entry_limit,
        ));
        drop(state);
        Container::over(Box::new(FakeContainerFile { kernel: self.clone(), index }))
    }

    /// Makes the call after `after` more calls fail; 0 is the next one. Only calls that can fail are counted.
    pub fn fail_after(&self, after: u64, failure: KernelFailure) {
        let mut state = self.lock();
        let at = state.calls + after;
        state.failures.insert(at, failure);
    }

    /// Forgets all failures that have not happened.
    pub fn stop_failing(&self) {
        self.lock().failures.clear();
    }

    /// How many calls were made that could have failed.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// How many address spaces and hardware page tables there are.
    pub fn objects(&self) -> usize {
        self.lock().iommufds.objects()
    }

    /// How many mappings there are in all address spaces of iommufds, and how many of them were made by copying.
    pub fn mappings(&self) -> (usize, usize) {
        self.lock().iommufds.mappings()
    }

    /// Where a device's DMA lands; `None` if it is refused.
    pub fn dma(&self, endpoint: EndpointId, iova: u64, access: Access) -> Option<Place> {
        let state = self.lock();
        match state.containers.iter().find(|container| container.has(endpoint)) {
            Some(container) => container.dma(iova, access),
            None => state.iommufds.dma(endpoint, iova, access),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the model does not panic under its lock")
    }
}

/// An iommufd of the model.
#[derive(Debug)]
pub(super) struct FakeIommufd {
    pub kernel: FakeKernel,
    pub number: RawFd,
}

/// A device file of the model.
#[derive(Debug)]
pub(super) struct FakeDevice {
    pub kernel: FakeKernel,
    pub endpoint: EndpointId,
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        // The lock is poisoned where a test has failed already.
        if let Ok(mut state) = self.kernel.state.lock() {
            state.iommufds.close_device(self.endpoint);
        }
    }
}

/// A container of the model.
#[derive(Debug)]
pub(super) struct FakeContainerFile {
    pub kernel: FakeKernel,
    pub index: usize,
}
