// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Groups of devices on address spaces of an iommufd.

#![forbid(unsafe_code)]

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::api::IommufdApi;
use super::device::VfioDevice;
use super::ioas::{Ioas, Iommufd};
use crate::access::Access;
use crate::host::linux::failed;
use crate::host::{AfterFailure, AttachError, HostError, HostErrorKind, HostGroup, IoPageTable};
use crate::id::EndpointId;
use crate::memory::{GuestRam, HostSegment, RamRegion};

#[cfg(test)]
#[cfg(feature = "type1")]
mod tests;

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
    Here { source: Option<Arc<PinnedSource>> },
}

/// A member that is still an endpoint.
#[derive(Debug)]
struct Member {
    id: EndpointId,
    device: VfioDevice,
    /// The device's number in the iommufd, if this process bound it.
    number: Option<u32>,
}

#[derive(Debug)]
struct State {
    members: Vec<Member>,
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
        let member = |(id, device)| Member { id, device, number: None };
        Self::with(iommufd, devices.into_iter().map(member).collect(), Binding::Elsewhere)
    }

    /// A group of devices that are bound to this iommufd here and now: for a VMM that embeds the device.
    ///
    /// # Errors
    ///
    /// A device cannot be bound, or there is none.
    pub fn bound(iommufd: Arc<Iommufd>, devices: Vec<(EndpointId, VfioDevice)>) -> Result<Self, HostError> {
        if devices.is_empty() {
            return Err(HostError::new(HostErrorKind::Misuse, "binding a group without devices", None));
        }
        let bind = |(id, device): (_, VfioDevice)| {
            let number = Some(device.bind(&iommufd)?);
            Ok(Member { id, device, number })
        };
        let members = devices.into_iter().map(bind).collect::<Result<_, HostError>>()?;
        let group = Self::with(iommufd, members, Binding::Here { source: None });
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
        let Binding::Here { source } = &mut self.binding else {
            let action = "pinning memory for a group that was bound elsewhere";
            return Err(HostError::new(HostErrorKind::Misuse, action, None));
        };
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        *source = Some(Arc::new(PinnedSource::new(&self.iommufd, state.device_number()?)?));
        Ok(self)
    }

    fn with(iommufd: Arc<Iommufd>, members: Vec<Member>, binding: Binding) -> Self {
        let ids = members.iter().map(|member| member.id).collect();
        let state = Mutex::new(State { members, hardware_table: None });
        Self { iommufd, members: ids, state, bound_here: AtomicBool::new(false), binding }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that the devices are bound to this iommufd. The kernel takes an address space by its number, and looks
    /// the number up in the iommufd that the device is bound to: in another one it may be the VMM's own table, and the
    /// attach would succeed. So each device is first attached to a fresh address space: one that has a device is told
    /// apart from one that has none by its alignment (1 until then, `iopt_table_add_domain()`).
    ///
    /// # Errors
    ///
    /// They are not, or it cannot be told. In any case they are detached from what they were attached to.
    fn check_binding(&self, members: &[Member]) -> Result<(), HostError> {
        // Each moves the whole group: an address space is freed only if none of them stays there.
        for Member { device, .. } in members {
            device.detach();
        }
        for Member { device, .. } in members {
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

    /// Attaches every device to an address space, by a hardware page table of it where this process can make one.
    fn attach_to(&self, state: &mut State, ioas: &Ioas) -> Result<(), AttachError> {
        match self.binding {
            Binding::Elsewhere => state.attach_all(ioas.id()),
            Binding::Here { .. } => {
                let hardware_table = state
                    .device_number()
                    .and_then(|device| HardwareTable::new(&self.iommufd.api, device, ioas.id()))
                    .map_err(|error| AttachError { error, after: AfterFailure::PreviousTable })?;
                state.attach_all(hardware_table.id)?;
                // The one before is freed.
                state.hardware_table = Some(hardware_table);
                Ok(())
            }
        }
    }
}

impl State {
    /// The number of a device that is still there.
    fn device_number(&self) -> Result<u32, HostError> {
        let number = self.members.iter().find_map(|member| member.number);
        number.ok_or_else(|| HostError::new(HostErrorKind::Gone, "attaching a group without devices", None))
    }

    /// Attaches every device, in turn. The first replace moves the whole group. Each device is attached all the same: only
    /// then does the kernel keep its reserved regions out of the address space.
    fn attach_all(&mut self, object: u32) -> Result<(), AttachError> {
        for (index, Member { device, .. }) in self.members.iter().enumerate() {
            if let Err(error) = device.attach_to(object) {
                let after = if index == 0 {
                    AfterFailure::PreviousTable
                } else {
                    self.block();
                    AfterFailure::Blocked
                };
                return Err(AttachError { error, after });
            }
        }
        Ok(())
    }

    fn block(&mut self) {
        for Member { device, .. } in &self.members {
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
            Binding::Here { source } => source.clone(),
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
        let own = table.downcast_ref::<Ioas>().filter(|ioas| Arc::ptr_eq(&ioas.api, &self.iommufd.api));
        let Some(ioas) = own else {
            let error = HostError::new(HostErrorKind::Incompatible, "attaching to a table of another host", None);
            return Err(AttachError { error, after: AfterFailure::PreviousTable });
        };
        let mut state = self.state();
        if state.members.is_empty() {
            let error = HostError::new(HostErrorKind::Gone, "attaching a group whose devices are gone", None);
            return Err(AttachError { error, after: AfterFailure::Blocked });
        }
        if self.bound_here.load(Ordering::Relaxed) {
            return self.attach_to(&mut state, ioas);
        }
        // What there was before is gone with the check.
        let checked = self.check_binding(&state.members);
        let attached = checked.and_then(|()| self.attach_to(&mut state, ioas).map_err(|failure| failure.error));
        attached.map_err(|error| {
            state.block();
            AttachError { error, after: AfterFailure::Blocked }
        })
    }

    fn block(&self) {
        self.state().block();
    }

    fn release(&self, member: EndpointId) {
        self.state().members.retain(|own| {
            let stays = own.id != member;
            if !stays {
                // The kernel keeps the group where it is for as long as a device is attached, and whoever has another file of
                // this one, as a VMM does, keeps it attached.
                own.device.detach();
            }
            stays
        });
    }

    fn memory_changed(&self, ram: &GuestRam) {
        if let Binding::Here { source: Some(source) } = &self.binding {
            source.follow(ram);
        }
    }
}

/// An address space that no device is attached to, with guest memory at its guest-physical addresses, pinned by a hardware page
/// table. Mappings are copied from it, which shares the pins.
#[derive(Debug)]
pub(super) struct PinnedSource {
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

    pub const fn ioas(&self) -> u32 {
        self.ioas.id()
    }

    /// Where the source has a piece of memory, if it has it.
    pub fn place_of(&self, segment: &HostSegment) -> Option<u64> {
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
