// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Linux's iommufd: one IOAS for each guest domain, groups attached to it by an atomic replace.
//!
//! A [`VfioDevice`] is the file of a VFIO device (`/dev/vfio/devices/vfioN`). Whoever drives the device binds it to an
//! iommufd and attaches it to an address space of its own; holding the same two files, this process then attaches it
//! to another one. Facts of the kernel are from `include/uapi/linux/iommufd.h`, `include/uapi/linux/vfio.h` and
//! `drivers/iommu/iommufd/`.

// Ioctls on files that these types own.
#![allow(unsafe_code)]

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::File;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_DESTROY, IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP,
    IOMMUFD_CMD_IOAS_MAP_FILE, IOMMUFD_CMD_IOAS_UNMAP, IOMMUFD_TYPE, iommu_destroy, iommu_ioas_alloc,
    iommu_ioas_iova_ranges, iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap, iommu_iova_range,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as MAP_WRITEABLE,
};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, vfio_device_detach_iommufd_pt, vfio_device_info,
};

use super::{
    AfterFailure, AttachError, Constraints, HostError, HostErrorKind, HostGroup, IoPageTable, MapError, UnmapError,
};
use crate::access::Access;
use crate::fd::{FileKind, WrongFile};
use crate::id::EndpointId;
use crate::memory::{FileMemory, HostMemory, HostSegment};
use crate::range::{IovaRange, RangeSet};

const DESTROY: Opcode = iommufd_opcode(IOMMUFD_CMD_DESTROY);
const IOAS_ALLOC: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_ALLOC);
const IOAS_IOVA_RANGES: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_IOVA_RANGES);
const IOAS_MAP: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_MAP);
const IOAS_MAP_FILE: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_MAP_FILE);
const IOAS_UNMAP: Opcode = iommufd_opcode(IOMMUFD_CMD_IOAS_UNMAP);
const DEVICE_GET_INFO: Opcode = vfio_opcode(7);
const DEVICE_BIND_IOMMUFD: Opcode = vfio_opcode(18);
const DEVICE_ATTACH_IOMMUFD_PT: Opcode = vfio_opcode(19);
const DEVICE_DETACH_IOMMUFD_PT: Opcode = vfio_opcode(20);

/// How long an attach waits for a device that is being reset.
const RESET_PATIENCE: Duration = Duration::from_millis(100);
/// How many usable ranges the kernel may report: far more than any host has holes.
const MOST_RANGES: u32 = 4096;

const fn iommufd_opcode(command: u32) -> Opcode {
    let [number, ..] = command.to_le_bytes();
    opcode::none(IOMMUFD_TYPE, number)
}

const fn vfio_opcode(number: u32) -> Opcode {
    // VFIO_TYPE is the same character as IOMMUFD_TYPE.
    iommufd_opcode(VFIO_BASE + number)
}

/// Passes a structure to a file that takes it with this code, and returns what the file wrote into it.
///
/// # Safety
///
/// The file must be of the kind that the code belongs to (which `Iommufd` and `VfioDevice` make sure of), `argument` must be the structure that the code takes, with
/// its size field right, and every address in it must point to what the kernel expects there.
unsafe fn call<const CODE: Opcode, T>(file: BorrowedFd<'_>, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: the caller vouches for code, structure and addresses.
    unsafe { ioctl(file, Updater::<CODE, T>::new(argument)) }
}

const fn size<T>() -> u32 {
    size_before(size_of::<T>())
}

/// The size of a structure up to a field that kernels before it did not know.
#[expect(clippy::cast_possible_truncation, reason = "structures of the kernel's interface have tens of bytes")]
const fn size_before(offset: usize) -> u32 {
    offset as u32
}

fn failed(errno: Errno, action: impl Into<String>, kind: HostErrorKind) -> HostError {
    HostError::new(kind, action, Some(errno.into()))
}

/// An open `/dev/iommu`: a container of address spaces.
#[derive(Debug)]
pub struct Iommufd {
    file: OwnedFd,
}

impl Iommufd {
    /// Takes an open `/dev/iommu`.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn new(file: OwnedFd) -> Result<Self, WrongFile> {
        FileKind::Iommufd.check(&file)?;
        Ok(Self { file })
    }

    /// Makes an empty address space.
    ///
    /// # Errors
    ///
    /// Whatever the kernel says; a file that is no iommufd among it.
    pub fn new_ioas(self: &Arc<Self>) -> Result<Ioas, HostError> {
        let mut argument = iommu_ioas_alloc { size: size::<iommu_ioas_alloc>(), ..Default::default() };
        // SAFETY: the structure has no addresses.
        unsafe { call::<IOAS_ALLOC, _>(self.file.as_fd(), &mut argument) }
            .map_err(|errno| failed(errno, "IOMMU_IOAS_ALLOC", out_of_memory_or_other(errno)))?;
        Ok(Ioas { iommufd: Arc::clone(self), id: argument.out_ioas_id, held: Mutex::default() })
    }

    /// Whether an address space with this number is there, whoever made it.
    pub fn has_ioas(&self, id: u32) -> bool {
        let mut argument =
            iommu_ioas_iova_ranges { size: size::<iommu_ioas_iova_ranges>(), ioas_id: id, ..Default::default() };
        // SAFETY: no range is asked for, so the null address is not written to.
        let result = unsafe { call::<IOAS_IOVA_RANGES, _>(self.file.as_fd(), &mut argument) };
        matches!(result, Ok(()) | Err(Errno::MSGSIZE))
    }
}

/// The file of a VFIO device.
#[derive(Debug)]
pub struct VfioDevice {
    file: OwnedFd,
    name: String,
}

impl VfioDevice {
    /// Takes an open `/dev/vfio/devices/vfioN`, and a name for messages.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn new(file: OwnedFd, name: String) -> Result<Self, WrongFile> {
        FileKind::VfioDevice.check(&file)?;
        Ok(Self { file, name })
    }

    /// Binds the device to an iommufd. Needed once for each device file, before anything else can be done with it.
    ///
    /// # Errors
    ///
    /// The device is in use, its group is not VFIO's alone, or the platform forbids it.
    pub fn bind(&self, iommufd: &Iommufd) -> Result<(), HostError> {
        let mut argument = vfio_device_bind_iommufd {
            argsz: size_before(offset_of!(vfio_device_bind_iommufd, token_uuid_ptr)),
            iommufd: iommufd.file.as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: the size leaves the only address out.
        unsafe { call::<DEVICE_BIND_IOMMUFD, _>(self.file.as_fd(), &mut argument) }
            .map_err(|errno| failed(errno, format!("binding {} to the iommufd", self.name), HostErrorKind::Other))
    }

    /// Attaches the device to an address space, in place of whatever it is attached to.
    ///
    /// # Errors
    ///
    /// What the device is attached to has not changed.
    pub fn attach(&self, ioas: &Ioas) -> Result<(), HostError> {
        let started = Instant::now();
        loop {
            let mut argument = vfio_device_attach_iommufd_pt {
                argsz: size_before(offset_of!(vfio_device_attach_iommufd_pt, pasid)),
                pt_id: ioas.id,
                ..Default::default()
            };
            // SAFETY: the structure has no addresses.
            let result = unsafe { call::<DEVICE_ATTACH_IOMMUFD_PT, _>(self.file.as_fd(), &mut argument) };
            match result {
                Ok(()) => return Ok(()),
                // The device is being reset.
                Err(Errno::BUSY) if started.elapsed() < RESET_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(errno) => return Err(self.attach_error(errno)),
            }
        }
    }

    /// What can be mapped for the device's group alone. The device, which must be bound to this iommufd, is attached to an
    /// empty address space for a moment, and detached: to be asked before anybody uses it.
    ///
    /// # Errors
    ///
    /// Whatever the kernel says.
    pub fn constraints(&self, iommufd: &Arc<Iommufd>) -> Result<Constraints, HostError> {
        let fresh = iommufd.new_ioas()?;
        self.attach(&fresh)?;
        let constraints = fresh.constraints();
        // An address space with a device cannot be freed.
        self.detach();
        constraints
    }

    fn attach_error(&self, errno: Errno) -> HostError {
        let kind = match errno {
            Errno::ADDRINUSE => HostErrorKind::ReservedConflict,
            Errno::NOMEM => HostErrorKind::NoMemory,
            Errno::BUSY => HostErrorKind::Busy,
            Errno::NODEV => HostErrorKind::Gone,
            // No such address space: the device is bound to another iommufd.
            Errno::NOENT => HostErrorKind::NotBound,
            Errno::INVAL if !self.is_bound() => HostErrorKind::NotBound,
            Errno::INVAL => HostErrorKind::Incompatible,
            _ => HostErrorKind::Other,
        };
        failed(errno, format!("attaching {}", self.name), kind)
    }

    /// Whether the device has been bound: before that, every other ioctl is invalid.
    fn is_bound(&self) -> bool {
        let mut argument = vfio_device_info { argsz: size::<vfio_device_info>(), ..Default::default() };
        // SAFETY: the structure has no addresses.
        unsafe { call::<DEVICE_GET_INFO, _>(self.file.as_fd(), &mut argument) }.is_ok()
    }

    /// Detaches the device from whatever it is attached to: all its DMA is refused. A device that is not bound, or
    /// gone, has nothing to be detached from.
    pub fn detach(&self) {
        let mut argument = vfio_device_detach_iommufd_pt {
            argsz: size_before(offset_of!(vfio_device_detach_iommufd_pt, pasid)),
            ..Default::default()
        };
        // SAFETY: the structure has no addresses.
        let result = unsafe { call::<DEVICE_DETACH_IOMMUFD_PT, _>(self.file.as_fd(), &mut argument) };
        if let Err(errno) = result {
            log::debug!("detaching {}: {errno}", self.name);
        }
    }
}

/// An address space of an iommufd.
#[derive(Debug)]
pub struct Ioas {
    iommufd: Arc<Iommufd>,
    id: u32,
    /// What keeps the memory alive that is mapped by address, by first virtual address. (Of memory mapped by file the
    /// kernel holds the file.)
    held: Mutex<BTreeMap<u64, HostMemory>>,
}

impl Ioas {
    /// The kernel's number for it.
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// Maps one piece of memory.
    fn map_segment(&self, iova: u64, segment: &HostSegment, access: Access) -> Result<(), HostError> {
        let action = |call| format!("{call} of {:#x} bytes at {iova:#x}", segment.length());
        let Some(host) = segment.host() else {
            return Err(HostError::new(HostErrorKind::BadAddress, action("mapping"), None));
        };
        if let Some(file) = host.pinnable_file() {
            match self.map_file(iova, file, segment.length(), access) {
                Ok(()) => return Ok(()),
                // Before Linux 6.13 there is mapping by address only.
                Err(Errno::NOTTY) => (),
                Err(errno) => return Err(failed(errno, action("IOMMU_IOAS_MAP_FILE"), map_error_kind(errno))),
            }
        }
        let mut argument = iommu_ioas_map {
            size: size::<iommu_ioas_map>(),
            flags: map_flags(access),
            ioas_id: self.id,
            user_va: host.address(),
            length: segment.length(),
            iova,
            ..Default::default()
        };
        // SAFETY: a segment is mapped at this address for its whole length, and `host` keeps it mapped: it is held below
        // for as long as the kernel may look at the range.
        unsafe { call::<IOAS_MAP, _>(self.iommufd.file.as_fd(), &mut argument) }
            .map_err(|errno| failed(errno, action("IOMMU_IOAS_MAP"), map_error_kind(errno)))?;
        self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(iova, host.clone());
        Ok(())
    }

    fn map_file(&self, iova: u64, memory: &FileMemory, length: u64, access: Access) -> Result<(), Errno> {
        let file: &File = memory.file();
        let mut argument = iommu_ioas_map_file {
            size: size::<iommu_ioas_map_file>(),
            flags: map_flags(access),
            ioas_id: self.id,
            fd: file.as_raw_fd(),
            start: memory.offset(),
            length,
            iova,
        };
        // SAFETY: the structure has no addresses of this process; the kernel takes its own hold of the file.
        unsafe { call::<IOAS_MAP_FILE, _>(self.iommufd.file.as_fd(), &mut argument) }
    }

    fn unmap_bytes(&self, iova: u64, length: u64) -> Result<u64, Errno> {
        let mut argument = iommu_ioas_unmap { size: size::<iommu_ioas_unmap>(), ioas_id: self.id, iova, length };
        // SAFETY: the structure has no addresses of this process.
        unsafe { call::<IOAS_UNMAP, _>(self.iommufd.file.as_fd(), &mut argument) }?;
        Ok(argument.length)
    }

    fn release_held(&self, iova: IovaRange) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((start, _)) = held.range(iova.start()..=iova.last()).next() {
            let start = *start;
            held.remove(&start);
        }
    }
}

impl IoPageTable for Ioas {
    fn map(&self, iova: IovaRange, to: &[HostSegment], access: Access) -> Result<(), MapError> {
        let mut done = 0;
        for segment in to {
            let Err(error) = self.map_segment(iova.start() + done, segment, access) else {
                done += segment.length();
                continue;
            };
            if done == 0 {
                return Err(MapError::Refused(error));
            }
            return match self.unmap_bytes(iova.start(), done) {
                Ok(gone) if gone == done => {
                    self.release_held(iova);
                    Err(MapError::Refused(error))
                }
                Ok(_) | Err(_) => Err(MapError::LeftBehind(error)),
            };
        }
        Ok(())
    }

    fn unmap(&self, iova: IovaRange) -> Result<u64, UnmapError> {
        // A range of 2^64 bytes cannot be said, and the kernel takes this length for all there is.
        let gone = self.unmap_bytes(iova.start(), iova.length().unwrap_or(u64::MAX)).map_err(|errno| {
            let error = failed(errno, format!("IOMMU_IOAS_UNMAP of {iova}"), HostErrorKind::Other);
            UnmapError { error, gone: 0 }
        })?;
        self.release_held(iova);
        Ok(gone)
    }

    fn constraints(&self) -> Result<Constraints, HostError> {
        let mut ranges: Vec<iommu_iova_range> = Vec::new();
        let mut count = 0;
        loop {
            let mut argument = iommu_ioas_iova_ranges {
                size: size::<iommu_ioas_iova_ranges>(),
                ioas_id: self.id,
                num_iovas: count,
                allowed_iovas: ranges.as_mut_ptr().expose_provenance() as u64,
                ..Default::default()
            };
            // SAFETY: the address is that of `num_iovas` structures of the kind that the kernel writes there.
            let result = unsafe { call::<IOAS_IOVA_RANGES, _>(self.iommufd.file.as_fd(), &mut argument) };
            match result {
                Ok(()) => {
                    let known = ranges.iter().take(argument.num_iovas as usize);
                    let usable: RangeSet = known.filter_map(|range| IovaRange::new(range.start, range.last)).collect();
                    return Ok(Constraints { usable, granule: argument.out_iova_alignment });
                }
                // There are more than that: the kernel says how many.
                Err(Errno::MSGSIZE) if count < argument.num_iovas && argument.num_iovas <= MOST_RANGES => {
                    count = argument.num_iovas;
                    ranges.resize(count as usize, iommu_iova_range::default());
                }
                Err(errno) => return Err(failed(errno, "IOMMU_IOAS_IOVA_RANGES", HostErrorKind::Other)),
            }
        }
    }
}

impl Drop for Ioas {
    fn drop(&mut self) {
        let mut argument = iommu_destroy { size: size::<iommu_destroy>(), id: self.id };
        // SAFETY: the structure has no addresses; the number is that of an object which only this value stands for.
        let result = unsafe { call::<DESTROY, _>(self.iommufd.file.as_fd(), &mut argument) };
        if let Err(errno) = result {
            log::error!("IOAS {} stays in the kernel: {errno}", self.id);
            // And may still look at this memory.
            let held = std::mem::take(&mut *self.held.lock().unwrap_or_else(PoisonError::into_inner));
            std::mem::forget(held);
        }
    }
}

fn map_flags(access: Access) -> u32 {
    let read = if access.read { MAP_READABLE } else { 0 };
    let write = if access.write { MAP_WRITEABLE } else { 0 };
    MAP_FIXED_IOVA | read | write
}

fn map_error_kind(errno: Errno) -> HostErrorKind {
    match errno {
        Errno::INVAL | Errno::OVERFLOW => HostErrorKind::Unmappable,
        Errno::EXIST => HostErrorKind::AlreadyMapped,
        Errno::NOMEM | Errno::NOSPC => HostErrorKind::NoMemory,
        Errno::FAULT => HostErrorKind::BadAddress,
        _ => HostErrorKind::Other,
    }
}

fn out_of_memory_or_other(errno: Errno) -> HostErrorKind {
    if errno == Errno::NOMEM { HostErrorKind::NoMemory } else { HostErrorKind::Other }
}

/// An IOMMU group whose devices this process holds by their VFIO files.
#[derive(Debug)]
pub struct IommufdGroup {
    iommufd: Arc<Iommufd>,
    members: Vec<EndpointId>,
    /// Those of the members that are still endpoints.
    devices: Mutex<Vec<(EndpointId, VfioDevice)>>,
    /// The devices are known to be bound to this iommufd.
    bound_here: AtomicBool,
}

impl IommufdGroup {
    /// A group of devices that the caller has bound to this iommufd ([`VfioDevice::bind`]), or that another process binds by
    /// the same files: a VMM that this process works beside. Until that has happened, attaching fails.
    pub fn shared(iommufd: Arc<Iommufd>, devices: Vec<(EndpointId, VfioDevice)>) -> Self {
        let members = devices.iter().map(|(member, _)| *member).collect();
        Self { iommufd, members, devices: Mutex::new(devices), bound_here: AtomicBool::new(false) }
    }

    fn devices(&self) -> MutexGuard<'_, Vec<(EndpointId, VfioDevice)>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
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
                    let action = format!("attaching {}", device.name);
                    return Err(HostError::new(HostErrorKind::NotBound, action, None));
                }
            }
        }
        self.bound_here.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl HostGroup for IommufdGroup {
    fn members(&self) -> &[EndpointId] {
        &self.members
    }

    fn new_table(&self) -> Result<Arc<dyn IoPageTable>, HostError> {
        let ioas = self.iommufd.new_ioas()?;
        log::debug!("IOAS {} allocated", ioas.id);
        Ok(Arc::new(ioas))
    }

    fn can_share(&self, table: &dyn IoPageTable) -> bool {
        let table: &dyn Any = table;
        table.downcast_ref::<Ioas>().is_some_and(|ioas| Arc::ptr_eq(&ioas.iommufd, &self.iommufd))
    }

    fn attach(&self, table: &Arc<dyn IoPageTable>) -> Result<(), AttachError> {
        let table: &dyn Any = table.as_ref();
        let Some(ioas) = table.downcast_ref::<Ioas>() else {
            let error = HostError::new(HostErrorKind::Incompatible, "attaching to a table of another kind", None);
            return Err(AttachError { error, after: AfterFailure::PreviousTable });
        };
        let devices = self.devices();
        if let Err(error) = self.check_binding(&devices) {
            block(&devices);
            return Err(AttachError { error, after: AfterFailure::Blocked });
        }
        // The first replace moves the whole group. Each device is attached all the same: only then does the kernel
        // keep its reserved regions out of the address space.
        for (index, (_, device)) in devices.iter().enumerate() {
            if let Err(error) = device.attach(ioas) {
                let after = if index == 0 {
                    AfterFailure::PreviousTable
                } else {
                    block(&devices);
                    AfterFailure::Blocked
                };
                return Err(AttachError { error, after });
            }
        }
        Ok(())
    }

    fn block(&self) {
        block(&self.devices());
    }

    fn release(&self, member: EndpointId) {
        self.devices().retain(|(id, _)| *id != member);
    }
}

fn block(devices: &[(EndpointId, VfioDevice)]) {
    for (_, device) in devices {
        device.detach();
    }
}
