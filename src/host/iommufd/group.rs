// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Groups of devices on address spaces of an iommufd.

#![forbid(unsafe_code)]

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::api::IommufdApi;
use super::device::VfioDevice;
use super::ioas::{Ioas, Iommufd, failed};
use crate::access::Access;
use crate::host::{AfterFailure, AttachError, HostError, HostErrorKind, HostGroup, IoPageTable};
use crate::id::EndpointId;
use crate::memory::{GuestRam, HostSegment, RamRegion};

/// An IOMMU group whose devices this process holds by their VFIO files.
#[derive(Debug)]
pub struct IommufdGroup {
    iommufd: Arc<Iommufd>,
    members: Vec<EndpointId>,
    state: Mutex<State>,
    /// The devices are known to be bound to this iommufd.
    bound_here: AtomicBool,
    binding: Binding,
}

/// Who bound the devices.
#[derive(Debug)]
enum Binding {
    /// Somebody else, who knows their numbers.
    Elsewhere,
    /// This process: it can make hardware page tables for them.
    Here {
        /// The first device's number.
        device: u32,
        source: Option<Arc<PinnedSource>>,
    },
}

#[derive(Debug)]
struct State {
    /// Those of the members that are still endpoints.
    devices: Vec<(EndpointId, VfioDevice)>,
    /// What the devices are attached to, if this process bound them.
    hardware_table: Option<HardwareTable>,
}

/// A hardware page table (HWPT) of an address space.
#[derive(Debug)]
struct HardwareTable {
    api: Arc<dyn IommufdApi>,
    id: u32,
}

impl HardwareTable {
    fn new(api: &Arc<dyn IommufdApi>, device: u32, ioas: u32) -> Result<Self, HostError> {
        let result = api.hwpt_alloc(device, ioas);
        let kind = |errno| match errno {
            rustix::io::Errno::NOMEM => HostErrorKind::NoMemory,
            rustix::io::Errno::ADDRINUSE => HostErrorKind::ReservedConflict,
            rustix::io::Errno::NODEV => HostErrorKind::Gone,
            rustix::io::Errno::INVAL => HostErrorKind::Incompatible,
            _ => HostErrorKind::Other,
        };
        let id = result.map_err(|errno| failed(errno, format!("IOMMU_HWPT_ALLOC for IOAS {ioas}"), kind(errno)))?;
        Ok(Self { api: Arc::clone(api), id })
    }
}

impl Drop for HardwareTable {
    fn drop(&mut self) {
        if let Err(errno) = self.api.destroy(self.id) {
            log::error!("the hardware page table {} stays in the kernel: {errno}", self.id);
        }
    }
}

impl IommufdGroup {
    /// A group of devices that the caller has bound to this iommufd ([`VfioDevice::bind`]), or that another process binds by
    /// the same files: a VMM that this process works beside. Until that has happened, attaching fails.
    pub fn shared(iommufd: Arc<Iommufd>, devices: Vec<(EndpointId, VfioDevice)>) -> Self {
        Self::with(iommufd, devices, Binding::Elsewhere)
    }

    /// A group of devices that are bound to this iommufd here and now: for a VMM that embeds the device.
    ///
    /// # Errors
    ///
    /// A device cannot be bound, or there is none.
    pub fn bound(iommufd: Arc<Iommufd>, devices: Vec<(EndpointId, VfioDevice)>) -> Result<Self, HostError> {
        let numbers: Vec<u32> = devices.iter().map(|(_, device)| device.bind(&iommufd)).collect::<Result<_, _>>()?;
        let nothing = || HostError::new(HostErrorKind::NotBound, "binding a group without devices", None);
        let device = *numbers.first().ok_or_else(nothing)?;
        let group = Self::with(iommufd, devices, Binding::Here { device, source: None });
        group.bound_here.store(true, Ordering::Relaxed);
        Ok(group)
    }

    /// Keeps guest memory pinned once and for all, from when the device is told of it, so that each mapping of it costs less:
    /// for a group that was [`bound`](Self::bound) here. Memory that is no memfd or hugetlbfs file is left out.
    ///
    /// # Errors
    ///
    /// Whatever the kernel says; or the group was not bound here.
    pub fn with_pinned_source(mut self) -> Result<Self, HostError> {
        let Binding::Here { device, source } = &mut self.binding else {
            return Err(HostError::new(
                HostErrorKind::NotBound,
                "pinning memory for a group that was bound elsewhere",
                None,
            ));
        };
        *source = Some(Arc::new(PinnedSource::new(&self.iommufd, *device)?));
        Ok(self)
    }

    fn with(iommufd: Arc<Iommufd>, devices: Vec<(EndpointId, VfioDevice)>, binding: Binding) -> Self {
        let members = devices.iter().map(|(member, _)| *member).collect();
        let state = Mutex::new(State { devices, hardware_table: None });
        Self { iommufd, members, state, bound_here: AtomicBool::new(false), binding }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that the devices are bound to this iommufd. The kernel takes an address space by its number, and looks
    /// the number up in the iommufd that the device is bound to: in another one it may be the VMM's own table, and the
    /// attach would succeed. So each device is first attached to a fresh address space: one that has a device is told
    /// apart from one that has none by its alignment (1 until then, `iopt_table_add_domain()`).
    fn check_binding(&self, devices: &[(EndpointId, VfioDevice)]) -> Result<(), HostError> {
        if self.bound_here.load(Ordering::Relaxed) {
            return Ok(());
        }
        for (_, device) in devices {
            let fresh = self.iommufd.new_ioas()?;
            let attached = device.attach(&fresh);
            let is_here = fresh.constraints().map(|constraints| constraints.granule > 1);
            // The address space is freed before the next one is made, and cannot be while a device is attached.
            device.detach();
            match attached {
                Ok(()) if is_here? => (),
                // Nothing of ours is in a fresh address space that a device could be incompatible with.
                Err(HostError { kind, .. }) if kind != HostErrorKind::Incompatible => return attached,
                Ok(()) | Err(_) => {
                    let action = format!("attaching {}", device.name());
                    return Err(HostError::new(HostErrorKind::NotBound, action, None));
                }
            }
        }
        self.bound_here.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Attaches every device, in turn. The first replace moves the whole group. Each device is attached all the same: only
    /// then does the kernel keep its reserved regions out of the address space.
    fn attach_all(state: &mut State, object: u32) -> Result<(), AttachError> {
        for (index, (_, device)) in state.devices.iter().enumerate() {
            if let Err(error) = device.attach_to(object) {
                let after = if index == 0 {
                    AfterFailure::PreviousTable
                } else {
                    state.block();
                    AfterFailure::Blocked
                };
                return Err(AttachError { error, after });
            }
        }
        Ok(())
    }
}

impl State {
    fn block(&mut self) {
        for (_, device) in &self.devices {
            device.detach();
        }
        self.hardware_table = None;
    }
}

impl HostGroup for IommufdGroup {
    fn members(&self) -> &[EndpointId] {
        &self.members
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        let source = match &self.binding {
            Binding::Elsewhere => None,
            Binding::Here { source, .. } => source.clone(),
        };
        let ioas = self.iommufd.new_ioas_with(source)?;
        log::debug!("IOAS {} allocated", ioas.id());
        Ok(Arc::new(ioas))
    }

    fn can_share(&self, table: &dyn IoPageTable) -> bool {
        let table: &dyn Any = table;
        table.downcast_ref::<Ioas>().is_some_and(|ioas| Arc::ptr_eq(&ioas.api, &self.iommufd.api))
    }

    fn attach(&self, table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        let table: &dyn Any = table.as_ref();
        let Some(ioas) = table.downcast_ref::<Ioas>() else {
            let error = HostError::new(HostErrorKind::Incompatible, "attaching to a table of another kind", None);
            return Err(AttachError { error, after: AfterFailure::PreviousTable });
        };
        let mut state = self.state();
        if let Err(error) = self.check_binding(&state.devices) {
            state.block();
            return Err(AttachError { error, after: AfterFailure::Blocked });
        }
        match self.binding {
            Binding::Elsewhere => Self::attach_all(&mut state, ioas.id()),
            Binding::Here { device, .. } => {
                let hardware_table = HardwareTable::new(&self.iommufd.api, device, ioas.id())
                    .map_err(|error| AttachError { error, after: AfterFailure::PreviousTable })?;
                Self::attach_all(&mut state, hardware_table.id)?;
                // The one before is freed.
                state.hardware_table = Some(hardware_table);
                Ok(())
            }
        }
    }

    fn block(&self) {
        self.state().block();
    }

    fn release(&self, member: EndpointId) {
        self.state().devices.retain(|(id, _)| *id != member);
    }

    fn memory_changed(&self, ram: &GuestRam) {
        if let Binding::Here { source: Some(source), .. } = &self.binding {
            source.follow(ram);
        }
    }
}

/// An address space that no device is attached to, with guest memory at its guest-physical addresses, pinned by a hardware page
/// table. Mappings are copied from it, which shares the pins.
#[derive(Debug)]
pub struct PinnedSource {
    // Fields are dropped in this order: a hardware page table before its address space.
    _pin: HardwareTable,
    ioas: Ioas,
    mapped: Mutex<Vec<HostSegment>>,
}

impl PinnedSource {
    fn new(iommufd: &Iommufd, device: u32) -> Result<Self, HostError> {
        let ioas = iommufd.new_ioas()?;
        let pin = HardwareTable::new(&iommufd.api, device, ioas.id())?;
        Ok(Self { _pin: pin, ioas, mapped: Mutex::default() })
    }

    pub(super) const fn ioas(&self) -> u32 {
        self.ioas.id()
    }

    /// Where the source has a piece of memory, if it has it.
    pub(super) fn place_of(&self, segment: &HostSegment) -> Option<u64> {
        let mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        mapped.iter().any(|whole| segment.lies_in(whole)).then_some(segment.start().0)
    }

    /// Unpins memory that has left, and pins what is new. What cannot be pinned is left out: it is mapped by itself then.
    fn follow(&self, ram: &GuestRam) {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted: Vec<HostSegment> = ram.regions().iter().map(RamRegion::whole).collect();
        mapped.retain(|old| {
            let stays = wanted.iter().any(|new| new.is_same(old));
            if !stays && let Err(error) = self.ioas.unmap(old.addresses()) {
                log::error!("guest memory at {} stays pinned: {error}", old.addresses());
            }
            stays
        });
        for new in wanted {
            let by_file = new.host().is_some_and(|host| host.pinnable_file().is_some());
            if !by_file || mapped.iter().any(|old| old.is_same(&new)) {
                continue;
            }
            match self.ioas.map_segment(new.start().0, &new, Access::READ_WRITE) {
                Ok(()) => mapped.push(new),
                Err(error) => log::warn!("guest memory at {} is not pinned beforehand: {error}", new.addresses()),
            }
        }
    }
}

#[cfg(test)]
#[cfg(feature = "type1")]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::io::Errno;
    use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::device::{Settings, VirtioIommu};
    use crate::host::fake::kernel::{FakeKernel, KernelFailure};
    use crate::range::{IovaRange, RangeSet};
    use crate::reserved::EndpointView;

    const ONE: EndpointId = EndpointId(1);
    const OTHER: EndpointId = EndpointId(2);

    /// Memory of these regions of 16 pages each, every one with a file of its own or with none.
    fn ram(regions: &[(u64, bool)]) -> GuestRam {
        let region = |(start, with_file): &(u64, bool)| {
            let file = with_file.then(|| {
                let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
                ftruncate(&file, 0x1_0000).unwrap();
                FileOffset::new(std::fs::File::from(file), 0)
            });
            (GuestAddress(*start), 0x1_0000, file)
        };
        let regions: Vec<_> = regions.iter().map(region).collect();
        GuestRam::from_mmap(&GuestMemoryMmap::<()>::from_ranges_with_files(regions).unwrap()).unwrap()
    }

    fn usable() -> RangeSet {
        RangeSet::from("0-ffffffff".parse::<IovaRange>().unwrap())
    }

    fn map(table: &Arc<dyn IoPageTable>, iova: &str, ram: &GuestRam, physical: u64) {
        let iova: IovaRange = iova.parse().unwrap();
        let segments = ram.segments(GuestAddress(physical), iova.length().unwrap()).unwrap();
        table.map(iova, &segments, Access::READ_WRITE).unwrap();
    }

    #[test]
    fn memory_that_is_pinned_is_copied_and_what_left_is_not() {
        let kernel = FakeKernel::new();
        let devices = kernel.devices(&[ONE], &usable());
        let group = IommufdGroup::bound(kernel.iommufd(), devices).unwrap().with_pinned_source().unwrap();
        let both = ram(&[(0, true), (0x10_0000, true), (0x20_0000, false)]);
        group.memory_changed(&both);
        assert_eq!(kernel.mappings(), (2, 0), "what has no file is left out");
        let table = group.new_table().unwrap();
        map(&table, "5000-5fff", &both, 0x1000);
        map(&table, "6000-6fff", &both, 0x20_1000);
        assert_eq!(kernel.mappings(), (4, 1));
        // The first region gets other memory, the second leaves.
        let other = ram(&[(0, true)]);
        group.memory_changed(&other);
        assert_eq!(kernel.mappings(), (3, 1));
        map(&table, "7000-7fff", &both, 0x10_0000);
        map(&table, "8000-8fff", &other, 0x2000);
        assert_eq!(kernel.mappings(), (5, 2));
        drop((table, group));
        assert_eq!((kernel.mappings(), kernel.objects()), ((0, 0), 0));
    }

    #[test]
    fn what_cannot_be_pinned_or_copied_is_mapped_all_the_same() {
        let kernel = FakeKernel::new();
        let devices = kernel.devices(&[ONE], &usable());
        let group = IommufdGroup::bound(kernel.iommufd(), devices).unwrap().with_pinned_source().unwrap();
        let memory = ram(&[(0, true)]);
        kernel.fail_after(0, KernelFailure::Errno(Errno::NOMEM));
        group.memory_changed(&memory);
        let table = group.new_table().unwrap();
        map(&table, "5000-5fff", &memory, 0);
        assert_eq!(kernel.mappings(), (1, 0));
        group.memory_changed(&memory);
        kernel.fail_after(0, KernelFailure::Errno(Errno::NOENT));
        map(&table, "6000-6fff", &memory, 0);
        assert_eq!(kernel.mappings(), (3, 0));
    }

    #[test]
    fn only_what_was_bound_here_can_be_pinned_for() {
        let kernel = FakeKernel::new();
        let (iommufd, devices) = (kernel.iommufd(), kernel.devices(&[ONE], &usable()));
        let error = IommufdGroup::shared(iommufd, devices).with_pinned_source().unwrap_err();
        assert_eq!(error.kind, HostErrorKind::NotBound);
        assert_eq!(IommufdGroup::bound(kernel.iommufd(), Vec::new()).unwrap_err().kind, HostErrorKind::NotBound);
    }

    #[test]
    fn a_second_group_joins_many_mappings_by_one_call() {
        const MAPPINGS: u64 = 0x1_0000;
        let kernel = FakeKernel::new();
        let iommufd = kernel.iommufd();
        let group = |id| -> Arc<dyn HostGroup> {
            Arc::new(IommufdGroup::bound(Arc::clone(&iommufd), kernel.devices(&[id], &usable())).unwrap())
        };
        let groups = vec![group(ONE), group(OTHER)];
        let settings = Settings::new("0-ffffffff".parse().unwrap(), 0x1000);
        let views = [ONE, OTHER].map(|id| (id, EndpointView::default())).to_vec();
        let mut device = VirtioIommu::new(settings, views, groups).unwrap();
        device.set_memory(ram(&[(0, true)]));
        device.set_driver_features(device.features());
        let mut send = |words: &[u64], kind: u8, domain: u32| {
            let mut bytes = vec![kind, 0, 0, 0];
            bytes.extend(domain.to_le_bytes());
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            bytes.truncate(if kind == 1 { 20 } else { 36 });
            bytes.resize(if kind == 1 { 20 } else { 36 }, 0);
            let mut reply = [0xff; 4];
            assert_eq!((device.handle(&bytes, &mut reply), reply), (4, [0; 4]));
        };
        send(&[u64::from(ONE.0)], 1, 7);
        for page in 0..MAPPINGS {
            let start = page * 0x1000;
            send(&[start, start + 0xfff, page % 16 * 0x1000, 3], 3, 7);
        }
        assert_eq!(kernel.mappings().0 as u64, MAPPINGS);
        let before = kernel.calls();
        send(&[u64::from(OTHER.0)], 1, 7);
        // A hardware page table, which the kernel fills; the attach; and the question whether the promise holds.
        assert_eq!(kernel.calls() - before, 3);
        assert!(kernel.dma(OTHER, (MAPPINGS - 1) * 0x1000, Access::WRITE).is_some());
    }
}
