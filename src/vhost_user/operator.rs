// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an operator asks of a backend that serves a guest.

use std::fmt;
use std::sync::Arc;

use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::backend::IommuBackend;
use super::state::State;
use crate::device::{SetupError, VirtioIommu};
use crate::host::HostGroup;
use crate::host::timed::TimedGroup;
use crate::id::EndpointId;
use crate::range::IovaRange;
use crate::reserved::EndpointView;

/// What is told that there are faults that it has not seen.
pub(super) struct FaultListener(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for FaultListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultListener").finish_non_exhaustive()
    }
}

impl IommuBackend {
    /// Looks at the device. The request queue waits meanwhile: what is found is to be copied, and used when this has returned.
    pub fn inspect<T>(&self, look: impl FnOnce(&VirtioIommu) -> T) -> T {
        look(&self.state.lock().device)
    }

    /// Where the guest's memory is, as the frontend gave it last.
    pub fn guest_memory(&self) -> Vec<IovaRange> {
        let memory = self.memory().memory();
        memory.iter().filter_map(|region| IovaRange::from_length(region.start_addr().0, region.len())).collect()
    }

    /// Adds a host group with its endpoints: [`VirtioIommu::add_group`].
    ///
    /// # Errors
    ///
    /// [`SetupError`]; nothing was changed.
    pub fn add_group(
        &self,
        group: Arc<dyn HostGroup>,
        endpoints: Vec<(EndpointId, EndpointView)>,
    ) -> Result<(), SetupError> {
        let group = match self.meter.get() {
            Some(meter) => Arc::new(TimedGroup::new(group, Arc::clone(meter.host_time()))),
            None => group,
        };
        let mut state = self.state.lock();
        let result = state.device.add_group(group, endpoints);
        self.finish(state);
        result
    }

    /// Blocks what is to be blocked of devices that were bound since they were added: [`VirtioIommu::devices_were_bound`].
    pub fn devices_were_bound(&self) {
        let mut state = self.state.lock();
        state.device.devices_were_bound();
        self.finish(state);
    }

    /// Takes an endpoint away, and says whether there was one. When this returns its file is closed, and it reaches nothing any more
    /// unless a sibling of its host group does: [`VirtioIommu::remove_endpoint`].
    pub fn remove_endpoint(&self, endpoint: EndpointId) -> bool {
        let mut state = self.state.lock();
        let was_there = state.device.remove_endpoint(endpoint);
        self.finish(state);
        was_there
    }

    /// Has something called, from any thread, after faults were recorded. It is called while the request queue waits, so it must be
    /// quick and not call this backend. Once only: whether it was the first time.
    pub fn on_faults(&self, tell: impl Fn() + Send + Sync + 'static) -> bool {
        self.fault_listener.set(FaultListener(Box::new(tell))).is_ok()
    }

    /// Tells the listener if there is something to tell.
    pub(super) fn tell_of_faults(&self, state: &mut State) {
        let recorded = state.device.faults_recorded();
        if recorded != state.faults_told
            && let Some(FaultListener(tell)) = self.fault_listener.get()
        {
            tell();
        }
        state.faults_told = recorded;
    }
}
