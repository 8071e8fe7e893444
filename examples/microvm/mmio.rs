// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Virtio over MMIO (virtio 1.3, 4.2.2): the registers of a device, and its interrupt.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_iommu::causes::with_causes;
use virtio_iommu::embed::{EmbeddedIommu, StartError, Transport};
use virtio_iommu::queue::QueueError;
use virtio_iommu::spec;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
/// Kicks go there, by an ioeventfd: the register itself is never written to.
pub const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS_LOW: u64 = 0x080;
const QUEUE_DESCRIPTORS_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
const CONFIG: u64 = 0x100;

const STATUS_DRIVER_OK: u32 = 4;
const STATUS_NEEDS_RESET: u32 = 0x40;
const INTERRUPT_BUFFERS: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// A device, as its registers see it.
pub trait VirtioDevice: Send {
    /// What kind of device it is (5).
    fn id(&self) -> u32;

    /// The largest size of each of its queues.
    fn queue_sizes(&self) -> &'static [u16];

    /// The features that it offers, 32 at a time.
    fn features_page(&self, page: u32) -> u32;

    /// The driver accepts features, 32 at a time.
    fn acknowledge_features(&mut self, page: u32, value: u32);

    /// Reads from the configuration space.
    fn read_config(&self, offset: u64, bytes: &mut [u8]);

    /// Writes to the configuration space.
    fn write_config(&mut self, offset: u64, bytes: &[u8]);

    /// The driver is ready, and has set the queues up so.
    fn start(&mut self, queues: Vec<Queue>) -> Result<(), Box<dyn Error>>;

    /// The driver resets the device: when this returns, it accesses no memory any more.
    fn reset(&mut self);
}

impl<M: GuestAddressSpace + Send> VirtioDevice for EmbeddedIommu<M> {
    fn id(&self) -> u32 {
        spec::DEVICE_ID
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[Self::LARGEST_QUEUE; spec::QUEUE_COUNT as usize]
    }

    fn features_page(&self, page: u32) -> u32 {
        self.features_page(page)
    }

    fn acknowledge_features(&mut self, page: u32, value: u32) {
        self.acknowledge_features(page, value);
    }

    fn read_config(&self, offset: u64, bytes: &mut [u8]) {
        self.read_config(offset, bytes);
    }

    fn write_config(&mut self, offset: u64, bytes: &[u8]) {
        self.write_config(offset, bytes);
    }

    fn start(&mut self, queues: Vec<Queue>) -> Result<(), Box<dyn Error>> {
        let queues = queues.try_into().map_err(|_| StartError::Queue(spec::EVENT_QUEUE))?;
        Ok(self.start(queues)?)
    }

    fn reset(&mut self) {
        self.reset();
    }
}

/// What a device and its registers share: why there is an interrupt, and whether the device gave up.
pub struct Interrupt {
    file: EventFd,
    causes: AtomicU32,
    needs_reset: AtomicBool,
}

impl Interrupt {
    /// An interrupt by an irqfd.
    pub const fn new(file: EventFd) -> Self {
        Self { file, causes: AtomicU32::new(0), needs_reset: AtomicBool::new(false) }
    }

    fn raise(&self, cause: u32) {
        self.causes.fetch_or(cause, Ordering::SeqCst);
        // It can only be full, and then KVM is about to look.
        let _ = self.file.write(1);
    }

    /// The driver did what the device cannot go on from.
    fn give_up(&self, reason: &dyn Error) {
        eprintln!("a device stops until it is reset: {}", with_causes(reason));
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }

    fn clear(&self) {
        self.causes.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}

impl Transport for Interrupt {
    fn buffers_used(&self, _queue: u16) {
        self.raise(INTERRUPT_BUFFERS);
    }

    fn needs_reset(&self, reason: &QueueError) {
        self.give_up(reason);
    }
}

/// The registers of a device.
pub struct Registers {
    device: Arc<Mutex<dyn VirtioDevice>>,
    interrupt: Arc<Interrupt>,
    status: u32,
    /// None while the device has them.
    queues: Vec<Queue>,
    queue: usize,
    device_page: u32,
    driver_page: u32,
}

impl Registers {
    /// The registers of a device that is reset.
    ///
    /// # Errors
    ///
    /// A queue cannot have the size that it is said to.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>, interrupt: Arc<Interrupt>) -> Result<Self, virtio_queue::Error> {
        let queues = new_queues(&*lock(&device))?;
        Ok(Self { device, interrupt, status: 0, queues, queue: 0, device_page: 0, driver_page: 0 })
    }

    /// The driver reads.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            lock(&self.device).read_config(offset, bytes);
        } else if bytes.len() == 4 {
            bytes.copy_from_slice(&self.read_register(offset).to_le_bytes());
        } else {
            // 4.2.2.2: "The driver MUST only use 32 bit wide and aligned reads and writes".
            bytes.fill(0);
        }
    }

    fn read_register(&self, register: u64) -> u32 {
        let queue = self.queues.get(self.queue);
        match register {
            MAGIC => u32::from_le_bytes(*b"virt"),
            VERSION => 2,
            DEVICE_ID => lock(&self.device).id(),
            DEVICE_FEATURES => lock(&self.device).features_page(self.device_page),
            QUEUE_SIZE_MAX => queue.map_or(0, |queue| u32::from(queue.max_size())),
            QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready())),
            INTERRUPT_STATUS => self.interrupt.causes.load(Ordering::SeqCst),
            STATUS if self.interrupt.needs_reset.load(Ordering::SeqCst) => self.status | STATUS_NEEDS_RESET,
            STATUS => self.status,
            _ => 0,
        }
    }

    /// The driver writes.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            lock(&self.device).write_config(offset, bytes);
        } else if let Ok(bytes) = bytes.try_into() {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }

    fn write_register(&mut self, register: u64, value: u32) {
        match register {
            DEVICE_FEATURES_SELECT => self.device_page = value,
            DRIVER_FEATURES_SELECT => self.driver_page = value,
            DRIVER_FEATURES => lock(&self.device).acknowledge_features(self.driver_page, value),
            QUEUE_SELECT => self.queue = usize::try_from(value).unwrap_or(usize::MAX),
            INTERRUPT_ACK => _ = self.interrupt.causes.fetch_and(!value, Ordering::SeqCst),
            STATUS => self.set_status(value),
            _ => {
                if let Some(queue) = self.queues.get_mut(self.queue) {
                    set_up_queue(queue, register, value);
                }
            }
        }
    }

    fn set_status(&mut self, value: u32) {
        let mut device = lock(&self.device);
        if value == 0 {
            device.reset();
            // They could be made before.
            self.queues = new_queues(&*device).unwrap_or_default();
            self.interrupt.clear();
        } else if value & !self.status & STATUS_DRIVER_OK != 0
            && let Err(error) = device.start(std::mem::take(&mut self.queues))
        {
            self.interrupt.give_up(&*error);
        }
        self.status = value;
    }
}

fn set_up_queue(queue: &mut Queue, register: u64, value: u32) {
    match register {
        // What is no size is one that cannot be set.
        QUEUE_SIZE => queue.set_size(u16::try_from(value).unwrap_or(0)),
        QUEUE_READY => queue.set_ready(value == 1),
        QUEUE_DESCRIPTORS_LOW => queue.set_desc_table_address(Some(value), None),
        QUEUE_DESCRIPTORS_HIGH => queue.set_desc_table_address(None, Some(value)),
        QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
        QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
        QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
        QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
        _ => (),
    }
}

fn new_queues(device: &dyn VirtioDevice) -> Result<Vec<Queue>, virtio_queue::Error> {
    device.queue_sizes().iter().map(|size| Queue::new(*size)).collect()
}

/// Takes a lock. What a thread that panicked left behind it is no worse than what a guest may have a device do.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
