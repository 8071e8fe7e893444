// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `viommuctl` asks of a running daemon.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::TypedValueParser;
use clap::{Args, Subcommand, value_parser};
use serde_json::Value;

use super::inspect::{Inspection, UsableError, inspect};
use super::output::{OutputError, put, say};
use super::plugging::{self, PlugError};
use super::qemu::port_of_bus;
use super::qmp::{GUEST_PATIENCE, Plug, Qmp, QmpError};
use super::show::table;
use super::status;
use crate::control::protocol::{Addition, Address, Device, Fault, FaultReason, Level, Mapping, Reply, Request};
use crate::control::{Client, ClientError};
use crate::device;
use crate::fd::{AdoptError, FileKind, adopt};
use crate::id::{EndpointId, PciAddress};
use crate::reserved::facts::Text;
use crate::reserved::gather::{GatherError, Host};
use crate::reserved::sysfs::{Sysfs, SysfsError};
use crate::vhost_user::log_levels;

/// The daemon that is asked.
#[derive(Clone, Debug, Args)]
pub struct Daemon {
    /// The daemon's control socket.
    #[arg(long = "control", value_name = "PATH")]
    path: PathBuf,
}

/// What is asked of a daemon.
#[derive(Clone, Debug, Subcommand)]
pub enum Operation {
    /// Shows a daemon's endpoints, their domains, and what has been counted.
    Status {
        /// The daemon that is asked.
        #[command(flatten)]
        daemon: Daemon,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Adds all devices of a host IOMMU group to a running guest's IOMMU, and with --qmp to the guest itself.
    ///
    /// The devices must be bound to vfio-pci and idle. Their facts are gathered and their files opened here; the daemon and QEMU
    /// are given the same files. Without --qmp, whoever started this gives the file to the VMM, binds and plugs it after this has
    /// returned, and then says so (`bound`).
    Add(AddArguments),
    /// Takes endpoints away. When this returns, they reach nothing any more, and the daemon has let their devices go; if its watcher
    /// may hold a device still, that is said.
    ///
    /// With --qmp one after the other, each when QEMU has it no more: what was removed and what was not is said.
    Remove {
        /// The endpoints, as the guest has them.
        #[arg(required = true, value_name = "BDF")]
        endpoints: Vec<EndpointId>,
        /// The daemon that is asked.
        #[command(flatten)]
        daemon: Daemon,
        /// QEMU's monitor: first the guest is asked to let each device go.
        #[arg(long, value_name = "PATH")]
        qmp: Option<PathBuf>,
        /// How long the guest has for each device.
        #[arg(long, value_name = "SECONDS", default_value_t = GUEST_PATIENCE, requires = "qmp", value_parser = value_parser!(u32).range(1..=3600))]
        wait: u32,
    },
    /// Tells a daemon that the VMM has bound devices that were added without --qmp: those that are to be blocked until the guest's
    /// driver attaches them are blocked only then.
    Bound {
        /// The daemon that is asked.
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Shows the faults that the daemon remembers: accesses and requests that were refused for reasons the guest is told of.
    Faults {
        /// The daemon that is asked.
        #[command(flatten)]
        daemon: Daemon,
        /// Go on with those that come, until the daemon ends.
        #[arg(long)]
        follow: bool,
        /// Only those with a higher number.
        #[arg(long, value_name = "N", default_value_t = 0)]
        after: u64,
        /// Print JSON, one line for each.
        #[arg(long)]
        json: bool,
    },
    /// Shows what a domain of the guest maps.
    Mappings {
        /// The domain's number.
        domain: u32,
        /// The daemon that is asked.
        #[command(flatten)]
        daemon: Daemon,
        /// Print JSON, one line for each.
        #[arg(long)]
        json: bool,
    },
    /// Shows what the guest is told of each endpoint.
    Told {
        /// The daemon that is asked.
        #[command(flatten)]
        daemon: Daemon,
        /// Print JSON, as `plan --json` does.
        #[arg(long)]
        json: bool,
    },
    /// Changes how much a daemon logs.
    LogLevel {
        /// How much.
        #[arg(value_parser = log_levels().map(Level::from), ignore_case = true)]
        level: Level,
        /// The daemon that is asked.
        #[command(flatten)]
        daemon: Daemon,
    },
}

/// What is added, and to what.
#[derive(Clone, Debug, Args)]
pub struct AddArguments {
    /// Addresses of the devices on the host: all of one IOMMU group that are bound to VFIO.
    #[arg(required = true, value_name = "BDF")]
    devices: Vec<PciAddress>,
    #[command(flatten)]
    daemon: Daemon,
    /// Where the guest has, or is to have, each device, in the same order. The guest's VIOT must say that the IOMMU is before it:
    /// it does for 01:00.0 and on with `run --hotplug`.
    #[arg(long, value_name = "BDF,...", required = true, value_delimiter = ',')]
    guest: Vec<PciAddress>,
    /// QEMU's monitor: the devices are plugged into the guest when the daemon has them.
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,
    /// The port that the device is plugged into, if it is not one of `run --hotplug`. For one device.
    #[arg(long, value_name = "ID", requires = "qmp")]
    bus: Option<String>,
    /// Number of an inherited VFIO device file for each device, in the same order, which the VMM has too: for other VMMs, which must
    /// not have bound it yet.
    #[arg(long, value_name = "FD,...", value_delimiter = ',', conflicts_with = "qmp")]
    cdev_fd: Vec<RawFd>,
}

/// Something that could not be done.
#[derive(Debug, thiserror::Error)]
pub enum OperateError {
    /// The daemon.
    #[error(transparent)]
    Daemon(#[from] ClientError),
    /// The daemon answered something else.
    #[error("the daemon answered something else than it was asked: use programs of the same version")]
    Unexpected,
    /// The arguments do not fit each other.
    #[error("{0}")]
    Usage(String),
    /// The host does not tell.
    #[error(transparent)]
    Gather(#[from] GatherError),
    /// The host does not tell.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// The device cannot be had.
    #[error("{device} cannot be assigned: `viommuctl check {device}` says what to do")]
    Unusable {
        /// The device.
        device: PciAddress,
        /// Why.
        source: UsableError,
    },
    /// The device's file cannot be had.
    #[error("cannot open {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A passed file cannot be used.
    #[error(transparent)]
    File(#[from] AdoptError),
    /// QEMU.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// Devices that were not plugged, or not removed.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// The answer cannot be printed.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl OperateError {
    /// The exit code: 1 run time, 2 usage, 3 host.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::File(_) => 2,
            Self::Gather(_) | Self::Sysfs(_) | Self::Unusable { .. } | Self::Open { .. } => 3,
            Self::Daemon(_) | Self::Unexpected | Self::Qmp(_) | Self::Plug(_) | Self::Output(_) => 1,
        }
    }
}

type Done = Result<(), OperateError>;

impl Operation {
    /// Asks, and prints what is answered.
    ///
    /// # Errors
    ///
    /// [`OperateError`]
    pub fn run(self) -> Done {
        match self {
            Self::Status { daemon, json } => show(&daemon, json),
            Self::Add(arguments) => arguments.add(),
            Self::Remove { endpoints, daemon, qmp, wait } => {
                let wait = Duration::from_secs(wait.into());
                plugging::remove(&mut daemon.client()?, &endpoints, qmp.as_deref(), wait)
            }
            Self::Bound { daemon } => plugging::settle(&mut daemon.client()?),
            Self::Faults { daemon, follow, after, json } => faults(&daemon, after, follow, json),
            Self::Mappings { domain, daemon, json } => mappings(&daemon, domain, json),
            Self::Told { daemon, json } => told(&daemon, json),
            Self::LogLevel { level, daemon } => match daemon.client()?.ask(Request::LogLevel { level })? {
                Reply::LogLevel(_) => Ok(()),
                _ => Err(OperateError::Unexpected),
            },
        }
    }
}

impl Daemon {
    fn client(&self) -> Result<Client, ClientError> {
        Client::connect(&self.path)
    }
}

/// Prints an answer. If nobody reads it, there is no more to do.
fn print(text: &str) -> Done {
    Ok(put(text).map(drop)?)
}

fn json_line(value: &impl serde::Serialize) -> String {
    // Texts, numbers, lists and truth values: nothing that JSON cannot say.
    format!("{}\n", serde_json::to_string(value).unwrap_or_default())
}

fn show(daemon: &Daemon, json: bool) -> Done {
    let mut client = daemon.client()?;
    let Reply::Endpoints(endpoints) = client.ask(Request::List)? else { return Err(OperateError::Unexpected) };
    let Reply::Stats(stats) = client.ask(Request::Stats)? else { return Err(OperateError::Unexpected) };
    if json {
        return print(&json_line(&serde_json::json!({ "endpoints": endpoints, "stats": stats })));
    }
    print(&status::show(&endpoints, &stats))
}

fn faults(daemon: &Daemon, after: u64, follow: bool, json: bool) -> Done {
    let mut client = daemon.client()?;
    let Reply::Faults(faults) = client.ask(Request::Faults { after, follow })? else {
        return Err(OperateError::Unexpected);
    };
    let show = |fault: &Fault| if json { json_line(fault) } else { show_fault(fault) };
    for fault in &faults.faults {
        if !put(&show(fault))? {
            return Ok(());
        }
    }
    if !follow {
        return Ok(());
    }
    // Those that follow are all after these. What is missing before was forgotten, with the endpoint or for later ones.
    let mut last = faults.recorded;
    loop {
        let fault = match client.next_reply() {
            Ok(Reply::Fault(fault)) => fault,
            Ok(_) => return Err(OperateError::Unexpected),
            Err(ClientError::Ended) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let missing = fault.number.saturating_sub(last).saturating_sub(1);
        if missing > 0 {
            say(format_args!("viommuctl: {missing} faults came too fast to be shown"));
        }
        last = fault.number;
        if !put(&show(&fault))? {
            return Ok(());
        }
    }
}

fn show_fault(fault: &Fault) -> String {
    let Fault { number, time, reason, .. } = fault;
    let more =
        if *reason == FaultReason::Unknown { ", for a reason of the host's that the daemon's log says" } else { "" };
    format!("{}.{:03} #{number} {}{more}\n", time / 1000, time % 1000, device::Fault::from(fault))
}

fn mappings(daemon: &Daemon, domain: u32, json: bool) -> Done {
    let mut client = daemon.client()?;
    let mut from = Text(Address(0));
    loop {
        let limit = crate::control::protocol::LARGEST_PAGE;
        let Reply::Mappings(page) = client.ask(Request::Mappings { domain, from, limit })? else {
            return Err(OperateError::Unexpected);
        };
        for mapping in &page.mappings {
            print(&if json { json_line(mapping) } else { show_mapping(mapping) })?;
        }
        match page.next.filter(|next| next.0 > from.0) {
            Some(next) => from = next,
            None => return Ok(()),
        }
    }
}

fn show_mapping(mapping: &Mapping) -> String {
    let Mapping { start, end, physical, .. } = mapping;
    format!("{}-{} to {} {}\n", start.0, end.0, physical.0, mapping.access())
}

fn told(daemon: &Daemon, json: bool) -> Done {
    let Reply::Plan(plan) = daemon.client()?.ask(Request::Plan)? else { return Err(OperateError::Unexpected) };
    if json {
        return print(&format!("{}\n", serde_json::to_string_pretty(&plan).unwrap_or_default()));
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let ends = list(plan.get("input_range").unwrap_or(&Value::Null));
    let mut output = format!("input range: {}\n", ends.iter().map(text).collect::<Vec<_>>().join("-"));
    for endpoint in list(plan.get("endpoints").unwrap_or(&Value::Null)) {
        let field = |name: &str| endpoint.get(name).cloned().unwrap_or_default();
        let mut table = table(&["range", "the guest is told", "why"]);
        for (name, told, why) in [("resv", Some("subtype"), None), ("withheld", None, Some("reason"))] {
            for row in list(&field(name)) {
                let cell = |key: &str| row.get(key).map(text).unwrap_or_default();
                let range = format!("{}-{}", cell("start"), cell("end"));
                let told = told.map_or_else(|| "nothing".to_owned(), cell);
                table.add_row([range, told, why.map(cell).unwrap_or_default()]);
            }
        }
        let _ = writeln!(output, "{}\n{table}", text(&field("id")));
        for advisory in list(&field("advisories")) {
            let cell = |key: &str| advisory.get(key).map(text).unwrap_or_default();
            let _ = writeln!(output, "{}-{}: {}", cell("start"), cell("end"), cell("text"));
        }
    }
    print(&output)
}

impl AddArguments {
    fn add(&self) -> Done {
        self.check()?;
        // What cannot be reached is said before anything is touched.
        let mut client = self.daemon.client()?;
        let mut monitor = self.qmp.as_deref().map(Qmp::connect).transpose()?;
        let (addition, nodes) = self.gather()?;
        let files = self.files(&nodes)?;
        let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let Reply::Added(_) = client.ask_with_files(Request::Add(addition), &borrowed)? else {
            return Err(OperateError::Unexpected);
        };
        let Some(monitor) = &mut monitor else { return Ok(()) };
        let bus = |guest: PciAddress| self.bus.clone().or_else(|| port_of_bus(guest.bus())).unwrap_or_default();
        let buses: Vec<String> = self.guest.iter().map(|guest| bus(*guest)).collect();
        let places = self.guest.iter().zip(&buses).zip(&borrowed);
        let plugs: Vec<Plug<'_>> =
            places.map(|((guest, bus), file)| Plug::new(*guest, bus, *file, &self.guest)).collect();
        Ok(plugging::plug_all(&mut client, monitor, &plugs)?)
    }

    /// The devices' files: those that were passed, or opened here.
    fn files(&self, nodes: &[PathBuf]) -> Result<Vec<OwnedFd>, OperateError> {
        let passed = self.cdev_fd.iter().map(|number| Ok(adopt(*number, FileKind::VfioDevice)?.file));
        if !self.cdev_fd.is_empty() {
            return passed.collect();
        }
        let open = |path: &PathBuf| {
            let file = File::options().read(true).write(true).open(path);
            file.map(OwnedFd::from).map_err(|source| OperateError::Open { path: path.clone(), source })
        };
        nodes.iter().map(open).collect()
    }

    fn check(&self) -> Done {
        let usage = |text: &str| Err(OperateError::Usage(text.to_owned()));
        if self.guest.len() != self.devices.len() {
            return usage("give as many --guest addresses as devices");
        }
        if !self.cdev_fd.is_empty() && self.cdev_fd.len() != self.devices.len() {
            return usage("give as many --cdev-fd numbers as devices");
        }
        if self.bus.is_some() && self.devices.len() != 1 {
            return usage("--bus is for one device");
        }
        let needs_port = self.qmp.is_some() && self.bus.is_none();
        if needs_port && self.guest.iter().any(|guest| guest.segment() != 0 || port_of_bus(guest.bus()).is_none()) {
            return usage(
                "devices cannot be plugged into the root bus: use 01:00.0 and on with `run --hotplug`, or give --bus",
            );
        }
        let unseen = self.qmp.as_ref().and_then(|_| plugging::without_function_0(&self.guest));
        if let Some(unseen) = unseen {
            return Err(OperateError::Usage(format!(
                "the guest would not see {unseen} without a function 0 that comes with it: give that too, or a port for each device"
            )));
        }
        Ok(())
    }

    /// What is known of the devices, and their files.
    fn gather(&self) -> Result<(Addition, Vec<PathBuf>), OperateError> {
        let (host, sysfs) = (Host::default(), Sysfs::new("/sys"));
        let (mut devices, mut nodes, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        for (address, guest) in self.devices.iter().zip(&self.guest) {
            let Inspection { group, facts, granule, usable_unknown } = inspect(&host, *address)?;
            let unusable = |source| OperateError::Unusable { device: *address, source };
            if let Some(source) = usable_unknown {
                return Err(unusable(source));
            }
            let node = sysfs.vfio_node(*address)?.ok_or_else(|| unusable(UsableError::NotBound))?;
            nodes.push(Path::new("/dev/vfio/devices").join(&node));
            devices.push(Device {
                id: Text(EndpointId::from(*guest)),
                host: Text(*address),
                node,
                granule,
                facts: (&facts).into(),
            });
            groups.push(group);
        }
        let Some(first) = groups.first() else { return Err(OperateError::Usage("give a device".to_owned())) };
        if let Some(other) = groups.iter().find(|group| group.number != first.number) {
            let text = format!(
                "the devices are in IOMMU groups {} and {}: add those of one group at a time",
                first.number, other.number
            );
            return Err(OperateError::Usage(text));
        }
        let vfio_members = sysfs.vfio_members(first)?.into_iter().map(Text).collect();
        Ok((Addition { group: first.number, vfio_members, devices }, nodes))
    }
}
