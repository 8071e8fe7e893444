// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The IOMMU, with one emulated device behind it.

use std::sync::Arc;

use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::embed::{EmbeddedIommu, Transport};
use virtio_iommu::host::HostGroup;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::IovaRange;
use virtio_iommu::reserved::plan::X86_MSI;
use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};
use virtio_iommu::translate::{Limits, Translation, Translator};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::Error;
use crate::mmio::Interrupt;

/// The disk. A device that is not on PCI may have any ID that no other endpoint has.
pub const DISK: EndpointId = EndpointId(1);

const GRANULE: u64 = 0x1000;
/// As many as [`Limits`] has by default.
const ADDRESS_BITS: u32 = 48;

/// The device, for its registers and the loop.
pub type Iommu = EmbeddedIommu<Arc<GuestMemoryMmap>>;

/// Makes the device, and what the disk translates its accesses with.
///
/// # Errors
///
/// No event files can be had.
pub fn new(memory: &GuestMemoryMmap, interrupt: &Arc<Interrupt>, trace: bool) -> Result<(Iommu, Translator), Error> {
    let limits = Limits { address_bits: ADDRESS_BITS, ..Limits::default() };
    let group = Translation::new(limits).group(vec![DISK]);
    let translator = group.translator(DISK).ok_or(Error::NoTranslator)?;
    let group = Arc::new(group);

    // Behind hardware a write there is an interrupt, so no guest may map it. The disk's own interrupt is a wire.
    let doorbell = ReservedRegion { range: X86_MSI, kind: ReservedKind::Msi };
    let endpoints = vec![(DISK, EndpointView::new(vec![doorbell])?)];
    let input_range = IovaRange::new(0, (1 << ADDRESS_BITS) - 1).unwrap_or(IovaRange::ALL);
    // Nothing gets through until the guest has mapped it.
    let settings = Settings { boot_bypass: false, ..Settings::new(input_range, GRANULE) };
    let mut device = VirtioIommu::new(settings, endpoints, vec![Arc::clone(&group) as Arc<dyn HostGroup>])?;
    let ranges: Vec<_> = memory.iter().map(|region| (region.start_addr(), region.len())).collect();
    device.set_memory(GuestRam::in_software(&ranges)?);
    if trace {
        device.on_exchange(|exchange| eprintln!("iommu: {exchange}"));
    }

    let iommu = EmbeddedIommu::new(device, Arc::new(memory.clone()), Arc::clone(interrupt) as Arc<dyn Transport>)
        .map_err(Error::Events)?;
    // An access that is refused on the disk's behalf is an event for the guest.
    group.on_refused(iommu.waker());
    Ok((iommu, translator))
}
