// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From arguments to a device: files adopted and checked, facts gathered, groups formed.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::{info, warn};
use rustix::fs::fstat;

use super::args::{Arguments, EndpointArgument, OnOff};
use crate::control::{AssignedDevice, MOST_ENDPOINTS, is_node_of};
use crate::device::{self, Settings, VirtioIommu};
use crate::fd::{AdoptError, Adopted, FileKind, WrongFile, adopt};
use crate::host::HostGroup;
use crate::host::iommufd::{Iommufd, IommufdGroup, VfioDevice};
use crate::host::timed::{HostTime, TimedGroup};
use crate::id::{EndpointId, PciAddress};
use crate::range::IovaRange;
use crate::reserved::HostFacts;
use crate::reserved::facts::{FactsError, FactsFile};
use crate::reserved::gather::{GatherError, Host};
use crate::reserved::plan::EndpointPlan;
use crate::reserved::plan::{Plan, PlanError, Policy, plan, widest};
use crate::reserved::sysfs::{IommuGroup, Sysfs, SysfsError};
use crate::spec;

/// How many bits of address the guest is offered if nobody says: what four levels of page tables translate.
const DEFAULT_ADDRESS_WIDTH: u8 = 48;

/// A device that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// There are more endpoints than are watched over.
    #[error("{0} endpoints are given, and there can be {MOST_ENDPOINTS}: give the others to another daemon")]
    TooManyEndpoints(usize),
    /// A passed file cannot be used.
    #[error(transparent)]
    File(#[from] AdoptError),
    /// A passed file is something else.
    #[error(transparent)]
    WrongFile(#[from] WrongFile),
    /// The host does not tell what it should.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// The host does not tell what it should.
    #[error(transparent)]
    Gather(#[from] GatherError),
    /// The facts cannot be read.
    #[error(transparent)]
    Facts(#[from] FactsError),
    /// A device file cannot be traced to its device.
    #[error("cannot tell which device /dev/{node} is for: {} does not lead to one", .path.display())]
    Untraceable {
        /// The device node.
        node: String,
        /// Where sysfs should have told.
        path: PathBuf,
    },
    /// The file is for another device than was said.
    #[error("endpoint {id}: fd {cdev_fd} is for the host device {found}, not {host}")]
    WrongDevice {
        /// The endpoint.
        id: EndpointId,
        /// The file.
        cdev_fd: RawFd,
        /// The device that it is for.
        found: PciAddress,
        /// The device that was said.
        host: PciAddress,
    },
    /// The node is not there.
    #[error(
        "endpoint {id}: /dev/{node} is not the device's where this process runs, so that it would not see when the host wants the device \
         back: let it see /dev/vfio/devices of the host"
    )]
    NoNode {
        /// The endpoint.
        id: EndpointId,
        /// The name of the node below `/dev`.
        node: String,
    },
    /// The file cannot be looked at.
    #[error("endpoint {0}: its file cannot be examined")]
    Stat(EndpointId, #[source] std::io::Error),
    /// A device would have two IDs, and the guest would move it by one while it believes that the other stays.
    #[error("endpoints {first} and {second} are both the host device {host}: give each device once")]
    DeviceTwice {
        /// The endpoint that was given first.
        first: EndpointId,
        /// The other one.
        second: EndpointId,
        /// The device.
        host: PciAddress,
    },
    /// VFIO was told to do without an IOMMU.
    #[error(
        "endpoint {id}: the host device {host} is behind no IOMMU (vfio-noiommu): nothing would hold its DMA. Turn the host's \
         IOMMU on"
    )]
    NoIommu {
        /// The endpoint.
        id: EndpointId,
        /// The device.
        host: PciAddress,
    },
    /// There are facts, but not of this device.
    #[error("{} says nothing of the host device {host}: gather its facts too (viommuctl inspect {host} --facts-out)", .file.display())]
    NoFacts {
        /// The file of facts.
        file: PathBuf,
        /// The device.
        host: PciAddress,
    },
    /// The facts are of another time or another host.
    #[error("the reserved regions of {host} are not those in {}: gather the facts anew", .file.display())]
    StaleFacts {
        /// The file of facts.
        file: PathBuf,
        /// The device.
        host: PciAddress,
    },
    /// A device of the group belongs to VFIO and not to the guest.
    #[error(
        "host device {missing} is in IOMMU group {group} with an endpoint and bound to VFIO, but is no endpoint itself: \
         add it with --endpoint, or unbind it"
    )]
    GroupIncomplete {
        /// The group.
        group: u32,
        /// The device.
        missing: PciAddress,
    },
    /// The host must keep an identity mapping for the device.
    #[error(
        "endpoint {endpoint}: the host must keep {range} mapped to itself for this device (a `direct` region), so VFIO \
         refuses it: ask the platform's vendor, or assign another device"
    )]
    Direct {
        /// The endpoint.
        endpoint: EndpointId,
        /// The region.
        range: IovaRange,
    },
    /// Neither the facts nor the operator say how far addresses go.
    #[error(
        "endpoint {endpoint}: how far its addresses go is not known: give its facts (viommuctl inspect --facts-out), or \
         --input-range"
    )]
    UnknownWidth {
        /// The endpoint.
        endpoint: EndpointId,
    },
    /// What the guest is to be told cannot be worked out.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Endpoints and groups do not fit each other.
    #[error(transparent)]
    Device(#[from] device::SetupError),
}

impl SetupError {
    /// Whether the arguments are at fault, rather than the host.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::TooManyEndpoints(_)
            | Self::File(_)
            | Self::UnknownWidth { .. }
            | Self::Facts(_)
            | Self::WrongFile(_)
            | Self::NoFacts { .. }
            | Self::Device(_)
            | Self::WrongDevice { .. }
            | Self::DeviceTwice { .. } => true,
            Self::Plan(error) => matches!(error, PlanError::NoEndpoint),
            Self::Direct { .. }
            | Self::NoIommu { .. }
            | Self::Sysfs(_)
            | Self::Gather(_)
            | Self::Untraceable { .. }
            | Self::NoNode { .. }
            | Self::Stat(..)
            | Self::StaleFacts { .. }
            | Self::GroupIncomplete { .. } => false,
        }
    }
}

/// An endpoint with its file and what the host says of it.
struct Assigned {
    id: EndpointId,
    host: PciAddress,
    device: VfioDevice,
    /// The name of its file's node below `/dev`.
    node: String,
    /// Which device its file is of.
    number: u64,
    group: IommuGroup,
    facts: HostFacts,
}

/// A device, what its guest is told, and what its endpoints are on the host.
#[derive(Debug)]
pub struct BuiltDevice {
    /// The device.
    pub device: VirtioIommu,
    /// What the guest is told.
    pub plan: Plan,
    /// Its endpoints, in the order of the arguments.
    pub endpoints: Vec<AssignedDevice>,
    /// The iommufd, if one was passed.
    pub iommufd: Option<Arc<Iommufd>>,
    /// The time that calls of the host take, if anybody can ask for it.
    pub host_time: Option<Arc<HostTime>>,
}

/// Makes the device that the arguments ask for.
///
/// # Errors
///
/// [`SetupError`]
pub fn build_device(arguments: &Arguments) -> Result<BuiltDevice, SetupError> {
    if arguments.endpoint.len() > MOST_ENDPOINTS {
        return Err(SetupError::TooManyEndpoints(arguments.endpoint.len()));
    }
    let sysfs = Sysfs::new("/sys");
    let iommufd = arguments.iommufd_fd.map(|number| adopt(number, FileKind::Iommufd)).transpose()?;
    let facts = arguments.facts.as_deref().map(FactsFile::read).transpose()?;
    let mut assigned = Vec::new();
    for endpoint in &arguments.endpoint {
        assigned.push(assign(&sysfs, endpoint, arguments, facts.as_ref())?);
    }
    check_distinct(assigned.iter().map(|assigned| (assigned.id, assigned.host)))?;
    check_groups(&sysfs, &assigned)?;

    let policy = policy(arguments);
    let known: Vec<_> = assigned.iter().map(|assigned| (assigned.id, assigned.facts.clone())).collect();
    check_width(&policy, &known)?;
    let plan = plan(&policy, &known)?;
    for (assigned, planned) in assigned.iter().zip(&plan.endpoints) {
        check_attachable(planned)?;
        log_plan(assigned, planned);
    }
    let settings = settings(arguments, &plan);
    if assigned.is_empty() {
        let (range, granule) = (settings.input_range, settings.granule);
        info!(
            "no endpoint is given: the guest is offered {range} in pages of {granule} bytes, whatever is added later"
        );
    }
    let endpoints: Vec<_> =
        assigned.iter().zip(&plan.endpoints).map(|(assigned, planned)| assigned.with_plan(planned)).collect();
    let views = plan.endpoints.iter().map(|planned| (planned.id, planned.view.clone())).collect();
    let iommufd = iommufd.map(|Adopted { file, .. }| Iommufd::new(file)).transpose()?.map(Arc::new);
    let mut groups = iommufd.as_ref().map_or_else(Vec::new, |iommufd| form_groups(iommufd, assigned));
    let host_time = arguments.is_measured().then(Arc::<HostTime>::default);
    if let Some(time) = &host_time {
        let timed = |group| -> Arc<dyn HostGroup> { Arc::new(TimedGroup::new(group, Arc::clone(time))) };
        groups = groups.into_iter().map(timed).collect();
    }
    Ok(BuiltDevice { device: VirtioIommu::new(settings, views, groups)?, plan, endpoints, iommufd, host_time })
}

/// The operator's policy. Without an endpoint to say how far addresses go, and without the operator, the guest is offered as many as
/// most hosts have; what an endpoint that is added later cannot reach is then reserved for it.
fn policy(arguments: &Arguments) -> Policy {
    let mut policy = arguments.policy.policy();
    if arguments.endpoint.is_empty() && policy.input_range.is_none() {
        policy.max_address_width.get_or_insert(DEFAULT_ADDRESS_WIDTH);
        policy.input_range = Some(widest(&policy));
    }
    policy
}

impl Assigned {
    fn with_plan(&self, planned: &EndpointPlan) -> AssignedDevice {
        AssignedDevice {
            host: self.host,
            group: self.group.number,
            node: self.node.clone(),
            device_number: self.number,
            plan: planned.clone(),
        }
    }
}

fn settings(arguments: &Arguments, plan: &Plan) -> Settings {
    let granule = rustix::param::page_size() as u64;
    let defaults = Settings::new(plan.input_range, granule);
    let regions = plan.endpoints.iter().map(|planned| planned.view.reported().len()).max().unwrap_or(0);
    let needed = u32::try_from(regions * spec::RESV_MEM_SIZE).unwrap_or(u32::MAX);
    Settings {
        probe_size: defaults.probe_size.max(needed),
        boot_bypass: arguments.boot_bypass == OnOff::On,
        access_platform: arguments.access_platform,
        max_domains: arguments.max_domains,
        max_mappings: arguments.max_mappings,
        max_mappings_in_all: arguments.max_mappings_in_all,
        ..defaults
    }
}

fn assign(
    sysfs: &Sysfs,
    endpoint: &EndpointArgument,
    arguments: &Arguments,
    facts: Option<&FactsFile>,
) -> Result<Assigned, SetupError> {
    let id = endpoint.id;
    let Adopted { file, node, sysfs: place } = adopt(endpoint.cdev_fd, FileKind::VfioDevice)?;
    let path = place.join("device");
    let target = fs::canonicalize(&path).ok();
    let found = target.and_then(|target| target.file_name()?.to_str()?.parse().ok());
    let found: PciAddress = found.ok_or(SetupError::Untraceable { node: node.clone(), path })?;
    if let Some(host) = endpoint.host.filter(|host| *host != found) {
        return Err(SetupError::WrongDevice { id, cdev_fd: endpoint.cdev_fd, found, host });
    }
    let group = sysfs.group(found)?;
    if sysfs.is_noiommu(group.number) {
        return Err(SetupError::NoIommu { id, host: found });
    }
    let mut facts = match facts.zip(arguments.facts.clone()) {
        None => Host::default().facts(found)?.1,
        Some((facts, file)) => {
            let Some(known) = facts.get(EndpointId::from(found)) else {
                return Err(SetupError::NoFacts { file, host: found });
            };
            if known.reserved_regions != group.reserved_regions {
                return Err(SetupError::StaleFacts { file, host: found });
            }
            known.clone()
        }
    };
    arguments.policy.amend(&mut facts);
    let number = fstat(&file).map_err(|errno| SetupError::Stat(id, errno.into()))?.st_rdev;
    let is_its_node = |metadata: &fs::Metadata| is_node_of(metadata, number);
    if !fs::symlink_metadata(Path::new("/dev").join(&node)).as_ref().is_ok_and(is_its_node) {
        return Err(SetupError::NoNode { id, node });
    }
    Ok(Assigned { id, host: found, device: VfioDevice::new(file, found.to_string())?, node, number, group, facts })
}

/// Every endpoint must be another device. Files do not tell: a device can be opened, and a descriptor duplicated, many times.
fn check_distinct(endpoints: impl Iterator<Item = (EndpointId, PciAddress)>) -> Result<(), SetupError> {
    let mut seen = BTreeMap::new();
    for (second, host) in endpoints {
        if let Some(first) = seen.insert(host, second) {
            return Err(SetupError::DeviceTwice { first, second, host });
        }
    }
    Ok(())
}

/// Every device of a group that is bound to VFIO must be an endpoint: the host moves the whole group.
fn check_groups(sysfs: &Sysfs, assigned: &[Assigned]) -> Result<(), SetupError> {
    for group in assigned.iter().map(|assigned| &assigned.group) {
        let is_endpoint = |member: &PciAddress| assigned.iter().any(|assigned| assigned.host == *member);
        if let Some(missing) = sysfs.vfio_members(group)?.into_iter().find(|member| !is_endpoint(member)) {
            return Err(SetupError::GroupIncomplete { group: group.number, missing });
        }
    }
    Ok(())
}

fn form_groups(iommufd: &Arc<Iommufd>, assigned: Vec<Assigned>) -> Vec<Arc<dyn HostGroup>> {
    let mut groups: BTreeMap<u32, Vec<(EndpointId, VfioDevice)>> = BTreeMap::new();
    for Assigned { id, device, group, .. } in assigned {
        groups.entry(group.number).or_default().push((id, device));
    }
    let group = |devices| -> Arc<dyn HostGroup> { Arc::new(IommufdGroup::shared(Arc::clone(iommufd), devices)) };
    groups.into_values().map(group).collect()
}

/// How far addresses go must be known: a guest that is offered too much is refused when it attaches.
fn check_width(policy: &Policy, endpoints: &[(EndpointId, HostFacts)]) -> Result<(), SetupError> {
    let unknown = endpoints.iter().find(|(_, facts)| facts.usable.is_none() && facts.aperture.is_none());
    match unknown {
        Some((endpoint, _)) if policy.input_range.is_none() => Err(SetupError::UnknownWidth { endpoint: *endpoint }),
        _ => Ok(()),
    }
}

fn check_attachable(planned: &EndpointPlan) -> Result<(), SetupError> {
    match planned.direct {
        Some(range) => Err(SetupError::Direct { endpoint: planned.id, range }),
        None => Ok(()),
    }
}

fn log_plan(assigned: &Assigned, planned: &EndpointPlan) {
    let id = assigned.id;
    info!("endpoint {id} is host device {} in IOMMU group {}", assigned.host, assigned.group.number);
    planned.log();
    if let Some(warning) = assigned.facts.peer_to_peer_warning() {
        warn!("endpoint {id}: {warning}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_endpoints_are_two_devices() {
        let [one, other]: [PciAddress; 2] = ["01:00.0", "01:00.1"].map(|address| address.parse().unwrap());
        let (first, second) = (EndpointId(0x18), EndpointId(0x20));
        assert!(check_distinct([(first, one), (second, other)].into_iter()).is_ok());
        let error = check_distinct([(first, one), (EndpointId(0x28), other), (second, one)].into_iter()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "endpoints 0000:00:03.0 and 0000:00:04.0 are both the host device 0000:01:00.0: give each device once"
        );
        assert!(error.is_usage());
    }
}
