// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the ways to map memory by Linux have in common.

#![forbid(unsafe_code)]

use rustix::io::Errno;

use super::HostErrorKind;

/// What the kernel means when it refuses to map memory.
pub(super) const fn map_error_kind(errno: Errno) -> HostErrorKind {
    match errno {
        Errno::INVAL | Errno::OVERFLOW => HostErrorKind::Unmappable,
        Errno::EXIST => HostErrorKind::AlreadyMapped,
        Errno::NOMEM | Errno::NOSPC => HostErrorKind::NoMemory,
        Errno::FAULT => HostErrorKind::BadAddress,
        _ => HostErrorKind::Other,
    }
}

#[cfg(any(feature = "iommufd", feature = "type1"))]
pub(super) use self::ioctls::{failed, size, vfio_opcode};

#[cfg(feature = "iommufd")]
pub(super) use self::ioctls::size_before;

#[cfg(any(feature = "iommufd", feature = "type1"))]
mod ioctls {
    use rustix::io::Errno;
    use rustix::ioctl::{Opcode, opcode};
    use vfio_bindings::bindings::vfio::VFIO_BASE;

    use crate::host::{HostError, HostErrorKind};

    /// `VFIO_TYPE`
    const VFIO_TYPE: u8 = b';';

    /// A call that the kernel refused.
    pub fn failed(errno: Errno, action: impl Into<String>, kind: HostErrorKind) -> HostError {
        HostError::new(kind, action, Some(errno.into()))
    }

    /// The code of one of VFIO's calls.
    pub const fn vfio_opcode(number: u32) -> Opcode {
        let [number, ..] = (VFIO_BASE + number).to_le_bytes();
        opcode::none(VFIO_TYPE, number)
    }

    /// The size of a structure, as it is written into the structure.
    pub const fn size<T>() -> u32 {
        size_before(size_of::<T>())
    }

    /// The size of a structure up to a field that kernels before it did not know.
    #[expect(clippy::cast_possible_truncation, reason = "structures of the kernel's interface have tens of bytes")]
    pub const fn size_before(offset: usize) -> u32 {
        offset as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_to_map_is_told_by_its_reason() {
        for (errno, kind) in [
            (Errno::INVAL, HostErrorKind::Unmappable),
            (Errno::OVERFLOW, HostErrorKind::Unmappable),
            (Errno::EXIST, HostErrorKind::AlreadyMapped),
            (Errno::NOMEM, HostErrorKind::NoMemory),
            (Errno::NOSPC, HostErrorKind::NoMemory),
            (Errno::FAULT, HostErrorKind::BadAddress),
            (Errno::PERM, HostErrorKind::Other),
        ] {
            assert_eq!(map_error_kind(errno), kind, "{errno}");
        }
    }

    /// The numbers of `VFIO_CHECK_EXTENSION` and `VFIO_DEVICE_BIND_IOMMUFD`, include/uapi/linux/vfio.h.
    #[cfg(any(feature = "iommufd", feature = "type1"))]
    #[test]
    fn vfios_calls_are_those_of_the_kernel() {
        assert_eq!((vfio_opcode(1), vfio_opcode(18)), (0x3b65, 0x3b76));
        assert_eq!(size::<[u64; 3]>(), 24);
    }
}
