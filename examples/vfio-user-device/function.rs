// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as a PCI function, as vfio-user clients see it.

use std::fs::File;
use std::io;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};

use crate::edu::{self, Edu};

const CONFIG_SIZE: usize = 256;
/// Offsets in configuration space, and bits of the command.
const COMMAND: usize = 0x04;
const REVISION: usize = 0x08;
const SUBCLASS: usize = 0x0a;
const SUBSYSTEM: usize = 0x2c;
const MEMORY_SPACE: u8 = 1 << 1;
const BUS_MASTER: u8 = 1 << 2;
/// How many transfers are shown: the guest makes as many as it likes.
const SHOWN: usize = 16;

/// The function.
pub struct Function {
    device: Edu,
    config: [u8; CONFIG_SIZE],
    left_to_show: usize,
}

impl Function {
    /// A function with this device in it.
    pub fn new(device: Edu) -> Self {
        let mut config = [0; CONFIG_SIZE];
        let header: [(usize, &[u8]); 4] = [
            (0, &[0x34, 0x12, 0xe8, 0x11]),
            (REVISION, &[0x10]),
            // Of no class.
            (SUBCLASS, &[0xff, 0x00]),
            (SUBSYSTEM, &[0xf4, 0x1a, 0x00, 0x11]),
        ];
        for (offset, bytes) in header {
            for (to, from) in config.iter_mut().skip(offset).zip(bytes) {
                *to = *from;
            }
        }
        Self { device, config, left_to_show: SHOWN }
    }

    /// What the function has: its registers and its configuration space.
    pub fn regions() -> Vec<ServerRegion> {
        let region = |index| {
            let size = match index {
                VFIO_PCI_BAR0_REGION_INDEX => edu::SIZE,
                VFIO_PCI_CONFIG_REGION_INDEX => CONFIG_SIZE as u64,
                _ => 0,
            };
            let flags = if size == 0 { 0 } else { VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE };
            let argsz = u32::try_from(size_of::<vfio_region_info>()).unwrap_or(u32::MAX);
            let region_info = vfio_region_info { argsz, flags, index, size, ..Default::default() };
            ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }
        };
        (0..VFIO_PCI_NUM_REGIONS).map(region).collect()
    }

    /// Of each kind of interrupt it has none.
    pub fn interrupts() -> Vec<IrqInfo> {
        (0..VFIO_PCI_NUM_IRQS).map(|index| IrqInfo { index, flags: 0, count: 0 }).collect()
    }

    fn command(&self) -> u8 {
        self.config.get(COMMAND).copied().unwrap_or(0)
    }

    /// The command is all that can be written: the client keeps addresses and interrupts itself.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let written = usize::try_from(offset).ok().and_then(|offset| data.get(COMMAND.checked_sub(offset)?));
        if let Some((command, value)) = self.config.get_mut(COMMAND).zip(written) {
            *command = value & (MEMORY_SPACE | BUS_MASTER);
        }
    }
}

impl ServerBackend for Function {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match region {
            VFIO_PCI_BAR0_REGION_INDEX => self.device.read(offset, data),
            VFIO_PCI_CONFIG_REGION_INDEX => {
                let from = usize::try_from(offset).ok().and_then(|offset| self.config.get(offset..)?.get(..data.len()));
                data.copy_from_slice(from.ok_or(io::ErrorKind::InvalidInput)?);
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        match region {
            VFIO_PCI_BAR0_REGION_INDEX => {
                let transfer = self.device.write(offset, data, self.command() & BUS_MASTER != 0);
                if let Some((transfer, left)) = transfer.zip(self.left_to_show.checked_sub(1)) {
                    self.left_to_show = left;
                    println!("device: {transfer}");
                }
            }
            VFIO_PCI_CONFIG_REGION_INDEX => self.write_config(offset, data),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }

    /// Not needed: see [`Bus`](crate::bus::Bus).
    fn dma_map(&mut self, _: DmaMapFlags, _: u64, _: u64, _: u64, _: Option<File>) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.device.reset();
        self.write_config(COMMAND as u64, &[0]);
        Ok(())
    }

    /// There is none to set.
    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, _: Vec<File>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
