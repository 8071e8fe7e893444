// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The registers and the DMA engine of QEMU's `edu` device (QEMU, docs/specs/edu.rst).
//!
//! What takes time there is done at once here. There is no interrupt line: the interrupt status is a register that is read.

use std::fmt;
use std::ops::Range;

use vm_memory::GuestAddress;

use crate::bus::{Bus, DmaError};

/// The size of the registers and the buffer behind them: BAR 0.
pub const SIZE: u64 = 1 << 20;

const IDENTIFICATION: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const INTERRUPT_STATUS: u64 = 0x24;
const INTERRUPT_RAISE: u64 = 0x60;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
const DMA_SOURCE: u64 = 0x80;
const DMA_TARGET: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;

/// Version 1.0, and what makes it an edu.
const IDENTITY: u32 = 0x0100_00ed;
/// Where the DMA engine finds the device's own buffer.
const BUFFER: u64 = 0x4_0000;
const BUFFER_SIZE: usize = 4096;
/// How far the device's addresses go; what is beyond is cut off.
const DMA_MASK: u64 = (1 << 28) - 1;

/// Of the status: an interrupt when a factorial is computed.
const STATUS_INTERRUPT: u32 = 0x80;
/// Of the interrupt status.
const FACTORIAL_DONE: u32 = 0x1;
const DMA_DONE: u32 = 0x100;
/// Of the command.
const START: u64 = 0x1;
const FROM_DEVICE: u64 = 0x2;
const INTERRUPT: u64 = 0x4;

/// The device.
pub struct Edu {
    bus: Bus,
    registers: Registers,
}

/// All that a reset sets to zero.
struct Registers {
    liveness: u32,
    factorial: u32,
    status: u32,
    interrupts: u32,
    source: u64,
    target: u64,
    count: u64,
    command: u64,
    buffer: [u8; BUFFER_SIZE],
}

impl Registers {
    const RESET: Self = Self {
        liveness: 0,
        factorial: 0,
        status: 0,
        interrupts: 0,
        source: 0,
        target: 0,
        count: 0,
        command: 0,
        buffer: [0; BUFFER_SIZE],
    };
}

/// What a write to a register had the device do with guest memory.
#[derive(Debug)]
pub struct Transfer {
    /// The I/O virtual address.
    iova: u64,
    /// How many bytes were asked for.
    count: usize,
    /// They were written to guest memory.
    from_device: bool,
    /// Where the first of them is in guest memory; none if there is none.
    result: Result<Option<GuestAddress>, DmaError>,
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { iova, count, from_device, result } = self;
        let verb = if *from_device { "writes" } else { "reads" };
        write!(f, "{verb} {count} bytes at {iova:#x}: ")?;
        match result {
            Ok(Some(at)) => write!(f, "guest memory at {:#x}", at.0),
            Ok(None) => write!(f, "nothing"),
            Err(error) => write!(f, "{error}"),
        }
    }
}

impl Edu {
    /// A device on a bus, as after a reset.
    pub const fn new(bus: Bus) -> Self {
        Self { bus, registers: Registers::RESET }
    }

    /// Sets everything back.
    pub const fn reset(&mut self) {
        self.registers = Registers::RESET;
    }

    /// Reads registers: 4 bytes at a time, or 8 of those of the DMA engine. All ones are what others read.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = &self.registers;
        let value = match offset {
            IDENTIFICATION => IDENTITY.into(),
            LIVENESS => registers.liveness.into(),
            FACTORIAL => registers.factorial.into(),
            STATUS => registers.status.into(),
            INTERRUPT_STATUS => registers.interrupts.into(),
            DMA_SOURCE => registers.source,
            DMA_TARGET => registers.target,
            DMA_COUNT => registers.count,
            DMA_COMMAND => registers.command,
            _ => u64::MAX,
        };
        let value = if is_valid(offset, data.len()) { value } else { u64::MAX };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// Writes registers, in the same sizes. Returns what that had the device do with guest memory, if anything, which it only may
    /// as a bus master.
    pub fn write(&mut self, offset: u64, data: &[u8], is_bus_master: bool) -> Option<Transfer> {
        if !is_valid(offset, data.len()) {
            return None;
        }
        let wide = data.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte));
        let [a, b, c, d, ..] = wide.to_le_bytes();
        let value = u32::from_le_bytes([a, b, c, d]);
        let registers = &mut self.registers;
        match offset {
            LIVENESS => registers.liveness = !value,
            FACTORIAL => registers.compute_factorial(value),
            STATUS => registers.status = value & STATUS_INTERRUPT,
            INTERRUPT_RAISE => registers.interrupts |= value,
            INTERRUPT_ACKNOWLEDGE => registers.interrupts &= !value,
            DMA_SOURCE => registers.source = wide,
            DMA_TARGET => registers.target = wide,
            DMA_COUNT => registers.count = wide,
            DMA_COMMAND => {
                registers.command = wide & !START;
                if wide & START != 0 {
                    return self.run(is_bus_master);
                }
            }
            _ => (),
        }
        None
    }

    /// Does what the registers of the DMA engine say.
    fn run(&mut self, is_bus_master: bool) -> Option<Transfer> {
        let Registers { source, target, count, command, buffer, interrupts, .. } = &mut self.registers;
        let from_device = *command & FROM_DEVICE != 0;
        let (own, other) = if from_device { (*source, *target) } else { (*target, *source) };
        if *command & INTERRUPT != 0 {
            *interrupts |= DMA_DONE;
        }
        let bytes = buffer.get_mut(part_of_buffer(own, *count)?).filter(|_| is_bus_master)?;
        let (iova, count) = (other & DMA_MASK, bytes.len());
        let result = if from_device { self.bus.write(iova, bytes) } else { self.bus.read(iova, bytes) };
        Some(Transfer { iova, count, from_device, result })
    }
}

impl Registers {
    fn compute_factorial(&mut self, of: u32) {
        // From 34 on all 32 bits are zero: the guest cannot have the device count for longer.
        self.factorial = (1..=of.min(34)).fold(1, u32::wrapping_mul);
        if self.status & STATUS_INTERRUPT != 0 {
            self.interrupts |= FACTORIAL_DONE;
        }
    }
}

const fn is_valid(offset: u64, size: usize) -> bool {
    size == 4 || (size == 8 && offset >= DMA_SOURCE)
}

/// The part of the device's buffer that is meant by an address and a count, which may reach out of it.
fn part_of_buffer(address: u64, count: u64) -> Option<Range<usize>> {
    let start = usize::try_from(address.checked_sub(BUFFER)?).ok()?;
    Some(start..start.checked_add(usize::try_from(count).ok()?)?)
}
