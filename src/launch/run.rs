// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon and QEMU, started together over the same files.

use std::fs::{self, File};
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, FdFlags, fcntl_setfd};

use super::directory::{Directory, DirectoryError};
use super::inspect::inspect;
use super::output::say;
use super::qemu::{self, Hotplug, Parts, QemuError, quote};
use crate::causes::with_causes;
use crate::id::{EndpointId, PciAddress};
use crate::reserved::facts::{FactsError, FactsFile};
use crate::reserved::gather::{GatherError, Host};
use crate::reserved::sysfs::{Sysfs, SysfsError};
use crate::topology::viot::{self, PciFunctions, ViotError};
use crate::vhost_user::{SocketError, make_room};

/// How long the daemon may take until it listens.
const PATIENCE: Duration = Duration::from_secs(20);
/// The number that the first file has in printed commands.
const FIRST_PRINTED_FD: RawFd = 8;

/// A device that is to be the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The device on the host.
    pub host: PciAddress,
    /// Where the guest is to have it.
    pub guest: PciAddress,
}

/// What is to be started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The devices; there need be none if some can be added later.
    pub devices: Vec<Assignment>,
    /// Where the guest is to have the IOMMU.
    pub iommu: PciAddress,
    /// The daemon's program.
    pub daemon: PathBuf,
    /// Further options of the daemon.
    pub daemon_options: Vec<String>,
    /// Where files and the socket are put.
    pub directory: Directory,
    /// How many devices can be added while the guest runs; at most [`qemu::MOST_PORTS`]. With any the daemon has a control socket.
    pub hotplug: u8,
    /// QEMU's command line.
    pub qemu: Vec<String>,
}

/// Commands that cannot be made or started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// QEMU's command line.
    #[error("QEMU's command line: {0}")]
    Qemu(#[from] QemuError),
    /// The guest's table.
    #[error(transparent)]
    Viot(#[from] ViotError),
    /// The host does not tell.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// The host does not tell.
    #[error(transparent)]
    Inspect(#[from] GatherError),
    /// A device's facts are not known.
    #[error("{device}: {reason}")]
    NoFacts {
        /// The device.
        device: PciAddress,
        /// Why.
        reason: String,
    },
    /// The facts cannot be written.
    #[error(transparent)]
    Facts(#[from] FactsError),
    /// The files have no place.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The daemon's socket has no place.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A file cannot be had.
    #[error("cannot use {}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The daemon did not come up.
    #[error("{} did not start: see {}", .daemon.display(), .log.display())]
    Daemon {
        /// The program.
        daemon: PathBuf,
        /// What it said.
        log: PathBuf,
    },
}

impl LaunchError {
    /// The exit code: 1 run time, 2 usage, 3 host.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Sysfs(_) | Self::Inspect(_) | Self::NoFacts { .. } => 3,
            Self::Facts(_)
            | Self::File { .. }
            | Self::Daemon { .. }
            | Self::Directory(DirectoryError::Io { .. })
            | Self::Socket(SocketError::Io { .. }) => 1,
            Self::Qemu(_) | Self::Viot(_) | Self::Directory(_) | Self::Socket(_) => 2,
        }
    }
}

/// The two commands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Commands {
    daemon: Vec<String>,
    qemu: Vec<String>,
}

impl Launch {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The commands, with files by these numbers: `/dev/iommu`, then each device.
    fn commands(&self, iommufd: RawFd, devices: &[RawFd]) -> Result<Commands, LaunchError> {
        let mut daemon = vec![self.daemon.display().to_string()];
        daemon.extend(["--socket-path".to_owned(), self.path("iommu.sock").display().to_string()]);
        if !self.devices.is_empty() {
            daemon.extend(["--facts".to_owned(), self.path("facts.json").display().to_string()]);
        }
        daemon.push(format!("--iommufd-fd={iommufd}"));
        for (Assignment { host, guest }, fd) in self.devices.iter().zip(devices) {
            daemon.push(format!("--endpoint=id={guest},cdev-fd={fd},host={host}"));
        }
        if self.hotplug > 0 {
            daemon.extend(["--control-path".to_owned(), self.control().display().to_string()]);
        }
        daemon.extend(self.daemon_options.iter().cloned());
        let monitor = self.path("qmp.sock");
        let hotplug = (self.hotplug > 0).then_some(Hotplug { ports: self.hotplug, monitor });
        let parts = Parts {
            socket: self.path("iommu.sock"),
            viot: self.path("viot.bin"),
            iommufd,
            iommu: self.iommu,
            devices: self.devices.iter().map(|device| device.guest).zip(devices.iter().copied()).collect(),
            hotplug,
        };
        Ok(Commands { daemon, qemu: qemu::command(&self.qemu, &parts)? })
    }

    /// The guest's table, which also makes sure that no place is taken twice. Of the ports' places QEMU's command line makes sure.
    fn viot(&self) -> Result<Vec<u8>, LaunchError> {
        let mut functions: Vec<PciFunctions> =
            self.devices.iter().map(|device| PciFunctions::from(device.guest)).collect();
        functions.extend(self.later()?);
        Ok(viot::table(self.iommu, functions)?)
    }

    /// Where devices can be added later: all that is behind the ports.
    fn later(&self) -> Result<Option<PciFunctions>, LaunchError> {
        if self.hotplug == 0 {
            return Ok(None);
        }
        let text = format!("01:00.0-{:02x}:1f.7", self.hotplug);
        Ok(Some(text.parse()?))
    }

    fn control(&self) -> PathBuf {
        self.path("control").join("socket")
    }

    /// How a device is added while the guest runs, and taken away; empty if none can be.
    pub fn how_to_add(&self) -> String {
        if self.hotplug == 0 {
            return String::new();
        }
        let sockets = [self.control(), self.path("qmp.sock")].map(|path| quote(&path.display().to_string()));
        let [control, monitor] = sockets;
        let last = self.hotplug;
        format!(
            "to add a device while the guest runs, at one of 01:00.0 to {last:02x}:00.0, and to take it away:\n\
             viommuctl add BDF --guest 01:00.0 --control {control} --qmp {monitor}\n\
             viommuctl remove 01:00.0 --control {control} --qmp {monitor}"
        )
    }

    /// What [`start`](Self::start) would do, as lines for a shell.
    ///
    /// # Errors
    ///
    /// [`LaunchError`]
    pub fn lines(&self, sysfs: &Sysfs) -> Result<String, LaunchError> {
        self.viot()?;
        let hosts: Vec<String> = self.devices.iter().map(|device| device.host.to_string()).collect();
        let guests: Vec<String> = self.devices.iter().map(|device| device.guest.to_string()).collect();
        let facts = self.path("facts.json").display().to_string();
        let table = self.path("viot.bin").display().to_string();
        let endpoints = guests.iter().cloned().chain(self.later()?.map(|later| later.to_string()));
        let mut lines = vec!["# for bash, in a shell of its own with access to /dev/iommu and /dev/vfio".to_owned()];
        let directory = quote(&self.directory.path().display().to_string());
        // As Directory::make does, but for who else can write to one that is given.
        lines.push(match self.directory {
            Directory::New(_) => format!("mkdir -m 700 {directory} || exit"),
            Directory::Given(_) => {
                format!("mkdir -p -m 700 {directory} && [ -O {directory} ] && [ ! -L {directory} ] || exit")
            }
        });
        if !hosts.is_empty() {
            lines.push(format!("viommuctl inspect {} --facts-out {}", hosts.join(" "), quote(&facts)));
        }
        lines.push(format!(
            "viommuctl viot --iommu {} --endpoints {} -o {}",
            self.iommu,
            endpoints.collect::<Vec<_>>().join(","),
            quote(&table)
        ));
        let mut opened = format!("exec {FIRST_PRINTED_FD}<>/dev/iommu");
        let mut numbers = Vec::new();
        for (device, number) in self.devices.iter().zip(FIRST_PRINTED_FD + 1..) {
            let node = vfio_node(sysfs, device.host)?;
            opened = format!("{opened} {number}<>/dev/vfio/devices/{node}");
            numbers.push(number);
        }
        lines.push(opened);
        let commands = self.commands(FIRST_PRINTED_FD, &numbers)?;
        let shell = |command: &[String]| command.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
        lines.push(format!("{} &", shell(&commands.daemon)));
        // The socket of a daemon that was killed is there, too, but not in the kernel's list of those that live.
        let socket = quote(&format!(" {}", self.path("iommu.sock").display()));
        lines.push(format!("while kill -0 $! && ! grep -qF {socket} /proc/net/unix; do sleep 0.1; done"));
        lines.push(shell(&commands.qemu));
        lines.extend(self.how_to_add().lines().map(|line| format!("# {line}")));
        Ok(lines.join("\n"))
    }

    /// Gathers the facts, writes the guest's table, opens the files, starts the daemon, and becomes QEMU. Returns only
    /// if that failed.
    pub fn start(&self, sysfs: &Sysfs) -> LaunchError {
        let Err(error) = self.try_start(sysfs);
        error
    }

    fn try_start(&self, sysfs: &Sysfs) -> Result<std::convert::Infallible, LaunchError> {
        // What is wrong with the arguments is said before a file is made or opened. (Whether the host is ready was looked at
        // before, for which idle devices are attached for a moment.)
        self.commands(0, &vec![0; self.devices.len()])?;
        let table = self.viot()?;
        let facts = self.gather_facts()?;

        self.directory.make()?;
        if !facts.devices.is_empty() {
            facts.write(&self.path("facts.json"))?;
        }
        fs::write(self.path("viot.bin"), table).map_err(at(&self.path("viot.bin")))?;

        let iommufd = open(Path::new("/dev/iommu"))?;
        let devices = self.open_devices(sysfs)?;
        let numbers: Vec<RawFd> = devices.iter().map(AsRawFd::as_raw_fd).collect();
        let commands = self.commands(iommufd.as_raw_fd(), &numbers)?;
        self.start_daemon(&commands.daemon)?;
        if self.hotplug > 0 {
            say(format_args!("{}", self.how_to_add()));
        }

        let mut words = commands.qemu.iter();
        let program = words.next().map(PathBuf::from).unwrap_or_default();
        let source = Command::new(&program).args(words).exec();
        // The daemon ends with this process.
        Err(LaunchError::File { path: program, source })
    }

    fn gather_facts(&self) -> Result<FactsFile, LaunchError> {
        let mut file = FactsFile::default();
        for device in self.devices.iter().map(|device| device.host) {
            let inspection = inspect(&Host::default(), device)?;
            if let Some(reason) = inspection.usable_unknown {
                return Err(LaunchError::NoFacts { device, reason: with_causes(&reason) });
            }
            file.devices.push((EndpointId::from(device), inspection.facts));
        }
        Ok(file)
    }

    fn open_devices(&self, sysfs: &Sysfs) -> Result<Vec<File>, LaunchError> {
        let mut files = Vec::new();
        for device in &self.devices {
            files.push(open(&Path::new("/dev/vfio/devices").join(vfio_node(sysfs, device.host)?))?);
        }
        Ok(files)
    }

    /// Starts the daemon and waits until QEMU can connect.
    fn start_daemon(&self, command: &[String]) -> Result<(), LaunchError> {
        let (log, socket) = (self.path("daemon.log"), self.path("iommu.sock"));
        // Whoever listens there is not this one.
        make_room(&socket)?;
        let output = File::create(&log).map_err(at(&log))?;
        let (ready, told) = io::pipe().map_err(at(&self.daemon))?;
        fcntl_setfd(&told, FdFlags::empty()).map_err(|errno| at(&self.daemon)(errno.into()))?;
        let mut child = Command::new(&self.daemon)
            .args(command.iter().skip(1))
            .arg("--exit-with-parent")
            .arg(format!("--ready-fd={}", told.as_raw_fd()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn()
            .map_err(at(&self.daemon))?;
        // So that the daemon's end is seen.
        drop(told);
        if is_told(ready) {
            return Ok(());
        }
        let _ = child.kill();
        let _ = child.wait();
        Err(LaunchError::Daemon { daemon: self.daemon.clone(), log })
    }
}

/// Waits for the daemon to say that it is ready, which it does not if it ends.
fn is_told(mut ready: PipeReader) -> bool {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(0), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&ready, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => (),
            Err(_) | Ok(0) => return false,
            Ok(_) => return matches!(ready.read(&mut [0]), Ok(1)),
        }
    }
}

fn vfio_node(sysfs: &Sysfs, device: PciAddress) -> Result<String, LaunchError> {
    let reason = format!("it is not bound to vfio-pci: `viommuctl check {device}` says what to do");
    sysfs.vfio_node(device)?.ok_or(LaunchError::NoFacts { device, reason })
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> LaunchError {
    let path = path.to_owned();
    |source| LaunchError::File { path, source }
}

/// Opens a file that children inherit.
fn open(path: &Path) -> Result<File, LaunchError> {
    let file = File::options().read(true).write(true).open(path).map_err(at(path))?;
    fcntl_setfd(file.as_fd(), FdFlags::empty()).map_err(|errno| at(path)(errno.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::vhost_user::close;

    #[test]
    fn a_daemon_is_waited_for_until_it_is_ready_or_gone() {
        let place = tempfile::tempdir().unwrap();
        let program = place.path().join("daemon");
        let mut launch = Launch { daemon: "/bin/sh".into(), ..launch(Directory::Given(place.path().to_owned())) };
        let start = |launch: &Launch, script: &str| {
            // The last of its arguments is --ready-fd=N.
            fs::write(&program, format!("for last; do :; done; fd=${{last#--ready-fd=}}; {script}")).unwrap();
            launch.start_daemon(&[String::new(), program.display().to_string()])
        };
        let marker = place.path().join("marker");
        start(&launch, &format!("touch {}; echo >/proc/$$/fd/$fd; sleep 1", marker.display())).unwrap();
        assert!(marker.exists());
        let error = start(&launch, "exit 3").unwrap_err();
        assert!(matches!(error, LaunchError::Daemon { .. }), "{error}");
        launch.daemon = "/nowhere".into();
        assert!(matches!(start(&launch, ""), Err(LaunchError::File { .. })));
    }

    fn launch(directory: Directory) -> Launch {
        Launch {
            devices: vec![Assignment { host: "01:00.0".parse().unwrap(), guest: "00:03.0".parse().unwrap() }],
            iommu: "00:01.0".parse().unwrap(),
            daemon: "/bin/vhost-device-iommu".into(),
            daemon_options: vec!["--relaxable=report".to_owned()],
            directory,
            hotplug: 0,
            qemu: ["qemu", "-m", "1G"].map(ToOwned::to_owned).to_vec(),
        }
    }

    #[test]
    fn both_commands_name_the_same_files() {
        let launch = launch(Directory::Given("/run/vm".into()));
        let Commands { daemon, qemu } = launch.commands(20, &[21]).unwrap();
        let expected = "/bin/vhost-device-iommu --socket-path /run/vm/iommu.sock --facts /run/vm/facts.json --iommufd-fd=20 \
                        --endpoint=id=0000:00:03.0,cdev-fd=21,host=0000:01:00.0 --relaxable=report";
        assert_eq!(daemon.join(" "), expected);
        let qemu = qemu.join(" ");
        assert!(qemu.contains("path=/run/vm/iommu.sock") && qemu.contains("file=/run/vm/viot.bin"));
        assert!(
            qemu.contains("iommufd,id=viommu-iommufd,fd=20") && qemu.contains("fd=21,iommufd=viommu-iommufd,addr=3.0")
        );
    }

    #[test]
    fn without_a_device_there_are_no_facts_and_room_for_those_that_come() {
        let launch = Launch { devices: Vec::new(), hotplug: 2, ..launch(Directory::Given("/run/vm".into())) };
        let Commands { daemon, qemu } = launch.commands(20, &[]).unwrap();
        let expected = "/bin/vhost-device-iommu --socket-path /run/vm/iommu.sock --iommufd-fd=20 --control-path \
                        /run/vm/control/socket --relaxable=report";
        assert_eq!(daemon.join(" "), expected);
        let qemu = qemu.join(" ");
        assert!(qemu.contains("iommufd,id=viommu-iommufd,fd=20") && qemu.contains("viommu-port1"), "{qemu}");
        assert!(!qemu.contains("vfio-pci"), "{qemu}");
        let lines = launch.lines(&Sysfs::new("/nowhere")).unwrap();
        assert!(!lines.contains("inspect") && lines.contains("--endpoints 0000:01:00.0-0000:02:1f.7"), "{lines}");
    }

    #[test]
    fn the_daemon_is_waited_for_and_not_the_socket_that_another_left() {
        let place = tempfile::tempdir().unwrap();
        let launch = Launch { daemon: "/bin/false".into(), ..launch(Directory::Given(place.path().to_owned())) };
        let socket = place.path().join("iommu.sock");
        close(UnixListener::bind(&socket).unwrap(), &socket);
        let error = launch.start_daemon(&[String::new()]).unwrap_err();
        assert!(matches!(error, LaunchError::Daemon { .. }), "{error}");
        assert!(!socket.exists());
        let _live = UnixListener::bind(&socket).unwrap();
        let error = launch.start_daemon(&[String::new()]).unwrap_err();
        assert!(matches!(error, LaunchError::Socket(SocketError::InUse(_))), "{error}");
        assert!(socket.exists());
    }

    #[test]
    fn the_printed_lines_make_the_directory_as_it_would_be_made() {
        let place = tempfile::tempdir().unwrap();
        let sysfs = place.path().join("sys");
        fs::create_dir_all(sysfs.join("bus/pci/devices/0000:01:00.0/vfio-dev/vfio7")).unwrap();
        let make = |directory: &Directory| {
            let lines = launch(directory.clone()).lines(&Sysfs::new(&sysfs)).unwrap();
            let line = lines.lines().find(|line| line.starts_with("mkdir")).unwrap();
            Command::new("bash").args(["-c", line]).stderr(Stdio::null()).status().unwrap().success()
        };
        let new = Directory::New(place.path().join("a new one"));
        assert!(make(&new));
        assert!(!make(&new), "it is there");
        let given = Directory::Given(place.path().join("above/below it"));
        assert!(make(&given) && make(&given));
        let link = place.path().join("link");
        std::os::unix::fs::symlink(given.path(), &link).unwrap();
        assert!(!make(&Directory::Given(link)));
    }

    #[test]
    fn the_printed_lines_wait_for_the_daemon_and_not_for_the_socket_that_another_left() {
        let place = tempfile::tempdir().unwrap();
        let sysfs = place.path().join("sys");
        fs::create_dir_all(sysfs.join("bus/pci/devices/0000:01:00.0/vfio-dev/vfio7")).unwrap();
        let socket = place.path().join("iommu.sock");
        let lines = launch(Directory::Given(place.path().to_owned())).lines(&Sysfs::new(&sysfs)).unwrap();
        let wait = lines.lines().find(|line| line.starts_with("while")).unwrap();
        // What stands for the daemon lives for a second.
        let waits = || {
            let started = Instant::now();
            let script = format!("sleep 1 & {wait}");
            assert!(Command::new("bash").args(["-c", &script]).stderr(Stdio::null()).status().unwrap().success());
            started.elapsed() >= Duration::from_secs(1)
        };
        let listener = UnixListener::bind(&socket).unwrap();
        assert!(!waits(), "somebody listens");
        close(listener, &socket);
        assert!(socket.exists() && waits(), "nobody listens");
    }
}
