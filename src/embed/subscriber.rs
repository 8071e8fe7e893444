// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as a subscriber of event-manager's loop.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;

use super::EmbeddedIommu;

/// How many requests are handled before others have their turn in the loop.
const BUDGET: usize = 64;

const REQUEST_KICK: u32 = 0;
const EVENT_KICK: u32 = 1;
const WAKE: u32 = 2;

impl<M: GuestAddressSpace> MutEventSubscriber for EmbeddedIommu<M> {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            REQUEST_KICK => self.on_request_kick(BUDGET),
            EVENT_KICK => self.on_event_kick(BUDGET),
            _ => self.on_wake(BUDGET),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let [requests, events] = &self.kicks;
        for (file, data) in [(requests, REQUEST_KICK), (events, EVENT_KICK), (self.wake.as_ref(), WAKE)] {
            if let Err(error) = ops.add(Events::with_data(file, data, EventSet::IN)) {
                log::error!("the IOMMU's events cannot be waited for: {error:?}");
            }
        }
    }
}
