// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Is this host ready to assign these devices? One finding for each thing that must be so, with a remedy for each that is
//! not.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;

use super::inspect::inspect;
use super::memlock::{Grant, how_to_raise, locked_at_most};
use super::size::Size;
use crate::causes::with_causes;
use crate::id::PciAddress;
use crate::reserved::gather::Host;
use crate::reserved::plan::is_software_msi;
use crate::reserved::sysfs::{IommuGroup, Sysfs, SysfsError};
use crate::reserved::{Driver, HostFacts, HostRegion, HostRegionKind};

/// The device of QEMU that a vhost-user backend of any kind can be behind.
pub(super) const QEMU_DEVICE: &str = "vhost-user-test-device-pci";

/// What is to be checked.
#[derive(Clone, Debug)]
pub struct Question {
    /// The devices that are to be assigned to one guest; none if all come later.
    pub devices: Vec<PciAddress>,
    /// The QEMU that is to run it.
    pub qemu: PathBuf,
    /// How much memory the guest is to have, if that is known.
    pub memory: Option<Size>,
}

/// How a finding bears on the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it must be.
    Ok,
    /// Not known, or not as it should be; it may work.
    Warning,
    /// It will not work.
    No,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How it bears on the answer.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// The findings for one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceReport {
    /// The device.
    pub device: String,
    /// Whether it can be assigned.
    pub ready: bool,
    /// What was looked at.
    pub findings: Vec<Finding>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether everything is ready.
    pub ready: bool,
    /// What concerns all devices.
    pub host: Vec<Finding>,
    /// What concerns each device.
    pub devices: Vec<DeviceReport>,
}

impl Finding {
    fn ok(found: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn warning(found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warning, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn no(found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::No, found: found.into(), remedy: Some(remedy.into()) }
    }
}

fn all_well(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.verdict != Verdict::No)
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warning => "warn",
            Verdict::No => "NO  ",
        };
        write!(f, "  {mark} {}", self.found)?;
        match &self.remedy {
            Some(remedy) => write!(f, "\n       -> {remedy}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "host")?;
        for finding in &self.host {
            writeln!(f, "{finding}")?;
        }
        for device in &self.devices {
            let verdict = if device.ready { "ready" } else { "NOT ready" };
            writeln!(f, "{}: {verdict}", device.device)?;
            for finding in &device.findings {
                writeln!(f, "{finding}")?;
            }
        }
        f.write_str(if self.ready { "ready" } else { "NOT ready" })
    }
}

/// Looks at the host. Devices that are idle are attached to an empty address space for a moment.
pub fn check(host: &Host, question: &Question) -> Report {
    let memlock = check_memlock(Grant::of_this_process(), question.memory, question.devices.len());
    let findings = vec![check_iommufd(), check_qemu(&question.qemu), memlock];
    let devices: Vec<_> = question.devices.iter().map(|device| check_device(host, *device, question)).collect();
    let ready = all_well(&findings) && devices.iter().all(|device| device.ready);
    Report { ready, host: findings, devices }
}

fn check_iommufd() -> Finding {
    match File::options().read(true).write(true).open("/dev/iommu") {
        Ok(_) => Finding::ok("/dev/iommu can be opened"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::no(
            "there is no /dev/iommu",
            "`modprobe iommufd`; if there is no such module, use Linux 6.6 or later with CONFIG_IOMMUFD",
        ),
        Err(error) => Finding::no(
            format!("/dev/iommu cannot be opened: {error}"),
            "run with access to /dev/iommu, such as root's",
        ),
    }
}

fn check_qemu(qemu: &Path) -> Finding {
    let run = |argument: &[&str]| Command::new(qemu).args(argument).output();
    let remedy = format!(
        "install QEMU 11.1 or later, or name one (`check --qemu PATH`, `run ... -- PATH`): {QEMU_DEVICE} is needed"
    );
    let version = match run(&["--version"]) {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.lines().next().unwrap_or_default().to_owned()
        }
        Ok(output) => return Finding::no(format!("{} does not run: {}", qemu.display(), output.status), remedy),
        Err(error) => return Finding::no(format!("{} cannot be run: {error}", qemu.display()), remedy),
    };
    let devices = run(&["-device", "help"]).map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    if devices.is_ok_and(|list| list.contains(QEMU_DEVICE)) {
        Finding::ok(format!("{version} has {QEMU_DEVICE}"))
    } else {
        Finding::no(format!("{version} has no {QEMU_DEVICE}"), remedy)
    }
}

fn check_memlock(grant: Grant, memory: Option<Size>, devices: usize) -> Finding {
    let found = format!("memory that may be locked: {grant}");
    let Some(memory) = memory else {
        let remedy = "give the guest's memory with --memory to see whether that is enough";
        return if grant.covers(u64::MAX) { Finding::ok(found) } else { Finding::warning(found, remedy) };
    };
    let needed = locked_at_most(memory.0, devices as u64);
    if grant.covers(needed) {
        return Finding::ok(format!("{found}, enough for a guest of {memory}"));
    }
    let needed_for = "QEMU locks all of it, bypass all of it, and the guest's mappings up to all of it for each device";
    let found = format!("{found}, and a guest of {memory} may need {}: {needed_for}", Size(needed));
    Finding::no(found, how_to_raise(needed))
}

fn check_device(host: &Host, device: PciAddress, question: &Question) -> DeviceReport {
    let findings = device_findings(host, device, question);
    DeviceReport { device: device.to_string(), ready: all_well(&findings), findings }
}

fn device_findings(host: &Host, device: PciAddress, question: &Question) -> Vec<Finding> {
    let sysfs = Sysfs::new(&host.sysfs);
    let group = match sysfs.group(device) {
        Ok(group) => group,
        Err(error @ SysfsError::NoDevice { .. }) => {
            return vec![Finding::no(error.to_string(), "`lspci -D` lists the devices of this host")];
        }
        Err(error) => {
            let remedy =
                "turn the IOMMU on: VT-d or AMD-Vi in the firmware, intel_iommu=on on the kernel's command line";
            return vec![Finding::no(error.to_string(), remedy)];
        }
    };
    let mut findings = vec![check_group_is_real(&sysfs, &group), check_driver(host, device)];
    findings.extend(check_members(&sysfs, device, &group, &question.devices));
    findings.push(check_direct(&group));
    let (driver, system) = (sysfs.iommu_driver(device).unwrap_or_default(), rustix::system::uname());
    findings.extend(check_software_msi(&group, driver, &system.release().to_string_lossy()));
    if all_well(&findings) {
        findings.push(check_usable(host, device));
    }
    findings
}

/// A device without an IOMMU has a group too, when VFIO is told to do without: nothing isolates it.
fn check_group_is_real(sysfs: &Sysfs, group: &IommuGroup) -> Finding {
    if sysfs.is_noiommu(group.number) {
        return Finding::no(
            format!("group {} is no IOMMU group: its DMA is not translated (vfio-noiommu)", group.number),
            "turn the host's IOMMU on (intel_iommu=on, amd_iommu=on), and enable_unsafe_noiommu_mode off",
        );
    }
    let count = group.members.len();
    let devices = if count == 1 { "device" } else { "devices" };
    Finding::ok(format!("IOMMU group {} with {count} {devices}", group.number))
}

/// What gives a device to vfio-pci, to be typed as it stands.
fn how_to_bind(host: &Host, device: PciAddress, is_bound: bool) -> String {
    let bus = host.sysfs.join("bus/pci");
    let module = if bus.join("drivers/vfio-pci").exists() { "" } else { "modprobe vfio-pci; " };
    let bus = bus.display();
    let unbind =
        if is_bound { format!("echo {device} >{bus}/devices/{device}/driver/unbind; ") } else { String::new() };
    format!(
        "bind it, once the host does not use it any more (unmount disks): `{module}echo vfio-pci \
         >{bus}/devices/{device}/driver_override; {unbind}echo {device} >{bus}/drivers_probe`; or `driverctl set-override \
         {device} vfio-pci`, which lasts over reboots"
    )
}

fn check_driver(host: &Host, device: PciAddress) -> Finding {
    let remedy = |is_bound| how_to_bind(host, device, is_bound);
    let sysfs = Sysfs::new(&host.sysfs);
    match sysfs.driver(device) {
        Ok(Some(driver)) if sysfs.is_vfio(device).is_ok_and(|is_vfio| is_vfio) => match sysfs.vfio_node(device) {
            Ok(Some(node)) => Finding::ok(format!("bound to {driver}, as /dev/vfio/devices/{node}")),
            _ => Finding::no(
                format!("bound to {driver}, without a VFIO device file"),
                "use a kernel with CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or later)",
            ),
        },
        Ok(Some(driver)) => Finding::no(format!("bound to {driver}"), remedy(true)),
        Ok(None) => Finding::no("bound to no driver", remedy(false)),
        Err(error) => Finding::no(error.to_string(), remedy(false)),
    }
}

/// The other devices of the group: those that VFIO has must be assigned too, and no other driver may have one.
fn check_members(sysfs: &Sysfs, device: PciAddress, group: &IommuGroup, given: &[PciAddress]) -> Vec<Finding> {
    // drivers/vfio/group.c and the drivers that set driver_managed_dma: these do no DMA of their own.
    const HARMLESS: [&str; 2] = ["pcieport", "pci-stub"];
    let mut findings = Vec::new();
    for member in group.members.iter().filter(|member| **member != device && !given.contains(member)) {
        let Ok(Some(driver)) = sysfs.driver(*member) else { continue };
        if sysfs.is_vfio(*member).is_ok_and(|is_vfio| is_vfio) {
            findings.push(Finding::no(
                format!("{member} is in the same group and bound to {driver}, but is not assigned"),
                format!("assign {member} too, or unbind it"),
            ));
        } else if !HARMLESS.contains(&driver.as_str()) {
            findings.push(Finding::no(
                format!("{member} is in the same group and in use by the host ({driver})"),
                format!("bind {member} to vfio-pci and assign it too, or unbind it"),
            ));
        }
    }
    findings
}

fn check_direct(group: &IommuGroup) -> Finding {
    let mut regions = group.reserved_regions.iter().flatten();
    match regions.find(|region| region.kind == HostRegionKind::Direct) {
        None => Finding::ok("no region must stay mapped to itself"),
        Some(HostRegion { range, .. }) => Finding::no(
            format!("the firmware wants {range} mapped to itself at all times (`direct`): VFIO refuses the device"),
            "ask the platform's vendor, or assign another device",
        ),
    }
}

/// Before Linux 6.15 a device whose MSI doorbell is mapped by software could not change its address space.
fn check_software_msi(group: &IommuGroup, driver: Driver, release: &str) -> Option<Finding> {
    group.reserved_regions.iter().flatten().find(|region| is_software_msi(region, driver))?;
    let facts = HostFacts { kernel: Some(release.to_owned()), ..HostFacts::default() };
    match facts.kernel_version() {
        Some(version) if version >= (6, 15) => None,
        Some(_) => Some(Finding::no(
            format!(
                "Linux {release} maps the group's MSI doorbell once and for all: interrupts end when a guest attaches"
            ),
            "use Linux 6.15 or later",
        )),
        None => Some(Finding::warning(
            format!("Linux {release} may lose interrupts when a guest attaches"),
            "use Linux 6.15 or later",
        )),
    }
}

/// What to do about a device that another process has, or seems to have.
fn who_uses(host: &Host, device: PciAddress) -> String {
    let node = Sysfs::new(&host.sysfs).vfio_node(device).ok().flatten().unwrap_or_else(|| "vfio*".to_owned());
    format!(
        "end whatever uses the device, such as a guest (`fuser -v /dev/vfio/devices/{node}`); the kernel's log (dmesg) may \
         say more"
    )
}

fn check_usable(host: &Host, device: PciAddress) -> Finding {
    match inspect(host, device) {
        Err(error) => Finding::no(
            with_causes(&error),
            "run as root, who can read all of /sys and /proc; if that does not help, it is a mistake of this program: report it",
        ),
        Ok(inspection) => match (inspection.usable_unknown, inspection.facts.usable) {
            (None, Some(usable)) => Finding::ok(format!("can be attached; usable: {usable}")),
            (Some(reason), _) => {
                Finding::no(format!("cannot be attached: {}", with_causes(&reason)), who_uses(host, device))
            }
            (None, None) => Finding::no("cannot be attached", "the kernel's log (dmesg) may say why"),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs with 0000:01:00.0 and .1 in group 12.
    fn tree(drivers: [&str; 2], regions: &str, name: Option<&str>) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let group = directory.path().join("kernel/iommu_groups/12");
        fs::create_dir_all(group.join("devices")).unwrap();
        fs::write(group.join("reserved_regions"), regions).unwrap();
        if let Some(name) = name {
            fs::write(group.join("name"), name).unwrap();
        }
        for (function, driver) in ["0000:01:00.0", "0000:01:00.1"].iter().zip(drivers) {
            let device = directory.path().join("bus/pci/devices").join(function);
            fs::create_dir_all(&device).unwrap();
            if driver.contains("vfio") {
                fs::create_dir_all(device.join("vfio-dev/vfio7")).unwrap();
            }
            symlink("../../../../kernel/iommu_groups/12", device.join("iommu_group")).unwrap();
            if !driver.is_empty() {
                symlink(Path::new("../../drivers").join(driver), device.join("driver")).unwrap();
            }
            fs::write(group.join("devices").join(function), "").unwrap();
        }
        directory
    }

    fn noes(drivers: [&str; 2], regions: &str, name: Option<&str>, given: &[&str]) -> Vec<String> {
        let tree = tree(drivers, regions, name);
        let host = Host { sysfs: tree.path().to_owned(), proc: tree.path().to_owned() };
        let devices: Vec<PciAddress> = given.iter().map(|text| text.parse().unwrap()).collect();
        let question = Question { devices, qemu: PathBuf::new(), memory: None };
        let findings = device_findings(&host, question.devices[0], &question);
        assert!(findings.iter().all(|finding| (finding.verdict == Verdict::Ok) == finding.remedy.is_none()));
        findings.into_iter().filter(|finding| finding.verdict == Verdict::No).map(|finding| finding.found).collect()
    }

    const MSI: &str = "0x00000000fee00000 0x00000000feefffff msi\n";

    #[test]
    fn each_thing_that_is_not_as_it_must_be_is_named() {
        let first = &["0000:01:00.0"][..];
        let both = &["0000:01:00.0", "0000:01:00.1"][..];
        let one = |noes: Vec<String>, text: &str| {
            assert_eq!(noes.len(), 1, "{noes:?}");
            assert!(noes[0].contains(text), "{noes:?}");
        };
        one(noes(["nvme", ""], MSI, None, first), "bound to nvme");
        one(noes(["", ""], MSI, None, first), "bound to no driver");
        one(
            noes(["vfio-pci", "vfio-pci"], MSI, None, first),
            "0000:01:00.1 is in the same group and bound to vfio-pci",
        );
        one(
            noes(["mlx5_vfio_pci", "mlx5_vfio_pci"], MSI, None, first),
            "0000:01:00.1 is in the same group and bound to mlx5_vfio_pci, but is not assigned",
        );
        one(noes(["vfio-pci", "e1000e"], MSI, None, first), "in use by the host (e1000e)");
        one(noes(["vfio-pci", "pcieport"], "0x1000 0x1fff direct\n", None, first), "0x1000-0x1fff mapped to itself");
        one(noes(["vfio-pci", ""], MSI, Some("vfio-noiommu\n"), first), "is no IOMMU group");
        one(noes(["vfio-pci", ""], MSI, None, &["0000:02:00.0"]), "there is no PCI device 0000:02:00.0");
        // Whatever else is well, this machine has no such device to attach.
        one(noes(["vfio-pci", "mlx5_vfio_pci"], MSI, None, both), "cannot be attached");
        one(noes(["mlx5_vfio_pci", ""], MSI, None, first), "cannot be attached");
        one(noes(["vfio-pci", "pcieport"], MSI, Some("other\n"), first), "cannot be attached");
    }

    #[test]
    fn the_remedy_for_a_device_that_is_not_bound_can_be_typed() {
        let bound = tree(["nvme", ""], MSI, None);
        let host = Host { sysfs: bound.path().to_owned(), proc: bound.path().to_owned() };
        let remedy = |device: &str| check_driver(&host, device.parse().unwrap()).remedy.unwrap();
        let bus = bound.path().join("bus/pci");
        let bind = |unbind: &str, device: &str| {
            let (bus, path) = (bus.display(), bus.join("devices").join(device));
            let path = path.display();
            format!("echo vfio-pci >{path}/driver_override; {unbind}echo {device} >{bus}/drivers_probe`")
        };
        let unbind = format!("echo 0000:01:00.0 >{}/devices/0000:01:00.0/driver/unbind; ", bus.display());
        let said = remedy("0000:01:00.0");
        assert!(said.contains(&format!("`modprobe vfio-pci; {}", bind(&unbind, "0000:01:00.0"))), "{said}");
        fs::create_dir_all(bus.join("drivers/vfio-pci")).unwrap();
        let said = remedy("0000:01:00.1");
        assert!(said.contains(&format!("`{}", bind("", "0000:01:00.1"))), "{said}");
    }

    #[test]
    fn who_uses_a_device_is_asked_of_its_own_file() {
        let tree = tree(["vfio-pci", ""], MSI, None);
        let host = Host { sysfs: tree.path().to_owned(), proc: tree.path().to_owned() };
        let said = who_uses(&host, "0000:01:00.0".parse().unwrap());
        assert!(said.contains("`fuser -v /dev/vfio/devices/vfio7`"), "{said}");
    }

    #[test]
    fn a_doorbell_that_software_maps_needs_a_kernel_that_maps_it_anew() {
        let verdict = |regions: &str, driver, release| {
            let tree = tree(["vfio-pci", ""], regions, None);
            let group = Sysfs::new(tree.path()).group("0000:01:00.0".parse().unwrap()).unwrap();
            check_software_msi(&group, driver, release).map(|finding| finding.verdict)
        };
        let software = "0x0000000008000000 0x00000000080fffff msi\n";
        assert_eq!(verdict(software, Driver::ArmSmmuV3, "6.14.9"), Some(Verdict::No));
        assert_eq!(verdict(software, Driver::ArmSmmuV3, "6.15.0"), None);
        assert_eq!(verdict(software, Driver::ArmSmmuV3, "strange"), Some(Verdict::Warning));
        assert_eq!(verdict(software, Driver::IntelVtd, "6.14.9"), None);
        assert_eq!(verdict(MSI, Driver::ArmSmmuV3, "6.14.9"), None);
    }

    #[test]
    fn what_may_be_locked_is_compared_with_all_that_a_guest_may_need() {
        let guest = Some(Size(1 << 30));
        let verdict = |grant, memory| check_memlock(grant, memory, 2).verdict;
        let limit = |bytes| Grant::Limit(bytes);
        for grant in [Grant::Capability, Grant::Unlimited] {
            assert_eq!((verdict(grant, guest), verdict(grant, None)), (Verdict::Ok, Verdict::Ok));
        }
        assert_eq!(verdict(limit(4 << 30), guest), Verdict::Ok);
        assert_eq!(verdict(limit((4 << 30) - 1), guest), Verdict::No);
        assert_eq!(verdict(limit(4 << 30), None), Verdict::Warning);
        // What can be typed is enough.
        let remedy = check_memlock(limit(0), Some(Size(1)), 0).remedy.unwrap();
        assert!(remedy.contains("`ulimit -l 1`"), "{remedy}");
    }

    #[test]
    fn a_qemu_that_is_not_there_is_named() {
        let finding = check_qemu(Path::new("/nowhere/qemu"));
        assert_eq!(finding.verdict, Verdict::No);
        assert!(finding.found.contains("/nowhere/qemu cannot be run"), "{finding}");
        assert!(finding.remedy.unwrap().contains("`check --qemu PATH`"));
    }
}
