// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The machine: devices in their places, and the processor.

use std::fs::{self, File};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use virtio_iommu::causes::with_causes;
use virtio_iommu::topology::viot::{self, Endpoints, IommuAddress};
use virtio_iommu::translate::Translator;
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::acpi::{self, SLOT_SIZE, Slot};
use crate::block::{Block, Disk, STRAY};
use crate::boot::{self, Payload};
use crate::iommu::{self, Iommu};
use crate::memory::{self, MMIO, MMIO_SIZE, STRAY_TARGET};
use crate::mmio::{Interrupt, QUEUE_NOTIFY, Registers, VirtioDevice, lock};
use crate::serial;
use crate::vcpu::{self, Bus};
use crate::{Arguments, Error, IommuMode};

/// Interrupts of the I/O APIC that nothing has by tradition.
const GSIS: std::ops::RangeInclusive<u32> = 5..=23;

type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// A machine, ready to run.
pub struct Machine {
    vcpu: VcpuFd,
    bus: Bus,
    subscribers: Vec<Subscriber>,
    iommu: Option<Arc<Mutex<Iommu>>>,
    // Without its file a machine runs on, but has lost its irqfds.
    _vm: VmFd,
    // Kept until the processor is gone.
    memory: GuestMemoryMmap,
}

impl Machine {
    /// Puts a machine together and loads the guest.
    ///
    /// # Errors
    ///
    /// The host refuses something, or a file is not what it should be.
    pub fn new(arguments: &Arguments) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(Error::kvm("open /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(Error::kvm("create a virtual machine"))?;
        // The interrupt controllers are in the host's kernel.
        vm.create_irq_chip().map_err(Error::kvm("create interrupt controllers"))?;
        let memory = memory::allocate(arguments.memory)?;
        memory::give_to_guest(&vm, &memory)?;

        let (uart, keyboard) = serial::open(new_interrupt(&vm, serial::COM1_IRQ)?).map_err(Error::Terminal)?;
        let mut devices = Devices::new(&vm, &memory)?;
        devices.subscribers.push(Arc::new(Mutex::new(keyboard)));
        let (iommu, viot) = if arguments.iommu == IommuMode::Off {
            devices.add_disk(arguments, None)?;
            (None, None)
        } else {
            let (at, iommu, translator) = devices.add_iommu(arguments.trace)?;
            let disk = devices.add_disk(arguments, Some(translator))?;
            let disk = Endpoints::Mmio { base: disk, id: iommu::DISK };
            (Some(iommu), Some(viot::table(IommuAddress::Mmio(at), [disk])?))
        };
        let Devices { registers, subscribers, .. } = devices;

        let slots: Vec<Slot> = registers.iter().map(|(slot, _)| *slot).collect();
        let rsdp = acpi::write(&memory, &slots, viot.as_deref())?;
        let command_line = arguments.command_line();
        let payload =
            Payload { kernel: &arguments.kernel, initrd: arguments.initrd.as_deref(), command_line: &command_line };
        let entry = boot::load(&memory, &payload, rsdp)?;
        let vcpu = vcpu::new(&kvm, &vm, &memory, entry)?;
        Ok(Self { vcpu, bus: Bus { uart, devices: registers }, subscribers, iommu, _vm: vm, memory })
    }

    /// Runs until the guest switches itself off. Devices are served by a thread of their own, that of this call is the processor.
    ///
    /// # Errors
    ///
    /// The guest cannot go on.
    pub fn run(&mut self) -> Result<(), Error> {
        let mut manager = EventManager::<Subscriber>::new()?;
        for subscriber in self.subscribers.drain(..) {
            manager.add_subscriber(subscriber);
        }
        // It ends with the process.
        thread::Builder::new()
            .name("devices".to_owned())
            .spawn(move || {
                let error = loop {
                    if let Err(error) = manager.run() {
                        break error;
                    }
                };
                eprintln!("microvm: devices are served no longer: {}", with_causes(&error));
            })
            .map_err(Error::Thread)?;
        vcpu::run(&mut self.vcpu, &mut self.bus)
    }

    /// What the IOMMU was asked for and had to say, and whether stray writes hit memory.
    pub fn report(&self, arguments: &Arguments) {
        if let Some(iommu) = &self.iommu {
            let mut iommu = lock(iommu);
            let device = iommu.device_mut();
            while let Some(notice) = device.next_notice() {
                eprintln!("iommu: {notice}");
            }
            eprintln!("iommu: {}", device.statistics());
        }
        if arguments.stray_dma.is_some() {
            let hit = self.memory.read_obj(STRAY_TARGET).is_ok_and(|bytes: [u8; 8]| bytes == STRAY);
            eprintln!("memory at {:#x} {}", STRAY_TARGET.0, if hit { "was overwritten" } else { "is unharmed" });
        }
    }
}

/// The virtio devices, and where more can be.
struct Devices<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemoryMmap,
    addresses: AddressAllocator,
    gsis: IdAllocator,
    registers: Vec<(Slot, Registers)>,
    subscribers: Vec<Subscriber>,
}

impl<'a> Devices<'a> {
    fn new(vm: &'a VmFd, memory: &'a GuestMemoryMmap) -> Result<Self, Error> {
        let addresses = AddressAllocator::new(MMIO.0, MMIO_SIZE)?;
        let gsis = IdAllocator::new(*GSIS.start(), *GSIS.end())?;
        Ok(Self { vm, memory, addresses, gsis, registers: Vec::new(), subscribers: Vec::new() })
    }

    /// Adds the IOMMU: where it is, and what the disk translates its accesses with.
    fn add_iommu(&mut self, trace: bool) -> Result<(GuestAddress, Arc<Mutex<Iommu>>, Translator), Error> {
        let (slot, interrupt) = self.next_slot()?;
        let (iommu, translator) = iommu::new(self.memory, &interrupt, trace)?;
        for (queue, kick) in (0..).map_while(|queue| Some((queue, iommu.kick(queue)?))) {
            self.register_kick(slot, u32::from(queue), kick)?;
        }
        let iommu = Arc::new(Mutex::new(iommu));
        self.add(slot, interrupt, &iommu)?;
        Ok((slot.base, iommu, translator))
    }

    /// Adds the disk: where it is.
    fn add_disk(&mut self, arguments: &Arguments, translator: Option<Translator>) -> Result<GuestAddress, Error> {
        let (slot, interrupt) = self.next_slot()?;
        let disk = open_disk(&arguments.disk, arguments.stray_dma)?;
        let block = Block::new(disk, self.memory.clone(), translator, Arc::clone(&interrupt)).map_err(Error::Events)?;
        self.register_kick(slot, 0, block.kick())?;
        self.add(slot, interrupt, &Arc::new(Mutex::new(block)))?;
        Ok(slot.base)
    }

    /// A place for registers, and an interrupt.
    fn next_slot(&mut self) -> Result<(Slot, Arc<Interrupt>), Error> {
        let size = u64::from(SLOT_SIZE);
        let range = self.addresses.allocate(size, size, AllocPolicy::FirstMatch)?;
        let gsi = self.gsis.allocate_id()?;
        let interrupt = Arc::new(Interrupt::new(new_interrupt(self.vm, gsi)?));
        Ok((Slot { base: GuestAddress(range.start()), gsi }, interrupt))
    }

    /// Has kicks of a queue written to a file, without leaving the guest for them.
    fn register_kick(&self, slot: Slot, queue: u32, kick: &EventFd) -> Result<(), Error> {
        let address = IoEventAddress::Mmio(slot.base.unchecked_add(QUEUE_NOTIFY).0);
        self.vm.register_ioevent(kick, &address, queue).map_err(Error::kvm("register an ioeventfd"))
    }

    /// Puts a device behind its registers, and into the loop.
    fn add<D>(&mut self, slot: Slot, interrupt: Arc<Interrupt>, device: &Arc<Mutex<D>>) -> Result<(), Error>
    where
        D: VirtioDevice + MutEventSubscriber + 'static,
    {
        let registers = Registers::new(Arc::clone(device) as Arc<Mutex<dyn VirtioDevice>>, interrupt)?;
        self.registers.push((slot, registers));
        self.subscribers.push(Arc::clone(device) as Subscriber);
        Ok(())
    }
}

fn new_interrupt(vm: &VmFd, gsi: u32) -> Result<EventFd, Error> {
    let file = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::Events)?;
    vm.register_irqfd(&file, gsi).map_err(Error::kvm("register an irqfd"))?;
    Ok(file)
}

fn open_disk(path: &Path, stray: Option<u64>) -> Result<Disk, Error> {
    let file: std::io::Result<File> = fs::OpenOptions::new().read(true).write(true).open(path);
    file.and_then(|file| Disk::new(file, stray)).map_err(|source| Error::File {
        action: "open",
        path: path.to_owned(),
        source,
    })
}
