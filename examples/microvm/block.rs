// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk (virtio 1.3, 5.2) behind the IOMMU: its rings and all buffers are at I/O virtual addresses.

use std::error::Error;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_iommu::embed::Transport;
use virtio_iommu::spec::feature;
use virtio_iommu::translate::Translator;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::memory::STRAY_TARGET;
use crate::mmio::{Interrupt, VirtioDevice};

const DEVICE_ID: u32 = 2;
const QUEUE_SIZE: u16 = 128;
const SECTOR_SIZE: u64 = 512;
/// How many requests are served before others have their turn in the loop.
const BUDGET: usize = 32;

/// `seg_max` is in the configuration.
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_FLUSH: u64 = 1 << 9;
/// A chain has a header and a status beside its data.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

const REQUEST_IN: u32 = 0;
const REQUEST_OUT: u32 = 1;
const REQUEST_FLUSH: u32 = 4;
const REQUEST_GET_ID: u32 = 8;
const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

const SERIAL: [u8; 20] = *b"microvm\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// What a stray write leaves behind.
pub const STRAY: [u8; 8] = *b"WRONGWAY";

/// What a file is as a disk.
pub struct Disk {
    file: File,
    size: u64,
    /// The sector whose reading has the disk write where it was not told to.
    stray: Option<u64>,
}

/// The device.
pub struct Block {
    disk: Disk,
    memory: GuestMemoryMmap,
    /// What it translates its accesses with; `None` if it is not behind an IOMMU.
    translator: Option<Translator>,
    interrupt: Arc<Interrupt>,
    kick: EventFd,
    accepted: u64,
    queue: Option<Queue>,
}

/// Why a driver's set-up is refused.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("the driver of the disk did not accept the features {0:#x}, without which there is no way to its buffers")]
    Features(u64),
    #[error("the driver of the disk did not set up its queue where the device can reach it")]
    Queue,
}

impl Disk {
    /// The whole sectors of a file.
    ///
    /// # Errors
    ///
    /// It has no size.
    pub fn new(mut file: File, stray: Option<u64>) -> io::Result<Self> {
        let size = file.seek(SeekFrom::End(0))? & !(SECTOR_SIZE - 1);
        Ok(Self { file, size, stray })
    }

    /// Serves the next request, if there is one: whether there was.
    fn serve_next<M: GuestMemory<Bitmap = ()>>(
        &mut self,
        queue: &mut Queue,
        memory: &M,
    ) -> Result<bool, virtio_queue::Error> {
        // An iterator refuses a ring that has more than fits; pop_descriptor_chain() would only find nothing in it.
        let Some(chain) = queue.iter(memory)?.next() else { return Ok(false) };
        let head = chain.head_index();
        let used = self.serve(chain, memory);
        queue.add_used(memory, head, used)?;
        Ok(true)
    }

    /// Serves a request; how many bytes were written to its buffers, from the first that can be written on (2.7.8.2).
    fn serve<M: GuestMemory<Bitmap = ()>>(&mut self, chain: DescriptorChain<&M>, memory: &M) -> u32 {
        let Some(status_address) = status_address(chain.clone()) else { return 0 };
        let writable: u64 = chain.clone().writable().map(|buffer| u64::from(buffer.len())).sum();
        let (status, written) = match self.execute(chain, memory) {
            Ok(written) => (STATUS_OK, written),
            Err(error) if error.kind() == ErrorKind::Unsupported => (STATUS_UNSUPPORTED, 0),
            Err(error) => {
                eprintln!("disk: {error}");
                (STATUS_IO_ERROR, 0)
            }
        };
        let has_status = memory.write_obj(status, status_address).is_ok();
        // The status is the last byte, and counts if all before it was written.
        if has_status && u64::from(written) + 1 == writable { written.saturating_add(1) } else { written }
    }

    fn execute<M: GuestMemory<Bitmap = ()>>(&mut self, chain: DescriptorChain<&M>, memory: &M) -> io::Result<u32> {
        let mut reader = chain.clone().reader(memory).map_err(io::Error::other)?;
        let mut writer = chain.writer(memory).map_err(io::Error::other)?;
        let kind: u32 = reader.read_obj()?;
        let _reserved: u32 = reader.read_obj()?;
        let sector = u64::from_le(reader.read_obj()?);
        // The last byte that can be written is the status.
        let room = writer.available_bytes().saturating_sub(1) as u64;
        match u32::from_le(kind) {
            REQUEST_IN => {
                self.seek(sector, room)?;
                if self.stray.is_some_and(|stray| (sector..sector + room / SECTOR_SIZE).contains(&stray)) {
                    go_astray(memory);
                }
                io::copy(&mut (&self.file).take(room), &mut writer)?;
            }
            REQUEST_OUT => {
                self.seek(sector, reader.available_bytes() as u64)?;
                io::copy(&mut reader, &mut self.file)?;
            }
            REQUEST_FLUSH => self.file.sync_data()?,
            REQUEST_GET_ID => _ = io::copy(&mut SERIAL.take(room), &mut writer)?,
            _ => return Err(ErrorKind::Unsupported.into()),
        }
        u32::try_from(writer.bytes_written()).map_err(io::Error::other)
    }

    /// Goes to a sector from which so many bytes can be read or written.
    fn seek(&mut self, sector: u64, length: u64) -> io::Result<()> {
        let start = sector.checked_mul(SECTOR_SIZE);
        let end = start.and_then(|start| start.checked_add(length));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.size && length.is_multiple_of(SECTOR_SIZE) => {
                self.file.seek(SeekFrom::Start(start)).map(|_| ())
            }
            _ => Err(io::Error::new(ErrorKind::InvalidInput, "a request for what is no part of the disk")),
        }
    }
}

/// Where the status of a request goes: the last byte of its last buffer.
fn status_address<M: GuestMemory>(chain: DescriptorChain<&M>) -> Option<GuestAddress> {
    let last = chain.last().filter(Descriptor::is_write_only)?;
    last.addr().checked_add(u64::from(last.len().checked_sub(1)?))
}

/// Writes to an address that the driver did not ask for.
fn go_astray<M: GuestMemory>(memory: &M) {
    match memory.write_obj(STRAY, STRAY_TARGET) {
        Ok(()) => eprintln!("disk: a stray write got through"),
        Err(error) => eprintln!("disk: a stray write did not get through: {error}"),
    }
}

impl Block {
    /// A disk, that translates its accesses if it is given what with.
    ///
    /// # Errors
    ///
    /// No event file can be had.
    pub fn new(
        disk: Disk,
        memory: GuestMemoryMmap,
        translator: Option<Translator>,
        interrupt: Arc<Interrupt>,
    ) -> io::Result<Self> {
        let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { disk, memory, translator, interrupt, kick, accepted: 0, queue: None })
    }

    /// The file that kicks of the queue are to be written to.
    pub const fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// What a driver must accept. Without `VIRTIO_F_ACCESS_PLATFORM` it would give guest-physical addresses.
    fn required_features(&self) -> u64 {
        feature::VERSION_1 | if self.translator.is_some() { feature::ACCESS_PLATFORM } else { 0 }
    }

    fn features(&self) -> u64 {
        self.required_features() | FEATURE_SEG_MAX | FEATURE_FLUSH
    }

    /// Capacity, no limit to the size of a segment, how many segments.
    fn config(&self) -> Vec<u8> {
        let capacity = self.disk.size / SECTOR_SIZE;
        [&capacity.to_le_bytes()[..], &[0; 4], &SEG_MAX.to_le_bytes()].concat()
    }

    /// Serves a request. Translations are held on to for that long, and no longer: an UNMAP waits for it.
    fn serve_next(&mut self, queue: &mut Queue) -> Result<bool, virtio_queue::Error> {
        match &self.translator {
            Some(translator) => self.disk.serve_next(queue, &translator.memory(&self.memory)),
            None => self.disk.serve_next(queue, &self.memory),
        }
    }
}

impl MutEventSubscriber for Block {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // Nothing to read means that it was read before.
        let _ = self.kick.read();
        let Some(mut queue) = self.queue.take() else { return };
        let mut served = 0;
        // The driver is never told that it need not kick: one that adds a buffer behind the last will.
        let result = loop {
            match self.serve_next(&mut queue) {
                Ok(true) => served += 1,
                other => break other,
            }
            if served == BUDGET {
                break Ok(true);
            }
        };
        if served != 0 {
            self.interrupt.buffers_used(0);
        }
        match result {
            Ok(more) => {
                self.queue = Some(queue);
                if more {
                    // It can only be full, and then it is readable.
                    let _ = self.kick.write(1);
                }
            }
            Err(error) => self.interrupt.needs_reset(&error.into()),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.kick, EventSet::IN)) {
            eprintln!("disk: kicks cannot be waited for: {error}");
        }
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features_page(&self, page: u32) -> u32 {
        let bits = self.features().checked_shr(page.saturating_mul(32)).unwrap_or(0);
        u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0)
    }

    fn acknowledge_features(&mut self, page: u32, value: u32) {
        let shift = page.saturating_mul(32);
        let page = u64::from(u32::MAX).checked_shl(shift).unwrap_or(0);
        let accepted = u64::from(value).checked_shl(shift).unwrap_or(0);
        self.accepted = (self.accepted & !page) | (accepted & self.features());
    }

    fn read_config(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let config = self.config();
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        for (to, from) in bytes.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _bytes: &[u8]) {}

    fn start(&mut self, queues: Vec<Queue>) -> Result<(), Box<dyn Error>> {
        let missing = self.required_features() & !self.accepted;
        if missing != 0 {
            return Err(StartError::Features(missing).into());
        }
        let mut queues = queues.into_iter();
        let queue = queues.next().ok_or(StartError::Queue)?;
        // The rings are at I/O virtual addresses as well.
        let is_valid = match &self.translator {
            Some(translator) => queue.is_valid(&translator.memory(&self.memory)),
            None => queue.is_valid(&self.memory),
        };
        if !is_valid {
            return Err(StartError::Queue.into());
        }
        self.queue = Some(queue);
        // The driver may have kicked before.
        self.kick.write(1)?;
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
        self.accepted = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::mock::MockSplitQueue;

    use super::*;

    const HEADER: u64 = 0x1_0000;
    const DATA: u64 = 0x2_0000;
    const STATUS: u64 = 0x3_0000;
    const WRITE: u16 = 2;

    /// Serves a request for a disk of one sector, with so much room for data; its status and used length.
    fn serve(kind: u32, sector: u64, room: u32) -> (u8, u32) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0x5a; 512]).unwrap();
        let mut disk = Disk::new(file, None).unwrap();
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        memory.write_obj(kind.to_le(), GuestAddress(HEADER)).unwrap();
        memory.write_obj(sector.to_le(), GuestAddress(HEADER + 8)).unwrap();
        memory.write_obj(0xaa_u8, GuestAddress(STATUS)).unwrap();
        let buffers = [(HEADER, 16, 0), (DATA, room, WRITE), (STATUS, 1, WRITE)];
        let buffers = buffers.into_iter().filter(|(_, length, _)| *length > 0);
        let descriptors: Vec<_> = buffers
            .map(|(start, length, flags)| RawDescriptor::from(Descriptor::new(start, length, flags, 0)))
            .collect();
        let driver = MockSplitQueue::new(&memory, 16);
        driver.build_desc_chain(&descriptors).unwrap();
        let mut queue: Queue = driver.create_queue().unwrap();
        assert!(disk.serve_next(&mut queue, &memory).unwrap());
        let used = driver.used().ring().ref_at(0).unwrap().load().len();
        (memory.read_obj(GuestAddress(STATUS)).unwrap(), used)
    }

    /// 2.7.8.2: The device MUST write at least len bytes to descriptor, beginning at the first device-writable buffer, prior to
    /// updating the used idx.
    #[test]
    fn the_used_length_counts_what_was_written_from_the_first_byte_on() {
        assert_eq!(serve(REQUEST_IN, 0, 512), (STATUS_OK, 513));
        assert_eq!(serve(REQUEST_IN, 1, 512), (STATUS_IO_ERROR, 0), "the status is behind what was not written");
        assert_eq!(serve(REQUEST_FLUSH, 0, 0), (STATUS_OK, 1));
        assert_eq!(serve(99, 0, 0), (STATUS_UNSUPPORTED, 1));
        assert_eq!(serve(99, 0, 512), (STATUS_UNSUPPORTED, 0));
        assert_eq!(serve(REQUEST_GET_ID, 0, 20), (STATUS_OK, 21));
        assert_eq!(serve(REQUEST_GET_ID, 0, 30), (STATUS_OK, 20));
    }
}
