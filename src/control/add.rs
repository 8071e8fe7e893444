// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Endpoints that are added while the guest runs, by the terms that it was given at the start: input range, page size, probe size.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::files::{DeviceFile, DeviceFiles, FileError, KeeperError};
use super::protocol::{Addition, Device, MOST_DEVICES};
use super::registry::{AssignedDevice, Entries, Entry, MOST_ENDPOINTS, Registry};
use crate::device::{Settings, SetupError};
use crate::id::{EndpointId, PciAddress};
use crate::range::IovaRange;
use crate::reserved::HostFacts;
use crate::reserved::plan::{Plan, PlanError, Policy, plan};

/// Devices that cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// Nothing can be added to this daemon.
    #[error("this daemon was started without --iommufd-fd: start it with the iommufd that the VMM has")]
    NoIommufd,
    /// There are too few or too many.
    #[error("{devices} devices with {files} files: give one file for each device, and at most {most}", most = MOST_DEVICES)]
    Count {
        /// How many devices are described.
        devices: usize,
        /// How many files came.
        files: usize,
    },
    /// There would be too many endpoints.
    #[error("there can be {MOST_ENDPOINTS} endpoints: remove some first")]
    TooMany,
    /// An ID is in use.
    #[error("there is an endpoint {0} already: remove it first, or choose another place in the guest")]
    IdTaken(EndpointId),
    /// A device would have two IDs.
    #[error("endpoints {first} and {second} are the same host device: give each device once")]
    DeviceTwice {
        /// The endpoint that is there, or was given first.
        first: EndpointId,
        /// The other one.
        second: EndpointId,
    },
    /// A file is none of a device.
    #[error("endpoint {id}: its file cannot be used: {source}")]
    File {
        /// The endpoint.
        id: EndpointId,
        /// What it is.
        source: FileError,
    },
    /// Files became useless meanwhile.
    #[error("the files cannot be used: {0}")]
    Files(#[source] FileError),
    /// The node is not there.
    #[error(
        "endpoint {id}: /dev/vfio/devices/{node} is not the device's where the daemon runs, so that it would not see when the host wants \
         the device back: give the name of the file in /dev/vfio/devices, and let the daemon see that directory"
    )]
    NoNode {
        /// The endpoint.
        id: EndpointId,
        /// The name.
        node: String,
    },
    /// The group was added before.
    #[error(
        "endpoint {endpoint} is in host IOMMU group {group} already, and the devices of a group are added together: remove it first"
    )]
    GroupTaken {
        /// The group.
        group: u32,
        /// An endpoint that is in it.
        endpoint: EndpointId,
    },
    /// A device of the group belongs to VFIO and not to the guest.
    #[error(
        "host device {missing} is in IOMMU group {group} and bound to VFIO, but not among the devices: add it with them, or unbind it"
    )]
    GroupIncomplete {
        /// The group.
        group: u32,
        /// The device.
        missing: PciAddress,
    },
    /// A device is said to be none of the group's.
    #[error("host device {host} is not among those of IOMMU group {group} that are bound to VFIO")]
    NotInGroup {
        /// The group.
        group: u32,
        /// The device.
        host: PciAddress,
    },
    /// How far addresses go is not known.
    #[error(
        "endpoint {0}: which addresses it can use is not known: the device must be bound to vfio-pci and idle when its facts are gathered"
    )]
    UnknownWidth(EndpointId),
    /// The host maps in larger pages.
    #[error(
        "endpoint {id}: the host maps in pages of {host:#x} bytes, and the guest was told of pages of {guest:#x} bytes"
    )]
    Granule {
        /// The endpoint.
        id: EndpointId,
        /// The host's, in bytes.
        host: u64,
        /// The guest's, in bytes.
        guest: u64,
    },
    /// The host must keep an identity mapping for the device.
    #[error(
        "endpoint {id}: the host must keep {range} mapped to itself for this device (a `direct` region), so VFIO refuses it: assign \
         another device"
    )]
    Direct {
        /// The endpoint.
        id: EndpointId,
        /// The region.
        range: IovaRange,
    },
    /// It does not fit what the guest was told at the start.
    #[error("it does not fit what the guest was told when it started: {0}")]
    Plan(#[source] PlanError),
    /// It does not fit what the guest was told at the start.
    #[error("it does not fit what the guest was told when it started: {0}")]
    Device(#[source] SetupError),
    /// Nobody would hold the devices after this process.
    #[error(
        "the watcher does not take the files, so that nobody would detach the devices if the daemon were killed: {0}"
    )]
    Keeper(#[source] KeeperError),
}

impl Registry {
    /// Adds all devices of a host group. What the guest is told of them is returned.
    ///
    /// # Errors
    ///
    /// [`AddError`]; nothing was changed, and the files are closed.
    pub fn add(&self, addition: &Addition, files: Vec<OwnedFd>) -> Result<Plan, AddError> {
        let maker = self.files.as_ref().ok_or(AddError::NoIommufd)?;
        let Addition { group, vfio_members, devices } = addition;
        if devices.is_empty() || devices.len() > MOST_DEVICES || devices.len() != files.len() {
            return Err(AddError::Count { devices: devices.len(), files: files.len() });
        }
        let mut numbers = Vec::new();
        for (device, file) in devices.iter().zip(&files) {
            let number = maker.identify(file.as_fd());
            numbers.push(number.map_err(|source| AddError::File { id: device.id.0, source })?);
        }
        let mut entries = self.entries();
        entries.check(addition, &numbers)?;
        check_members(*group, devices, &vfio_members.iter().map(|member| member.0).collect::<Vec<_>>())?;
        let nodes = devices.iter().zip(&numbers).map(|(device, number)| self.node(maker.as_ref(), device, *number));
        let inodes = nodes.collect::<Result<Vec<_>, _>>()?;
        let plan = self.plan_for(devices)?;

        let mut places = Vec::new();
        if let Err(error) = entries.hold(&files, &mut places) {
            entries.give_up(&places);
            return Err(error);
        }
        let named = devices.iter().zip(files);
        let named: Vec<DeviceFile> =
            named.map(|(device, file)| (device.id.0, file, device.host.0.to_string())).collect();
        let views = plan.endpoints.iter().map(|planned| (planned.id, planned.view.clone())).collect();
        let added = maker
            .group(named)
            .map_err(AddError::Files)
            .and_then(|host| self.backend.add_group(host, views).map_err(AddError::Device));
        if let Err(error) = added {
            entries.give_up(&places);
            return Err(error);
        }
        let mut places = places.into_iter();
        for (((device, planned), number), inode) in devices.iter().zip(&plan.endpoints).zip(numbers).zip(inodes) {
            let assigned = AssignedDevice {
                host: device.host.0,
                group: *group,
                node: format!("vfio/devices/{}", device.node),
                device_number: number,
                plan: planned.clone(),
            };
            entries.list.push(Entry { assigned, inode: Some(inode), place: places.next() });
        }
        entries.list.sort_by_key(Entry::id);
        drop(entries);
        // A node that went meanwhile may not have been in the list when it was looked for.
        self.remove_those_gone();
        Ok(plan)
    }

    /// The inode of a device's node, which must be there and not be another device's.
    fn node(&self, maker: &dyn DeviceFiles, device: &Device, number: u64) -> Result<u64, AddError> {
        let name = &device.node;
        // The name of a file, and no path.
        let is_plain = Path::new(name).file_name().is_some_and(|last| last == name.as_str());
        let metadata = is_plain.then(|| self.look_at_node(name)).flatten();
        let own = metadata.filter(|node| maker.is_node(node, number));
        own.map(|node| node.ino()).ok_or_else(|| AddError::NoNode { id: device.id.0, node: name.clone() })
    }

    /// What the guest is told of devices, by the terms that it was given.
    fn plan_for(&self, devices: &[Device]) -> Result<Plan, AddError> {
        let settings: Settings = self.backend.inspect(|device| device.settings().clone());
        let known: Vec<(EndpointId, HostFacts)> = devices
            .iter()
            .map(|device| {
                let mut facts = HostFacts::from(device.facts.clone());
                self.policy.amend(&mut facts);
                (device.id.0, facts)
            })
            .collect();
        let chosen = self.policy.policy();
        let unknown = known.iter().find(|(_, facts)| facts.usable.is_none() && facts.aperture.is_none());
        if let Some((id, _)) = unknown.filter(|_| chosen.input_range.is_none()) {
            return Err(AddError::UnknownWidth(*id));
        }
        let coarse =
            |device: &Device| Some((device.id.0, device.granule.filter(|granule| *granule > settings.granule)?));
        if let Some((id, host)) = devices.iter().find_map(coarse) {
            return Err(AddError::Granule { id, host, guest: settings.granule });
        }
        let policy = Policy {
            input_range: Some(settings.input_range),
            probe_size: Some(settings.probe_size),
            guest_ram: self.backend.guest_memory(),
            ..chosen
        };
        let plan = plan(&policy, &known).map_err(AddError::Plan)?;
        match plan.endpoints.iter().find_map(|planned| Some((planned.id, planned.direct?))) {
            Some((id, range)) => Err(AddError::Direct { id, range }),
            None => Ok(plan),
        }
    }
}

impl Entries {
    /// Whether IDs, devices and group are new.
    fn check(&self, addition: &Addition, numbers: &[u64]) -> Result<(), AddError> {
        let Addition { group, devices, .. } = addition;
        if self.list.len() + devices.len() > MOST_ENDPOINTS {
            return Err(AddError::TooMany);
        }
        for (at, (device, number)) in devices.iter().zip(numbers).enumerate() {
            let id = device.id.0;
            let others = || devices.iter().zip(numbers).take(at);
            if self.find(id).is_some() || others().any(|(other, _)| other.id.0 == id) {
                return Err(AddError::IdTaken(id));
            }
            let is_same = |host: PciAddress, other: u64| other == *number || host == device.host.0;
            let there = self.list.iter().find(|entry| is_same(entry.assigned.host, entry.assigned.device_number));
            let first = there.map(Entry::id);
            let first =
                first.or_else(|| Some(others().find(|(other, number)| is_same(other.host.0, **number))?.0.id.0));
            if let Some(first) = first {
                return Err(AddError::DeviceTwice { first, second: id });
            }
        }
        match self.list.iter().find(|entry| entry.assigned.group == *group) {
            Some(entry) => Err(AddError::GroupTaken { group: *group, endpoint: entry.id() }),
            None => Ok(()),
        }
    }

    /// Has the keeper hold the files.
    fn hold(&mut self, files: &[OwnedFd], places: &mut Vec<u8>) -> Result<(), AddError> {
        if let Some(keeper) = &mut self.keeper {
            for file in files {
                places.push(keeper.hold(file.as_fd()).map_err(AddError::Keeper)?);
            }
        }
        Ok(())
    }
}

/// All devices of the group that VFIO has must be among those that are added, and no others.
fn check_members(group: u32, devices: &[Device], vfio_members: &[PciAddress]) -> Result<(), AddError> {
    let is_given = |member: &PciAddress| devices.iter().any(|device| device.host.0 == *member);
    if let Some(missing) = vfio_members.iter().find(|member| !is_given(member)) {
        return Err(AddError::GroupIncomplete { group, missing: *missing });
    }
    match devices.iter().find(|device| !vfio_members.contains(&device.host.0)) {
        Some(device) => Err(AddError::NotInGroup { group, host: device.host.0 }),
        None => Ok(()),
    }
}
