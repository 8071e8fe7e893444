// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! ACPI tables of a hardware-reduced machine: no power management but switching off, all devices in the namespace, and
//! the VIOT that says which of them are behind the IOMMU.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use crate::Error;
use crate::memory::ACPI_TABLES;
use crate::serial::{COM1, COM1_IRQ, COM1_SIZE};
use crate::vcpu::{RESET, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_OFF};

const OEM: [u8; 6] = *b"VIOMMU";
const TABLE: [u8; 8] = *b"MICROVM\0";
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// Flags of what a PC has and this machine has not: a VGA adapter, a clock in CMOS memory.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// How long the registers of a virtio device are.
pub const SLOT_SIZE: u32 = 0x1000;

/// Where the guest finds a virtio device.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// Its registers.
    pub base: GuestAddress,
    /// Its interrupt.
    pub gsi: u32,
}

/// Writes the tables into guest memory, with a VIOT if there is one; where the first, the RSDP, is.
///
/// # Errors
///
/// They do not fit.
pub fn write(memory: &GuestMemoryMmap, devices: &[Slot], viot: Option<&[u8]>) -> Result<GuestAddress, Error> {
    let mut tables = Tables { memory, next: ACPI_TABLES };
    let dsdt = tables.add(&dsdt(devices)?)?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(tables.add(&fadt(dsdt))?.0);
    xsdt.add_entry(tables.add(&madt())?.0);
    if let Some(viot) = viot {
        xsdt.add_entry(tables.add(viot)?.0);
    }
    let xsdt = tables.add(&bytes_of(&xsdt))?;
    tables.add(&bytes_of(&Rsdp::new(OEM, xsdt.0)))
}

/// Tables, one behind the other.
struct Tables<'m> {
    memory: &'m GuestMemoryMmap,
    next: GuestAddress,
}

impl Tables<'_> {
    fn add(&mut self, table: &[u8]) -> Result<GuestAddress, Error> {
        let start = self.next;
        self.memory.write_slice(table, start)?;
        self.next = start.unchecked_add(table.len().next_multiple_of(16) as u64);
        Ok(start)
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: GuestAddress) -> Vec<u8> {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1).dsdt_64(dsdt.0).flag(Flags::HwReducedAcpi).flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(RESET);
    fadt.reset_value = 1;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    bytes_of(&fadt.finalize())
}

/// One processor, one interrupt controller.
fn madt() -> Vec<u8> {
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    madt.add_structure(ProcessorLocalApic::new(0, 0, EnabledStatus::Enabled));
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    bytes_of(&madt)
}

fn dsdt(devices: &[Slot]) -> Result<Vec<u8>, Error> {
    let mut namespace = serial_port();
    for (index, slot) in (0..).zip(devices) {
        namespace.extend(virtio_device(index, *slot)?);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    dsdt.append_slice(&aml::Scope::raw("\\_SB_".into(), namespace));
    let off = aml::Package::new(vec![&SLEEP_TYPE_OFF]);
    dsdt.append_slice(&bytes_of(&aml::Name::new("_S5_".into(), &off)));
    Ok(dsdt.as_slice().to_vec())
}

fn serial_port() -> Vec<u8> {
    let ports = aml::IO::new(COM1, COM1, 1, COM1_SIZE);
    let interrupt = edge(COM1_IRQ);
    bytes_of(&aml::Device::new(
        "COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    ))
}

/// A virtio device on MMIO. Linux looks its registers up in the VIOT by where the first range of memory starts.
fn virtio_device(index: u8, slot: Slot) -> Result<Vec<u8>, Error> {
    let base = u32::try_from(slot.base.0).map_err(|_| Error::TooManyDevices)?;
    let registers = aml::Memory32Fixed::new(true, base, SLOT_SIZE);
    let interrupt = edge(slot.gsi);
    Ok(bytes_of(&aml::Device::new(
        format!("VIO{index:X}").as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &index),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )))
}

/// An interrupt by an irqfd without resampling: an edge.
fn edge(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}
