// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the model takes from `drivers/iommu/iommufd/`.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use rustix::io::Errno;

use super::kernel::{
    Area, Areas, FakeDevice, FakeIommufd, KernelFailure, PAGE, Place, Target, overlapping, remove, translate,
};
use crate::access::Access;
use crate::host::Constraints;
use crate::host::iommufd::api::{IommufdApi, VfioDeviceApi};
use crate::id::EndpointId;
use crate::memory::{FileMemory, HostMemory};
use crate::range::{IovaRange, RangeSet};

/// All iommufds, and the groups whose devices can be bound to one.
#[derive(Debug, Default)]
pub(super) struct Iommufds {
    opened: RawFd,
    next_object: u32,
    objects: BTreeMap<u32, (RawFd, Object)>,
    groups: Vec<Group>,
}

#[derive(Debug)]
enum Object {
    Device,
    Ioas(Areas),
    /// A hardware page table of this address space, for this group.
    HardwareTable {
        ioas: u32,
        group: usize,
    },
}

/// The kernel moves a group as one (`struct iommufd_group`).
#[derive(Debug)]
struct Group {
    devices: BTreeMap<EndpointId, Device>,
    usable: RangeSet,
    /// What those devices are on that are attached: an address space, or a hardware page table of one.
    object: Option<u32>,
}

#[derive(Debug, Default)]
struct Device {
    /// How many files of it are open.
    files: u32,
    /// The iommufd, and the number there.
    bound: Option<(RawFd, u32)>,
    attached: bool,
}

impl Group {
    /// What the IOMMU translates for the group, whatever it reserves of that.
    fn aperture(&self) -> RangeSet {
        let ends = self.usable.first().zip(self.usable.last());
        ends.and_then(|(first, last)| IovaRange::new(first.start(), last.last())).into_iter().collect()
    }
}

impl Iommufds {
    pub fn open(&mut self) -> RawFd {
        self.opened += 1;
        self.opened
    }

    pub fn add_group(&mut self, members: &[EndpointId], usable: &RangeSet) {
        let devices = members.iter().map(|member| (*member, Device::default())).collect();
        self.groups.push(Group { devices, usable: usable.clone(), object: None });
    }

    pub fn open_device(&mut self, endpoint: EndpointId) {
        if let Ok(device) = self.device(endpoint) {
            device.files += 1;
        }
    }

    /// The last file's end is the device's in the iommufd (`vfio_df_iommufd_unbind()`, drivers/vfio/iommufd.c).
    pub fn close_device(&mut self, endpoint: EndpointId) {
        let Ok(device) = self.device(endpoint) else { return };
        device.files = device.files.saturating_sub(1);
        if device.files == 0
            && let Some((_, number)) = device.bound
        {
            // A bound device can be detached.
            let _ = self.detach(endpoint);
            self.objects.remove(&number);
            if let Ok(device) = self.device(endpoint) {
                device.bound = None;
            }
        }
    }

    /// How many address spaces and hardware page tables there are.
    pub fn objects(&self) -> usize {
        self.objects.values().filter(|(_, object)| !matches!(object, Object::Device)).count()
    }

    /// How many mappings there are, and how many of them are copies.
    pub fn mappings(&self) -> (usize, usize) {
        let areas = self.objects.values().filter_map(|(_, object)| match object {
            Object::Ioas(areas) => Some(areas.values()),
            _ => None,
        });
        areas.flatten().fold((0, 0), |(all, copies), area| (all + 1, copies + usize::from(area.is_copy)))
    }

    pub fn dma(&self, endpoint: EndpointId, iova: u64, access: Access) -> Option<Place> {
        let group = self.groups.get(self.group_of(endpoint)?)?;
        translate(self.areas(self.ioas_of(group.object?)?)?, iova, access)
    }

    fn group_of(&self, endpoint: EndpointId) -> Option<usize> {
        self.groups.iter().position(|group| group.devices.contains_key(&endpoint))
    }

    fn areas(&self, ioas: u32) -> Option<&Areas> {
        match self.objects.get(&ioas) {
            Some((_, Object::Ioas(areas))) => Some(areas),
            _ => None,
        }
    }

    /// The address spaces of an iommufd.
    fn areas_mut(&mut self, owner: RawFd, ioas: u32) -> Result<&mut Areas, Errno> {
        match self.objects.get_mut(&ioas) {
            Some((own, Object::Ioas(areas))) if *own == owner => Ok(areas),
            _ => Err(Errno::NOENT),
        }
    }

    /// The address space that an object is, or is a hardware page table of.
    fn ioas_of(&self, object: u32) -> Option<u32> {
        match self.objects.get(&object)? {
            (_, Object::Ioas(_)) => Some(object),
            (_, Object::HardwareTable { ioas, .. }) => Some(*ioas),
            (_, Object::Device) => None,
        }
    }

    /// The groups that decide what can be mapped in an address space: each is attached to it.
    fn attached(&self, ioas: u32) -> impl Iterator<Item = &Group> {
        let is_on = move |group: &&Group| group.object.and_then(|object| self.ioas_of(object)) == Some(ioas);
        self.groups.iter().filter(is_on)
    }

    /// What can be mapped: what every attached group can use, and what every hardware page table translates.
    fn constraints(&self, ioas: u32) -> Constraints {
        let tables = self.objects.values().filter_map(|(_, object)| match object {
            Object::HardwareTable { ioas: own, group } if *own == ioas => self.groups.get(*group),
            _ => None,
        });
        let apertures: Vec<RangeSet> = tables.map(Group::aperture).collect();
        let attached: Vec<RangeSet> = self.attached(ioas).map(|group| group.usable.clone()).collect();
        let granule = if apertures.is_empty() && attached.is_empty() { 1 } else { PAGE };
        let all = RangeSet::from(IovaRange::ALL);
        let usable = apertures.iter().chain(&attached).fold(all, |usable, own| usable.intersect(own));
        Constraints { usable, granule }
    }

    fn alloc(&mut self, owner: RawFd, object: Object) -> u32 {
        self.next_object += 1;
        self.objects.insert(self.next_object, (owner, object));
        self.next_object
    }

    /// `iopt_map_pages()`: alignment, then what can be used, then what is there.
    fn map(&mut self, owner: RawFd, ioas: u32, area: Area) -> Result<(), Errno> {
        if area.access.is_none() {
            return Err(Errno::INVAL);
        }
        self.areas_mut(owner, ioas)?;
        let Constraints { usable, granule } = self.constraints(ioas);
        if !area.iova.is_aligned(granule) {
            return Err(Errno::INVAL);
        }
        if !usable.covers(area.iova) {
            return Err(Errno::INVAL);
        }
        let areas = self.areas_mut(owner, ioas)?;
        if !overlapping(areas, area.iova).is_empty() {
            return Err(Errno::EXIST);
        }
        areas.insert(area.iova.start(), area);
        Ok(())
    }

    /// `iopt_unmap_iova_range()`: area by area, until one reaches out of the range.
    fn unmap(&mut self, owner: RawFd, ioas: u32, iova: IovaRange, is_short: bool) -> Result<u64, Errno> {
        let areas = self.areas_mut(owner, ioas)?;
        let inside = overlapping(areas, iova);
        if inside.is_empty() && iova != IovaRange::ALL {
            return Err(Errno::NOENT);
        }
        let splits = inside.iter().any(|area| !iova.covers(*area));
        let most = if is_short { 1 } else { usize::MAX };
        let gone = remove(areas, inside.into_iter().take_while(|area| iova.covers(*area)).take(most));
        if splits { Err(Errno::NOENT) } else { Ok(gone) }
    }

    /// What another address space has at a whole range, piece by piece (`iopt_get_pages()`).
    fn copied(&self, from: u32, source: IovaRange, access: Access) -> Result<Vec<(IovaRange, Target)>, Errno> {
        let areas = self.areas(from).ok_or(Errno::NOENT)?;
        let mut pieces = Vec::new();
        let mut next = Some(source.start());
        for inside in overlapping(areas, source) {
            let part = inside.intersection(source).filter(|part| Some(part.start()) == next).ok_or(Errno::NOENT)?;
            let area = areas.get(&inside.start()).ok_or(Errno::NOENT)?;
            if access.write && !area.access.write {
                return Err(Errno::PERM);
            }
            let offset = part.start() - inside.start();
            let target = match &area.to {
                Target::Memory(memory) => Target::Memory(memory.at(offset)),
                Target::File(file) => Target::File(file.at(offset)),
            };
            pieces.push((part, target));
            next = part.last().checked_add(1);
        }
        let is_whole = pieces.last().is_some_and(|(part, _)| part.last() == source.last());
        if is_whole { Ok(pieces) } else { Err(Errno::NOENT) }
    }

    fn hwpt_alloc(&mut self, owner: RawFd, device: u32, ioas: u32) -> Result<u32, Errno> {
        let group =
            self.groups.iter().position(|group| group.devices.values().any(|own| own.bound == Some((owner, device))));
        let group = group.ok_or(Errno::NOENT)?;
        // Nothing is nested in another hardware page table.
        if let Some((own, Object::HardwareTable { .. })) = self.objects.get(&ioas)
            && *own == owner
        {
            return Err(Errno::OPNOTSUPP);
        }
        let areas = self.areas_mut(owner, ioas).map_err(|_| Errno::INVAL)?;
        let mapped: Vec<(IovaRange, bool)> = areas.values().map(|area| (area.iova, area.is_aligned())).collect();
        let aperture = self.groups.get(group).map(Group::aperture).unwrap_or_default();
        if !mapped.iter().all(|(iova, is_aligned)| aperture.covers(*iova) && *is_aligned) {
            return Err(Errno::ADDRINUSE);
        }
        Ok(self.alloc(owner, Object::HardwareTable { ioas, group }))
    }

    fn destroy(&mut self, owner: RawFd, object: u32) -> Result<(), Errno> {
        let is_used = self.groups.iter().any(|group| group.object == Some(object))
            || self
                .objects
                .values()
                .any(|(_, other)| matches!(other, Object::HardwareTable { ioas, .. } if *ioas == object));
        match self.objects.get(&object) {
            Some((own, _)) if *own == owner && is_used => Err(Errno::BUSY),
            Some((own, _)) if *own == owner => {
                self.objects.remove(&object);
                Ok(())
            }
            _ => Err(Errno::NOENT),
        }
    }

    fn device(&mut self, endpoint: EndpointId) -> Result<&mut Device, Errno> {
        let group = self.group_of(endpoint).ok_or(Errno::NODEV)?;
        self.groups.get_mut(group).and_then(|group| group.devices.get_mut(&endpoint)).ok_or(Errno::NODEV)
    }

    fn bind(&mut self, endpoint: EndpointId, iommufd: RawFd) -> Result<u32, Errno> {
        if self.device(endpoint)?.bound.is_some() {
            return Err(Errno::INVAL);
        }
        let number = self.alloc(iommufd, Object::Device);
        self.device(endpoint)?.bound = Some((iommufd, number));
        Ok(number)
    }

    /// `iommufd_device_attach()` for a device that is not attached, `iommufd_device_replace()` for one that is.
    fn attach(&mut self, endpoint: EndpointId, object: u32) -> Result<(), Errno> {
        let (owner, _) = self.device(endpoint)?.bound.ok_or(Errno::INVAL)?;
        let index = self.group_of(endpoint).ok_or(Errno::NODEV)?;
        match self.objects.get(&object) {
            Some((own, Object::Ioas(_))) if *own == owner => (),
            Some((own, Object::HardwareTable { group, .. })) if *own == owner && *group == index => (),
            Some((own, _)) if *own == owner => return Err(Errno::INVAL),
            _ => return Err(Errno::NOENT),
        }
        let areas = self.ioas_of(object).and_then(|ioas| self.areas(ioas)).ok_or(Errno::NOENT)?;
        let group = self.groups.get(index).ok_or(Errno::NODEV)?;
        if !areas.values().all(|area| group.usable.covers(area.iova) && area.is_aligned()) {
            return Err(Errno::ADDRINUSE);
        }
        let is_attached = group.devices.get(&endpoint).is_some_and(|device| device.attached);
        if !is_attached && group.object.is_some_and(|current| current != object) {
            return Err(Errno::INVAL);
        }
        let group = self.groups.get_mut(index).ok_or(Errno::NODEV)?;
        group.object = Some(object);
        group.devices.entry(endpoint).or_default().attached = true;
        Ok(())
    }

    /// The group is on nothing only when the last of its devices is detached.
    fn detach(&mut self, endpoint: EndpointId) -> Result<(), Errno> {
        let device = self.device(endpoint)?;
        if device.bound.is_none() {
            return Err(Errno::INVAL);
        }
        device.attached = false;
        if let Some(group) = self.group_of(endpoint).and_then(|index| self.groups.get_mut(index))
            && !group.devices.values().any(|device| device.attached)
        {
            group.object = None;
        }
        Ok(())
    }
}

impl IommufdApi for FakeIommufd {
    fn number(&self) -> RawFd {
        self.number
    }

    fn ioas_alloc(&self) -> Result<u32, Errno> {
        let mut state = self.kernel.lock();
        state.call_or_fail()?;
        Ok(state.iommufds.alloc(self.number, Object::Ioas(Areas::new())))
    }

    fn destroy(&self, object: u32) -> Result<(), Errno> {
        self.kernel.lock().iommufds.destroy(self.number, object)
    }

    fn ioas_map(&self, ioas: u32, iova: IovaRange, memory: &HostMemory, access: Access) -> Result<(), Errno> {
        let mut state = self.kernel.lock();
        state.call_or_fail()?;
        let area = Area { iova, to: Target::Memory(memory.clone()), access, is_copy: false };
        state.iommufds.map(self.number, ioas, area)
    }

    fn ioas_map_file(&self, ioas: u32, iova: IovaRange, memory: &FileMemory, access: Access) -> Result<(), Errno> {
        let mut state = self.kernel.lock();
        state.call_or_fail()?;
        let area = Area { iova, to: Target::File(memory.clone()), access, is_copy: false };
        state.iommufds.map(self.number, ioas, area)
    }

    fn ioas_copy(&self, to: u32, iova: IovaRange, from: u32, source: u64, access: Access) -> Result<(), Errno> {
        let mut state = self.kernel.lock();
        state.call_or_fail()?;
        let length = iova.length().ok_or(Errno::INVAL)?;
        let source = IovaRange::from_length(source, length).ok_or(Errno::OVERFLOW)?;
        let mut pieces = state.iommufds.copied(from, source, access)?;
        // The range is taken as a whole; in it is an area for each piece.
        let (_, first) = pieces.first().ok_or(Errno::NOENT)?;
        state.iommufds.map(self.number, to, Area { iova, to: first.clone(), access, is_copy: true })?;
        let granule = state.iommufds.constraints(to).granule;
        let areas = state.iommufds.areas_mut(self.number, to)?;
        areas.remove(&iova.start());
        let place = |(part, to): (IovaRange, Target)| {
            let start = iova.start() + (part.start() - source.start());
            let iova = IovaRange::from_length(start, part.length()?)?;
            Some(Area { iova, to, access, is_copy: true })
        };
        let placed: Vec<Area> = pieces.drain(..).filter_map(place).collect();
        if granule == PAGE && !placed.iter().all(Area::is_aligned) {
            return Err(Errno::INVAL);
        }
        areas.extend(placed.into_iter().map(|area| (area.iova.start(), area)));
        Ok(())
    }

    fn ioas_unmap(&self, ioas: u32, iova: IovaRange) -> Result<u64, Errno> {
        let mut state = self.kernel.lock();
        match state.call() {
            Some(KernelFailure::Errno(errno)) => Err(errno),
            failure => state.iommufds.unmap(self.number, ioas, iova, failure.is_some()),
        }
    }

    fn ioas_iova_ranges(&self, ioas: u32) -> Result<Constraints, Errno> {
        let mut state = self.kernel.lock();
        state.call_or_fail()?;
        state.iommufds.areas_mut(self.number, ioas)?;
        Ok(state.iommufds.constraints(ioas))
    }

    fn hwpt_alloc(&self, device: u32, ioas: u32) -> Result<u32, Errno> {
        let mut state = self.kernel.lock();
        state.call_or_fail()?;
        state.iommufds.hwpt_alloc(self.number, device, ioas)
    }
}

impl VfioDeviceApi for FakeDevice {
    fn bind(&self, iommufd: RawFd) -> Result<u32, Errno> {
        let mut state = self.kernel.lock();
        state.call_or_fail()?;
        state.iommufds.bind(self.endpoint, iommufd)
    }

    fn attach(&self, object: u32) -> Result<(), Errno> {
        let mut state = self.kernel.lock();
        state.call_or_fail()?;
        state.iommufds.attach(self.endpoint, object)
    }

    fn detach(&self) -> Result<(), Errno> {
        self.kernel.lock().iommufds.detach(self.endpoint)
    }

    fn is_bound(&self) -> bool {
        let mut state = self.kernel.lock();
        state.iommufds.device(self.endpoint).is_ok_and(|device| device.bound.is_some())
    }
}
