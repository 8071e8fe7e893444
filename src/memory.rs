// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory as the host backends need it: guest-physical address to file, offset and address in this process.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::range::IovaRange;

/// The guest's RAM: regions in ascending order that do not overlap. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct GuestRam {
    regions: Arc<[RamRegion]>,
}

/// One region of guest RAM.
#[derive(Clone, Debug)]
pub struct RamRegion {
    /// The guest-physical addresses.
    addresses: IovaRange,
    host: Option<HostMemory>,
}

/// A piece of guest memory, and where the host finds it. Only this module makes one, from memory that is there.
#[derive(Clone, Debug)]
pub struct HostSegment {
    start: GuestAddress,
    length: u64,
    host: Option<HostMemory>,
}

/// A place in memory that is mapped into this process, and stays mapped as long as this value lives.
#[derive(Clone)]
pub struct HostMemory {
    address: usize,
    /// How many bytes are mapped from there on.
    length: u64,
    file: Option<FileMemory>,
    owner: Arc<dyn Any + Send + Sync>,
}

/// A place in a file that memory is shared with.
#[derive(Clone, Debug)]
pub struct FileMemory {
    file: Arc<File>,
    offset: u64,
    /// Device and inode number: what the file is, whatever descriptor leads to it.
    identity: (u64, u64),
    /// Whether the host can pin the file's own pages, without going through an address.
    pinnable: bool,
}

/// Guest memory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Two regions have an address in common.
    #[error("the guest memory regions {0} and {1} overlap")]
    Overlap(IovaRange, IovaRange),
    /// A region is empty, or passes the end of the address space.
    #[error("the guest memory region of {length:#x} bytes at {start:#x} is empty or wraps")]
    Region {
        /// First guest-physical address of the region.
        start: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// The file behind a region ends before the region does: whoever touched what is missing would be ended by a signal.
    #[error("the guest memory region at {start:#x} needs {needed:#x} bytes of its file, which has {size:#x}")]
    FileTooSmall {
        /// First guest-physical address of the region.
        start: u64,
        /// How long the file must be.
        needed: u128,
        /// How long it is.
        size: u64,
    },
    /// The file behind a region cannot be looked at.
    #[error("cannot examine the file behind the guest memory region at {start:#x}")]
    File {
        /// First guest-physical address of the region.
        start: u64,
        /// Why.
        source: std::io::Error,
    },
}

impl GuestRam {
    /// RAM that no host page table can map: for emulated endpoints.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Region`], [`MemoryError::Overlap`]
    pub fn in_software(ranges: &[(GuestAddress, u64)]) -> Result<Self, MemoryError> {
        let regions: Result<_, _> = ranges.iter().map(|&(start, length)| RamRegion::new(start, length, None)).collect();
        Self::from_regions(regions?)
    }

    fn from_regions(mut regions: Vec<RamRegion>) -> Result<Self, MemoryError> {
        regions.sort_by_key(|region| region.addresses);
        for (region, next) in regions.iter().zip(regions.iter().skip(1)) {
            if region.addresses.overlaps(next.addresses) {
                return Err(MemoryError::Overlap(region.addresses, next.addresses));
            }
        }
        Ok(Self { regions: regions.into() })
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The pieces that make up a range of guest-physical addresses, in order; `None` unless every byte is RAM.
    pub fn segments(&self, start: GuestAddress, length: u64) -> Option<Vec<HostSegment>> {
        let mut segments = Vec::new();
        self.put_segments(start, length, &mut segments).then_some(segments)
    }

    /// Puts the pieces that make up a range of guest-physical addresses in the place of whatever is in `segments`; whether every
    /// byte is RAM.
    pub(crate) fn put_segments(&self, start: GuestAddress, length: u64, segments: &mut Vec<HostSegment>) -> bool {
        segments.clear();
        self.walk(start, length, |region, offset, length| segments.push(region.segment(offset, length)))
    }

    /// Whether every byte of a range of guest-physical addresses is RAM.
    pub fn covers(&self, start: GuestAddress, length: u64) -> bool {
        self.walk(start, length, |_, _, _| ())
    }

    /// Shows the pieces of a range, each by region, offset in it and length, until a byte is missing; whether none
    /// was, and there was a first one.
    fn walk(&self, start: GuestAddress, length: u64, mut piece: impl FnMut(&RamRegion, u64, u64)) -> bool {
        let (mut at, mut left) = (start.0, length);
        let first = self.regions.partition_point(|region| region.addresses.last() < at);
        for region in self.regions.iter().skip(first) {
            let Some(offset) = at.checked_sub(region.addresses.start()).filter(|_| left != 0) else {
                break;
            };
            let more = region.addresses.last() - at;
            let taken = if left - 1 <= more { left } else { more + 1 };
            piece(region, offset, taken);
            left -= taken;
            at = at.wrapping_add(taken);
        }
        left == 0 && length != 0
    }

    /// Whether both are the same RAM: the same addresses, each backed by the same memory.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let pairs = self.regions.iter().zip(other.regions.iter());
        self.regions.len() == other.regions.len() && pairs.into_iter().all(|(a, b)| a.whole().is_same(&b.whole()))
    }
}

impl RamRegion {
    fn new(start: GuestAddress, length: u64, host: Option<HostMemory>) -> Result<Self, MemoryError> {
        let addresses =
            IovaRange::from_length(start.0, length).ok_or(MemoryError::Region { start: start.0, length })?;
        Ok(Self { addresses, host })
    }

    /// The region's guest-physical addresses. In bypass they are I/O virtual ones too.
    pub const fn addresses(&self) -> IovaRange {
        self.addresses
    }

    /// The whole region.
    pub fn whole(&self) -> HostSegment {
        // A region is made from a length.
        self.segment(0, self.addresses.last() - self.addresses.start() + 1)
    }

    fn segment(&self, offset: u64, length: u64) -> HostSegment {
        HostSegment {
            start: GuestAddress(self.addresses.start() + offset),
            length,
            host: self.host.as_ref().map(|host| host.at(offset)),
        }
    }
}

impl HostSegment {
    /// The first guest-physical address.
    pub const fn start(&self) -> GuestAddress {
        self.start
    }

    /// How many bytes; never zero.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// The guest-physical addresses.
    pub fn addresses(&self) -> IovaRange {
        // A segment is a part of a region, which is a range.
        IovaRange::from_length(self.start.0, self.length).unwrap_or(IovaRange::ALL)
    }

    /// Whether this is a part of another piece: the same guest addresses backed by the same memory.
    pub fn lies_in(&self, whole: &Self) -> bool {
        if !whole.addresses().covers(self.addresses()) {
            return false;
        }
        let offset = self.start.0 - whole.start.0;
        match (&self.host, &whole.host) {
            (None, None) => true,
            (Some(own), Some(host)) => own.is_same(&host.at(offset)),
            _ => false,
        }
    }

    /// Where the piece starts on the host, mapped for at least its length; `None` for memory that only software looks at.
    pub const fn host(&self) -> Option<&HostMemory> {
        self.host.as_ref()
    }

    /// Whether both are the same guest addresses backed by the same memory.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let same_host = match (&self.host, &other.host) {
            (None, None) => true,
            (Some(a), Some(b)) => a.is_same(b),
            _ => false,
        };
        self.start == other.start && self.length == other.length && same_host
    }
}

impl FileMemory {
    /// The file.
    pub const fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The offset in the file, in bytes.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Device and inode number: what the file is, whatever descriptor leads to it.
    pub const fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// The place so many bytes further on.
    pub(crate) fn at(&self, offset: u64) -> Self {
        Self { offset: self.offset + offset, ..self.clone() }
    }
}

impl HostMemory {
    /// The address in this process.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// How many bytes are mapped from there on.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// The place in a file whose pages the host pins directly, if there is one: memory of tmpfs (memfd is that)
    /// or hugetlbfs.
    pub fn pinnable_file(&self) -> Option<&FileMemory> {
        self.file.as_ref().filter(|file| file.pinnable)
    }

    /// The place so many bytes further on, which are mapped.
    pub(crate) fn at(&self, offset: u64) -> Self {
        let file = self.file.as_ref().map(|file| file.at(offset));
        #[expect(clippy::cast_possible_truncation, reason = "the region is mapped: offsets in it fit an address")]
        let address = self.address + offset as usize;
        Self { address, length: self.length - offset, file, owner: Arc::clone(&self.owner) }
    }

    fn is_same(&self, other: &Self) -> bool {
        match (&self.file, &other.file) {
            (Some(a), Some(b)) => a.identity == b.identity && a.offset == b.offset,
            (None, None) => self.address == other.address,
            _ => false,
        }
    }
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostMemory").field("address", &self.address).field("file", &self.file).finish_non_exhaustive()
    }
}

#[cfg(any(feature = "iommufd", feature = "type1", feature = "vhost", feature = "vhost-user"))]
mod mapped {
    use std::fs::Metadata;
    use std::os::unix::fs::MetadataExt;

    use rustix::fs::fstatfs;
    use vm_memory::bitmap::Bitmap;
    use vm_memory::mmap::GuestRegionMmap;
    use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

    use super::{Arc, FileMemory, GuestRam, HostMemory, MemoryError, RamRegion};

    // Linux, include/uapi/linux/magic.h.
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    // Linux, include/uapi/linux/mman.h.
    const MAP_SHARED: i32 = 1;

    impl GuestRam {
        /// The RAM that is mapped into this process, as a VMM or a vhost-user backend has it. Every piece keeps its
        /// mapping alive.
        ///
        /// A file that is cut off later is not noticed: the process is ended by SIGBUS when it touches what is missing. A file
        /// that is sealed against shrinking cannot be.
        ///
        /// # Errors
        ///
        /// [`MemoryError::FileTooSmall`]; [`MemoryError::File`] if the file behind a region cannot be looked at.
        pub fn from_mmap<B: Bitmap + Send + Sync + 'static>(memory: &GuestMemoryMmap<B>) -> Result<Self, MemoryError> {
            let regions: Result<_, _> = memory.iter().map(RamRegion::from_mmap).collect();
            Self::from_regions(regions?)
        }
    }

    impl RamRegion {
        fn from_mmap<B: Bitmap + Send + Sync + 'static>(region: &GuestRegionMmap<B>) -> Result<Self, MemoryError> {
            let start = region.start_addr();
            let mapping = region.get_mmap();
            // A private mapping has pages of its own: the file's are other memory.
            let shared = mapping.flags() & MAP_SHARED != 0;
            let failed = |source| MemoryError::File { start: start.0, source };
            let mut file = None;
            if let Some(place) = region.file_offset() {
                let metadata = place.file().metadata().map_err(failed)?;
                check_size(region, place, &metadata)?;
                file = Some(FileMemory::new(place, &metadata).map_err(failed)?);
            }
            let host = HostMemory {
                address: mapping.as_ptr().expose_provenance(),
                length: region.len(),
                file: file.filter(|_| shared),
                owner: mapping,
            };
            Self::new(start, region.len(), Some(host))
        }
    }

    /// Whether a region's file is there to its end. Devices have no length that could tell.
    fn check_size<B: Bitmap>(
        region: &GuestRegionMmap<B>,
        place: &FileOffset,
        metadata: &Metadata,
    ) -> Result<(), MemoryError> {
        let (needed, size) = (u128::from(place.start()) + u128::from(region.len()), metadata.len());
        if metadata.is_file() && needed > u128::from(size) {
            return Err(MemoryError::FileTooSmall { start: region.start_addr().0, needed, size });
        }
        Ok(())
    }

    impl FileMemory {
        fn new(place: &FileOffset, metadata: &Metadata) -> std::io::Result<Self> {
            let (file, offset) = (Arc::clone(place.arc()), place.start());
            // IOMMU_IOAS_MAP_FILE takes memfds and hugetlbfs files. The kernel looks at the kind of file only when
            // it pins, which is too late to choose another way.
            let pinnable = matches!(fstatfs(&file)?.f_type, TMPFS_MAGIC | HUGETLBFS_MAGIC);
            Ok(Self { file, offset, identity: (metadata.dev(), metadata.ino()), pinnable })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestRam {
        let ranges =
            [(GuestAddress(0x10_0000), 0x10_0000), (GuestAddress(0), 0xa_0000), (GuestAddress(0x20_0000), 0x1000)];
        GuestRam::in_software(&ranges).unwrap()
    }

    fn pieces(start: u64, length: u64) -> Option<Vec<(u64, u64)>> {
        let segments = ram().segments(GuestAddress(start), length)?;
        Some(segments.iter().map(|segment| (segment.start.0, segment.length)).collect())
    }

    #[test]
    fn a_range_is_ram_only_if_every_byte_is() {
        assert_eq!(pieces(0x9_f000, 0x1000), Some(vec![(0x9_f000, 0x1000)]));
        assert_eq!(pieces(0x9_f000, 0x1001), None);
        assert_eq!(pieces(0xa_0000, 1), None);
        assert_eq!(pieces(0xf_ffff, 2), None);
        assert_eq!(pieces(0x1f_f000, 0x2000), Some(vec![(0x1f_f000, 0x1000), (0x20_0000, 0x1000)]));
        assert_eq!(pieces(0x1f_f000, 0x2001), None);
        assert_eq!(pieces(0, 0), None);
        assert_eq!(pieces(u64::MAX, 1), None);
        assert_eq!(pieces(0, u64::MAX), None);
    }

    #[test]
    fn regions_that_overlap_wrap_or_are_empty_are_refused() {
        let refused = |ranges: &[(GuestAddress, u64)]| GuestRam::in_software(ranges).is_err();
        assert!(refused(&[(GuestAddress(0), 0x1000), (GuestAddress(0xfff), 0x1000)]));
        assert!(refused(&[(GuestAddress(0), 0)]));
        assert!(refused(&[(GuestAddress(u64::MAX), 2)]));
        assert!(!refused(&[(GuestAddress(u64::MAX), 1), (GuestAddress(0), u64::MAX)]));
    }

    #[cfg(any(feature = "iommufd", feature = "type1", feature = "vhost", feature = "vhost-user"))]
    #[test]
    fn the_same_file_mapped_again_is_the_same_ram() {
        use vm_memory::{FileOffset, GuestMemoryMmap};

        let file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        let map = |offset: u64| {
            let file = FileOffset::new(file.try_clone().unwrap(), offset);
            let memory =
                GuestMemoryMmap::<()>::from_ranges_with_files([(GuestAddress(0), 0x2000, Some(file))]).unwrap();
            GuestRam::from_mmap(&memory).unwrap()
        };
        assert!(map(0).is_same(&map(0)));
        assert!(!map(0).is_same(&map(0x1000)));
        let segment = map(0x1000).segments(GuestAddress(0x1800), 0x10).unwrap().remove(0);
        assert_eq!(segment.host().unwrap().file.as_ref().unwrap().offset(), 0x2800);
    }

    #[cfg(any(feature = "iommufd", feature = "type1", feature = "vhost", feature = "vhost-user"))]
    #[test]
    fn a_private_mapping_is_not_its_file() {
        use std::os::fd::OwnedFd;

        use rustix::fs::{MemfdFlags, memfd_create};
        use vm_memory::mmap::{GuestRegionMmap, MmapRegion, MmapRegionBuilder};
        use vm_memory::{FileOffset, GuestMemoryMmap};

        let memfd: OwnedFd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(memfd);
        file.set_len(0x2000).unwrap();
        let ram = |flags| {
            let mapping: MmapRegion = MmapRegionBuilder::new(0x2000)
                .with_mmap_prot(3)
                .with_mmap_flags(flags)
                .with_file_offset(FileOffset::new(file.try_clone().unwrap(), 0))
                .build()
                .unwrap();
            let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
            GuestRam::from_mmap(&GuestMemoryMmap::from_regions(vec![region]).unwrap()).unwrap()
        };
        let (shared, private, other) = (ram(1), ram(2), ram(2));
        let pinnable = |ram: &GuestRam| ram.regions()[0].whole().host().unwrap().pinnable_file().is_some();
        assert!(pinnable(&shared) && !pinnable(&private));
        assert!(shared.is_same(&ram(1)) && !private.is_same(&other));
    }
}
