// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A small VMM that boots Linux with a disk behind this crate's IOMMU: the place to copy from.
//!
//! ```sh
//! cargo run --release --example microvm --features acpi,event-manager,translate -- \
//!     --kernel bzImage --initrd initrd --disk disk.img --iommu strict --trace
//! ```
//!
//! | | |
//! |---|---|
//! | `iommu.rs` | the device, the endpoint behind it and what it translates with |
//! | `mmio.rs` | the device behind the registers of virtio over MMIO |
//! | `acpi.rs`, `machine.rs` | how the guest finds both, and that the one is behind the other (VIOT) |
//! | `block.rs` | an emulated device whose rings and buffers are at I/O virtual addresses |
//! | `boot.rs`, `memory.rs`, `serial.rs`, `vcpu.rs` | what any VMM has |
//!
//! The guest has one processor, a serial port on this process's standard input and output, and ends by `poweroff -f` or `reboot -f`.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use virtio_iommu::causes::with_causes;

mod acpi;
mod block;
mod boot;
mod iommu;
mod machine;
mod memory;
mod mmio;
mod serial;
mod vcpu;

use machine::Machine;

/// Boots Linux with a disk behind a virtio-iommu.
#[derive(Debug, Parser)]
struct Arguments {
    /// A bzImage, with its drivers for virtio-mmio, virtio-blk, virtio-iommu and VIOT built in
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Its first file system
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// What the kernel is told beside where its console is and how it uses the IOMMU
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// The guest's /dev/vda; it can be written to
    #[arg(long, value_name = "FILE")]
    disk: PathBuf,
    /// The guest's memory
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(memory::MEBIBYTES))]
    memory: u32,
    /// Whether the disk is behind an IOMMU
    #[arg(long, value_enum, default_value_t = IommuMode::On)]
    iommu: IommuMode,
    /// Shows what the guest asks the IOMMU for, and each fault that it is told of
    #[arg(long)]
    trace: bool,
    /// Has the disk write where it was not told to before this sector is read: without an IOMMU that hits memory
    #[arg(long, value_name = "SECTOR")]
    stray_dma: Option<u64>,
}

/// How the guest uses the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum IommuMode {
    /// There is none
    Off,
    /// UNMAP requests need not be waited for
    On,
    /// Memory is given back when the UNMAP is answered
    Strict,
}

impl Arguments {
    fn command_line(&self) -> String {
        let iommu = match self.iommu {
            IommuMode::Off => "",
            IommuMode::On => " iommu.strict=0",
            IommuMode::Strict => " iommu.strict=1",
        };
        format!("console=ttyS0 panic=-1{iommu} {}", self.cmdline)
    }
}

/// Why there is no machine, or none any more.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("KVM: cannot {action}")]
    Kvm {
        action: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("cannot {action} {path}", path = .path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} cannot be loaded; it must be a bzImage", .path.display())]
    Kernel {
        path: PathBuf,
        #[source]
        source: linux_loader::loader::Error,
    },
    #[error("{} has {size} bytes, for which there is no room beside the kernel: give the guest more memory", .path.display())]
    TooLarge { path: PathBuf, size: u64 },
    #[error("the kernel's command line cannot be used")]
    CommandLineText(#[from] linux_loader::cmdline::Error),
    #[error("the kernel's command line does not fit")]
    CommandLine(#[source] linux_loader::loader::Error),
    #[error("the kernel's parameters do not fit")]
    Parameters(#[from] linux_loader::configurator::Error),
    #[error("the guest's memory cannot be had")]
    Memory(#[source] vm_memory::mmap::FromRangesError),
    #[error("guest memory cannot be accessed")]
    Access(#[from] vm_memory::GuestMemoryError),
    #[error("the guest's memory cannot be described to the IOMMU")]
    Ram(#[from] virtio_iommu::memory::MemoryError),
    #[error("the IOMMU cannot be set up")]
    Iommu(#[from] virtio_iommu::device::SetupError),
    #[error("the IOMMU cannot be set up")]
    View(#[from] virtio_iommu::reserved::ViewError),
    #[error("the disk is not in its own group")]
    NoTranslator,
    #[error("the guest cannot be told of the IOMMU")]
    Viot(#[from] virtio_iommu::topology::viot::ViotError),
    #[error("there is no room for so many devices")]
    Places(#[from] vm_allocator::Error),
    #[error("a device is at an address that a 32-bit resource cannot have")]
    TooManyDevices,
    #[error("a device has a queue of no possible size")]
    Queue(#[from] virtio_queue::Error),
    #[error("no event file can be had")]
    Events(#[source] io::Error),
    #[error("the loop of the devices cannot be set up")]
    Loop(#[from] event_manager::Error),
    #[error("the thread of the devices cannot be started")]
    Thread(#[source] io::Error),
    #[error("the terminal cannot be set up")]
    Terminal(#[source] io::Error),
    #[error("the guest stopped at {at:#x} by {exit}")]
    Stopped { exit: String, at: u64 },
}

impl Error {
    /// Names what was asked of KVM.
    fn kvm(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { action, source }
    }
}

fn run(arguments: &Arguments) -> Result<(), Error> {
    let mut machine = Machine::new(arguments)?;
    machine.run()?;
    machine.report(arguments);
    Ok(())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = run(&arguments);
    serial::restore_terminal();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("microvm: {}", with_causes(&error));
            ExitCode::FAILURE
        }
    }
}
