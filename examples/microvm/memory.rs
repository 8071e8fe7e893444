// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory, and where things are in it.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::Error;

/// The segments that the kernel is entered with.
pub const SEGMENTS: GuestAddress = GuestAddress(0x500);
/// What the kernel is told by its loader: the "zero page".
pub const BOOT_PARAMETERS: GuestAddress = GuestAddress(0x7000);
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// A page that the guest is told to leave alone. A stray write of the disk goes to this address: with an IOMMU nothing is mapped there,
/// without one it is this page.
pub const STRAY_TARGET: GuestAddress = GuestAddress(0x9_f000);
/// ACPI's tables. From here to the next there is no memory for general use.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// Where memory goes on.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
/// Where the registers of devices are, behind all memory.
pub const MMIO: GuestAddress = GuestAddress(0xd000_0000);
/// How much room there is for them.
pub const MMIO_SIZE: u64 = 0x10_0000;

/// How much memory a guest has in MiB.
pub const MEBIBYTES: std::ops::RangeInclusive<i64> = 64..=MMIO.0.cast_signed() >> 20;

/// Guest memory, in one piece from address 0 on.
///
/// # Errors
///
/// The host has not so much of it.
pub fn allocate(mebibytes: u32) -> Result<GuestMemoryMmap, Error> {
    let size = usize::try_from(u64::from(mebibytes) << 20).unwrap_or(usize::MAX);
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).map_err(Error::Memory)
}

/// Makes it the guest's. `memory` must be kept as long as the guest runs.
///
/// # Errors
///
/// KVM refuses.
pub fn give_to_guest(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.get_host_address(vm_memory::MemoryRegionAddress(0))?.expose_provenance() as u64,
        };
        // SAFETY: the region is a mapping of that size, of memory that nothing in this process has a reference into: it is accessed
        // through vm-memory only. `Machine` keeps it until after its processor has run for the last time.
        #[allow(unsafe_code)]
        unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("give the guest its memory"))?;
    }
    Ok(())
}
