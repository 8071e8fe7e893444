// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The translator as vm-memory's `Iommu`.

use vm_memory::iommu::{Error, Iommu, Iotlb, IotlbIterator, IovaRange as VmMemoryRange};
use vm_memory::{GuestAddress, Permissions};

use super::memory::access_of;
use super::translator::{Segment, Translator};

/// For devices that use [`vm_memory::IommuMemory`] already. [`IovaMemory`](super::IovaMemory) is faster, and keeps the promise of
/// an UNMAP: with `IommuMemory`, slices that were had before an UNMAP was answered can be used after it.
///
/// Translations are not cached here, so none is ever stale when it is asked for. `IommuMemory` marks written pages in a dirty bitmap
/// of its own, by I/O virtual address.
#[derive(Debug)]
pub struct IommuAdapter {
    translator: Translator,
}

impl IommuAdapter {
    /// How many pieces the guest memory behind one access may be in.
    const MOST_PIECES: usize = 4096;

    /// Translates with this translator.
    pub const fn new(translator: Translator) -> Self {
        Self { translator }
    }
}

impl Iommu for IommuAdapter {
    type IotlbGuard<'a> = Box<Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let refused =
            |reason: String| Error::CannotResolve { iova_range: VmMemoryRange { base: iova, length }, reason };
        // Iotlb counts with the address behind the range, and not with empty ones.
        if length == 0 || iova.0.checked_add(length as u64).is_none() {
            return Err(refused("it is empty, or reaches the end of the address space".to_owned()));
        }
        let mut found = Box::new(Iotlb::new());
        let mut at = iova;
        self.translator.with_translation(iova.0, length, access_of(access), |segments| {
            for (index, segment) in segments.enumerate() {
                let Segment { start, length } = segment.map_err(|fault| refused(fault.to_string()))?;
                if index == Self::MOST_PIECES {
                    return Err(refused(format!("it is in more than {} pieces", Self::MOST_PIECES)));
                }
                found.set_mapping(at, start, length, access)?;
                at = GuestAddress(at.0.wrapping_add(length as u64));
            }
            Ok(())
        })?;
        Iotlb::lookup(found, iova, length, access).map_err(|_| refused("it was not found again".to_owned()))
    }
}
