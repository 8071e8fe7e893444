// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the model takes from `drivers/vfio/vfio_iommu_type1.c`.

use std::collections::BTreeSet;
use std::os::fd::RawFd;

use rustix::io::Errno;

use super::kernel::{
    Area, Areas, FakeContainerFile, KernelFailure, PAGE, Place, Target, overlapping, remove, translate,
};
use crate::access::Access;
use crate::host::type1::ContainerApi;
use crate::id::EndpointId;
use crate::memory::HostMemory;
use crate::range::{IovaRange, RangeSet};

/// A container with one group.
#[derive(Debug)]
pub(super) struct FakeContainer {
    members: BTreeSet<EndpointId>,
    usable: RangeSet,
    entry_limit: u32,
    areas: Areas,
}

impl FakeContainer {
    pub fn new(members: BTreeSet<EndpointId>, usable: RangeSet, entry_limit: u32) -> Self {
        Self { members, usable, entry_limit, areas: Areas::new() }
    }

    pub fn has(&self, endpoint: EndpointId) -> bool {
        self.members.contains(&endpoint)
    }

    pub fn dma(&self, iova: u64, access: Access) -> Option<Place> {
        translate(&self.areas, iova, access)
    }

    fn left(&self) -> u32 {
        self.entry_limit.saturating_sub(u32::try_from(self.areas.len()).unwrap_or(u32::MAX))
    }

    /// `vfio_dma_do_map()`: alignment, then what is there, then the limit, then what can be used.
    fn map(&mut self, area: Area) -> Result<(), Errno> {
        let iova = area.iova;
        if !iova.is_aligned(PAGE) || area.access.is_none() {
            return Err(Errno::INVAL);
        }
        if !overlapping(&self.areas, iova).is_empty() {
            return Err(Errno::EXIST);
        }
        if self.left() == 0 {
            return Err(Errno::NOSPC);
        }
        if !self.usable.covers(iova) {
            return Err(Errno::INVAL);
        }
        self.areas.insert(iova.start(), area);
        Ok(())
    }

    /// `vfio_dma_do_unmap()` of a type1v2 container.
    fn unmap(&mut self, iova: IovaRange, is_short: bool) -> Result<u64, Errno> {
        if !iova.is_aligned(PAGE) {
            return Err(Errno::INVAL);
        }
        let inside = overlapping(&self.areas, iova);
        if inside.iter().any(|mapped| !iova.covers(*mapped)) {
            return Err(Errno::INVAL);
        }
        let most = if is_short { 1 } else { usize::MAX };
        Ok(remove(&mut self.areas, inside.into_iter().take(most)))
    }

    /// `vfio_iommu_type1_get_info()`
    fn info(&self) -> Vec<u8> {
        let ranges = self.usable.ranges();
        let mut bytes = Vec::new();
        let put = |bytes: &mut Vec<u8>, numbers: &[u32]| bytes.extend(numbers.iter().flat_map(|n| n.to_ne_bytes()));
        // Size, flags, page sizes, the first capability.
        put(&mut bytes, &[0, 3, 0x4020_1000, 0, 24, 0]);
        let next = 24 + 16 + 16 * u32::try_from(ranges.len()).expect("a few ranges");
        put(&mut bytes, &[1 | 1 << 16, next, u32::try_from(ranges.len()).expect("a few ranges"), 0]);
        for range in ranges {
            bytes.extend(range.start().to_ne_bytes());
            bytes.extend(range.last().to_ne_bytes());
        }
        put(&mut bytes, &[3 | 1 << 16, 0, self.left()]);
        bytes
    }
}

impl FakeContainerFile {
    fn with<T>(&self, act: impl FnOnce(&mut FakeContainer) -> Result<T, Errno>) -> Result<T, Errno> {
        let mut state = self.kernel.lock();
        act(state.containers.get_mut(self.index).ok_or(Errno::BADF)?)
    }
}

impl ContainerApi for FakeContainerFile {
    fn number(&self) -> RawFd {
        -1
    }

    /// The model's containers have a type from the start.
    fn set_iommu(&self) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn info(&self) -> Result<Vec<u8>, Errno> {
        self.kernel.lock().call_or_fail()?;
        self.with(|container| Ok(container.info()))
    }

    fn map_dma(&self, iova: IovaRange, memory: &HostMemory, access: Access) -> Result<(), Errno> {
        self.kernel.lock().call_or_fail()?;
        let aligned = memory.address().is_multiple_of(PAGE);
        let area = Area { iova, to: Target::Memory(memory.clone()), access, is_copy: false };
        self.with(|container| if aligned { container.map(area) } else { Err(Errno::INVAL) })
    }

    fn unmap_dma(&self, iova: IovaRange) -> Result<u64, Errno> {
        let failure = self.kernel.lock().call();
        if let Some(KernelFailure::Errno(errno)) = failure {
            return Err(errno);
        }
        self.with(|container| container.unmap(iova, failure.is_some()))
    }
}
