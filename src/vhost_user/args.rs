// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's command line.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, ValueEnum};

use super::backend::OnStop;
use super::logging::LogFormat;
use crate::control::Place;
use crate::device::Settings;
use crate::id::{EndpointId, PciAddress};
use crate::queue::Polling;
use crate::reserved::arguments::PolicyArguments;
use crate::sandbox::SeccompMode;

/// What `--sandbox` is if nobody says. The runtime of a sanitizer has a thread and files of its own.
const SANDBOX: &str = if cfg!(sanitized) { "off" } else { "on" };

/// Reads how much to log; what is none of the levels is answered with all of them.
pub fn log_levels() -> impl TypedValueParser<Value = log::LevelFilter> {
    PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"]).try_map(|text| text.parse())
}

/// A virtio-iommu device as a vhost-user backend.
///
/// The host IOMMU's true reserved regions are reported to the guest, per endpoint; the guest's mappings are carried into
/// the host's IOMMU through iommufd. The launcher opens /dev/iommu and the devices' /dev/vfio/devices/vfioN and passes
/// the same files to the VMM and to this process. One frontend is served; when it is gone every endpoint is blocked.
///
/// The process stays in the foreground. It exits with 0 when all was well (SIGTERM included), 1 for what went wrong at run time,
/// 2 for the arguments, 3 for the host (and guest memory that is cut off), 4 for a frontend that broke the protocol, 5 if it cannot be
/// confined.
#[derive(Clone, Debug, Parser)]
#[allow(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
#[command(name = "vhost-device-iommu", version, max_term_width = 100)]
pub struct Arguments {
    /// Path of the vhost-user socket. It is created, with access for its owner only; a socket that nobody listens on
    /// is replaced.
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Number of the inherited vhost-user socket: one that listens, or one that the frontend is connected to. Without this and
    /// --socket-path the socket is the one that the service manager passes (`LISTEN_FDS`).
    #[arg(long, value_name = "FDNUM")]
    pub fd: Option<RawFd>,

    /// Number of an inherited file: as soon as a frontend can connect, a newline is written to it, and it is closed. A service
    /// manager that waits on `NOTIFY_SOCKET` is told in any case.
    #[arg(long, value_name = "FD")]
    pub ready_fd: Option<RawFd>,

    /// Print what kind of vhost-user backend this is, as JSON, and exit. Whatever else is given is ignored.
    #[arg(long)]
    pub print_capabilities: bool,

    /// Check arguments, passed files and facts, print what the guest would be told of each endpoint, and exit as a start would.
    /// Nothing is served, and no socket is touched.
    #[arg(long)]
    pub check: bool,

    /// With --check: print JSON instead of tables.
    #[arg(long, requires = "check")]
    pub json: bool,

    /// Path of a control socket, for viommuctl: what there is, and adding and removing devices while the guest runs. It is created,
    /// with access for its owner only, in a directory that nobody else can write to; one that is not there is created.
    #[arg(long, value_name = "PATH")]
    pub control_path: Option<PathBuf>,

    /// Number of an inherited Unix stream socket that listens, to be the control socket. A service manager passes it under the name
    /// `control`.
    #[arg(long, value_name = "FD", conflicts_with = "control_path")]
    pub control_fd: Option<RawFd>,

    /// Number of the inherited /dev/iommu.
    #[arg(long, value_name = "FD")]
    pub iommufd_fd: Option<RawFd>,

    /// An assigned device: what the guest calls it, the number of its inherited VFIO device file, and optionally its
    /// address on the host, which is then checked. Can be given several times; all devices of a host IOMMU group that
    /// are bound to VFIO must be. With none, the guest is offered --input-range, or as many bits of address as --max-address-width
    /// says, or 48.
    #[arg(long, value_name = "id=BDF,cdev-fd=FD[,host=BDF]", requires = "iommufd_fd")]
    pub endpoint: Vec<EndpointArgument>,

    /// What is known of the devices' groups, as `viommuctl inspect --facts-out` writes it. Without it, sysfs is asked
    /// for reserved regions, and --input-range must say how far addresses go.
    #[arg(long, value_name = "FILE")]
    pub facts: Option<PathBuf>,

    /// What the guest is told of reserved regions.
    #[command(flatten)]
    pub policy: PolicyArguments,

    /// Whether endpoints reach guest memory as it is until the guest's driver takes over.
    #[arg(long, value_name = "on|off", default_value = "on")]
    pub boot_bypass: OnOff,

    /// What happens when the frontend stops the rings. It does so for a pause as well as for a reset of the guest: `keep`
    /// tells them apart when it starts them again; `reset` takes each for a reset, so that firmware can use assigned
    /// devices after a reboot, and gives up pausing.
    #[arg(long, value_name = "keep|reset", default_value = "keep")]
    pub on_stop: OnStop,

    /// How long to watch the request ring after work, in microseconds, so that the next request needs no kick; at most 10000.
    /// `auto` is as long as it is worth it, up to 200, and 0 for a guest that is idle.
    #[arg(long, value_name = "auto|N|0", default_value = "auto")]
    pub poll_us: Polling,

    /// Offer `VIRTIO_F_ACCESS_PLATFORM`: for machines that translate or restrict the device's own memory accesses.
    #[arg(long)]
    pub access_platform: bool,

    /// How many mappings a guest domain may have.
    #[arg(long, value_name = "N", default_value_t = Settings::DEFAULT_MAX_MAPPINGS)]
    pub max_mappings: usize,

    /// How many mappings all guest domains may have together.
    #[arg(long, value_name = "N", default_value_t = Settings::DEFAULT_MAX_MAPPINGS_IN_ALL)]
    pub max_mappings_in_all: usize,

    /// How many domains a guest may have.
    #[arg(long, value_name = "N", default_value_t = Settings::DEFAULT_MAX_DOMAINS)]
    pub max_domains: usize,

    /// Write what is counted and measured to this file, in Prometheus' text format, for a collector such as `node_exporter`'s
    /// `textfile`. Whoever reads it has all of it. It is removed at the end.
    #[arg(long, value_name = "PATH")]
    pub metrics_file: Option<PathBuf>,

    /// How often to write it, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 15, requires = "metrics_file", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub metrics_interval: u32,

    /// End when the process that started this one ends, whether or not a frontend is there.
    #[arg(long)]
    pub exit_with_parent: bool,

    /// Whether to give up, before the frontend is listened to, all that is not needed to serve it: capabilities (but `CAP_IPC_LOCK`),
    /// files and network (Landlock, where the kernel has it), and calls of the kernel (--seccomp). A process that cannot do so does not
    /// start. With `off` nothing is given up.
    #[arg(long, value_name = "on|off", default_value = SANDBOX)]
    pub sandbox: OnOff,

    /// What becomes of a call of the kernel that is not needed: `kill` ends the process, whose devices are then taken off its mappings;
    /// `trap` sends it SIGSYS, for debuggers; `log` has the kernel log it; `off` lets it be made.
    #[arg(long, value_name = "kill|trap|log|off", default_value = "kill")]
    pub seccomp: SeccompMode,

    /// How much to log. By default what `RUST_LOG` says, else info; with both, what both let pass.
    #[arg(long, value_name = "LEVEL", value_parser = log_levels(), ignore_case = true)]
    pub log_level: Option<log::LevelFilter>,

    /// How lines of the log look: `text`; `json`, an object for each line; `journal`, with the priorities that systemd's journal reads.
    #[arg(long, value_name = "text|json|journal", default_value = "text")]
    pub log_format: LogFormat,
}

/// What `--print-capabilities` prints: `VHostUserBackendCapabilities` of QEMU's docs/interop/vhost-user.json, whose list of types has
/// no `iommu` yet.
pub const CAPABILITIES: &str = r#"{"type": "iommu"}"#;

/// Whether a command line asks for [`CAPABILITIES`]. By QEMU's conventions for backends whatever else is there is then ignored, so this
/// is to be asked before the command line is parsed.
pub fn asks_for_capabilities(mut arguments: impl Iterator<Item = OsString>) -> bool {
    arguments.any(|argument| argument == "--print-capabilities")
}

impl Arguments {
    /// How calls of the kernel are given up; `None` if nothing is given up.
    pub(super) fn confined(&self) -> Option<SeccompMode> {
        (self.sandbox == OnOff::On).then_some(self.seccomp)
    }

    /// Where the control socket is to be, if there is to be one.
    pub(super) fn control_place(&self) -> Option<Place<'_>> {
        self.control_path.as_deref().map(Place::Path).or(self.control_fd.map(Place::Fd))
    }

    /// Whether anybody can ask how long requests take: by the control socket, in the metrics, or in the log.
    pub(super) fn is_measured(&self) -> bool {
        self.control_place().is_some() || self.metrics_file.is_some() || log::max_level() >= log::LevelFilter::Debug
    }
}

/// A switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// Yes.
    On,
    /// No.
    Off,
}

/// An assigned device, as given on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointArgument {
    /// What the guest calls it.
    pub id: EndpointId,
    /// The number of its VFIO device file.
    pub cdev_fd: RawFd,
    /// Its address on the host.
    pub host: Option<PciAddress>,
}

/// A text that does not say what an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseEndpointError {
    /// Something is not `key=value`, or the key is not known.
    #[error("`{0}` is not one of id=BDF, cdev-fd=FD, host=BDF")]
    Key(String),
    /// A key is given twice.
    #[error("`{0}` is given twice")]
    Twice(&'static str),
    /// A key is missing.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A value is not what it should be.
    #[error("{0}")]
    Value(String),
}

impl FromStr for EndpointArgument {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (mut id, mut cdev_fd, mut host) = (None, None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("id", value)) => put(&mut id, "id", value)?,
                Some(("cdev-fd", value)) => put(&mut cdev_fd, "cdev-fd", value)?,
                Some(("host", value)) => put(&mut host, "host", value)?,
                _ => return Err(ParseEndpointError::Key(part.to_owned())),
            }
        }
        Ok(Self {
            id: id.ok_or(ParseEndpointError::Missing("id"))?,
            cdev_fd: cdev_fd.ok_or(ParseEndpointError::Missing("cdev-fd"))?,
            host,
        })
    }
}

fn put<T: FromStr>(slot: &mut Option<T>, key: &'static str, value: &str) -> Result<(), ParseEndpointError>
where
    T::Err: std::fmt::Display,
{
    let value = value.parse().map_err(|error| ParseEndpointError::Value(format!("{key}={value}: {error}")))?;
    if slot.replace(value).is_some() { Err(ParseEndpointError::Twice(key)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn an_endpoint_is_read() {
        let endpoint: EndpointArgument = "id=0000:00:03.0,cdev-fd=9,host=0000:01:00.0".parse().unwrap();
        let host = "01:00.0".parse().ok();
        assert_eq!(endpoint, EndpointArgument { id: EndpointId(0x18), cdev_fd: 9, host });
        assert_eq!("cdev-fd=9,id=00:03.0".parse::<EndpointArgument>().unwrap().host, None);
    }

    #[test]
    fn a_bad_endpoint_is_refused_with_its_part() {
        for (text, part) in [
            ("id=00:03.0", "`cdev-fd` is missing"),
            ("cdev-fd=9", "`id` is missing"),
            ("id=00:03.0,cdev-fd=9,fd=9", "`fd=9`"),
            ("id=00:03.0,cdev-fd=x", "cdev-fd=x"),
            ("id=3,cdev-fd=9", "id=3: `3` is not a PCI address"),
            ("id=00:03.0,id=00:04.0,cdev-fd=9", "`id` is given twice"),
        ] {
            let error = text.parse::<EndpointArgument>().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
