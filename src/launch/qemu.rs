// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What QEMU's command line needs for a guest behind the daemon.

use std::ops::RangeInclusive;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use super::check::QEMU_DEVICE;
use super::plugging::share_slot;
use super::size::{ParseSizeError, Size};
use crate::id::{EndpointId, PciAddress};
use crate::spec;

/// What QEMU calls its iommufd.
pub(super) const IOMMUFD: &str = "viommu-iommufd";
/// In which slot of the root bus the first of the ports for devices that are added later is.
const FIRST_PORT: u8 = 0x10;
/// How many ports there can be.
pub const MOST_PORTS: u8 = 8;
/// In which slots of the root bus devices are, if nobody says. QEMU puts its display, its network cards and whatever has no `addr=` into
/// the first ones that are free, the display and the cards before any `-device`; q35 has its own devices in the last one.
const DEVICE_SLOTS: RangeInclusive<u8> = 0x08..=0x1e;

/// Marks the place in a command line where the arguments go; without it they go to the end.
const PLACE: &str = "@IOMMU@";

/// What the arguments refer to.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// The table for the guest.
    pub viot: PathBuf,
    /// The number of the inherited `/dev/iommu`.
    pub iommufd: RawFd,
    /// Where the guest has the IOMMU.
    pub iommu: PciAddress,
    /// Where the guest has each device, and the number of its inherited file.
    pub devices: Vec<(PciAddress, RawFd)>,
    /// For devices that are added later.
    pub hotplug: Option<Hotplug>,
}

/// What QEMU needs for devices that are added while the guest runs.
#[derive(Clone, Debug)]
pub struct Hotplug {
    /// How many ports there are, each for one device: from 00:10.0 on, at most [`MOST_PORTS`]. The firmware numbers the buses behind
    /// them from 1 on, if there are no other bridges.
    pub ports: u8,
    /// Where QEMU's monitor listens.
    pub monitor: PathBuf,
}

/// Where devices can be on the root bus, in order, that leave room for the IOMMU and ports for others.
pub fn free_places(iommu: PciAddress, ports: u8) -> impl Iterator<Item = PciAddress> {
    let places = DEVICE_SLOTS.map(|slot| PciAddress::from(EndpointId(u32::from(slot) << 3)));
    places.filter(move |place| !share_slot(*place, iommu) && !is_in_slot_of_port(*place, ports))
}

fn is_in_slot_of_port(place: PciAddress, ports: u8) -> bool {
    let is_on_root_bus = (place.segment(), place.bus()) == (0, 0);
    is_on_root_bus && place.device().checked_sub(FIRST_PORT).is_some_and(|index| index < ports)
}

/// What QEMU calls the port whose bus has this number in the guest; `None` for the root bus.
pub fn port_of_bus(bus: u8) -> Option<String> {
    Some(port(bus.checked_sub(1)?))
}

fn port(index: u8) -> String {
    format!("viommu-port{index}")
}

/// A command line that nothing can be added to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QemuError {
    /// There is no command.
    #[error("after `--`, give QEMU's command line")]
    Empty,
    /// There are two places.
    #[error("{PLACE} stands in it twice")]
    PlaceTwice,
    /// How much memory the guest has is not said.
    #[error("give the guest's memory with -m SIZE: it must be shared with the daemon")]
    NoMemory,
    /// Its size cannot be read.
    #[error("-m")]
    Memory(#[from] ParseSizeError),
    /// The guest's memory cannot be shared.
    #[error("the memory backend `{0}` is not shared: add share=on to its -object")]
    NotShared(String),
    /// A function is not where QEMU's root bus is.
    #[error("{0} is not on bus 0 of segment 0, where the guest's devices are put")]
    NotOnRootBus(PciAddress),
    /// A function is where a port is.
    #[error(
        "{0} is where the guest has a port for devices that come later: choose another place with --guest or --iommu"
    )]
    OnPort(PciAddress),
}

/// How much memory the guest is to have, by `-m`.
///
/// # Errors
///
/// [`QemuError::Memory`]
pub fn memory(command: &[String]) -> Result<Option<Size>, QemuError> {
    let Some(value) = values(command, &["-m"]).next() else {
        return Ok(None);
    };
    let first = value.split(',').next().unwrap_or_default();
    let size = first.strip_prefix("size=").unwrap_or(first);
    Ok(Some(size.parse()?))
}

/// The command line with all that a guest behind the daemon needs.
///
/// # Errors
///
/// [`QemuError`]
pub(super) fn command(command: &[String], parts: &Parts) -> Result<Vec<String>, QemuError> {
    if command.is_empty() {
        return Err(QemuError::Empty);
    }
    if command.iter().filter(|argument| *argument == PLACE).count() > 1 {
        return Err(QemuError::PlaceTwice);
    }
    let mut added = shared_memory(command)?;
    added.extend(["-acpitable".to_owned(), format!("file={}", escape(&parts.viot))]);
    added.extend(["-chardev".to_owned(), format!("socket,id=viommu,path={}", escape(&parts.socket))]);
    let address = slot(parts.iommu)?;
    let device = format!(
        "{QEMU_DEVICE},addr={address},chardev=viommu,virtio-id={},num_vqs={},vq_size=256,config_size={}",
        spec::DEVICE_ID,
        spec::QUEUE_COUNT,
        spec::config::SIZE
    );
    added.extend(["-device".to_owned(), device]);
    added.extend(["-object".to_owned(), format!("iommufd,id={IOMMUFD},fd={}", parts.iommufd)]);
    for (index, (guest, fd)) in parts.devices.iter().enumerate() {
        // QEMU 11.1 crashes on fd= without id=.
        let device = format!("vfio-pci,id=viommu-device{index},fd={fd},iommufd={IOMMUFD},addr={}", slot(*guest)?);
        added.extend(["-device".to_owned(), device]);
    }
    if let Some(Hotplug { ports, monitor }) = &parts.hotplug {
        let mut taken = parts.devices.iter().map(|(guest, _)| *guest).chain([parts.iommu]);
        if let Some(place) = taken.find(|place| is_in_slot_of_port(*place, *ports)) {
            return Err(QemuError::OnPort(place));
        }
        added.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", escape(monitor))]);
        for index in 0..*ports {
            let (id, number, place) = (port(index), index + 1, FIRST_PORT + index);
            added.push("-device".to_owned());
            added.push(format!("pcie-root-port,id={id},bus=pcie.0,addr={place:x}.0,chassis={number},slot={number}"));
        }
    }
    Ok(match command.iter().position(|argument| argument == PLACE) {
        Some(place) => {
            let (before, after) = command.split_at(place);
            before.iter().chain(&added).chain(after.iter().skip(1)).cloned().collect()
        }
        None => command.iter().chain(&added).cloned().collect(),
    })
}

/// The values of options by these names.
fn values<'a>(command: &'a [String], names: &'a [&str]) -> impl Iterator<Item = &'a str> {
    let pairs = command.iter().zip(command.iter().skip(1));
    pairs.filter(|(name, _)| names.contains(&name.as_str())).map(|(_, value)| value.as_str())
}

/// The value of a key in `a=b,c=d`.
fn key<'a>(value: &'a str, key: &str) -> Option<&'a str> {
    value.split(',').find_map(|part| part.strip_prefix(key)?.strip_prefix('='))
}

/// What is to be added so that the guest's memory is shared; nothing if it is.
fn shared_memory(command: &[String]) -> Result<Vec<String>, QemuError> {
    let machines = values(command, &["-machine", "-M"]).filter_map(|value| key(value, "memory-backend"));
    let nodes = values(command, &["-numa"]).filter_map(|value| key(value, "memdev"));
    let backends: Vec<&str> = machines.chain(nodes).collect();
    for backend in &backends {
        let mut objects = values(command, &["-object"]);
        let shared = objects.any(|object| key(object, "id") == Some(backend) && key(object, "share") == Some("on"));
        if !shared {
            return Err(QemuError::NotShared((*backend).to_owned()));
        }
    }
    if !backends.is_empty() {
        return Ok(Vec::new());
    }
    let size = memory(command)?.ok_or(QemuError::NoMemory)?;
    Ok(vec![
        "-object".to_owned(),
        format!("memory-backend-memfd,id=viommu-memory,size={size},share=on"),
        "-machine".to_owned(),
        "memory-backend=viommu-memory".to_owned(),
    ])
}

/// A place on the root bus, as `addr=` has it.
fn slot(address: PciAddress) -> Result<String, QemuError> {
    if address.segment() != 0 || address.bus() != 0 {
        return Err(QemuError::NotOnRootBus(address));
    }
    Ok(format!("{:x}.{:x}", address.device(), address.function()))
}

/// A path in a comma-separated value: QEMU wants commas doubled.
fn escape(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// An argument as a shell reads it.
pub(super) fn quote(argument: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "-_./=:,@%+".contains(character);
    if !argument.is_empty() && argument.chars().all(plain) {
        argument.to_owned()
    } else {
        format!("'{}'", argument.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> Parts {
        Parts {
            socket: "/run/a,b/iommu.sock".into(),
            viot: "/run/viot.bin".into(),
            iommufd: 8,
            iommu: "00:01.0".parse().unwrap(),
            devices: vec![("00:03.0".parse().unwrap(), 9), ("00:1f.7".parse().unwrap(), 10)],
            hotplug: None,
        }
    }

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(ToOwned::to_owned).collect()
    }

    fn make(text: &str) -> Result<String, QemuError> {
        command(&words(text), &parts()).map(|command| command.join(" "))
    }

    const IOMMU: &str = "-acpitable file=/run/viot.bin -chardev socket,id=viommu,path=/run/a,,b/iommu.sock \
        -device vhost-user-test-device-pci,addr=1.0,chardev=viommu,virtio-id=23,num_vqs=2,vq_size=256,config_size=40 \
        -object iommufd,id=viommu-iommufd,fd=8 \
        -device vfio-pci,id=viommu-device0,fd=9,iommufd=viommu-iommufd,addr=3.0 \
        -device vfio-pci,id=viommu-device1,fd=10,iommufd=viommu-iommufd,addr=1f.7";

    #[test]
    fn memory_is_made_shared() {
        let memory =
            "-object memory-backend-memfd,id=viommu-memory,size=4G,share=on -machine memory-backend=viommu-memory";
        let expected = format!("qemu -machine q35 -m 4G {memory} {IOMMU}");
        assert_eq!(make("qemu -machine q35 -m 4G").unwrap(), expected);
        assert!(make("qemu -m size=512M,slots=2").unwrap().contains("size=512M,share=on"));
    }

    #[test]
    fn memory_that_is_shared_is_left_as_it_is() {
        let line = "qemu -m 4G -M q35,memory-backend=ram -object memory-backend-memfd,id=ram,size=4G,share=on";
        assert_eq!(make(line).unwrap(), format!("{line} {IOMMU}"));
        let numa = "qemu -object memory-backend-memfd,share=on,id=a,size=4G -numa node,memdev=a";
        assert_eq!(make(numa).unwrap(), format!("{numa} {IOMMU}"));
    }

    #[test]
    fn ports_are_made_for_what_comes_later() {
        let hotplug = Some(Hotplug { ports: 2, monitor: "/run/qmp.sock".into() });
        let made = command(&words("qemu -m 1G"), &Parts { hotplug, ..parts() }).unwrap().join(" ");
        let expected = "-qmp unix:/run/qmp.sock,server=on,wait=off \
             -device pcie-root-port,id=viommu-port0,bus=pcie.0,addr=10.0,chassis=1,slot=1 \
             -device pcie-root-port,id=viommu-port1,bus=pcie.0,addr=11.0,chassis=2,slot=2";
        assert!(made.ends_with(expected), "{made}");
        assert_eq!((port_of_bus(2), port_of_bus(0)), (Some("viommu-port1".to_owned()), None));
    }

    #[test]
    fn nothing_is_put_where_a_port_is() {
        let hotplug = || Some(Hotplug { ports: 2, monitor: "/run/qmp.sock".into() });
        for (iommu, device, taken) in [
            ("00:01.0", "00:0f.7", None),
            ("00:01.0", "00:12.0", None),
            ("00:01.0", "00:10.0", Some("00:10.0")),
            ("00:01.0", "00:11.7", Some("00:11.7")),
            ("00:10.0", "00:03.0", Some("00:10.0")),
        ] {
            let devices = vec![(device.parse().unwrap(), 9)];
            let parts = Parts { iommu: iommu.parse().unwrap(), devices, hotplug: hotplug(), ..parts() };
            let error = command(&words("qemu -m 1G"), &parts).err();
            assert_eq!(error, taken.map(|taken| QemuError::OnPort(taken.parse().unwrap())));
        }
    }

    #[test]
    fn places_are_free_of_the_iommu_and_of_ports() {
        let places = |iommu: &str, ports| -> Vec<u8> {
            let places = free_places(iommu.parse().unwrap(), ports);
            places.map(PciAddress::device).collect()
        };
        assert_eq!(places("00:1e.0", 0), (0x08..0x1e).collect::<Vec<_>>());
        assert_eq!(places("00:09.0", 4), [0x08].into_iter().chain(0x0a..0x10).chain(0x14..0x1f).collect::<Vec<_>>());
    }

    #[test]
    fn the_place_can_be_said() {
        let made = make("qemu -m 1G @IOMMU@ -device edu").unwrap();
        assert!(made.starts_with("qemu -m 1G -object memory") && made.ends_with("addr=1f.7 -device edu"), "{made}");
    }

    #[test]
    fn what_cannot_work_is_refused() {
        assert_eq!(make(""), Err(QemuError::Empty));
        assert_eq!(make("qemu"), Err(QemuError::NoMemory));
        assert_eq!(make("qemu @IOMMU@ -m 1G @IOMMU@"), Err(QemuError::PlaceTwice));
        assert!(matches!(make("qemu -m lots"), Err(QemuError::Memory(_))));
        let private = "qemu -m 4G -M memory-backend=ram -object memory-backend-ram,id=ram,size=4G";
        assert_eq!(make(private), Err(QemuError::NotShared("ram".to_owned())));
        let far = Parts { iommu: "01:01.0".parse().unwrap(), ..parts() };
        assert!(matches!(command(&words("qemu -m 1G"), &far), Err(QemuError::NotOnRootBus(_))));
    }

    #[test]
    fn arguments_are_quoted_for_a_shell() {
        assert_eq!(quote("-m"), "-m");
        assert_eq!(quote("console=ttyS0 quiet"), "'console=ttyS0 quiet'");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }
}
