// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Address spaces of an iommufd as page tables.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::IommufdFile;
use super::api::IommufdApi;
use super::group::PinnedSource;
use crate::access::Access;
use crate::fd::{FileKind, WrongFile};
use crate::host::linux::{failed, map_error_kind};
use crate::host::pieces::map_pieces;
use crate::host::{Constraints, HostError, HostErrorKind, IoPageTable, MapError};
use crate::memory::HostSegment;
use crate::range::IovaRange;

/// An open `/dev/iommu`: a container of address spaces.
#[derive(Debug)]
pub struct Iommufd {
    pub(super) api: Arc<dyn IommufdApi>,
}

impl Iommufd {
    /// Takes an open `/dev/iommu`.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn new(file: OwnedFd) -> Result<Self, WrongFile> {
        FileKind::Iommufd.check(&file)?;
        Ok(Self { api: Arc::new(IommufdFile::new(file)) })
    }

    /// Over another kernel, or a model of one.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn over(api: Arc<dyn IommufdApi>) -> Self {
        Self { api }
    }

    /// The calls that it takes.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn api(&self) -> &dyn IommufdApi {
        self.api.as_ref()
    }

    /// Makes an empty address space.
    ///
    /// # Errors
    ///
    /// Whatever the kernel says.
    pub fn new_ioas(&self) -> Result<Ioas, HostError> {
        self.new_ioas_with(None)
    }

    pub(super) fn new_ioas_with(&self, source: Option<Arc<PinnedSource>>) -> Result<Ioas, HostError> {
        let id = self.api.ioas_alloc().map_err(|errno| {
            let kind = if errno == Errno::NOMEM { HostErrorKind::NoMemory } else { HostErrorKind::Other };
            failed(errno, "IOMMU_IOAS_ALLOC", kind)
        })?;
        Ok(Ioas { api: Arc::clone(&self.api), id, source })
    }

    /// Whether an address space with this number is there, whoever made it.
    pub fn has_ioas(&self, id: u32) -> bool {
        self.api.ioas_iova_ranges(id).is_ok()
    }
}

/// An address space of an iommufd.
#[derive(Debug)]
pub struct Ioas {
    pub(super) api: Arc<dyn IommufdApi>,
    id: u32,
    /// Where guest memory is pinned already, to be copied from.
    source: Option<Arc<PinnedSource>>,
}

impl Ioas {
    /// The kernel's number for it.
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// Maps one piece of memory: by copying where it is pinned already, by its file where that can be, else by its address.
    pub(super) fn map_segment(&self, iova: u64, segment: &HostSegment, access: Access) -> Result<(), HostError> {
        let action = |call| format!("{call} of {:#x} bytes at {iova:#x}", segment.length());
        let Some((host, range)) = segment.host().zip(IovaRange::from_length(iova, segment.length())) else {
            return Err(HostError::new(HostErrorKind::BadAddress, action("mapping"), None));
        };
        if let Some(source) = &self.source
            && let Some(from) = source.place_of(segment)
        {
            match self.api.ioas_copy(self.id, range, source.ioas(), from, access) {
                Ok(()) => return Ok(()),
                // The kernel cannot copy that part.
                Err(Errno::NOENT) => (),
                Err(errno) => return Err(failed(errno, action("IOMMU_IOAS_COPY"), map_error_kind(errno))),
            }
        }
        if let Some(file) = host.pinnable_file() {
            match self.api.ioas_map_file(self.id, range, file, access) {
                Ok(()) => return Ok(()),
                // Before Linux 6.13 there is mapping by address only.
                Err(Errno::NOTTY) => (),
                Err(errno) => return Err(failed(errno, action("IOMMU_IOAS_MAP_FILE"), map_error_kind(errno))),
            }
        }
        let result = self.api.ioas_map(self.id, range, host, access);
        result.map_err(|errno| failed(errno, action("IOMMU_IOAS_MAP"), map_error_kind(errno)))
    }
}

impl IoPageTable for Ioas {
    fn map(&self, iova: IovaRange, to: &[HostSegment], access: Access) -> Result<(), MapError> {
        map_pieces(iova, to, |iova, segment| self.map_segment(iova, segment, access), |mapped| self.unmap(mapped))
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, HostError> {
        let result = self.api.ioas_unmap(self.id, iova);
        result.map_err(|errno| failed(errno, format!("IOMMU_IOAS_UNMAP of {iova}"), HostErrorKind::Other))
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        let result = self.api.ioas_iova_ranges(self.id);
        result.map_err(|errno| failed(errno, "IOMMU_IOAS_IOVA_RANGES", HostErrorKind::Other))
    }
}

impl Drop for Ioas {
    fn drop(&mut self) {
        if let Err(errno) = self.api.destroy(self.id) {
            // What it maps by address stays held with it.
            log::error!("IOAS {} stays in the kernel: {errno}", self.id);
        }
    }
}
