// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Looks at a host and prepares a guest: arguments in, exit code out.

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use comfy_table::{Table, presets};
use virtio_iommu::id::{EndpointId, PciAddress};
use virtio_iommu::inspect::{Inspection, inspect};
use virtio_iommu::range::RangeSet;
use virtio_iommu::reserved::facts::FactsFile;
use virtio_iommu::reserved::sysfs::Sysfs;
use virtio_iommu::topology::viot::{self, PciFunctions};

/// Looks at a host's IOMMU groups and prepares what a guest with a virtio-iommu needs.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows what the host says of devices: their groups, reserved regions, usable addresses.
    ///
    /// A device that is bound to vfio-pci and idle is attached to an empty address space for a moment.
    Inspect {
        /// Addresses of devices on the host.
        #[arg(required = true, value_name = "BDF")]
        devices: Vec<PciAddress>,
        /// Also write the facts to a file, for vhost-device-iommu --facts.
        #[arg(long, value_name = "FILE")]
        facts_out: Option<PathBuf>,
        /// Print the facts as JSON instead of tables.
        #[arg(long)]
        json: bool,
    },
    /// Writes the ACPI table that puts PCI functions of the guest behind its virtio-iommu.
    Viot {
        /// Where the guest has the virtio-iommu.
        #[arg(long, value_name = "BDF")]
        iommu: PciAddress,
        /// The functions behind it, as the guest has them.
        #[arg(long, value_name = "BDF[-BDF]", required = true, value_delimiter = ',')]
        endpoints: Vec<PciFunctions>,
        /// The file to write.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
}

/// What went wrong, and the exit code for it: 1 run time, 2 usage, 3 host.
struct Failure(u8, Box<dyn Error>);

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Inspect { devices, facts_out, json } => run_inspect(&devices, facts_out, json),
        Command::Viot { iommu, endpoints, output } => run_viot(iommu, &endpoints, &output),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(code, error)) => {
            eprintln!("viommuctl: {}", with_causes(error.as_ref()));
            ExitCode::from(code)
        }
    }
}

fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

fn run_inspect(devices: &[PciAddress], facts_out: Option<PathBuf>, json: bool) -> Result<(), Failure> {
    let sysfs = Sysfs::new("/sys");
    let mut file = FactsFile::default();
    for device in devices {
        let inspection = inspect(&sysfs, *device).map_err(|error| Failure(3, error.into()))?;
        if !json {
            print_inspection(*device, &inspection);
        }
        file.devices.push((EndpointId::from(*device), inspection.facts));
    }
    if json {
        print!("{}", file.to_json());
    }
    if let Some(path) = facts_out {
        file.write(&path).map_err(|error| Failure(1, error.into()))?;
    }
    Ok(())
}

fn print_inspection(device: PciAddress, inspection: &Inspection) {
    let Inspection { group, facts, usable_unknown } = inspection;
    let members: Vec<String> = group.members.iter().map(ToString::to_string).collect();
    println!("{device}: IOMMU group {} ({})", group.number, members.join(" "));
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["range", "what the host says"]);
    for region in facts.reserved_regions.iter().flatten() {
        table.add_row([region.range.to_string(), region.kind.to_string()]);
    }
    for range in facts.usable.iter().flat_map(RangeSet::ranges) {
        table.add_row([range.to_string(), "usable".to_owned()]);
    }
    println!("{table}");
    if facts.reserved_regions.is_none() {
        println!("reserved regions: not known (the kernel is older than 4.11)");
    }
    if let Some(reason) = usable_unknown {
        println!("usable addresses: not known: {}", with_causes(reason));
    }
}

fn run_viot(iommu: PciAddress, endpoints: &[PciFunctions], output: &PathBuf) -> Result<(), Failure> {
    let bytes = viot::table(iommu, endpoints).map_err(|error| Failure(2, error.into()))?;
    fs::write(output, bytes).map_err(|error| Failure(1, format!("cannot write {}: {error}", output.display()).into()))
}
