// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's registers on virtio over MMIO (4.2.2), version 2.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_iommu::embed::{EmbeddedIommu, Transport};
use virtio_iommu::queue::QueueError;
use virtio_iommu::spec;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

const MAGIC: u32 = 0x000;
const VERSION: u32 = 0x004;
const DEVICE_ID: u32 = 0x008;
const DEVICE_FEATURES: u32 = 0x010;
const DEVICE_FEATURES_SELECT: u32 = 0x014;
const DRIVER_FEATURES: u32 = 0x020;
const DRIVER_FEATURES_SELECT: u32 = 0x024;
const QUEUE_SELECT: u32 = 0x030;
const QUEUE_SIZE_MAX: u32 = 0x034;
const QUEUE_SIZE: u32 = 0x038;
const QUEUE_READY: u32 = 0x044;
/// Kicks go there, by an ioeventfd.
pub const QUEUE_NOTIFY: u32 = 0x050;
const INTERRUPT_STATUS: u32 = 0x060;
const INTERRUPT_ACK: u32 = 0x064;
const STATUS: u32 = 0x070;
const QUEUE_DESCRIPTORS: u32 = 0x080;
const QUEUE_DRIVER: u32 = 0x090;
const QUEUE_DEVICE: u32 = 0x0a0;
const CONFIG: u32 = 0x100;

const STATUS_DRIVER_OK: u32 = 4;
const STATUS_NEEDS_RESET: u32 = 0x40;
const INTERRUPT_BUFFERS: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// What the device and the registers share.
pub struct Line {
    interrupt: EventFd,
    causes: AtomicU32,
    broken: AtomicU32,
}

impl Line {
    pub fn new(interrupt: EventFd) -> Self {
        Self { interrupt, causes: AtomicU32::new(0), broken: AtomicU32::new(0) }
    }

    fn raise(&self, cause: u32) {
        self.causes.fetch_or(cause, Ordering::SeqCst);
        self.interrupt.write(1).unwrap();
    }
}

impl Transport for Line {
    fn buffers_used(&self, _queue: u16) {
        self.raise(INTERRUPT_BUFFERS);
    }

    fn needs_reset(&self, _reason: &QueueError) {
        self.broken.store(STATUS_NEEDS_RESET, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }
}

/// The registers.
pub struct Registers {
    line: Arc<Line>,
    status: u32,
    queues: [Queue; 2],
    selected: [u32; 3],
}

const DEVICE_PAGE: usize = 0;
const DRIVER_PAGE: usize = 1;
const QUEUE: usize = 2;

impl Registers {
    pub fn new(line: Arc<Line>) -> Self {
        Self { line, status: 0, queues: queues(), selected: [0; 3] }
    }

    pub fn read<M: GuestAddressSpace>(&self, iommu: &EmbeddedIommu<M>, register: u32) -> u32 {
        let queue = self.queues.get(self.selected[QUEUE] as usize);
        match register {
            MAGIC => u32::from_le_bytes(*b"virt"),
            VERSION => 2,
            DEVICE_ID => spec::DEVICE_ID,
            DEVICE_FEATURES => iommu.features_page(self.selected[DEVICE_PAGE]),
            QUEUE_SIZE_MAX => queue.map_or(0, |queue| u32::from(queue.max_size())),
            QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready())),
            INTERRUPT_STATUS => self.line.causes.load(Ordering::SeqCst),
            STATUS => self.status | self.line.broken.load(Ordering::SeqCst),
            CONFIG.. => {
                let mut bytes = [0; 4];
                iommu.read_config(u64::from(register - CONFIG), &mut bytes);
                u32::from_le_bytes(bytes)
            }
            _ => 0,
        }
    }

    pub fn write<M: GuestAddressSpace>(&mut self, iommu: &mut EmbeddedIommu<M>, register: u32, value: u32) {
        match register {
            DEVICE_FEATURES_SELECT => self.selected[DEVICE_PAGE] = value,
            DRIVER_FEATURES_SELECT => self.selected[DRIVER_PAGE] = value,
            QUEUE_SELECT => self.selected[QUEUE] = value,
            DRIVER_FEATURES => iommu.acknowledge_features(self.selected[DRIVER_PAGE], value),
            INTERRUPT_ACK => _ = self.line.causes.fetch_and(!value, Ordering::SeqCst),
            STATUS => self.set_status(iommu, value),
            CONFIG.. => iommu.write_config(u64::from(register - CONFIG), &value.to_le_bytes()),
            _ => self.write_queue(register, value),
        }
    }

    fn write_queue(&mut self, register: u32, value: u32) {
        let Some(queue) = self.queues.get_mut(self.selected[QUEUE] as usize) else { return };
        match register {
            QUEUE_SIZE => queue.set_size(value as u16),
            QUEUE_READY => queue.set_ready(value == 1),
            QUEUE_DESCRIPTORS => queue.set_desc_table_address(Some(value), None),
            QUEUE_DRIVER => queue.set_avail_ring_address(Some(value), None),
            QUEUE_DEVICE => queue.set_used_ring_address(Some(value), None),
            _ => (),
        }
    }

    fn set_status<M: GuestAddressSpace>(&mut self, iommu: &mut EmbeddedIommu<M>, value: u32) {
        if value == 0 {
            iommu.reset();
            self.queues = queues();
            self.line.causes.store(0, Ordering::SeqCst);
            self.line.broken.store(0, Ordering::SeqCst);
        } else if value & !self.status & STATUS_DRIVER_OK != 0 {
            iommu.start(std::mem::replace(&mut self.queues, queues())).unwrap();
        }
        self.status = value;
    }
}

fn queues() -> [Queue; 2] {
    let size = EmbeddedIommu::<Arc<vm_memory::GuestMemoryMmap>>::LARGEST_QUEUE;
    [0, 1].map(|_| Queue::new(size).unwrap())
}
