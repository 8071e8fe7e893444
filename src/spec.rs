// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The wire: constants and layouts of the IOMMU device in virtio 1.3, section 5.13. Nothing is decided here.
//!
//! All fields are little-endian. Sizes and offsets are in bytes.

#![forbid(unsafe_code)]

/// Virtio device type of an IOMMU (5.13.1).
pub const DEVICE_ID: u32 = 23;

/// PCI device ID of an IOMMU: 0x1040 plus the device type (4.1.2.1).
pub const PCI_DEVICE_ID: u16 = 0x1040 + 23;

/// Index of the request virtqueue (5.13.2).
pub const REQUEST_QUEUE: u16 = 0;
/// Index of the event virtqueue (5.13.2).
pub const EVENT_QUEUE: u16 = 1;
/// How many virtqueues the device has.
pub const QUEUE_COUNT: u16 = 2;

/// Feature bits, as masks (5.13.3, and 6 for those that all devices share).
pub mod feature {
    /// `input_range` describes the virtual addresses that can be mapped.
    pub const INPUT_RANGE: u64 = 1 << 0;
    /// `domain_range` describes the domain IDs that can be used.
    pub const DOMAIN_RANGE: u64 = 1 << 1;
    /// MAP and UNMAP requests exist.
    pub const MAP_UNMAP: u64 = 1 << 2;
    /// PROBE requests exist.
    pub const PROBE: u64 = 1 << 4;
    /// `bypass` in the configuration and the BYPASS flag of ATTACH exist.
    pub const BYPASS_CONFIG: u64 = 1 << 6;
    /// Descriptors may point to a table of descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event` suppress notifications.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// The device complies with virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// The platform may restrict or translate the device's own memory accesses.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
}

/// Layout of `struct virtio_iommu_config` (5.13.4).
pub mod config {
    /// Size of the structure.
    pub const SIZE: usize = 40;
    /// Offset of `page_size_mask`, le64.
    pub const PAGE_SIZE_MASK: usize = 0;
    /// Offset of `input_range.start`, le64.
    pub const INPUT_RANGE_START: usize = 8;
    /// Offset of `input_range.end`, le64, inclusive.
    pub const INPUT_RANGE_END: usize = 16;
    /// Offset of `domain_range.start`, le32.
    pub const DOMAIN_RANGE_START: usize = 24;
    /// Offset of `domain_range.end`, le32, inclusive.
    pub const DOMAIN_RANGE_END: usize = 28;
    /// Offset of `probe_size`, le32.
    pub const PROBE_SIZE: usize = 32;
    /// Offset of `bypass`, u8: the only field a driver may write.
    pub const BYPASS: usize = 36;
}

/// Request types: the first byte of a request (5.13.6).
pub mod request_type {
    /// Attach an endpoint to a domain.
    pub const ATTACH: u8 = 1;
    /// Detach an endpoint from a domain.
    pub const DETACH: u8 = 2;
    /// Map a range of virtual addresses to guest-physical ones.
    pub const MAP: u8 = 3;
    /// Remove the mappings in a range of virtual addresses.
    pub const UNMAP: u8 = 4;
    /// Ask for the properties of an endpoint.
    pub const PROBE: u8 = 5;
}

/// Size of `struct virtio_iommu_req_head`: type, then three reserved bytes.
pub const HEAD_SIZE: usize = 4;
/// Size of `struct virtio_iommu_req_tail`: status, then three reserved bytes.
pub const TAIL_SIZE: usize = 4;
/// Size of the device-readable part of ATTACH: head, domain, endpoint, flags, `reserved[4]`.
pub const ATTACH_SIZE: usize = 20;
/// Size of the device-readable part of DETACH: head, domain, endpoint, `reserved[8]`.
pub const DETACH_SIZE: usize = 20;
/// Size of the device-readable part of MAP: head, domain, `virt_start`, `virt_end`, `phys_start`, flags.
pub const MAP_SIZE: usize = 36;
/// Size of the device-readable part of UNMAP: head, domain, `virt_start`, `virt_end`, `reserved[4]`.
pub const UNMAP_SIZE: usize = 28;
/// Size of the device-readable part of PROBE: head, endpoint, `reserved[64]`.
pub const PROBE_SIZE: usize = 72;
/// Size of the largest device-readable part.
pub const LARGEST_REQUEST: usize = PROBE_SIZE;

/// ATTACH flag: the domain is a bypass domain.
pub const ATTACH_F_BYPASS: u32 = 1 << 0;

/// MAP flag: the endpoint may read.
pub const MAP_F_READ: u32 = 1 << 0;
/// MAP flag: the endpoint may write.
pub const MAP_F_WRITE: u32 = 1 << 1;

/// Property type of a reserved region in a PROBE reply.
pub const PROBE_T_RESV_MEM: u16 = 1;
/// Size of `struct virtio_iommu_probe_resv_mem`: type and length, each le16, subtype, three reserved bytes, start and
/// end, each le64.
pub const RESV_MEM_SIZE: usize = 24;
/// What its length field says: the size without type and length themselves.
pub const RESV_MEM_LENGTH: u16 = 20;
/// Subtype of a region that cannot be mapped.
pub const RESV_MEM_T_RESERVED: u8 = 0;
/// Subtype of a region that is a doorbell for message-signalled interrupts.
pub const RESV_MEM_T_MSI: u8 = 1;

/// Layout of `struct virtio_iommu_fault` (5.13.6.9).
pub mod fault {
    /// Size of the structure.
    pub const SIZE: usize = 24;
    /// Reason: something that the other reasons do not describe.
    pub const R_UNKNOWN: u8 = 0;
    /// Reason: the endpoint is not attached to a domain.
    pub const R_DOMAIN: u8 = 1;
    /// Reason: the address is not mapped, or not for this access.
    pub const R_MAPPING: u8 = 2;
    /// Flag: the access was a read.
    pub const F_READ: u32 = 1 << 0;
    /// Flag: the access was a write.
    pub const F_WRITE: u32 = 1 << 1;
    /// Flag: `address` is valid.
    pub const F_ADDRESS: u32 = 1 << 8;
}
