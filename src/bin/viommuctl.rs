// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Looks at a host, prepares a guest, asks a running daemon: arguments in, exit code out.

use std::error::Error;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use virtio_iommu::causes::with_causes;
use virtio_iommu::device::Settings;
use virtio_iommu::id::{EndpointId, PciAddress};
use virtio_iommu::launch::check::{Question, check};
use virtio_iommu::launch::inspect::inspect;
use virtio_iommu::launch::memlock::{self, Demand, Grant};
use virtio_iommu::launch::operate::Operation;
use virtio_iommu::launch::output::{OutputError, put, say};
use virtio_iommu::launch::qemu::{self, MOST_PORTS};
use virtio_iommu::launch::{Assignment, Directory, Launch, LaunchError, Size, picture, show};
use virtio_iommu::range::IovaRange;
use virtio_iommu::reserved::arguments::PolicyArguments;
use virtio_iommu::reserved::facts::FactsFile;
use virtio_iommu::reserved::gather::Host;
use virtio_iommu::reserved::plan::{Plan, PlanError, Policy, plan};
use virtio_iommu::reserved::report;
use virtio_iommu::reserved::sysfs::Sysfs;
use virtio_iommu::topology::viot::{self, PciFunctions};

/// Looks at a host's IOMMU groups, prepares what a guest with a virtio-iommu needs, and asks and changes a running daemon.
#[derive(Debug, Parser)]
#[command(name = "viommuctl", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says whether this host is ready to assign devices to a guest, and what to do where it is not.
    ///
    /// Exits with 0 if it is, with 3 if it is not. Idle devices are attached to an empty address space for a moment.
    Check {
        /// Addresses of the devices on the host, all for one guest.
        #[arg(required = true, value_name = "BDF")]
        devices: Vec<PciAddress>,
        /// The QEMU that is to run the guest.
        #[arg(long, value_name = "PATH", default_value = "qemu-system-x86_64")]
        qemu: PathBuf,
        /// How much memory the guest is to have, such as 4G, to see whether enough of it can be locked.
        #[arg(long, value_name = "SIZE")]
        memory: Option<Size>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Runs QEMU with devices assigned behind a virtio-iommu: checks, gathers facts, opens the files, starts the daemon and
    /// becomes QEMU, with what it needs added to its command line. The daemon ends with QEMU.
    Run(RunArguments),
    /// Computes from facts what a guest would be told of each endpoint, without looking at any host.
    ///
    /// Exits with 0 if there is a plan, with 2 for facts that cannot be read, with 3 if an endpoint has no address to use or too
    /// many regions.
    Plan {
        /// The facts, and what the operator chose; `-` is the standard input.
        #[arg(long, value_name = "FILE")]
        facts: PathBuf,
        /// Print JSON instead of tables.
        #[arg(long)]
        json: bool,
        /// Also draw the first endpoint's address space to a file, as SVG.
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
    /// Shows what the host says of devices: their groups, reserved regions, usable addresses; and what a guest would be told.
    ///
    /// Exits with 3 if the host does not tell, or if a device has no address to use.
    ///
    /// A device that is bound to vfio-pci and idle is attached to an empty address space for a moment.
    Inspect {
        /// Addresses of devices on the host.
        #[arg(required = true, value_name = "BDF")]
        devices: Vec<PciAddress>,
        /// Also write the facts to a file, for vhost-device-iommu --facts.
        #[arg(long, value_name = "FILE")]
        facts_out: Option<PathBuf>,
        /// Print what a guest would be told, and the facts, as JSON instead of tables.
        #[arg(long)]
        json: bool,
        /// The host's sysfs, or a copy of another host's.
        #[arg(long, value_name = "DIR", default_value = "/sys")]
        sysfs: PathBuf,
        /// The host's proc, or a copy of another host's.
        #[arg(long, value_name = "DIR", default_value = "/proc")]
        proc: PathBuf,
        #[command(flatten)]
        policy: PolicyArguments,
        /// Guest memory, to see whether it lies where a device cannot reach it. Can be given several times.
        #[arg(long, value_name = "START-END")]
        guest_ram: Vec<IovaRange>,
        /// Also draw the first device's address space to a file, as SVG.
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
    #[command(flatten)]
    Operate(Operation),
    /// Says how much memory a guest may have locked, and how many mappings it may need, and whether this host grants that.
    ///
    /// Exits with 0 if it does, with 3 if it does not. The limits are those of whoever runs this, and of what it starts.
    Memlock {
        /// The guest's memory, such as 96G.
        #[arg(long, value_name = "SIZE")]
        memory: Size,
        /// In pages of which size the guest maps it, such as 4K or 2M.
        #[arg(long, value_name = "SIZE", default_value = "2M")]
        page: Size,
        /// How many devices are assigned.
        #[arg(long, value_name = "N", default_value_t = 1)]
        devices: u64,
        /// What the daemon is given as --max-mappings.
        #[arg(long, value_name = "N", default_value_t = Settings::DEFAULT_MAX_MAPPINGS as u64)]
        max_mappings: u64,
        /// What the daemon is given as --max-mappings-in-all.
        #[arg(long, value_name = "N", default_value_t = Settings::DEFAULT_MAX_MAPPINGS_IN_ALL as u64)]
        max_mappings_in_all: u64,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Writes the ACPI table that puts PCI functions of the guest behind its virtio-iommu.
    Viot {
        /// Where the guest has the virtio-iommu.
        #[arg(long, value_name = "BDF")]
        iommu: PciAddress,
        /// The functions behind it, as the guest has them: single ones or ranges, separated by commas.
        #[arg(long, value_name = "BDF[-BDF],...", required = true, value_delimiter = ',')]
        endpoints: Vec<PciFunctions>,
        /// The file to write.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
}

/// Where the guest has the virtio-iommu, if nobody says: not where QEMU puts what has no address.
const IOMMU_PLACE: &str = "00:1e.0";

#[derive(Debug, Args)]
struct RunArguments {
    /// Addresses of the devices on the host. With --hotplug there need be none.
    #[arg(required_unless_present = "hotplug", value_name = "BDF")]
    devices: Vec<PciAddress>,
    /// Where the guest is to have each device, in the same order: by default 00:08.0, 00:09.0 and so on, but for the places of the
    /// IOMMU and of ports.
    #[arg(long, value_name = "BDF,...", value_delimiter = ',')]
    guest: Vec<PciAddress>,
    /// Where the guest is to have the virtio-iommu.
    #[arg(long, value_name = "BDF", default_value = IOMMU_PLACE)]
    iommu: PciAddress,
    /// The daemon's program: by default vhost-device-iommu beside this one.
    #[arg(long, value_name = "PATH")]
    daemon: Option<PathBuf>,
    /// Where facts, table, socket and the daemon's log are put: by default a new directory for this process in
    /// `$XDG_RUNTIME_DIR` or /tmp. One that is there must belong to the user, who alone can write to it.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    // What `--help` says of it has a number in it.
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_value_t = 0, default_missing_value = "4",
        value_parser = clap::value_parser!(u8).range(0..=MOST_PORTS.into()), help = hotplug_help())]
    hotplug: u8,
    /// Do nothing, and print the lines that a shell could run instead.
    #[arg(long)]
    print: bool,
    /// A further option for the daemon, such as --daemon-option=--relaxable=report. Can be given several times.
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    daemon_option: Vec<String>,
    /// QEMU and its arguments. `@IOMMU@` marks where to add to them; by default at the end.
    #[arg(last = true, required = true, value_name = "QEMU ARGUMENTS")]
    qemu: Vec<String>,
}

fn hotplug_help() -> String {
    format!(
        "How many devices can be added while the guest runs, at 01:00.0, 02:00.0 and so on; at most {MOST_PORTS}. The daemon then has \
         a control socket and QEMU a monitor, both in the directory, and how to use them is printed. The guest needs ports of its own: \
         00:10.0 and on, and no other bridges before them"
    )
}

/// What went wrong, and the exit code for it: 1 run time, 2 usage, 3 host.
struct Failure(u8, Box<dyn Error>);

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Check { devices, qemu, memory, json } => run_check(&Question { devices, qemu, memory }, json),
        Command::Run(arguments) => {
            let print = arguments.print;
            arguments.launch().and_then(|launch| run_launch(&launch, print))
        }
        Command::Plan { facts, json, svg } => run_plan(&facts, json, svg),
        Command::Inspect { devices, facts_out, json, sysfs, proc, policy, guest_ram, svg } => {
            run_inspect(&Host { sysfs, proc }, &devices, &InspectOptions { policy, guest_ram, facts_out, json, svg })
        }
        Command::Operate(operation) => operation.run().map_err(|error| Failure(error.exit_code(), error.into())),
        Command::Memlock { memory, page, devices, max_mappings, max_mappings_in_all, json } => {
            run_memlock(&Demand { memory, page, devices, max_mappings, max_mappings_in_all }, json)
        }
        Command::Viot { iommu, endpoints, output } => run_viot(iommu, &endpoints, &output),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(code, error)) => {
            say(format_args!("viommuctl: {}", with_causes(error.as_ref())));
            ExitCode::from(code)
        }
    }
}

impl From<OutputError> for Failure {
    fn from(error: OutputError) -> Self {
        Self(1, error.into())
    }
}

/// What is printed of an answer: JSON for programs, or a text for people.
fn shown<T: Serialize + Display>(answer: &T, json: bool) -> Result<String, Failure> {
    let text = if json { serde_json::to_string_pretty(answer) } else { Ok(answer.to_string()) };
    text.map(|text| format!("{text}\n")).map_err(|error| Failure(1, error.into()))
}

fn run_check(question: &Question, json: bool) -> Result<(), Failure> {
    let report = check(&Host::default(), question);
    put(&shown(&report, json)?)?;
    if report.ready { Ok(()) } else { Err(Failure(3, "this host is not ready: see above".into())) }
}

fn run_memlock(demand: &Demand, json: bool) -> Result<(), Failure> {
    if demand.page.0 == 0 {
        return Err(Failure(2, "--page must not be 0".into()));
    }
    let needs = memlock::needs(demand, Grant::of_this_process(), memlock::type1_limit());
    put(&shown(&needs, json)?)?;
    if needs.granted { Ok(()) } else { Err(Failure(3, "this host does not grant all of that: see above".into())) }
}

impl RunArguments {
    fn launch(self) -> Result<Launch, Failure> {
        let mut guest = self.guest;
        if guest.is_empty() {
            guest = qemu::free_places(self.iommu, self.hotplug).take(self.devices.len()).collect();
            if guest.len() < self.devices.len() {
                let (room, asked) = (guest.len(), self.devices.len());
                let text = format!(
                    "there is room for {room} devices on the guest's bus 0, not for {asked}: choose places with --guest"
                );
                return Err(Failure(2, text.into()));
            }
        }
        let mut distinct = self.devices.clone();
        distinct.sort_unstable();
        distinct.dedup();
        if distinct.len() != self.devices.len() {
            return Err(Failure(2, "a device is given twice".into()));
        }
        if self.devices.is_empty() && self.hotplug == 0 {
            return Err(Failure(2, "give a device, or --hotplug for those that come later".into()));
        }
        if guest.len() != self.devices.len() {
            return Err(Failure(2, "give as many --guest addresses as devices".into()));
        }
        let beside = std::env::current_exe().ok().map(|program| program.with_file_name("vhost-device-iommu"));
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let own = || Directory::New(runtime.join(format!("virtio-iommu-{}", std::process::id())));
        Ok(Launch {
            devices: self.devices.into_iter().zip(guest).map(|(host, guest)| Assignment { host, guest }).collect(),
            iommu: self.iommu,
            daemon: self.daemon.or(beside).unwrap_or_else(|| "vhost-device-iommu".into()),
            daemon_options: self.daemon_option,
            directory: self.directory.map_or_else(own, Directory::Given),
            hotplug: self.hotplug,
            qemu: self.qemu,
        })
    }
}

fn run_launch(launch: &Launch, print: bool) -> Result<(), Failure> {
    let sysfs = Sysfs::new("/sys");
    if print {
        let lines = launch.lines(&sysfs).map_err(|error| Failure(error.exit_code(), error.into()))?;
        put(&format!("{lines}\n"))?;
        return Ok(());
    }
    let memory = qemu::memory(&launch.qemu).map_err(LaunchError::from);
    let memory = memory.map_err(|error| Failure(error.exit_code(), error.into()))?;
    let program = launch.qemu.first().map(PathBuf::from).unwrap_or_default();
    let devices = launch.devices.iter().map(|device| device.host).collect();
    let report = check(&Host::default(), &Question { devices, qemu: program, memory });
    if !report.ready {
        say(format_args!("{report}"));
        return Err(Failure(3, "this host is not ready: see above".into()));
    }
    let error = launch.start(&sysfs);
    Err(Failure(error.exit_code(), error.into()))
}

fn run_plan(facts: &Path, json: bool, svg: Option<PathBuf>) -> Result<(), Failure> {
    let file = FactsFile::read(facts).map_err(|error| Failure(2, error.into()))?;
    let plan = plan(&file.policy, &file.devices).map_err(|error| {
        let code = if matches!(error, PlanError::NothingUsable { .. } | PlanError::ProbeSize { .. }) { 3 } else { 2 };
        Failure(code, error.into())
    })?;
    if let Some(path) = svg {
        draw(&file, &plan, &path)?;
    }
    put(&if json { report::to_json(&plan) } else { show::plan(&plan) })?;
    Ok(())
}

/// What `inspect` was asked for, besides devices.
struct InspectOptions {
    policy: PolicyArguments,
    guest_ram: Vec<IovaRange>,
    facts_out: Option<PathBuf>,
    json: bool,
    svg: Option<PathBuf>,
}

fn run_inspect(host: &Host, devices: &[PciAddress], options: &InspectOptions) -> Result<(), Failure> {
    let policy = Policy { guest_ram: options.guest_ram.clone(), ..options.policy.policy() };
    let mut file = FactsFile { policy, devices: Vec::new() };
    let mut inspections = Vec::new();
    for device in devices {
        let mut inspection = inspect(host, *device).map_err(|error| Failure(3, error.into()))?;
        options.policy.amend(&mut inspection.facts);
        file.devices.push((EndpointId::from(*device), inspection.facts.clone()));
        inspections.push((*device, inspection));
    }
    if let Some(path) = &options.facts_out {
        file.write(path).map_err(|error| Failure(1, error.into()))?;
    }
    let planned = plan(&file.policy, &file.devices);
    if !options.json {
        for (device, inspection) in &inspections {
            put(&show::inspection(*device, inspection, planned.as_ref().ok()))?;
        }
    }
    let planned = planned.map_err(|error| Failure(3, error.into()))?;
    if options.json {
        put(&report::to_json_with_facts(&planned, &file))?;
    }
    match &options.svg {
        Some(path) => draw(&file, &planned, path),
        None => Ok(()),
    }
}

/// Draws the first device of a plan from these facts.
fn draw(file: &FactsFile, plan: &Plan, path: &Path) -> Result<(), Failure> {
    let Some((id, facts)) = file.devices.first() else {
        return Err(Failure(2, "there is no device to draw".into()));
    };
    let picture = picture::draw(&id.to_string(), facts, plan, &file.policy.guest_ram);
    fs::write(path, picture).map_err(|error| Failure(1, format!("cannot write {}: {error}", path.display()).into()))
}

fn run_viot(iommu: PciAddress, endpoints: &[PciFunctions], output: &Path) -> Result<(), Failure> {
    let bytes = viot::table(iommu, endpoints.iter().copied()).map_err(|error| Failure(2, error.into()))?;
    fs::write(output, bytes).map_err(|error| Failure(1, format!("cannot write {}: {error}", output.display()).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_is_given_lies_where_qemu_puts_nothing_by_itself() {
        let given = Arguments::parse_from(["viommuctl", "run", "02:00.0", "03:00.0", "--", "qemu", "-m", "1G"]);
        let Command::Run(run) = given.command else { panic!("it is `run`") };
        let Ok(launch) = run.launch() else { panic!("nothing is wrong with it") };
        assert_eq!((launch.iommu.to_string().as_str(), guests(&launch)), ("0000:00:1e.0", vec![8, 9]));
    }

    /// In which slots the guest has the devices.
    fn guests(launch: &Launch) -> Vec<u8> {
        launch.devices.iter().map(|device| device.guest.device()).collect()
    }

    #[test]
    fn many_devices_keep_off_the_ports_while_there_is_room() {
        let run = |count: usize| {
            let devices = (0..count).map(|bus| format!("{:02x}:00.0", bus + 1));
            let words = ["viommuctl", "run", "--hotplug=2"].map(ToOwned::to_owned).into_iter().chain(devices);
            let words = words.chain(["--", "qemu"].map(ToOwned::to_owned));
            let Command::Run(run) = Arguments::parse_from(words).command else { panic!("it is `run`") };
            run.launch()
        };
        let Ok(launch) = run(9) else { panic!("there is room") };
        assert_eq!(guests(&launch), [0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e, 0x0f, 0x12]);
        assert!(run(20).is_ok());
        let Err(Failure(2, error)) = run(21) else { panic!("there is no room") };
        assert_eq!(
            error.to_string(),
            "there is room for 20 devices on the guest's bus 0, not for 21: choose places with --guest"
        );
    }
}
