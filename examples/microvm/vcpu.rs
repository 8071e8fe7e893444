// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The processor: how it starts, and what becomes of its accesses to ports and registers.

use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::Error;
use crate::acpi::{SLOT_SIZE, Slot};
use crate::memory::{BOOT_PARAMETERS, SEGMENTS};
use crate::mmio::{Registers, lock};
use crate::serial::{COM1, COM1_SIZE, Uart};

/// Ports of ACPI's (6.5, 4.8.3.7): a write to the first with `SLP_EN` switches the machine off.
pub const SLEEP_CONTROL: u16 = 0x600;
/// It never wakes up.
pub const SLEEP_STATUS: u16 = 0x601;
/// Any write resets the machine.
pub const RESET: u16 = 0x602;
/// The type of sleep that is off.
pub const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Code and data, in flat segments (`__BOOT_CS`, `__BOOT_DS` of Linux's).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Protected mode.
const CR0_PE: u64 = 1;
/// The flag that is always set.
const RFLAGS: u64 = 2;

/// Leaf 1, register ECX: what KVM has with its own interrupt controllers, but does not list.
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;

/// What the processor's accesses reach.
pub struct Bus {
    /// The serial port.
    pub uart: Arc<Mutex<Uart>>,
    /// Devices on MMIO.
    pub devices: Vec<(Slot, Registers)>,
}

/// Makes a processor that is about to enter the kernel in 32-bit mode.
///
/// # Errors
///
/// KVM refuses.
pub fn new(kvm: &Kvm, vm: &VmFd, memory: &GuestMemoryMmap, entry: GuestAddress) -> Result<VcpuFd, Error> {
    let vcpu = vm.create_vcpu(0).map_err(Error::kvm("create a processor"))?;
    let cpuid = cpuid(kvm).map_err(Error::kvm("list the processor's features"))?;
    vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("set the processor's features"))?;

    for (address, descriptor) in (SEGMENTS.0..).step_by(8).zip(DESCRIPTORS) {
        memory.write_obj(descriptor, GuestAddress(address))?;
    }
    let mut special = vcpu.get_sregs().map_err(Error::kvm("get the processor's state"))?;
    special.cs = flat(CODE, 11);
    for segment in [&mut special.ds, &mut special.es, &mut special.ss] {
        *segment = flat(DATA, 3);
    }
    (special.gdt.base, special.gdt.limit) = (SEGMENTS.0, 31);
    special.cr0 |= CR0_PE;
    vcpu.set_sregs(&special).map_err(Error::kvm("set the processor's state"))?;
    let mut registers = vcpu.get_regs().map_err(Error::kvm("get the processor's registers"))?;
    (registers.rip, registers.rsi, registers.rflags) = (entry.0, BOOT_PARAMETERS.0, RFLAGS);
    vcpu.set_regs(&registers).map_err(Error::kvm("set the processor's registers"))?;
    Ok(vcpu)
}

fn cpuid(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
                // The number of the processor, which is that of the host's processor that was asked.
                entry.ebx &= 0x00ff_ffff;
            }
            0xb | 0x1f => entry.edx = 0,
            _ => (),
        }
    }
    Ok(cpuid)
}

fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { limit: u32::MAX, selector, type_, present: 1, s: 1, db: 1, g: 1, ..kvm_segment::default() }
}

/// Runs the guest until it switches itself off or resets itself.
///
/// # Errors
///
/// It cannot go on.
pub fn run(vcpu: &mut VcpuFd, bus: &mut Bus) -> Result<(), Error> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(address, bytes)) => bus.read(address, bytes),
            Ok(VcpuExit::MmioWrite(address, bytes)) => bus.write(address, bytes),
            Ok(VcpuExit::IoIn(port, bytes)) => bus.port_in(port, bytes),
            Ok(VcpuExit::IoOut(SLEEP_CONTROL, [value])) if *value == SLEEP_ENABLE | SLEEP_TYPE_OFF << 2 => {
                return Ok(());
            }
            Ok(VcpuExit::IoOut(RESET, _)) => return Ok(()),
            Ok(VcpuExit::IoOut(port, bytes)) => bus.port_out(port, bytes),
            Ok(other) => {
                let exit = format!("{other:?}");
                let at = vcpu.get_regs().map_or(0, |registers| registers.rip);
                return Err(Error::Stopped { exit, at });
            }
            // A signal, or what KVM asks to be repeated.
            Err(error) if matches!(io::Error::from(error).kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => (),
            Err(error) => return Err(Error::kvm("run the guest")(error)),
        }
    }
}

impl Bus {
    fn device(&mut self, address: u64) -> Option<(u64, &mut Registers)> {
        self.devices.iter_mut().find_map(|(slot, registers)| {
            let offset = address.checked_sub(slot.base.0)?;
            (offset < u64::from(SLOT_SIZE)).then_some((offset, registers))
        })
    }

    fn read(&mut self, address: u64, bytes: &mut [u8]) {
        match self.device(address) {
            Some((offset, registers)) => registers.read(offset, bytes),
            None => bytes.fill(0xff),
        }
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        if let Some((offset, registers)) = self.device(address) {
            registers.write(offset, bytes);
        }
    }

    fn port_in(&self, port: u16, bytes: &mut [u8]) {
        // What is not there reads as ones.
        bytes.fill(0xff);
        match (bytes, com1_register(port)) {
            ([byte], Some(register)) => *byte = lock(&self.uart).read(register),
            ([byte], None) if port == SLEEP_STATUS => *byte = 0,
            _ => (),
        }
    }

    fn port_out(&self, port: u16, bytes: &[u8]) {
        if let ([byte], Some(register)) = (bytes, com1_register(port))
            && let Err(error) = lock(&self.uart).write(register, *byte)
        {
            eprintln!("the serial port: {error}");
        }
    }
}

fn com1_register(port: u16) -> Option<u8> {
    let register = u8::try_from(port.checked_sub(COM1)?).ok()?;
    (register < COM1_SIZE).then_some(register)
}
