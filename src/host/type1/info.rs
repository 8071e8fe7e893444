// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `VFIO_IOMMU_GET_INFO` answers with: a structure, and capabilities chained by offsets
//! (`struct vfio_iommu_type1_info` and `struct vfio_info_cap_header`, include/uapi/linux/vfio.h).

#![forbid(unsafe_code)]

use crate::range::{IovaRange, RangeSet};

/// What a container can map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Type1Info {
    /// The page sizes, a bit each.
    pub page_sizes: u64,
    /// The addresses that can be mapped; `None` if the kernel does not tell (before 5.4, or no group is there).
    pub usable: Option<RangeSet>,
    /// How many more mappings there may be; `None` if the kernel does not tell (before 5.10).
    pub mappings_left: Option<u32>,
}

/// An answer that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InfoError {
    /// Something lies outside of the answer.
    #[error("{what} at {offset:#x} does not fit the {length:#x} bytes of the answer")]
    Outside {
        /// What.
        what: &'static str,
        /// Where it should be.
        offset: usize,
        /// The size of the answer.
        length: usize,
    },
    /// A capability does not lead to one behind it.
    #[error("the capability at {from:#x} leads back to {to:#x}")]
    Backwards {
        /// Where the capability is.
        from: usize,
        /// Where it leads.
        to: usize,
    },
    /// A usable range ends before it starts.
    #[error("the usable range from {start:#x} ends at {last:#x}")]
    Inverted {
        /// Its first address.
        start: u64,
        /// Its last address.
        last: u64,
    },
}

const FLAGS: usize = 4;
const PAGE_SIZES: usize = 8;
const CAPABILITY_OFFSET: usize = 16;
/// `VFIO_IOMMU_INFO_PGSIZES`
const HAS_PAGE_SIZES: u32 = 1;
/// `VFIO_IOMMU_INFO_CAPS`
const HAS_CAPABILITIES: u32 = 2;

/// Reads an answer.
///
/// # Errors
///
/// [`InfoError`]: nothing outside of the answer is looked at, and no capability twice.
pub fn parse(answer: &[u8]) -> Result<Type1Info, InfoError> {
    let flags = u32_at(answer, FLAGS, "the flags")?;
    let page_sizes = if flags & HAS_PAGE_SIZES == 0 { 0 } else { u64_at(answer, PAGE_SIZES, "the page sizes")? };
    let mut info = Type1Info { page_sizes, usable: None, mappings_left: None };
    if flags & HAS_CAPABILITIES == 0 {
        return Ok(info);
    }
    let mut offset = u32_at(answer, CAPABILITY_OFFSET, "the first capability's offset")? as usize;
    while offset != 0 {
        let header = u32_at(answer, offset, "a capability")?;
        let (id, version) = (header & 0xffff, header >> 16);
        let next = u32_at(answer, offset.saturating_add(4), "a capability's link")? as usize;
        match (id, version) {
            (1, 1) => info.usable = Some(usable(answer, offset)?),
            (3, 1) => info.mappings_left = Some(u32_at(answer, offset.saturating_add(8), "the mappings left")?),
            // Of a later kernel, or not needed here.
            _ => (),
        }
        if next != 0 && next <= offset {
            return Err(InfoError::Backwards { from: offset, to: next });
        }
        offset = next;
    }
    Ok(info)
}

/// `struct vfio_iommu_type1_info_cap_iova_range`: a count, and ranges of two inclusive ends.
fn usable(answer: &[u8], offset: usize) -> Result<RangeSet, InfoError> {
    let count = u32_at(answer, offset.saturating_add(8), "the count of usable ranges")?;
    let mut usable = RangeSet::new();
    let mut at = offset.saturating_add(16);
    for _ in 0..count {
        let (start, last) = (u64_at(answer, at, "a usable range")?, u64_at(answer, at.saturating_add(8), "its end")?);
        usable.insert(IovaRange::new(start, last).ok_or(InfoError::Inverted { start, last })?);
        at = at.saturating_add(16);
    }
    Ok(usable)
}

fn u32_at(answer: &[u8], offset: usize, what: &'static str) -> Result<u32, InfoError> {
    let bytes = answer.get(offset..).and_then(|rest| rest.first_chunk());
    bytes.map(|bytes| u32::from_ne_bytes(*bytes)).ok_or(InfoError::Outside { what, offset, length: answer.len() })
}

fn u64_at(answer: &[u8], offset: usize, what: &'static str) -> Result<u64, InfoError> {
    let bytes = answer.get(offset..).and_then(|rest| rest.first_chunk());
    bytes.map(|bytes| u64::from_ne_bytes(*bytes)).ok_or(InfoError::Outside { what, offset, length: answer.len() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An answer with these capabilities, one after the other: id, version, body.
    fn answer(flags: u32, capabilities: &[(u16, u16, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0; 24];
        bytes[FLAGS..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[PAGE_SIZES..16].copy_from_slice(&0x4000_1000u64.to_ne_bytes());
        let mut link = CAPABILITY_OFFSET;
        for (id, version, body) in capabilities {
            let at = bytes.len();
            bytes[link..link + 4].copy_from_slice(&u32::try_from(at).unwrap().to_ne_bytes());
            link = at + 4;
            bytes.extend(id.to_ne_bytes());
            bytes.extend(version.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(body);
        }
        bytes
    }

    fn ranges(ranges: &[(u64, u64)]) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(u32::try_from(ranges.len()).unwrap().to_ne_bytes());
        body.extend([0; 4]);
        for (start, last) in ranges {
            body.extend(start.to_ne_bytes());
            body.extend(last.to_ne_bytes());
        }
        body
    }

    fn whole() -> Vec<u8> {
        let migration = [&[0; 8][..], &0x1000u64.to_ne_bytes(), &[0; 8]].concat();
        answer(
            3,
            &[
                (2, 1, migration),
                (9, 1, vec![1, 2, 3, 4]),
                (1, 1, ranges(&[(0, 0xfedf_ffff), (0xfef0_0000, u64::MAX)])),
                (3, 1, 65535u32.to_ne_bytes().to_vec()),
            ],
        )
    }

    #[test]
    fn all_capabilities_are_found_and_unknown_ones_passed_over() {
        let info = parse(&whole()).unwrap();
        assert_eq!(info.page_sizes, 0x4000_1000);
        assert_eq!(info.usable.unwrap().to_string(), "0x0-0xfedfffff, 0xfef00000-0xffffffffffffffff");
        assert_eq!(info.mappings_left, Some(65535));
    }

    #[test]
    fn a_kernel_that_does_not_tell_is_no_error() {
        let nothing = Type1Info { page_sizes: 0x4000_1000, usable: None, mappings_left: None };
        assert_eq!(parse(&answer(1, &[])), Ok(nothing.clone()));
        // Before 5.4 the structure ended with the page sizes.
        assert_eq!(parse(&answer(1, &[])[..16]), Ok(nothing.clone()));
        assert_eq!(parse(&answer(3, &[])), Ok(nothing.clone()), "flagged, and none there");
        assert_eq!(parse(&answer(0, &[])), Ok(Type1Info { page_sizes: 0, ..nothing.clone() }));
        assert_eq!(parse(&answer(3, &[(1, 2, ranges(&[(0, 1)]))])), Ok(nothing), "of another version");
    }

    #[test]
    fn a_chain_that_loops_or_leads_outside_is_an_error() {
        let mut bytes = whole();
        let first = 24;
        bytes[first + 4..first + 8].copy_from_slice(&24u32.to_ne_bytes());
        assert_eq!(parse(&bytes), Err(InfoError::Backwards { from: 24, to: 24 }));
        bytes[first + 4..first + 8].copy_from_slice(&8u32.to_ne_bytes());
        assert_eq!(parse(&bytes), Err(InfoError::Backwards { from: 24, to: 8 }));
        for outside in [u32::MAX, 0x1000, u32::try_from(bytes.len()).unwrap() - 3] {
            bytes[first + 4..first + 8].copy_from_slice(&outside.to_ne_bytes());
            assert!(matches!(parse(&bytes), Err(InfoError::Outside { .. })), "{outside:#x}");
        }
    }

    #[test]
    fn ranges_that_are_not_there_or_inverted_are_an_error() {
        let mut many = ranges(&[(0, 1)]);
        many[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(matches!(parse(&answer(3, &[(1, 1, many)])), Err(InfoError::Outside { .. })));
        let inverted = parse(&answer(3, &[(1, 1, ranges(&[(2, 1)]))]));
        assert_eq!(inverted, Err(InfoError::Inverted { start: 2, last: 1 }));
        assert!(parse(&whole()[..60]).is_err());
        assert!(parse(&[]).is_err());
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), small: bool) {
            // Offsets and versions that are likely to lead on.
            if small && bytes.len() > 24 {
                bytes[FLAGS..8].copy_from_slice(&3u32.to_ne_bytes());
                for byte in &mut bytes[CAPABILITY_OFFSET..] {
                    *byte &= 0x3f;
                }
            }
            let _ = parse(&bytes);
        }
    }
}
