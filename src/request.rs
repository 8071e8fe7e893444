// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes to [`Request`], replies to bytes. Pure: no memory, no locks, no state.

#![forbid(unsafe_code)]

use std::fmt;

use crate::access::Access;
use crate::id::{DomainId, EndpointId};
use crate::range::IovaRange;
use crate::reserved::{ReservedKind, ReservedRegion};
use crate::spec;

/// How a request ended (virtio 1.3, 5.13.6, `VIRTIO_IOMMU_S_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The request could not be transported.
    IoError = 1,
    /// The device cannot do this.
    Unsupported = 2,
    /// The device failed.
    DeviceError = 3,
    /// A parameter is invalid.
    Invalid = 4,
    /// A parameter is out of range.
    Range = 5,
    /// The object that a parameter names does not exist.
    NoEntry = 6,
    /// An address cannot be reached.
    Fault = 7,
    /// Resources are exhausted.
    NoMemory = 8,
}

impl Status {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::Ok,
        Self::IoError,
        Self::Unsupported,
        Self::DeviceError,
        Self::Invalid,
        Self::Range,
        Self::NoEntry,
        Self::Fault,
        Self::NoMemory,
    ];
}

impl fmt::Display for Status {
    /// As in the specification, without what all have in common: `OK`, `NOENT`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "OK",
            Self::IoError => "IOERR",
            Self::Unsupported => "UNSUPP",
            Self::DeviceError => "DEVERR",
            Self::Invalid => "INVAL",
            Self::Range => "RANGE",
            Self::NoEntry => "NOENT",
            Self::Fault => "FAULT",
            Self::NoMemory => "NOMEM",
        })
    }
}

/// A request whose fields have been checked as far as they can be without knowing the device's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Attach an endpoint to a domain, which is created if it does not exist.
    Attach {
        /// The domain.
        domain: DomainId,
        /// The endpoint.
        endpoint: EndpointId,
        /// Whether the domain is to be one in which every address means itself.
        bypass: bool,
    },
    /// Detach an endpoint from a domain.
    Detach {
        /// The domain.
        domain: DomainId,
        /// The endpoint.
        endpoint: EndpointId,
    },
    /// Map virtual addresses to guest-physical ones.
    Map {
        /// The domain.
        domain: DomainId,
        /// The virtual addresses.
        iova: IovaRange,
        /// The first guest-physical address; the last one does not overflow.
        physical: u64,
        /// What endpoints may do there.
        access: Access,
    },
    /// Remove all mappings in a range.
    Unmap {
        /// The domain.
        domain: DomainId,
        /// The virtual addresses.
        iova: IovaRange,
    },
    /// Report the properties of an endpoint.
    Probe {
        /// The endpoint.
        endpoint: EndpointId,
    },
}

/// What a request is, by its type byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// ATTACH
    Attach,
    /// DETACH
    Detach,
    /// MAP
    Map,
    /// UNMAP
    Unmap,
    /// PROBE
    Probe,
}

impl RequestKind {
    /// The kind of the request that these bytes start; `None` if there is no whole head, or for a type that is
    /// not known.
    pub fn of(readable: &[u8]) -> Option<Self> {
        // The head's reserved bytes are not looked at: 5.13.6.2, "The device MUST ignore field reserved of
        // struct virtio_iommu_req_head".
        let head = readable.first_chunk::<{ spec::HEAD_SIZE }>()?;
        match head[0] {
            spec::request_type::ATTACH => Some(Self::Attach),
            spec::request_type::DETACH => Some(Self::Detach),
            spec::request_type::MAP => Some(Self::Map),
            spec::request_type::UNMAP => Some(Self::Unmap),
            spec::request_type::PROBE => Some(Self::Probe),
            _ => None,
        }
    }

    /// Size of the device-readable part of such a request.
    pub const fn size(self) -> usize {
        match self {
            Self::Attach => spec::ATTACH_SIZE,
            Self::Detach => spec::DETACH_SIZE,
            Self::Map => spec::MAP_SIZE,
            Self::Unmap => spec::UNMAP_SIZE,
            Self::Probe => spec::PROBE_SIZE,
        }
    }
}

impl fmt::Display for RequestKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attach => "ATTACH",
            Self::Detach => "DETACH",
            Self::Map => "MAP",
            Self::Unmap => "UNMAP",
            Self::Probe => "PROBE",
        })
    }
}

/// The largest device-writable part of a chain that is answered, in bytes. No reply needs more; with a larger one a chain is returned
/// unwritten by the queue, so that a guest cannot make the device clear gigabytes.
pub const LARGEST_REPLY: usize = 64 << 10;

/// How many bytes the device-writable part of a PROBE must have to be answered with properties.
pub(crate) const fn probe_reply_size(probe_size: u32) -> usize {
    probe_size as usize + spec::TAIL_SIZE
}

impl Request {
    /// Reads a request of a known kind. Bytes past its size are ignored: a device must not assume how a driver
    /// frames a request.
    ///
    /// # Errors
    ///
    /// The status to answer with: [`Status::Invalid`] if the request is too short, an unknown flag is set, or a reserved field of
    /// ATTACH or UNMAP is; [`Status::Range`] for a range that ends before it starts or wraps.
    pub(crate) fn parse(kind: RequestKind, readable: &[u8]) -> Result<Self, Status> {
        if readable.len() < kind.size() {
            return Err(Status::Invalid);
        }
        let mut fields = Fields(readable);
        fields.take::<{ spec::HEAD_SIZE }>()?;
        match kind {
            RequestKind::Attach => Self::parse_attach(fields),
            // 5.13.6.4.2: "The device MUST ignore reserved."
            RequestKind::Detach => Ok(Self::Detach { domain: fields.domain()?, endpoint: fields.endpoint()? }),
            RequestKind::Map => Self::parse_map(fields),
            RequestKind::Unmap => Self::parse_unmap(fields),
            // 5.13.6.7.2: "The device MUST ignore field reserved of a PROBE request."
            RequestKind::Probe => Ok(Self::Probe { endpoint: fields.endpoint()? }),
        }
    }

    fn parse_attach(mut fields: Fields<'_>) -> Result<Self, Status> {
        let (domain, endpoint) = (fields.domain()?, fields.endpoint()?);
        let flags = fields.u32()?;
        // 5.13.6.3.2: "If the reserved field of an ATTACH request is not zero, the device MUST reject the
        // request and set status to VIRTIO_IOMMU_S_INVAL."
        if fields.take::<4>()? != [0; 4] {
            return Err(Status::Invalid);
        }
        // 5.13.6.3.2: "If the device does not recognize a flags bit, it MUST reject the request and set status
        // to VIRTIO_IOMMU_S_INVAL."
        if flags & !spec::ATTACH_F_BYPASS != 0 {
            return Err(Status::Invalid);
        }
        Ok(Self::Attach { domain, endpoint, bypass: flags & spec::ATTACH_F_BYPASS != 0 })
    }

    fn parse_map(mut fields: Fields<'_>) -> Result<Self, Status> {
        let domain = fields.domain()?;
        let (start, last, physical) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let flags = fields.u32()?;
        // 5.13.6.5.2: "If the device doesn't recognize a flags bit, it MUST reject the request and set status
        // to VIRTIO_IOMMU_S_INVAL." MMIO is not recognized: the feature is not offered.
        if flags & !(spec::MAP_F_READ | spec::MAP_F_WRITE) != 0 {
            return Err(Status::Invalid);
        }
        let iova = IovaRange::new(start, last).ok_or(Status::Range)?;
        physical.checked_add(last - start).ok_or(Status::Range)?;
        let access = Access { read: flags & spec::MAP_F_READ != 0, write: flags & spec::MAP_F_WRITE != 0 };
        Ok(Self::Map { domain, iova, physical, access })
    }

    fn parse_unmap(mut fields: Fields<'_>) -> Result<Self, Status> {
        let domain = fields.domain()?;
        let (start, last) = (fields.u64()?, fields.u64()?);
        // 5.13.6.6.2: "If the reserved field of an UNMAP request is not zero, the device MAY set the request
        // status to VIRTIO_IOMMU_S_INVAL". It does, and removes nothing: what the field will mean is unknown.
        if fields.take::<4>()? != [0; 4] {
            return Err(Status::Invalid);
        }
        let iova = IovaRange::new(start, last).ok_or(Status::Range)?;
        Ok(Self::Unmap { domain, iova })
    }
}

impl fmt::Display for Request {
    /// On one line: `MAP domain 1: 0xfffff000-0xffffffff to 0x1234000, read-only`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attach { domain, endpoint, bypass } => {
                write!(f, "ATTACH domain {domain}: endpoint {endpoint}{}", if *bypass { ", bypass" } else { "" })
            }
            Self::Detach { domain, endpoint } => write!(f, "DETACH domain {domain}: endpoint {endpoint}"),
            Self::Map { domain, iova, physical, access } => {
                write!(f, "MAP domain {domain}: {iova} to {physical:#x}, {access}")
            }
            Self::Unmap { domain, iova } => write!(f, "UNMAP domain {domain}: {iova}"),
            Self::Probe { endpoint } => write!(f, "PROBE endpoint {endpoint}"),
        }
    }
}

/// The rest of a request, read field by field.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const SIZE: usize>(&mut self) -> Result<[u8; SIZE], Status> {
        let (field, rest) = self.0.split_first_chunk::<SIZE>().ok_or(Status::Invalid)?;
        self.0 = rest;
        Ok(*field)
    }

    fn u32(&mut self) -> Result<u32, Status> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Status> {
        self.take().map(u64::from_le_bytes)
    }

    fn domain(&mut self) -> Result<DomainId, Status> {
        self.u32().map(DomainId)
    }

    fn endpoint(&mut self) -> Result<EndpointId, Status> {
        self.u32().map(EndpointId)
    }
}

/// Writes a reply over the whole device-writable part: properties first, zeroes, the status in the last four
/// bytes. Returns the used length, which is the whole part: Linux takes a shorter one for success.
///
/// Nothing is written, and zero returned, if there is no room for a tail. Properties that do not fit are left out;
/// [`probe_reply_size`] says what they need.
pub(crate) fn write_reply(writable: &mut [u8], status: Status, properties: &[ReservedRegion]) -> usize {
    let used = writable.len();
    let Some((body, tail)) = writable.split_last_chunk_mut::<{ spec::TAIL_SIZE }>() else {
        return 0;
    };
    // 5.13.6.2: the device "SHOULD set field reserved of struct virtio_iommu_req_tail to zero".
    *tail = [status as u8, 0, 0, 0];
    // 5.13.6.7.2: "If the device doesn't fill all probe_size bytes with properties, it SHOULD fill the remaining
    // bytes of properties with zeroes."
    body.fill(0);
    // 5.13.6.7.2: "the device MUST put the second property exactly (length + 4) bytes after the beginning of the
    // first one."
    for (slot, region) in body.chunks_exact_mut(spec::RESV_MEM_SIZE).zip(properties) {
        slot.copy_from_slice(&reserved_memory_property(region));
    }
    used
}

/// `struct virtio_iommu_probe_resv_mem` (5.13.6.8.1).
fn reserved_memory_property(region: &ReservedRegion) -> [u8; spec::RESV_MEM_SIZE] {
    let subtype = match region.kind {
        ReservedKind::Reserved => spec::RESV_MEM_T_RESERVED,
        ReservedKind::Msi => spec::RESV_MEM_T_MSI,
    };
    let mut bytes = [0; spec::RESV_MEM_SIZE];
    bytes[0..2].copy_from_slice(&spec::PROBE_T_RESV_MEM.to_le_bytes());
    // 5.13.6.7.2: "The device MUST write the size of a property without the struct virtio_iommu_probe_property
    // header, in bytes, into length."
    bytes[2..4].copy_from_slice(&spec::RESV_MEM_LENGTH.to_le_bytes());
    bytes[4] = subtype;
    bytes[8..16].copy_from_slice(&region.range.start().to_le_bytes());
    bytes[16..24].copy_from_slice(&region.range.last().to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(bytes: &[u8]) -> Result<Request, Status> {
        Request::parse(RequestKind::of(bytes).unwrap(), bytes)
    }

    fn attach_bytes() -> [u8; 20] {
        [1, 0, 0, 0, 7, 0, 0, 0, 0x18, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    }

    fn map_bytes(start: u64, last: u64, physical: u64, flags: u32) -> Vec<u8> {
        let mut bytes = vec![3, 0, 0, 0, 7, 0, 0, 0];
        for field in [start, last, physical] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(flags.to_le_bytes());
        bytes
    }

    #[test]
    fn attach_is_read_field_by_field() {
        let expected = Request::Attach { domain: DomainId(7), endpoint: EndpointId(0x18), bypass: true };
        assert_eq!(parse(&attach_bytes()), Ok(expected));
    }

    #[test]
    fn head_reserved_must_be_ignored() {
        let mut bytes = attach_bytes();
        bytes[1..4].copy_from_slice(&[1, 2, 3]);
        assert_eq!(parse(&bytes), parse(&attach_bytes()));
    }

    #[test]
    fn attach_reserved_not_zero_must_be_inval() {
        for at in 16..20 {
            let mut bytes = attach_bytes();
            bytes[at] = 1;
            assert_eq!(parse(&bytes), Err(Status::Invalid), "byte {at}");
        }
    }

    #[test]
    fn attach_unknown_flag_must_be_inval() {
        for bit in 1..32 {
            let mut bytes = attach_bytes();
            bytes[12..16].copy_from_slice(&(1u32 << bit).to_le_bytes());
            assert_eq!(parse(&bytes), Err(Status::Invalid), "bit {bit}");
        }
    }

    #[test]
    fn detach_reserved_must_be_ignored() {
        let mut bytes = [2, 0, 0, 0, 7, 0, 0, 0, 0x18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        bytes[12..].fill(0xff);
        assert_eq!(parse(&bytes), Ok(Request::Detach { domain: DomainId(7), endpoint: EndpointId(0x18) }));
    }

    #[test]
    fn map_unknown_flag_must_be_inval() {
        for bit in 2..32 {
            assert_eq!(parse(&map_bytes(0, 4095, 0, 1 << bit)), Err(Status::Invalid), "bit {bit}");
        }
    }

    #[test]
    fn map_ranges_never_wrap() {
        assert_eq!(parse(&map_bytes(1, 0, 0, 1)), Err(Status::Range));
        assert_eq!(parse(&map_bytes(0, 4095, u64::MAX - 4094, 1)), Err(Status::Range));
        assert!(parse(&map_bytes(0, 4095, u64::MAX - 4095, 1)).is_ok());
        assert!(parse(&map_bytes(0, u64::MAX, 0, 1)).is_ok());
        assert!(parse(&map_bytes(0x1000, 0x1fff, u64::MAX - 4095, 1)).is_ok());
    }

    #[test]
    fn unmap_reserved_not_zero_is_inval() {
        let mut bytes = vec![4, 0, 0, 0, 7, 0, 0, 0];
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(u64::MAX.to_le_bytes());
        bytes.extend([0; 4]);
        assert_eq!(parse(&bytes), Ok(Request::Unmap { domain: DomainId(7), iova: IovaRange::ALL }));
        for at in 24..28 {
            let mut bytes = bytes.clone();
            bytes[at] = 1;
            assert_eq!(parse(&bytes), Err(Status::Invalid), "byte {at}");
        }
    }

    #[test]
    fn probe_reserved_must_be_ignored() {
        let mut bytes = [0xff; 72];
        bytes[..8].copy_from_slice(&[5, 9, 9, 9, 0x18, 0, 0, 0]);
        assert_eq!(parse(&bytes), Ok(Request::Probe { endpoint: EndpointId(0x18) }));
    }

    #[test]
    fn properties_follow_each_other_exactly_and_the_rest_is_zero() {
        let region = |start, last, kind| ReservedRegion { range: IovaRange::new(start, last).unwrap(), kind };
        let regions = [
            region(0xfee0_0000, 0xfeef_ffff, ReservedKind::Msi),
            region(0xfd_0000_0000, 0xff_ffff_ffff, ReservedKind::Reserved),
        ];
        let mut reply = vec![0xaa; 64 + 4];
        assert_eq!(write_reply(&mut reply, Status::Ok, &regions), 68);
        let mut expected =
            vec![1, 0, 20, 0, 1, 0, 0, 0, 0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0xff, 0xff, 0xef, 0xfe, 0, 0, 0, 0];
        expected.extend([1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfd, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0]);
        expected.resize(68, 0);
        assert_eq!(reply, expected);
    }

    #[test]
    fn no_room_for_a_tail_is_returned_unwritten() {
        for length in 0..4 {
            let mut reply = vec![0xaa; length];
            assert_eq!(write_reply(&mut reply, Status::Invalid, &[]), 0);
            assert!(reply.iter().all(|byte| *byte == 0xaa));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(kind) = RequestKind::of(&bytes) {
                let parsed = Request::parse(kind, &bytes);
                prop_assert!(bytes.len() >= kind.size() || parsed == Err(Status::Invalid));
            }
        }
    }
}
