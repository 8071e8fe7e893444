// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Loads Linux as its boot protocol says (Linux, `Documentation/arch/x86/boot.rst`), to be entered in 32-bit mode.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use linux_loader::configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Cmdline, KernelLoader, load_cmdline};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::Error;
use crate::memory::{ACPI_TABLES, BOOT_PARAMETERS, COMMAND_LINE, HIGH_MEMORY, STRAY_TARGET};

const PAGE: u64 = 0x1000;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// A loader without a number of its own.
const LOADER_OTHER: u8 = 0xff;
/// How long a command line may be, with its end.
const LONGEST_COMMAND_LINE: usize = 2048;

/// What to boot.
#[derive(Debug)]
pub struct Payload<'a> {
    /// A bzImage.
    pub kernel: &'a Path,
    /// Its first file system.
    pub initrd: Option<&'a Path>,
    /// What it is told.
    pub command_line: &'a str,
}

/// Puts kernel, initrd and boot parameters into guest memory; where the kernel is entered.
///
/// # Errors
///
/// A file cannot be read, is no kernel, or does not fit.
pub fn load(memory: &GuestMemoryMmap, payload: &Payload<'_>, rsdp: GuestAddress) -> Result<GuestAddress, Error> {
    let mut kernel = open(payload.kernel)?;
    let loaded = BzImage::load(memory, None, &mut kernel, Some(HIGH_MEMORY))
        .map_err(|source| Error::Kernel { path: payload.kernel.to_owned(), source })?;
    let mut header = loaded.setup_header.unwrap_or_default();
    header.type_of_loader = LOADER_OTHER;
    if let Some(initrd) = payload.initrd {
        let (start, size) = load_initrd(memory, initrd, &header)?;
        header.ramdisk_image = start;
        header.ramdisk_size = size;
    }
    let command_line = Cmdline::try_from(payload.command_line, LONGEST_COMMAND_LINE)?;
    load_cmdline(memory, COMMAND_LINE, &command_line).map_err(Error::CommandLine)?;
    header.cmd_line_ptr = u32::try_from(COMMAND_LINE.0).unwrap_or(0);

    let mut parameters = boot_params { hdr: header, acpi_rsdp_addr: rsdp.0, ..boot_params::default() };
    let mut map = parameters.e820_table;
    let ranges = [
        (GuestAddress(0), STRAY_TARGET, E820_RAM),
        (STRAY_TARGET, STRAY_TARGET.unchecked_add(PAGE), E820_RESERVED),
        (ACPI_TABLES, HIGH_MEMORY, E820_RESERVED),
        (HIGH_MEMORY, memory.last_addr().unchecked_add(1), E820_RAM),
    ];
    for (entry, (start, end, kind)) in map.iter_mut().zip(ranges) {
        *entry = boot_e820_entry { addr: start.0, size: end.0 - start.0, r#type: kind };
    }
    parameters.e820_table = map;
    parameters.e820_entries = 4;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&parameters, BOOT_PARAMETERS), memory)?;
    Ok(loaded.kernel_load)
}

/// Puts the initrd as high as the kernel wants it; start and size.
fn load_initrd(memory: &GuestMemoryMmap, path: &Path, kernel: &setup_header) -> Result<(u32, u32), Error> {
    let mut file = open(path)?;
    let read = |source| Error::File { action: "read", path: path.to_owned(), source };
    let size = file.seek(SeekFrom::End(0)).map_err(read)?;
    file.rewind().map_err(read)?;
    // The kernel unpacks itself into the memory from its preferred address on.
    let kernel_end = kernel.pref_address.saturating_add(u64::from(kernel.init_size));
    let end = memory.last_addr().0.min(u64::from(kernel.initrd_addr_max)) + 1;
    let start = end.checked_sub(size).map(|start| start & !(PAGE - 1)).filter(|start| *start >= kernel_end);
    let too_large = || Error::TooLarge { path: path.to_owned(), size };
    let start = start.ok_or_else(too_large)?;
    memory.read_exact_volatile_from(GuestAddress(start), &mut file, usize::try_from(size).unwrap_or(usize::MAX))?;
    Ok((u32::try_from(start).map_err(|_| too_large())?, u32::try_from(size).map_err(|_| too_large())?))
}

fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::File { action: "open", path: path.to_owned(), source })
}
