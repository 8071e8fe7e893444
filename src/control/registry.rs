// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The endpoints of a daemon, each with its device on the host, and who else holds its file.
//!
//! Whoever takes an entry out, a client or the watch over the devices' nodes, removes the endpoint. Whoever needs both the registry's
//! lock and the device's takes the registry's first; the request queue never needs it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fs, io};

use log::{info, warn};

use super::files::{DeviceFiles, Keeper, KeeperError};
use super::protocol::{self, Held, Removal};
use crate::causes::with_causes;
use crate::device::{EndpointStatus, Translation};
use crate::id::{EndpointId, PciAddress};
use crate::reserved::arguments::PolicyArguments;
use crate::reserved::facts::Text;
use crate::reserved::plan::{EndpointPlan, Plan};
use crate::vhost_user::IommuBackend;

/// How many endpoints there can be: places of a [`Keeper`].
pub(crate) const MOST_ENDPOINTS: usize = 254;

/// An endpoint and its device on the host.
#[derive(Clone, Debug)]
pub struct AssignedDevice {
    /// The device's address.
    pub host: PciAddress,
    /// The number of its IOMMU group.
    pub group: u32,
    /// The name of its file below `/dev`.
    pub node: String,
    /// Which device its file is of ([`DeviceFiles::identify`]).
    pub device_number: u64,
    /// What the guest is told of it, and its ID.
    pub plan: EndpointPlan,
}

/// What can be added, and how.
#[derive(Debug)]
pub struct Pluggable {
    /// What makes groups of files; `None` if nothing can be added.
    pub files: Option<Box<dyn DeviceFiles>>,
    /// Who else holds the files.
    pub keeper: Option<Box<dyn Keeper>>,
    /// What the operator chose when the daemon was started.
    pub policy: PolicyArguments,
    /// Where the devices' nodes are.
    pub directory: PathBuf,
}

/// The endpoints of a daemon.
#[derive(Debug)]
pub struct Registry {
    pub(super) backend: Arc<IommuBackend>,
    pub(super) files: Option<Box<dyn DeviceFiles>>,
    pub(super) policy: PolicyArguments,
    directory: PathBuf,
    entries: Mutex<Entries>,
}

/// The endpoints, ascending by ID, and who else holds their files.
#[derive(Debug, Default)]
pub(super) struct Entries {
    pub list: Vec<Entry>,
    pub keeper: Option<Box<dyn Keeper>>,
}

/// An endpoint.
#[derive(Debug)]
pub(super) struct Entry {
    pub assigned: AssignedDevice,
    /// The inode of its node, by which another device's of the same name is told apart; `None` if it is not there.
    pub inode: Option<u64>,
    /// Where the keeper has its file.
    pub place: Option<u8>,
}

/// An endpoint that cannot be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// There is no such endpoint.
    #[error("there is no endpoint {0}: `viommuctl status` shows which there are")]
    NotFound(EndpointId),
    /// It is given twice, or nothing is given.
    #[error("give each endpoint that is to be removed once, at least one and at most {most}", most = protocol::MOST_DEVICES)]
    Count,
}

impl Registry {
    /// The endpoints that a backend's device was made with. The keeper's places are those in this list.
    pub fn new(backend: Arc<IommuBackend>, devices: Vec<AssignedDevice>, pluggable: Pluggable) -> Self {
        let Pluggable { files, keeper, policy, directory } = pluggable;
        let entry = |(place, assigned): (usize, AssignedDevice)| {
            let inode = inode_of(&directory, &assigned.node);
            Entry { assigned, inode, place: u8::try_from(place).ok().filter(|_| place < MOST_ENDPOINTS) }
        };
        let mut list: Vec<Entry> = devices.into_iter().enumerate().map(entry).collect();
        list.sort_by_key(Entry::id);
        Self { backend, files, policy, directory, entries: Mutex::new(Entries { list, keeper }) }
    }

    pub(super) fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is any endpoint.
    pub fn is_empty(&self) -> bool {
        self.entries().list.is_empty()
    }

    /// What there is of each endpoint.
    pub fn list(&self) -> Vec<protocol::Endpoint> {
        let entries = self.entries();
        let statuses: Vec<EndpointStatus> = self.backend.inspect(|device| device.endpoints().collect());
        let status = |id| statuses.iter().find(|status| status.id == id);
        entries.list.iter().filter_map(|entry| Some(endpoint(&entry.assigned, status(entry.id())?))).collect()
    }

    /// What the guest is told.
    pub fn plan(&self) -> Plan {
        let entries = self.entries();
        let input_range = self.backend.inspect(|device| device.settings().input_range);
        Plan { input_range, endpoints: entries.list.iter().map(|entry| entry.assigned.plan.clone()).collect() }
    }

    /// Takes endpoints away: when this returns they reach nothing any more, unless a sibling of their group does, and their files are
    /// closed, but for those that are said to be held. Those of their groups that stay are returned, ascending.
    ///
    /// # Errors
    ///
    /// [`RemoveError`]; nothing was changed.
    pub fn remove(&self, endpoints: &[EndpointId]) -> Result<Removal, RemoveError> {
        let distinct = endpoints.iter().enumerate().all(|(at, id)| endpoints.iter().take(at).all(|other| other != id));
        if !distinct || endpoints.is_empty() || endpoints.len() > protocol::MOST_DEVICES {
            return Err(RemoveError::Count);
        }
        let mut entries = self.entries();
        if let Some(missing) = endpoints.iter().find(|id| entries.find(**id).is_none()) {
            return Err(RemoveError::NotFound(*missing));
        }
        let (mut groups, mut held) = (Vec::new(), Vec::new());
        for id in endpoints {
            let Some(entry) = entries.find(*id).map(|at| entries.list.remove(at)) else { continue };
            groups.push(entry.assigned.group);
            if let Err(error) = self.let_go(&mut entries, &entry) {
                held.push(Held { endpoint: Text(*id), reason: with_causes(&error) });
            }
        }
        let siblings = entries.list.iter().filter(|entry| groups.contains(&entry.assigned.group)).map(Entry::id);
        let siblings = siblings.map(Text).collect();
        Ok(Removal { endpoints: endpoints.iter().copied().map(Text).collect(), siblings, held })
    }

    /// Takes away the endpoints whose nodes are gone: the host wants their devices back, and waits for them.
    pub fn remove_those_gone(&self) {
        let mut entries = self.entries();
        let is_gone = |entry: &mut Entry| {
            let inode = inode_of(&self.directory, &entry.assigned.node);
            inode.is_none() || inode != entry.inode
        };
        let gone: Vec<Entry> = entries.list.extract_if(.., is_gone).collect();
        for entry in gone {
            let AssignedDevice { node, .. } = &entry.assigned;
            warn!("endpoint {}: the host takes its device back (/dev/{node} is gone)", entry.id());
            // That it may be held is in the log.
            _ = self.let_go(&mut entries, &entry);
        }
    }

    /// Whether anything can be added.
    pub fn can_add(&self) -> bool {
        self.files.is_some()
    }

    /// Whether somebody else is to hold the files; not any more once [`close`](Self::close) was called.
    pub fn is_kept(&self) -> bool {
        self.entries().keeper.is_some()
    }

    /// The keeper lets everything go: every endpoint is blocked.
    pub fn close(&self) {
        let keeper = self.entries().keeper.take();
        drop(keeper);
    }

    /// Removes an endpoint whose entry was taken out. It is removed even if its file may be held still.
    fn let_go(&self, entries: &mut Entries, entry: &Entry) -> Result<(), KeeperError> {
        self.backend.remove_endpoint(entry.id());
        info!("endpoint {} was removed", entry.id());
        let released = match (&mut entries.keeper, entry.place) {
            (Some(keeper), Some(place)) => keeper.release(place),
            (Some(_), None) => Err(KeeperError::Io(io::Error::other("its place is not known"))),
            (None, _) => Ok(()),
        };
        released.inspect_err(|error| {
            warn!("endpoint {}: the watcher did not say that it closed its file: {}", entry.id(), with_causes(error));
        })
    }

    /// A device's node, if it is there.
    pub(super) fn look_at_node(&self, name: &str) -> Option<fs::Metadata> {
        look_at_node(&self.directory, name)
    }
}

impl Entries {
    /// Where an endpoint is in the list.
    pub fn find(&self, id: EndpointId) -> Option<usize> {
        self.list.iter().position(|entry| entry.id() == id)
    }

    /// Gives up files that were held for endpoints that are none.
    pub fn give_up(&mut self, places: &[u8]) {
        for place in places {
            if let Some(Err(error)) = self.keeper.as_mut().map(|keeper| keeper.release(*place)) {
                warn!("the watcher holds the file of a device that is no endpoint: {}", with_causes(&error));
            }
        }
    }
}

impl Entry {
    pub fn id(&self) -> EndpointId {
        self.assigned.plan.id
    }
}

fn look_at_node(directory: &Path, node: &str) -> Option<fs::Metadata> {
    fs::symlink_metadata(directory.join(Path::new(node).file_name()?)).ok()
}

/// The inode of a device's node: in the file system of device nodes, numbers are not used again.
fn inode_of(directory: &Path, node: &str) -> Option<u64> {
    look_at_node(directory, node).map(|metadata| metadata.ino())
}

fn endpoint(assigned: &AssignedDevice, status: &EndpointStatus) -> protocol::Endpoint {
    let AssignedDevice { host, group, node, .. } = assigned;
    protocol::Endpoint {
        id: Text(status.id),
        host: Text(*host),
        group: *group,
        node: node.clone(),
        domain: status.domain.map(|domain| domain.0),
        translation: match status.translation {
            Translation::AsFound => protocol::Translation::AsFound,
            Translation::Blocked => protocol::Translation::Blocked,
            Translation::Bypass => protocol::Translation::Bypass,
            Translation::Domain(_) => protocol::Translation::Domain,
        },
        siblings: status.siblings.iter().copied().map(Text).collect(),
    }
}
