// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages that a device of the kernel's sends: `struct vhost_msg` and `struct vhost_msg_v2`, which agree in what is looked at
//! here (`include/uapi/linux/vhost_types.h`).

use crate::access::Access;

/// The bytes of a message.
pub(super) const SIZE: usize = 72;

const TYPE_IOTLB: u32 = 1;
const TYPE_IOTLB_V2: u32 = 2;
const IOTLB_MISS: u8 = 1;
/// Access is told by a bit each.
const ACCESS_READ: u8 = 1;
const ACCESS_WRITE: u8 = 2;

/// A device has no translation for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Miss {
    pub iova: u64,
    pub access: Access,
}

impl Miss {
    /// What a message asks for; `None` if it is something else.
    pub fn parse(message: &[u8]) -> Option<Self> {
        let kind = u32::from_ne_bytes(*message.first_chunk()?);
        let iova = u64::from_ne_bytes(*message.get(8..)?.first_chunk()?);
        let permissions = *message.get(32)?;
        let access = Access { read: permissions & ACCESS_READ != 0, write: permissions & ACCESS_WRITE != 0 };
        let is_miss = matches!(kind, TYPE_IOTLB | TYPE_IOTLB_V2) && *message.get(33)? == IOTLB_MISS;
        (is_miss && message.len() == SIZE && !access.is_none()).then_some(Self { iova, access })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u32, iova: u64, permissions: u8, iotlb: u8) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[..4].copy_from_slice(&kind.to_ne_bytes());
        bytes[8..16].copy_from_slice(&iova.to_ne_bytes());
        bytes[32] = permissions;
        bytes[33] = iotlb;
        bytes
    }

    #[test]
    fn both_versions_of_a_miss_are_understood() {
        for kind in [TYPE_IOTLB, TYPE_IOTLB_V2] {
            for (permissions, access) in [(1, Access::READ), (2, Access::WRITE), (3, Access::READ_WRITE)] {
                let expected = Miss { iova: 0x1234_5678_9abc, access };
                assert_eq!(Miss::parse(&message(kind, expected.iova, permissions, IOTLB_MISS)), Some(expected));
            }
        }
    }

    #[test]
    fn anything_else_is_none() {
        let miss = message(TYPE_IOTLB, 0x1000, 1, IOTLB_MISS);
        for length in 0..SIZE {
            assert_eq!(Miss::parse(&miss[..length]), None, "{length} bytes");
        }
        assert_eq!(Miss::parse(&message(3, 0x1000, 1, IOTLB_MISS)), None);
        assert_eq!(Miss::parse(&message(TYPE_IOTLB, 0x1000, 0, IOTLB_MISS)), None);
        assert_eq!(Miss::parse(&message(TYPE_IOTLB, 0x1000, 1, 2)), None);
    }
}
