// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All that a host's file systems say of a device's group, or copies of them from another host.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::bars::Bar;
use super::bridge::{self, BridgeWindow, HostBridge, IomemError};
use super::device_tree::{self, BridgeNode, DeviceTreeError};
use super::limited;
use super::sysfs::{IommuGroup, Sysfs, SysfsError};
use super::{Fact, HostFacts, Source};
use crate::id::PciAddress;
use crate::range::{IovaRange, RangeSet};

/// Where a host is looked at: its own file systems, or copies of them.
#[derive(Clone, Debug)]
pub struct Host {
    /// sysfs
    pub sysfs: PathBuf,
    /// proc
    pub proc: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { sysfs: "/sys".into(), proc: "/proc".into() }
    }
}

/// A host that does not tell what it should.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// sysfs
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// `/proc/iomem`
    #[error(transparent)]
    Iomem(#[from] IomemError),
    /// The device tree.
    #[error(transparent)]
    DeviceTree(#[from] DeviceTreeError),
}

impl Host {
    /// Whether this is the machine that we are on, with devices that can be opened.
    #[cfg(feature = "daemon")]
    pub(crate) fn is_here(&self) -> bool {
        self.sysfs == std::path::Path::new("/sys")
    }

    /// The kernel's release, if it can be read.
    fn kernel(&self) -> Option<String> {
        let release = limited::read_text(&self.proc.join("sys/kernel/osrelease")).ok()?;
        Some(release.trim().to_owned())
    }

    /// A device's group, and what the host shows of it. Which addresses the group can use is not in any file.
    ///
    /// # Errors
    ///
    /// [`GatherError`]
    pub fn facts(&self, address: PciAddress) -> Result<(IommuGroup, HostFacts), GatherError> {
        let sysfs = Sysfs::new(&self.sysfs);
        let group = sysfs.group(address)?;
        let mut sources = BTreeMap::from([(Fact::AcsIsolated, Source::GroupMembers)]);
        let aperture = sysfs.aperture(address)?;
        if aperture.is_some() {
            sources.insert(Fact::Aperture, Source::IommuRegisters);
        }
        let mut facts = HostFacts {
            kernel: self.kernel(),
            driver: sysfs.iommu_driver(address)?,
            reserved_regions: group.reserved_regions.clone(),
            aperture,
            acs_isolated: Some(sysfs.is_isolated(&group)?),
            sources,
            ..HostFacts::default()
        };
        if let Some(bridge) = sysfs.host_bridge(address)? {
            let node = sysfs.bridge_node(address)?.map(|node| device_tree::read(&node)).transpose()?;
            self.add_bridge(bridge, node, &sysfs.bars(bridge)?, &mut facts)?;
        }
        Ok((group, facts))
    }

    /// Adds windows, inbound addresses and BARs.
    fn add_bridge(
        &self,
        bridge: HostBridge,
        node: Option<BridgeNode>,
        bars: &[Bar],
        facts: &mut HostFacts,
    ) -> Result<(), GatherError> {
        let (windows, source) = match node {
            Some(node) => {
                facts.inbound = node.inbound;
                (Some(node.windows), Source::DeviceTree)
            }
            None => (self.windows_of_cpu(bridge, bars)?, Source::ProcIomem),
        };
        if facts.inbound.is_some() {
            facts.sources.insert(Fact::Inbound, Source::DeviceTree);
        }
        if let Some(windows) = &windows {
            facts.windows = Some(windows.iter().map(|window| window.bus).collect::<RangeSet>());
            facts.sources.insert(Fact::Windows, source);
        }
        let windows = windows.unwrap_or_default();
        // A BAR that does not tell is where a known window puts it, or where the CPU sees it.
        let on_bus = |bar: &Bar| {
            let by_window = || windows.iter().find_map(|window| window.on_bus(bar.cpu));
            bar.bus.or_else(by_window).unwrap_or(bar.cpu)
        };
        let mut on_bus: Vec<IovaRange> = bars.iter().map(on_bus).collect();
        on_bus.sort_unstable();
        on_bus.dedup();
        let told = bars.iter().any(|bar| bar.bus.is_some());
        facts.sources.insert(Fact::Bars, if told { Source::PciConfig } else { Source::PciResource });
        facts.bars = Some(on_bus);
        Ok(())
    }

    /// The windows in `/proc/iomem`, each where the bridge has it on its bus: a BAR in it that is seen from both sides tells,
    /// else it is taken to be at the same addresses.
    fn windows_of_cpu(&self, bridge: HostBridge, bars: &[Bar]) -> Result<Option<Vec<BridgeWindow>>, GatherError> {
        let place = |cpu: IovaRange| {
            let mut in_window = bars.iter().filter(|bar| cpu.covers(bar.cpu));
            let by_bar = in_window.find_map(|bar| Some((bar.cpu, bar.bus?)));
            let placed = by_bar.and_then(|known| BridgeWindow::behind(cpu, known));
            placed.unwrap_or(BridgeWindow { bus: cpu, cpu: Some(cpu) })
        };
        let windows = bridge::windows(&self.proc, bridge)?;
        Ok(windows.map(|windows| windows.into_iter().map(place).collect()))
    }
}
