// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's state from one backend to another, when the guest goes to another host: `VHOST_USER_SET_DEVICE_STATE_FD` and
//! `VHOST_USER_CHECK_DEVICE_STATE`.
//!
//! The frontend takes along what it knows: guest memory, features, and where the rings are. From here comes what the guest made of the
//! device, what it was told, which cannot be another on the new host, and where the request ring stopped, by which a reset is told
//! from a pause when it starts again.

use std::fs::File;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info};
use parking_lot::MutexGuard;
use serde::{Deserialize, Deserializer, Serialize};
use vhost::vhost_user::message::VhostTransferStateDirection;
use vhost_user_backend::VringT;
use virtio_queue::QueueT;

use super::backend::{IommuBackend, OnStop};
use super::restart::Position;
use super::state::State;
use super::told::{Told, ToldError};
use super::transfer::{Transfer, TransferError};
use super::vring::Vring;
use crate::causes::with_causes;
use crate::device::{DeviceState, DomainState, MappingState, RestoreError, Settings};
use crate::id::EndpointId;

/// The version that is written, and the only one that is read.
const VERSION: u32 = 1;
/// How long a thread that was just started may take to run.
const PATIENCE: Duration = Duration::from_secs(1);
/// Room in a state for all but domains and mappings.
const REST: u64 = 1 << 20;

/// What goes from one backend to the other, as JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Migrated {
    /// The first that is read: what follows may be otherwise in another version.
    #[serde(deserialize_with = "known_version")]
    version: u32,
    told: Told,
    /// Where the request ring stopped, if it ever ran.
    request_queue: Option<Position>,
    device: DeviceState,
}

fn known_version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        VERSION => Ok(VERSION),
        other => {
            Err(serde::de::Error::custom(format!("it is of version {other}, and only version {VERSION} is known")))
        }
    }
}

/// A state that is not given away, or not taken.
#[derive(Debug, thiserror::Error)]
enum MigrationError {
    /// A ring runs.
    #[error("a ring is running: stop all of them first (GET_VRING_BASE)")]
    Running,
    /// Another one is on its way.
    #[error("another transfer of it is under way")]
    UnderWay,
    /// None is on its way.
    #[error("no transfer of it was started")]
    NotStarted,
    /// The file was not closed.
    #[error("it is not there yet: the frontend did not close its end of the pipe, or did not read it to the end")]
    NotOver,
    /// An endpoint is a device of this host's.
    #[error(
        "endpoint {0} is a device of this host, which cannot go along: unplug it, and remove the endpoint, before the guest is \
         migrated"
    )]
    BoundToHost(EndpointId),
    /// What the guest made is gone already.
    #[error(
        "the device is reset when the rings stop (--on-stop reset), so that there is nothing to save: use --on-stop keep"
    )]
    ResetByStop,
    /// It did not get here, or there.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The guest would find something else here than it was told.
    #[error(transparent)]
    Told(#[from] ToldError),
    /// The device cannot be in it.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

impl Migrated {
    fn save(state: &mut State) -> Self {
        Self {
            version: VERSION,
            told: Told::by(&state.device),
            request_queue: state.request_ring.stopped,
            device: state.device.save(),
        }
    }

    /// Nothing is changed if it is refused, except as [`VirtioIommu::restore`](crate::device::VirtioIommu::restore) says of hosts that
    /// refuse.
    fn load(&self, state: &mut State) -> Result<(), MigrationError> {
        self.told.check(&state.device)?;
        state.device.restore(&self.device)?;
        state.features = self.device.driver_features;
        state.request_ring.last = self.request_queue;
        state.request_ring.stopped = self.request_queue;
        Ok(())
    }
}

/// How many bytes the longest state has that a device with these settings can be in.
fn longest(settings: &Settings) -> serde_json::Result<u64> {
    let mapping = MappingState { first: u64::MAX, last: u64::MAX, physical: u64::MAX, read: false, write: false };
    let domain = DomainState { id: u32::MAX, bypass: false, endpoints: vec![u32::MAX], mappings: Vec::new() };
    let with_comma = |bytes: Vec<u8>| bytes.len() as u64 + 1;
    let mappings = with_comma(serde_json::to_vec(&mapping)?).saturating_mul(settings.max_mappings_in_all as u64);
    let domains = with_comma(serde_json::to_vec(&domain)?).saturating_mul(settings.max_domains as u64);
    Ok(REST.saturating_add(mappings).saturating_add(domains))
}

/// A message as it may be logged: the name of a field, say, is whatever the frontend says.
fn printable(message: &str) -> String {
    const MOST: usize = 400;
    message.chars().take(MOST).map(|char| if char.is_control() { char::REPLACEMENT_CHARACTER } else { char }).collect()
}

impl IommuBackend {
    /// Starts to send the device's state over a file, or to receive it.
    pub(super) fn start_transfer(&self, direction: VhostTransferStateDirection, file: File) -> io::Result<()> {
        let what = match direction {
            VhostTransferStateDirection::SAVE => "is not saved",
            VhostTransferStateDirection::LOAD => "is not loaded",
        };
        self.try_start(direction, file).map_err(|error| self.refuse(what, &error))
    }

    /// Whether what was started came to a good end. A state that was received is taken on only here.
    pub(super) fn finish_transfer(&self) -> io::Result<()> {
        let done = self.try_finish().map_err(|error| self.refuse("is refused", &error))?;
        if self.state.lock().may_log() {
            info!("the device's state was {done}");
        }
        Ok(())
    }

    fn try_start(&self, direction: VhostTransferStateDirection, file: File) -> Result<(), MigrationError> {
        let mut transfer = self.transfer.lock();
        // One thread at a time, whatever the frontend does.
        if transfer.as_ref().is_some_and(Transfer::is_under_way) {
            return Err(MigrationError::UnderWay);
        }
        *transfer = None;
        let mut state = self.migratable_state()?;
        *transfer = Some(match direction {
            VhostTransferStateDirection::SAVE if self.options.on_stop == OnStop::Reset => {
                return Err(MigrationError::ResetByStop);
            }
            VhostTransferStateDirection::SAVE => Transfer::save(file, Migrated::save(&mut state))?,
            VhostTransferStateDirection::LOAD => {
                let limit = longest(state.device.settings()).map_err(|error| TransferError::Write(error.into()))?;
                Transfer::load(file, limit)?
            }
        });
        Ok(())
    }

    fn try_finish(&self) -> Result<&'static str, MigrationError> {
        let mut transfer = self.transfer.lock();
        let started = transfer.as_ref().ok_or(MigrationError::NotStarted)?;
        let outcome = started.wait().ok_or(MigrationError::NotOver)?;
        *transfer = None;
        let Some(migrated) = outcome? else {
            return Ok("saved");
        };
        let mut state = self.migratable_state()?;
        let result = migrated.load(&mut state);
        self.finish(state);
        result.map(|()| "loaded")
    }

    /// The device, if its state can be given away or taken now.
    fn migratable_state(&self) -> Result<MutexGuard<'_, State>, MigrationError> {
        let rings = self.known_rings()?;
        let state = self.state.lock();
        if rings.is_some_and(|rings| rings.iter().any(|ring| ring.get_ref().get_queue().ready())) {
            return Err(MigrationError::Running);
        }
        match state.device.unmigratable_endpoint() {
            Some(endpoint) => Err(MigrationError::BoundToHost(endpoint)),
            None => Ok(state),
        }
    }

    /// The rings, unless there are none. The library shows them when its thread for them first runs.
    fn known_rings(&self) -> Result<Option<&[Vring; 2]>, MigrationError> {
        let deadline = Instant::now() + PATIENCE;
        while self.has_daemon() {
            if let Some(rings) = self.rings.get() {
                return Ok(Some(rings));
            }
            if Instant::now() >= deadline {
                return Err(MigrationError::Running);
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(None)
    }

    /// The frontend is told that, and the log why.
    fn refuse(&self, what: &str, refusal: &MigrationError) -> io::Error {
        let why = printable(&with_causes(refusal));
        if self.state.lock().may_log() {
            error!("the device's state {what}: {why}");
        }
        io::Error::other(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_at_every_limit_is_no_longer_than_what_is_read() {
        let (max_domains, max_mappings_in_all) = (50, 400);
        let settings =
            Settings { max_domains, max_mappings_in_all, ..Settings::new(crate::range::IovaRange::ALL, 0x1000) };
        let widest = u64::MAX;
        let mapping = MappingState { first: widest, last: widest, physical: widest, read: false, write: false };
        let mappings = vec![mapping; max_mappings_in_all / max_domains];
        let domain = DomainState { id: u32::MAX, bypass: false, endpoints: vec![u32::MAX], mappings };
        let domains = vec![domain; max_domains];
        let length = serde_json::to_vec(&domains).unwrap().len() as u64;
        let longest = longest(&settings).unwrap() - REST;
        // But for the brackets around each list, which are in the rest.
        assert!(length - 2 <= longest && longest - length < 100, "{length} of {longest}");
    }
}
