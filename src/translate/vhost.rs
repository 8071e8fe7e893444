// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices of the host's kernel that ask for translations, and keep them: vhost-net, vhost-vsock, vhost-scsi.
//!
//! Such a device is told to expect I/O virtual addresses by `VIRTIO_F_ACCESS_PLATFORM` among its features. Whatever it does not find
//! in its IOTLB it asks for by a message that is read from its file, once, and waits; answers and invalidations are written to it. A
//! [`VhostIotlb`] answers, and an UNMAP invalidates before it is answered itself. What a device has handed on by then, such as
//! pages of a packet sent without copying (`experimental_zcopytx` of vhost-net), is out of its reach.
//!
//! For vhost-vdpa, which does not ask, there is [`VhostMapper`](crate::host::vhost::VhostMapper).

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;
use vhost::VhostIotlbBackend;
use vm_memory::{Address, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::cache::TranslationCache;
use super::group::EmulatedGroup;
use super::translator::{Pinned, Translator};
use crate::access::Access;
use crate::fd::duplicate;
use crate::host::HostError;
use crate::host::refused::RefusalReason;
use crate::host::vhost::{invalidate, update};
use crate::id::EndpointId;
use crate::mapping::SMALLEST_PAGE;
use crate::range::IovaRange;

mod device;
mod message;

pub use device::{Untranslated, WithIotlb};
use message::Miss;

/// The most bytes that an answer covers: the device gets a large mapping in pieces, as it asks.
const LARGEST_ANSWER: usize = 1 << 30;
/// The most pieces of the translation that are looked at for an answer.
const MOST_PIECES: usize = 64;
/// The most questions that are remembered until the guest maps what they are about: a queue waits for one at a time.
const MOST_UNANSWERED: usize = 64;

/// Answers a kernel device's questions, and has it forget what is no longer mapped.
///
/// It is made before the device is started, and dropped when it was stopped: an UNMAP does not wait for a device that nobody answers
/// for any more. It forgets everything then.
pub struct VhostIotlb<B: VhostIotlbBackend, M> {
    device: B,
    /// What the device's messages are read from.
    messages: OwnedFd,
    translator: Translator,
    memory: M,
    /// What the guest does not allow, the oldest first: the kernel does not ask again.
    unanswered: Mutex<VecDeque<Miss>>,
    stop: Box<dyn Fn() + Send + Sync>,
}

/// Questions of a device that could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum VhostIotlbError {
    /// The device's file cannot be read.
    #[error("reading messages of a vhost device")]
    Read(#[source] io::Error),
    /// What was read is no question.
    #[error("a vhost device sent a message that is not an IOTLB miss, but {0:02x?}")]
    NotAMiss(Vec<u8>),
    /// The device does not take the answer.
    #[error("answering a vhost device")]
    Answer(#[source] HostError),
}

/// The endpoint is not in the group, or its device's file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NewVhostIotlbError {
    /// The endpoint is in another group.
    #[error("endpoint {0} is not in the group")]
    NotAMember(EndpointId),
    /// There are too many open files, or it is none.
    #[error("duplicating a vhost device's file")]
    Duplicate(#[source] io::Error),
    /// The file blocks who reads from it: it must be opened with `O_NONBLOCK`.
    #[error("the vhost device's file blocks: open it with O_NONBLOCK")]
    Blocking,
}

impl<B, M> VhostIotlb<B, M>
where
    B: VhostIotlbBackend + AsRawFd + Send + Sync + 'static,
    M: GuestAddressSpace + Send + Sync + 'static,
    M::M: GuestMemoryBackend,
{
    /// Answers for the device of an endpoint. `memory` is guest memory as the VMM has mapped it; it is replaced before the IOMMU
    /// hears of it. `stop` is called if the kernel does not take an invalidation, on the thread that calls the IOMMU: it takes
    /// the device off its queues (for vhost-net, by taking its backend away) before it returns, and does not call the IOMMU.
    ///
    /// The device's file must not block who reads from it (`O_NONBLOCK`): questions are read until there are none. It is refused
    /// rather than changed, as whoever opened it may have duplicates.
    ///
    /// # Errors
    ///
    /// [`NewVhostIotlbError`]
    pub fn new(
        group: &EmulatedGroup,
        endpoint: EndpointId,
        device: B,
        memory: M,
        stop: impl Fn() + Send + Sync + 'static,
    ) -> Result<Arc<Self>, NewVhostIotlbError> {
        let translator = group.translator(endpoint).ok_or(NewVhostIotlbError::NotAMember(endpoint))?;
        let messages = duplicate(&device).map_err(NewVhostIotlbError::Duplicate)?;
        let flags = fcntl_getfl(&messages).map_err(|errno| NewVhostIotlbError::Duplicate(errno.into()))?;
        if !flags.contains(OFlags::NONBLOCK) {
            return Err(NewVhostIotlbError::Blocking);
        }
        let unanswered = Mutex::default();
        let iotlb = Arc::new(Self { device, messages, translator, memory, unanswered, stop: Box::new(stop) });
        let cache = Arc::downgrade(&iotlb);
        group.add_cache(&(cache as Weak<dyn TranslationCache>));
        Ok(iotlb)
    }

    /// The device.
    pub const fn device(&self) -> &B {
        &self.device
    }

    /// Tells the device what an address translates to before it asks. To be called for the first byte of each queue's used ring, for
    /// writing, when the driver has set the queues up: the kernel writes there while the device is started, and does not wait.
    /// No access is nothing to tell.
    ///
    /// # Errors
    ///
    /// [`VhostIotlbError::Answer`]
    pub fn tell(&self, iova: u64, access: Access) -> Result<(), VhostIotlbError> {
        if access.is_none() {
            // An entry without permissions would have the kernel refuse later accesses rather than ask.
            return Ok(());
        }
        self.answer(Miss { iova, access }).map_err(VhostIotlbError::Answer)
    }

    /// Answers up to `budget` questions, from any thread but one that is pinned; whether there may be more. To be called when
    /// [the file](AsFd) is readable, and again while there are more. What the guest does not allow is made a fault event,
    /// and answered when the guest allows it: the queue that it is for waits.
    ///
    /// # Errors
    ///
    /// [`VhostIotlbError`]; the rest can be answered nevertheless.
    pub fn on_readable(&self, budget: usize) -> Result<bool, VhostIotlbError> {
        for _ in 0..budget {
            let mut bytes = [0; message::SIZE];
            let length = match rustix::io::read(&self.messages, &mut bytes) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(false),
                Ok(length) => length,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(VhostIotlbError::Read(errno.into())),
            };
            let bytes = bytes.get(..length).unwrap_or_default();
            let miss = Miss::parse(bytes).ok_or_else(|| VhostIotlbError::NotAMiss(bytes.to_vec()))?;
            self.answer(miss).map_err(VhostIotlbError::Answer)?;
        }
        Ok(true)
    }

    /// Answers a question, now or when the guest allows it.
    fn answer(&self, miss: Miss) -> Result<(), HostError> {
        // Before it is looked up: whoever maps it after that finds the question.
        self.remember(miss);
        let pinned = self.translator.pin();
        if self.tell_pinned(&pinned, miss)? {
            self.unanswered().retain(|other| *other != miss);
            return Ok(());
        }
        let Miss { iova, access } = miss;
        // Also what is mapped to no memory of the VMM's.
        let fault = pinned.translate(iova, 1, access).err();
        pinned.report(fault.unwrap_or_else(|| pinned.fault(iova, access, RefusalReason::NotMapped)));
        Ok(())
    }

    /// Tells the device what an address translates to, if that is allowed; whether it is. Who unmaps it waits until it was told, and
    /// has it forgotten then.
    fn tell_pinned(&self, pinned: &Pinned<'_>, miss: Miss) -> Result<bool, HostError> {
        let page = miss.iova & !(SMALLEST_PAGE - 1);
        // The permissions that are wanted next are often those that the mapping has.
        for allowed in [Access::READ_WRITE, miss.access] {
            let Some((length, physical)) = extent(pinned, page, allowed) else { continue };
            let memory = self.memory.memory();
            let Some((region, offset)) = memory.to_region_addr(physical) else { break };
            let Ok(host_address) = region.get_host_address(offset) else { break };
            let length = length.min(region.len() - offset.0);
            let Some(range) = IovaRange::from_length(page, length) else { break };
            return update(&self.device, range, host_address as u64, allowed).map(|()| true);
        }
        Ok(false)
    }

    fn remember(&self, miss: Miss) {
        let mut unanswered = self.unanswered();
        if !unanswered.contains(&miss) {
            if unanswered.len() == MOST_UNANSWERED {
                unanswered.pop_front();
            }
            unanswered.push_back(miss);
        }
    }
}

impl<B: VhostIotlbBackend, M> VhostIotlb<B, M> {
    fn unanswered(&self) -> MutexGuard<'_, VecDeque<Miss>> {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much is mapped from an address on to consecutive memory with these permissions, and where that memory is.
fn extent(pinned: &Pinned<'_>, iova: u64, access: Access) -> Option<(u64, GuestAddress)> {
    let first = pinned.translate(iova, LARGEST_ANSWER, access).ok()?;
    let mut length = first.length;
    for _ in 1..MOST_PIECES {
        let Some(next) = iova.checked_add(length as u64).filter(|_| length < LARGEST_ANSWER) else { break };
        match pinned.translate(next, LARGEST_ANSWER - length, access) {
            Ok(found) if first.start.checked_add(length as u64) == Some(found.start) => length += found.length,
            _ => break,
        }
    }
    Some((length as u64, first.start))
}

impl<B, M> TranslationCache for VhostIotlb<B, M>
where
    B: VhostIotlbBackend + AsRawFd + Send + Sync + 'static,
    M: GuestAddressSpace + Send + Sync + 'static,
    M::M: GuestMemoryBackend,
{
    fn mapped(&self, iova: IovaRange) {
        let is_mapped = |miss: &Miss| iova.start() <= miss.iova && miss.iova <= iova.last();
        let waiting: Vec<Miss> = self.unanswered().iter().copied().filter(is_mapped).collect();
        for miss in waiting {
            match self.tell_pinned(&self.translator.pin(), miss) {
                Ok(true) => self.unanswered().retain(|other| *other != miss),
                Ok(false) => (),
                Err(error) => log::debug!("endpoint {}: {error}", self.translator.endpoint()),
            }
        }
    }

    fn invalidate(&self, iova: IovaRange) -> Result<(), HostError> {
        invalidate(&self.device, iova)
    }

    fn stop(&self) {
        (self.stop)();
    }
}

impl<B: VhostIotlbBackend, M> Drop for VhostIotlb<B, M> {
    fn drop(&mut self) {
        if let Err(error) = invalidate(&self.device, IovaRange::ALL) {
            log::error!("endpoint {}: {error}", self.translator.endpoint());
            (self.stop)();
        }
    }
}

/// To be waited for until it can be read.
impl<B: VhostIotlbBackend, M> AsFd for VhostIotlb<B, M> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.messages.as_fd()
    }
}

impl<B: VhostIotlbBackend, M> fmt::Debug for VhostIotlb<B, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostIotlb").field("translator", &self.translator).finish_non_exhaustive()
    }
}
