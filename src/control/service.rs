// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What each request does. What is found under the device's lock is copied, and written when it is free again.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use log::info;

use super::add::AddError;
use super::faults::FaultLog;
use super::protocol::{
    Addition, Address, Domain, Fault, LARGEST_PAGE, Level, Mapping, Page, Refusal, RefusalKind, Reply, Request, Stats,
};
use super::registry::{Registry, RemoveError};
use crate::causes::with_causes;
use crate::device::{DomainStatus, MappedRange};
use crate::id::{DomainId, EndpointId};
use crate::reserved::facts::Text;
use crate::reserved::report;

/// What clients may ask of.
#[derive(Debug)]
pub(super) struct Service {
    registry: Arc<Registry>,
    faults: FaultLog,
}

/// An answer, and whether the client is to have faults after the last one in it.
#[derive(Debug)]
pub(super) struct Answered {
    pub reply: Reply,
    /// The number of the last fault that the client knows of, if it follows them.
    pub following: Option<u64>,
}

impl Service {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry, faults: FaultLog::default() }
    }

    /// Takes over what the device has recorded since.
    pub fn look_at_faults(&mut self) {
        self.faults.follow(&self.registry.backend);
    }

    /// The faults with a higher number.
    pub fn faults_after(&self, number: u64) -> impl Iterator<Item = &Fault> {
        self.faults.after(number)
    }

    /// Does what a request asks. Files that no request asks for are closed.
    pub fn answer(&mut self, request: Request, files: Vec<OwnedFd>) -> Answered {
        if !files.is_empty() && !matches!(request, Request::Add(_)) {
            let text = format!("{} files came with a request that takes none: send them with `add` only", files.len());
            return Answered::only(refused(RefusalKind::Files, text));
        }
        match request {
            Request::Faults { after, follow } => {
                self.look_at_faults();
                let faults = self.faults.tell(after);
                let following = follow.then_some(faults.recorded);
                Answered { reply: Reply::Faults(faults), following }
            }
            Request::List => Answered::only(Reply::Endpoints(self.registry.list())),
            Request::Add(addition) => Answered::only(self.add(&addition, files)),
            Request::Remove { endpoints } => Answered::only(self.remove(&endpoints)),
            Request::Bound => {
                self.registry.backend.devices_were_bound();
                Answered::only(Reply::Settled)
            }
            Request::Domain { domain } => Answered::only(self.domain(DomainId(domain))),
            Request::Mappings { domain, from, limit } => {
                Answered::only(self.mappings(DomainId(domain), from.0.0, limit))
            }
            Request::Plan => Answered::only(Reply::Plan(report::to_value(&self.registry.plan()))),
            Request::Stats => Answered::only(self.stats()),
            Request::LogLevel { level } => {
                log::set_max_level(level.into());
                Answered::only(Reply::LogLevel(Level::from(log::max_level())))
            }
        }
    }

    fn add(&self, addition: &Addition, files: Vec<OwnedFd>) -> Reply {
        match self.registry.add(addition, files) {
            Ok(plan) => {
                for (device, planned) in addition.devices.iter().zip(&plan.endpoints) {
                    info!("endpoint {} was added: host device {}", planned.id, device.host.0);
                    planned.log();
                }
                Reply::Added(report::to_value(&plan))
            }
            Err(error) => refused(kind_of(&error), with_causes(&error)),
        }
    }

    fn remove(&self, endpoints: &[Text<EndpointId>]) -> Reply {
        let ids: Vec<EndpointId> = endpoints.iter().map(|id| id.0).collect();
        match self.registry.remove(&ids) {
            Ok(removal) => Reply::Removed(removal),
            Err(error) => {
                let kind = match &error {
                    RemoveError::NotFound(_) => RefusalKind::NotFound,
                    RemoveError::Count => RefusalKind::Malformed,
                };
                refused(kind, with_causes(&error))
            }
        }
    }

    fn domain(&self, id: DomainId) -> Reply {
        match self.registry.backend.inspect(|device| device.domain(id)) {
            Some(DomainStatus { endpoints, mappings, poisoned, .. }) => Reply::Domain(Domain {
                domain: id.0,
                endpoints: endpoints.into_iter().map(Text).collect(),
                bypass: mappings.is_none(),
                mappings: mappings.unwrap_or_default() as u64,
                poisoned,
            }),
            None => no_domain(id),
        }
    }

    fn mappings(&self, domain: DomainId, from: u64, limit: u32) -> Reply {
        let limit = limit.clamp(1, LARGEST_PAGE) as usize;
        // One more says where the next page begins.
        let found: Option<Vec<MappedRange>> =
            self.registry.backend.inspect(|device| Some(device.mappings(domain, from)?.take(limit + 1).collect()));
        let Some(found) = found else {
            return no_domain(domain);
        };
        let next = found.get(limit).map(|mapped| Text(Address(mapped.iova.start())));
        let mapping = |mapped: &MappedRange| Mapping {
            start: Text(Address(mapped.iova.start())),
            end: Text(Address(mapped.iova.last())),
            physical: Text(Address(mapped.physical.0)),
            read: mapped.access.read,
            write: mapped.access.write,
        };
        Reply::Mappings(Page { domain: domain.0, mappings: found.iter().take(limit).map(mapping).collect(), next })
    }

    fn stats(&self) -> Reply {
        Reply::Stats(Box::new(Stats::from(&self.registry.backend.counted())))
    }
}

impl Answered {
    const fn only(reply: Reply) -> Self {
        Self { reply, following: None }
    }
}

fn refused(kind: RefusalKind, message: String) -> Reply {
    Reply::Refused(Refusal::new(kind, message))
}

fn no_domain(id: DomainId) -> Reply {
    let text = format!("there is no domain {id}: `viommuctl status` shows which there are");
    refused(RefusalKind::NotFound, text)
}

fn kind_of(error: &AddError) -> RefusalKind {
    match error {
        AddError::Count { .. } | AddError::File { .. } | AddError::Files(_) => RefusalKind::Files,
        AddError::TooMany | AddError::IdTaken(_) | AddError::DeviceTwice { .. } | AddError::GroupTaken { .. } => {
            RefusalKind::Taken
        }
        AddError::UnknownWidth(_) | AddError::Granule { .. } | AddError::Plan(_) | AddError::Device(_) => {
            RefusalKind::DoesNotFit
        }
        AddError::NoIommufd
        | AddError::NoNode { .. }
        | AddError::GroupIncomplete { .. }
        | AddError::NotInGroup { .. }
        | AddError::Direct { .. }
        | AddError::Keeper(_) => RefusalKind::Host,
    }
}
