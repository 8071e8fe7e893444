// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A ring of the library's whose event files are touched under no lock.
//!
//! Kick and call are the frontend's files, and one that blocks must hold up nobody but the thread that serves the rings. The library's
//! own rings read the kick and write to the call under the ring's lock, for which the connection's thread waits: nobody would see
//! that the frontend is gone. And it ends the thread for a kick that cannot be read, although a kick may have been taken with the file
//! that was exchanged since: a guest that starts its ring again would wait for ever.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use log::error;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{ReadWriteFlags, preadv2};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;

use super::backend::Memory;
use super::throttle::{Pass, Throttle};

/// A ring and its event files. Cheap to clone.
#[derive(Clone)]
pub struct Vring {
    ring: VringMutex<Memory>,
    files: Arc<Mutex<EventFiles>>,
}

struct EventFiles {
    kick: Option<Arc<File>>,
    call: Option<Arc<File>>,
    /// The frontend can bring about as many failures as it likes.
    throttle: Throttle,
}

impl Vring {
    /// Tells the driver of used buffers, unless the file cannot take more: then it was told, or does not listen.
    pub fn signal_without_waiting(&self) -> io::Result<()> {
        let Some(call) = self.files.lock().call.clone() else {
            return Ok(());
        };
        let mut writable = [PollFd::new(&*call, PollFlags::OUT)];
        let ready = poll(&mut writable, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        if ready == 0 { Ok(()) } else { signal(&call) }
    }
}

/// Writes to an event file.
fn signal(mut call: &File) -> io::Result<()> {
    call.write_all(&1u64.to_ne_bytes())
}

impl fmt::Debug for Vring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vring").finish_non_exhaustive()
    }
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        let files = EventFiles { kick: None, call: None, throttle: Throttle::new(Instant::now()) };
        Ok(Self { ring: VringMutex::new(memory, max_queue_size)?, files: Arc::new(Mutex::new(files)) })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.ring.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.ring.get_mut()
    }

    fn add_used(&self, head: u16, length: u32) -> Result<(), Error> {
        self.ring.add_used(head, length)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        let call = self.files.lock().call.clone();
        call.map_or(Ok(()), |call| signal(&call))
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.ring.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.ring.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.ring.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.ring.set_enabled(enabled);
    }

    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), Error> {
        self.ring.set_queue_info(descriptors, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.ring.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.ring.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.ring.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.ring.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.ring.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.ring.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.ring.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        // The library waits for its own.
        let other = file.as_ref().map(File::try_clone).transpose();
        let mut files = self.files.lock();
        if let Err(error) = &other
            && files.throttle.ask(Instant::now()) != Pass::No
        {
            error!("no descriptor can be had for a ring's kicks, which are not taken: {error}");
        }
        files.kick = other.unwrap_or_default().map(Arc::new);
        drop(files);
        self.ring.set_kick(file);
    }

    /// Takes a kick, if there is one; whether the ring is enabled. Never fails.
    fn read_kick(&self) -> io::Result<bool> {
        let kick = self.files.lock().kick.clone();
        if let Some(kick) = kick {
            // At the file's own position, and without waiting, whatever its flags say. Nothing to read means that the kick was
            // taken before; the ring is looked at all the same.
            const OWN_POSITION: u64 = u64::MAX;
            let _ = preadv2(&kick, &mut [IoSliceMut::new(&mut [0; 8])], OWN_POSITION, ReadWriteFlags::NOWAIT);
        }
        Ok(self.ring.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        // The library's ring has no need of it.
        self.files.lock().call = file.map(Arc::new);
    }

    fn set_err(&self, file: Option<File>) {
        self.ring.set_err(file);
    }
}
