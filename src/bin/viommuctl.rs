// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Looks at a host and prepares a guest: arguments in, exit code out.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use comfy_table::{Table, presets};
use virtio_iommu::causes::with_causes;
use virtio_iommu::id::{EndpointId, ParsePciAddressError, PciAddress};
use virtio_iommu::launch::check::{Question, check};
use virtio_iommu::launch::inspect::{Host, Inspection, inspect};
use virtio_iommu::launch::{Launch, Size, picture, qemu};
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::facts::FactsFile;
use virtio_iommu::reserved::plan::{EndpointPlan, PlanError, Policy, plan};
use virtio_iommu::reserved::sysfs::Sysfs;
use virtio_iommu::reserved::{HostFacts, ReservedKind, report};
use virtio_iommu::topology::viot::{self, PciFunctions};
use virtio_iommu::vhost_user::{GuestMsi, parse_guest_msi};

/// Looks at a host's IOMMU groups and prepares what a guest with a virtio-iommu needs.
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
    Run {
        /// Addresses of the devices on the host.
        #[arg(required = true, value_name = "BDF")]
        devices: Vec<PciAddress>,
        /// Where the guest is to have each device, in the same order: by default 00:03.0, 00:04.0 and so on.
        #[arg(long, value_name = "BDF", value_delimiter = ',')]
        guest: Vec<PciAddress>,
        /// Where the guest is to have the virtio-iommu.
        #[arg(long, value_name = "BDF", default_value = "00:01.0")]
        iommu: PciAddress,
        /// The daemon's program: by default vhost-device-iommu beside this one.
        #[arg(long, value_name = "PATH")]
        daemon: Option<PathBuf>,
        /// Where facts, table, socket and the daemon's log are put: by default a new directory for this process in
        /// `$XDG_RUNTIME_DIR` or /tmp.
        #[arg(long, value_name = "DIR")]
        directory: Option<PathBuf>,
        /// Do nothing, and print the lines that a shell could run instead.
        #[arg(long)]
        print: bool,
        /// QEMU and its arguments. `@IOMMU@` marks where to add to them; by default at the end.
        #[arg(last = true, required = true, value_name = "QEMU ARGUMENTS")]
        qemu: Vec<String>,
    },
    /// Computes from facts what a guest would be told of each endpoint, without looking at any host.
    ///
    /// Exits with 0 if there is a plan, with 2 for facts that cannot be read, with 3 if an endpoint has no address to use.
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
        /// The host's sysfs, or a copy of another host's.
        #[arg(long, value_name = "DIR", default_value = "/sys")]
        sysfs: PathBuf,
        /// The host's proc, or a copy of another host's.
        #[arg(long, value_name = "DIR", default_value = "/proc")]
        proc: PathBuf,
        /// The MSI doorbell of the guest's machine, or `none`.
        #[arg(long, value_name = "START-END|none", default_value = "fee00000-feefffff", value_parser = parse_guest_msi)]
        guest_msi: GuestMsi,
        /// Guest memory, to see whether it lies where a device cannot reach it. Can be given several times.
        #[arg(long, value_name = "START-END")]
        guest_ram: Vec<IovaRange>,
        /// Also draw the first device's address space to a file, as SVG.
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
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

/// What went wrong, and the exit code for it: 1 run time, 2 usage, 3 host.
struct Failure(u8, Box<dyn Error>);

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Check { devices, qemu, memory, json } => run_check(&Question { devices, qemu, memory }, json),
        Command::Run { devices, guest, iommu, daemon, directory, print, qemu } => {
            let launch = make_launch(&devices, guest, iommu, daemon, directory, qemu);
            launch.and_then(|launch| run_launch(&launch, print))
        }
        Command::Plan { facts, json, svg } => run_plan(&facts, json, svg),
        Command::Inspect { devices, facts_out, json, sysfs, proc, guest_msi, guest_ram, svg } => {
            let policy = Policy { guest_msi: guest_msi.range(), guest_ram, ..Policy::default() };
            run_inspect(&Host { sysfs, proc }, &devices, &policy, facts_out, json, svg)
        }
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

fn run_check(question: &Question, json: bool) -> Result<(), Failure> {
    let report = check(&Host::default(), question);
    if json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|error| Failure(1, error.into()))?);
    } else {
        println!("{report}");
    }
    if report.ready { Ok(()) } else { Err(Failure(3, "this host is not ready: see above".into())) }
}

fn make_launch(
    devices: &[PciAddress],
    mut guest: Vec<PciAddress>,
    iommu: PciAddress,
    daemon: Option<PathBuf>,
    directory: Option<PathBuf>,
    qemu: Vec<String>,
) -> Result<Launch, Failure> {
    if guest.is_empty() {
        let slots = (3..).take(devices.len()).map(|slot: usize| format!("00:{slot:02x}.0"));
        let addresses: Result<_, ParsePciAddressError> = slots.map(|text| text.parse()).collect();
        guest = addresses.map_err(|error| Failure(2, error.into()))?;
    }
    let mut distinct = devices.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    if distinct.len() != devices.len() {
        return Err(Failure(2, "a device is given twice".into()));
    }
    if guest.len() != devices.len() {
        return Err(Failure(2, "give as many --guest addresses as devices".into()));
    }
    let beside = std::env::current_exe().ok().map(|program| program.with_file_name("vhost-device-iommu"));
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    Ok(Launch {
        devices: devices.iter().copied().zip(guest).collect(),
        iommu,
        daemon: daemon.or(beside).unwrap_or_else(|| "vhost-device-iommu".into()),
        directory: directory.unwrap_or_else(|| runtime.join(format!("virtio-iommu-{}", std::process::id()))),
        qemu,
    })
}

fn run_launch(launch: &Launch, print: bool) -> Result<(), Failure> {
    let sysfs = Sysfs::new("/sys");
    if print {
        let lines = launch.lines(&sysfs).map_err(|error| Failure(error.exit_code(), error.into()))?;
        println!("{lines}");
        return Ok(());
    }
    let memory = qemu::memory(&launch.qemu).map_err(|error| Failure(2, error.into()))?;
    let program = launch.qemu.first().map(PathBuf::from).unwrap_or_default();
    let devices = launch.devices.iter().map(|(host, _)| *host).collect();
    let report = check(&Host::default(), &Question { devices, qemu: program, memory });
    if !report.ready {
        eprintln!("{report}");
        return Err(Failure(3, "this host is not ready: see above".into()));
    }
    let error = launch.start(&sysfs);
    Err(Failure(error.exit_code(), error.into()))
}

fn run_plan(facts: &Path, json: bool, svg: Option<PathBuf>) -> Result<(), Failure> {
    let file = FactsFile::read(facts).map_err(|error| Failure(2, error.into()))?;
    let plan = plan(&file.policy, &file.devices).map_err(|error| {
        let code = if matches!(error, PlanError::NothingUsable { .. }) { 3 } else { 2 };
        Failure(code, error.into())
    })?;
    if let Some(path) = svg {
        draw(&file.policy, &file.devices, &path)?;
    }
    if json {
        print!("{}", report::to_json(&plan));
        return Ok(());
    }
    println!("input range {}", plan.input_range);
    for planned in &plan.endpoints {
        println!("{}", planned.id);
        print_plan(planned);
    }
    Ok(())
}

fn print_plan(planned: &EndpointPlan) {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["range", "the guest is told", "why"]);
    for region in planned.view.reported() {
        let told = match region.kind {
            ReservedKind::Reserved => "reserved",
            ReservedKind::Msi => "msi",
        };
        table.add_row([region.range.to_string(), told.to_owned(), String::new()]);
    }
    for withheld in &planned.withheld {
        table.add_row([
            withheld.range.to_string(),
            "nothing".to_owned(),
            report::reason_name(withheld.reason).to_owned(),
        ]);
    }
    println!("{table}");
    for advisory in &planned.advisories {
        println!("  {}: {}", advisory.range, advisory.kind);
    }
    if let Some(direct) = planned.direct {
        println!("  VFIO refuses the device: {direct} must stay mapped to itself (`direct`)");
    }
    if !planned.bypass_refused.is_empty() {
        println!("  bypass is refused: guest memory at {}", planned.bypass_refused);
    }
}

fn run_inspect(
    host: &Host,
    devices: &[PciAddress],
    policy: &Policy,
    facts_out: Option<PathBuf>,
    json: bool,
    svg: Option<PathBuf>,
) -> Result<(), Failure> {
    let mut file = FactsFile::default();
    for device in devices {
        let inspection = inspect(host, *device).map_err(|error| Failure(3, error.into()))?;
        if !json {
            print_inspection(*device, &inspection, policy);
        }
        file.devices.push((EndpointId::from(*device), inspection.facts));
    }
    if json {
        print!("{}", file.to_json());
    }
    if let Some(path) = facts_out {
        file.write(&path).map_err(|error| Failure(1, error.into()))?;
    }
    match svg {
        Some(path) => draw(policy, &file.devices, &path),
        None => Ok(()),
    }
}

/// Draws the first of these devices.
fn draw(policy: &Policy, devices: &[(EndpointId, HostFacts)], path: &Path) -> Result<(), Failure> {
    let Some((id, facts)) = devices.first() else {
        return Err(Failure(2, "there is no device to draw".into()));
    };
    let plan = plan(policy, &[(*id, facts.clone())]).map_err(|error| Failure(3, error.into()))?;
    let picture = picture::draw(&id.to_string(), facts, &plan, &policy.guest_ram);
    fs::write(path, picture).map_err(|error| Failure(1, format!("cannot write {}: {error}", path.display()).into()))
}

fn print_inspection(device: PciAddress, inspection: &Inspection, policy: &Policy) {
    let Inspection { group, facts, usable_unknown } = inspection;
    let members: Vec<String> = group.members.iter().map(ToString::to_string).collect();
    let kernel = facts.kernel.as_deref().unwrap_or("not known");
    println!("{device}: IOMMU group {} ({}), {}, Linux {kernel}", group.number, members.join(" "), facts.driver);
    let plan = plan(policy, &[(EndpointId::from(device), facts.clone())]);
    let planned = plan.as_ref().ok().and_then(|plan| plan.endpoints.first());
    let told = |range: IovaRange| planned.map_or_else(Default::default, |planned| told(planned, range));

    let mut rows: Vec<(IovaRange, String, (String, String), &str)> = Vec::new();
    for region in facts.reserved_regions.iter().flatten() {
        rows.push((region.range, region.kind.to_string(), told(region.range), "sysfs reserved_regions"));
    }
    for range in facts.windows.iter().flat_map(RangeSet::ranges) {
        rows.push((*range, "host bridge window".to_owned(), told(*range), "/proc/iomem"));
    }
    for range in facts.usable.iter().flat_map(RangeSet::ranges) {
        rows.push((*range, "usable".to_owned(), ("usable".to_owned(), String::new()), "iommufd"));
    }
    rows.sort_by_key(|(range, ..)| *range);
    let mut table = Table::new();
    let header = ["range", "size", "the host says", "the guest is told", "why", "source"];
    table.load_preset(presets::NOTHING).set_header(header);
    for (range, says, (told, why), source) in rows {
        table.add_row([range.to_string(), human_size(range), says, told, why, source.to_owned()]);
    }
    println!("{table}");
    if let Some(planned) = planned {
        for advisory in &planned.advisories {
            println!("{}: {}", advisory.range, advisory.kind);
        }
        if let Some(direct) = planned.direct {
            println!("VFIO refuses the device: {direct} must stay mapped to itself (`direct`)");
        }
    }
    if let Err(error) = &plan {
        println!("{}", with_causes(error));
    }
    if facts.reserved_regions.is_none() {
        println!("reserved regions: not known (the kernel is older than 4.11)");
    }
    if facts.windows.is_none() {
        println!("host bridge windows: not known (they are in /proc/iomem, for root)");
    }
    if let Some(reason) = usable_unknown {
        println!("usable addresses: not known: {}", with_causes(reason));
    }
}

/// What the guest is told of a range that the host shows, and why.
fn told(planned: &EndpointPlan, range: IovaRange) -> (String, String) {
    let reported = |kind| {
        let mut regions = planned.view.reported().iter().filter(|region| region.kind == kind);
        regions.any(|region| region.range.overlaps(range))
    };
    let withheld = planned.withheld.iter().find(|withheld| withheld.range.overlaps(range));
    let (told, why) = match (reported(ReservedKind::Reserved), reported(ReservedKind::Msi)) {
        (true, true) => ("reserved, msi in it", "the guest's doorbell is cut out"),
        (true, false) => ("reserved", "the host cannot map there"),
        (false, true) => ("msi", "the guest's doorbell"),
        (false, false) => match withheld {
            Some(withheld) => ("nothing", report::reason_name(withheld.reason)),
            None => ("usable", ""),
        },
    };
    (told.to_owned(), why.to_owned())
}

/// A size as people read it.
fn human_size(range: IovaRange) -> String {
    const UNITS: [(u32, &str); 5] = [(50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let size = range.size();
    match UNITS.iter().find(|(shift, _)| size >> shift > 0) {
        Some((shift, unit)) if size.trailing_zeros() >= *shift => format!("{} {unit}", size >> shift),
        Some((shift, unit)) => {
            let tenths = (size * 10) >> shift;
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
        None => format!("{size} B"),
    }
}

fn run_viot(iommu: PciAddress, endpoints: &[PciFunctions], output: &Path) -> Result<(), Failure> {
    let bytes = viot::table(iommu, endpoints).map_err(|error| Failure(2, error.into()))?;
    fs::write(output, bytes).map_err(|error| Failure(1, format!("cannot write {}: {error}", output.display()).into()))
}
