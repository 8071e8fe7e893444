// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a fact came from.

use std::fmt;
use std::str::FromStr;

/// The facts that can come from more than one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fact {
    /// [`HostFacts::usable`](super::HostFacts::usable)
    Usable,
    /// [`HostFacts::aperture`](super::HostFacts::aperture)
    Aperture,
    /// [`HostFacts::windows`](super::HostFacts::windows)
    Windows,
    /// [`HostFacts::bars`](super::HostFacts::bars)
    Bars,
    /// [`HostFacts::inbound`](super::HostFacts::inbound)
    Inbound,
    /// [`HostFacts::acs_isolated`](super::HostFacts::acs_isolated)
    AcsIsolated,
}

/// A place that facts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// An address space of iommufd that only this group was attached to.
    Iommufd,
    /// A container of VFIO type1 that only this group was in.
    VfioType1,
    /// The capability registers of the IOMMU, as its driver shows them in sysfs.
    IommuRegisters,
    /// `/proc/iomem`
    ProcIomem,
    /// `ranges` and `dma-ranges` of the host bridge in the device tree.
    DeviceTree,
    /// The devices' own BAR registers.
    PciConfig,
    /// The devices' `resource` files, whose addresses are the CPU's.
    PciResource,
    /// Which devices the kernel put into one group.
    GroupMembers,
    /// The operator.
    Operator,
}

/// A name of no fact, or of no source.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the name of a {1}")]
pub struct ParseSourceError(String, &'static str);

impl Fact {
    const NAMES: [(Self, &'static str); 6] = [
        (Self::Usable, "usable"),
        (Self::Aperture, "aperture"),
        (Self::Windows, "windows"),
        (Self::Bars, "bars"),
        (Self::Inbound, "inbound"),
        (Self::AcsIsolated, "acs_isolated"),
    ];
}

impl Source {
    const NAMES: [(Self, &'static str); 9] = [
        (Self::Iommufd, "iommufd"),
        (Self::VfioType1, "vfio-type1"),
        (Self::IommuRegisters, "iommu-registers"),
        (Self::ProcIomem, "proc-iomem"),
        (Self::DeviceTree, "device-tree"),
        (Self::PciConfig, "pci-config"),
        (Self::PciResource, "pci-resource"),
        (Self::GroupMembers, "group-members"),
        (Self::Operator, "operator"),
    ];
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(fact, _)| fact == self);
        f.write_str(name.map_or("", |(_, name)| name))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(source, _)| source == self);
        f.write_str(name.map_or("", |(_, name)| name))
    }
}

impl FromStr for Fact {
    type Err = ParseSourceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::NAMES.iter().find(|(_, name)| *name == text);
        known.map(|(fact, _)| *fact).ok_or_else(|| ParseSourceError(text.to_owned(), "fact"))
    }
}

impl FromStr for Source {
    type Err = ParseSourceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::NAMES.iter().find(|(_, name)| *name == text);
        known.map(|(source, _)| *source).ok_or_else(|| ParseSourceError(text.to_owned(), "source of facts"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_and_sources_have_names() {
        for (fact, name) in Fact::NAMES {
            assert_eq!((fact.to_string().as_str(), name.parse()), (name, Ok(fact)));
        }
        for (source, name) in Source::NAMES {
            assert_eq!((source.to_string().as_str(), name.parse()), (name, Ok(source)));
        }
        assert!("rumour".parse::<Source>().unwrap_err().to_string().contains("`rumour`"));
    }
}
