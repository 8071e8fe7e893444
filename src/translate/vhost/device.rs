// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the types of the `vhost` crate for devices of the kernel's lack.

use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::sync::Arc;

use vhost::VringConfigData;
use vhost::vhost_kern::{VhostKernBackend, VhostKernFeatures};
use vm_memory::guest_memory::Result;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

/// A device of the kernel's that gets I/O virtual addresses: the rings that `set_vring_addr` is told of are at such, and it can be
/// sent IOTLB messages. In vhost 0.18 `vhost_kern::net::Net` looks rings up in guest memory, and has no such messages.
///
/// `set_backend` and the like are methods of [`device`](Self::device).
#[derive(Debug)]
pub struct WithIotlb<K> {
    device: K,
    addresses: Arc<Untranslated>,
    backend_features: u64,
}

impl<K> WithIotlb<K> {
    /// Takes a device that was not set up yet.
    pub fn new(device: K) -> Self {
        Self { device, addresses: Arc::new(Untranslated(())), backend_features: 0 }
    }

    /// The device.
    pub const fn device(&self) -> &K {
        &self.device
    }
}

impl<K: AsRawFd> AsRawFd for WithIotlb<K> {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl<K: VhostKernBackend> VhostKernBackend for WithIotlb<K> {
    type AS = Arc<Untranslated>;

    fn mem(&self) -> &Self::AS {
        &self.addresses
    }

    /// Where the rings are is seen when they are used.
    fn is_valid(&self, config: &VringConfigData) -> bool {
        config.queue_size.is_power_of_two() && config.queue_size <= config.queue_max_size && config.is_log_addr_valid()
    }
}

impl<K: VhostKernBackend> VhostKernFeatures for WithIotlb<K> {
    fn get_backend_features_acked(&self) -> u64 {
        self.backend_features
    }

    fn set_backend_features_acked(&mut self, features: u64) {
        self.backend_features = features;
    }
}

/// No memory: addresses that are handed to the kernel as they are.
#[derive(Debug)]
pub struct Untranslated(());

impl GuestMemoryBackend for Untranslated {
    type R = GuestRegionMmap;

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        std::iter::empty()
    }

    /// The address itself, which nobody in this process can read or write by.
    fn get_host_address(&self, addr: GuestAddress) -> Result<*mut u8> {
        let addr_of_kernel =
            usize::try_from(addr.0).map_err(|_| vm_memory::GuestMemoryError::InvalidGuestAddress(addr))?;
        Ok(ptr::without_provenance_mut(addr_of_kernel))
    }
}
