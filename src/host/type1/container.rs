// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Containers as what a group's memory is mapped with.

#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::os::fd::{OwnedFd, RawFd};

use rustix::io::Errno;

use super::{ContainerFile, Type1Info, parse};
use crate::access::Access;
use crate::fd::{FileKind, WrongFile};
use crate::host::linux::{failed, map_error_kind};
use crate::host::replay::{DmaMapper, ReplayGroup};
use crate::host::{Constraints, HostError, HostErrorKind};
use crate::id::EndpointId;
use crate::memory::{HostMemory, HostSegment};
use crate::range::{IovaRange, RangeSet};

/// What of a container is used, call by call (`include/uapi/linux/vfio.h`). The kernel is behind it, or a model of the kernel.
pub trait ContainerApi: Debug + Send + Sync {
    /// The number by which groups are told of it.
    fn number(&self) -> RawFd;

    /// `VFIO_SET_IOMMU`: makes it a container of type1, version 2.
    ///
    /// # Errors
    ///
    /// EINVAL if it has no group, or a type already.
    fn set_iommu(&self) -> Result<(), Errno>;

    /// `VFIO_IOMMU_GET_INFO`: the kernel's answer, as bytes.
    ///
    /// # Errors
    ///
    /// The container has no type.
    fn info(&self) -> Result<Vec<u8>, Errno>;

    /// `VFIO_IOMMU_MAP_DMA`: maps memory of this process, which stays mapped here until it is unmapped there.
    ///
    /// # Errors
    ///
    /// EINVAL where nothing can be mapped, EEXIST where something is, ENOSPC when there are too many mappings, ENOMEM, EFAULT.
    fn map_dma(&self, iova: IovaRange, memory: &HostMemory, access: Access) -> Result<(), Errno>;

    /// `VFIO_IOMMU_UNMAP_DMA`: removes all mappings in a range, and returns how many bytes that were. Nothing is none.
    ///
    /// # Errors
    ///
    /// EINVAL if a mapping reaches out of the range: nothing is removed.
    fn unmap_dma(&self, iova: IovaRange) -> Result<u64, Errno>;
}

/// A container of VFIO type1.
#[derive(Debug)]
pub struct Container {
    pub(super) api: Box<dyn ContainerApi>,
}

impl Container {
    /// Takes an open `/dev/vfio/vfio`.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn new(file: OwnedFd) -> Result<Self, WrongFile> {
        FileKind::VfioContainer.check(&file)?;
        Ok(Self { api: Box::new(ContainerFile::new(file)) })
    }

    /// Over another kernel, or a model of one.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn over(api: Box<dyn ContainerApi>) -> Self {
        Self { api }
    }

    /// The calls that it takes.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn api(&self) -> &dyn ContainerApi {
        self.api.as_ref()
    }

    /// Makes it a container of type1, version 2. It must have a group.
    ///
    /// # Errors
    ///
    /// It has no group or a type already, or the group's IOMMU cannot be used.
    pub fn set_iommu(&self) -> Result<(), HostError> {
        let result = self.api.set_iommu();
        result.map_err(|errno| failed(errno, "VFIO_SET_IOMMU of type1v2", HostErrorKind::Incompatible))
    }

    /// What the container can map, for the groups that are in it.
    ///
    /// # Errors
    ///
    /// The container has no type, or the kernel's answer cannot be understood.
    pub fn info(&self) -> Result<Type1Info, HostError> {
        const ACTION: &str = "VFIO_IOMMU_GET_INFO";
        let answer = self.api.info().map_err(|errno| failed(errno, ACTION, HostErrorKind::Other))?;
        let error = |error| HostError::new(HostErrorKind::Other, ACTION, Some(std::io::Error::other(error)));
        parse(&answer).map_err(error)
    }

    /// A host group over this container, in which the group is and nobody else maps anything. It must be of type1, version 2. The
    /// [`VfioGroup`](super::VfioGroup) is to be kept for as long: a container whose group has left translates nothing.
    ///
    /// # Errors
    ///
    /// The container has no type.
    pub fn into_group(self, members: Vec<EndpointId>) -> Result<ReplayGroup<Self>, HostError> {
        self.info()?;
        Ok(ReplayGroup::new(self, members))
    }
}

impl DmaMapper for Container {
    fn map(&self, iova: u64, memory: &HostSegment, access: Access) -> Result<(), HostError> {
        let action = || format!("VFIO_IOMMU_MAP_DMA of {:#x} bytes at {iova:#x}", memory.length());
        let Some((host, range)) = memory.host().zip(IovaRange::from_length(iova, memory.length())) else {
            return Err(HostError::new(HostErrorKind::BadAddress, action(), None));
        };
        self.api.map_dma(range, host, access).map_err(|errno| {
            let mut action = action();
            if errno == Errno::NOSPC {
                action += " (more mappings than the parameter dma_entry_limit of the module vfio_iommu_type1 allows)";
            }
            failed(errno, action, map_error_kind(errno))
        })
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        let result = self.api.unmap_dma(iova);
        result.map_err(|errno| failed(errno, format!("VFIO_IOMMU_UNMAP_DMA of {iova}"), HostErrorKind::Other))
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        let info = self.info()?;
        // Without page sizes nothing is known: a page is what the processor has.
        let granule = match info.page_sizes {
            0 => rustix::param::page_size() as u64,
            sizes => 1 << sizes.trailing_zeros(),
        };
        Ok(Constraints { usable: info.usable.unwrap_or(RangeSet::from(IovaRange::ALL)), granule })
    }
}
