// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Facts as JSON: what `viommuctl inspect` writes, and what `viommuctl plan` and the daemon read.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::limited::read_text_from;
use super::plan::{Inbound, PeerToPeer, Policy, Relaxable};
use super::{Driver, Fact, HostFacts, HostRegion, Source};
use crate::id::EndpointId;
use crate::range::{IovaRange, RangeSet, parse_address};

/// The most bytes of a file of facts that are read.
const LARGEST: u64 = 256 << 10;

/// A file of facts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FactsFile {
    /// What the operator chose; files of facts alone have the defaults.
    pub policy: Policy,
    /// What is known of each device.
    pub devices: Vec<(EndpointId, HostFacts)>,
}

/// A file of facts that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    /// The file cannot be read or written.
    #[error("cannot access {}", .path.display())]
    Access {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is in it is no list of facts.
    #[error("{} is not a file of facts", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// A device is described twice.
    #[error("{} describes {id} twice", .path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// The device.
        id: EndpointId,
    },
}

impl FactsFile {
    /// Reads a file; `-` is the standard input.
    ///
    /// # Errors
    ///
    /// [`FactsError`]
    pub fn read(path: &Path) -> Result<Self, FactsError> {
        let failed = |source| FactsError::Access { path: path.to_owned(), source };
        let file = if path == Path::new("-") {
            Box::new(io::stdin()) as Box<dyn Read>
        } else {
            Box::new(fs::File::open(path).map_err(failed)?)
        };
        let text = read_text_from(file, LARGEST).map_err(failed)?;
        let file = Self::from_json(&text).map_err(|source| FactsError::Format { path: path.to_owned(), source })?;
        for (index, (id, _)) in file.devices.iter().enumerate() {
            if file.devices.iter().take(index).any(|(other, _)| other == id) {
                return Err(FactsError::Twice { path: path.to_owned(), id: *id });
            }
        }
        Ok(file)
    }

    /// Writes a file, in place of one that is there.
    ///
    /// # Errors
    ///
    /// [`FactsError::Access`]
    pub fn write(&self, path: &Path) -> Result<(), FactsError> {
        fs::write(path, self.to_json()).map_err(|source| FactsError::Access { path: path.to_owned(), source })
    }

    /// What is known of a device.
    pub fn get(&self, id: EndpointId) -> Option<&HostFacts> {
        self.devices.iter().find(|(device, _)| *device == id).map(|(_, facts)| facts)
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    ///
    /// What is wrong, and in which line.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        let document: Document = serde_json::from_str(text)?;
        let devices = document.endpoints.into_iter().map(|device| (device.id.0, device.facts.into()));
        Ok(Self { policy: document.policy.map(Policy::from).unwrap_or_default(), devices: devices.collect() })
    }

    /// The file's text.
    pub fn to_json(&self) -> String {
        let device = |(id, facts): &(EndpointId, HostFacts)| Device { id: Text(*id), facts: facts.into() };
        let document = Document { policy: None, endpoints: self.devices.iter().map(device).collect() };
        // Strings and lists of strings only: nothing that JSON cannot say.
        let mut text = serde_json::to_string_pretty(&document).unwrap_or_default();
        text.push('\n');
        text
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default, skip_serializing)]
    policy: Option<Choices>,
    endpoints: Vec<Device>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
struct Choices {
    relaxable: Option<Relaxable>,
    inbound: Option<Inbound>,
    p2p: Option<PeerToPeer>,
    max_address_width: Option<u8>,
    guest_msi: Option<Pair>,
    input_range: Option<Pair>,
    probe_size: Option<u32>,
    guest_ram: Option<Vec<Pair>>,
}

impl From<Choices> for Policy {
    fn from(choices: Choices) -> Self {
        Self {
            relaxable: choices.relaxable.unwrap_or_default(),
            inbound: choices.inbound.unwrap_or_default(),
            peer_to_peer: choices.p2p.unwrap_or_default(),
            max_address_width: choices.max_address_width,
            guest_msi: choices.guest_msi.map(|range| range.0),
            input_range: choices.input_range.map(|range| range.0),
            probe_size: choices.probe_size,
            guest_ram: choices.guest_ram.into_iter().flatten().map(|range| range.0).collect(),
        }
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Device {
    id: Text<EndpointId>,
    facts: Facts,
}

/// What is known of a device, as it is written.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Facts {
    kernel: Option<String>,
    driver: Option<Text<Driver>>,
    reserved_regions: Option<Vec<Text<HostRegion>>>,
    usable: Option<Vec<Pair>>,
    aperture: Option<Pair>,
    windows: Option<Vec<Pair>>,
    bars: Option<Vec<Pair>>,
    inbound: Option<Vec<Pair>>,
    acs_isolated: Option<bool>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    sources: BTreeMap<Text<Fact>, Text<Source>>,
}

fn set(ranges: Option<Vec<Pair>>) -> Option<RangeSet> {
    ranges.map(|ranges| ranges.into_iter().map(|range| range.0).collect())
}

fn pairs(set: Option<&RangeSet>) -> Option<Vec<Pair>> {
    set.map(|set| set.ranges().iter().copied().map(Pair).collect())
}

impl From<Facts> for HostFacts {
    fn from(facts: Facts) -> Self {
        Self {
            kernel: facts.kernel,
            driver: facts.driver.map(|driver| driver.0).unwrap_or_default(),
            reserved_regions: facts
                .reserved_regions
                .map(|regions| regions.into_iter().map(|region| region.0).collect()),
            usable: set(facts.usable),
            aperture: facts.aperture.map(|range| range.0),
            windows: set(facts.windows),
            bars: facts.bars.map(|bars| bars.into_iter().map(|range| range.0).collect()),
            inbound: set(facts.inbound),
            acs_isolated: facts.acs_isolated,
            sources: facts.sources.into_iter().map(|(fact, source)| (fact.0, source.0)).collect(),
        }
    }
}

impl From<&HostFacts> for Facts {
    fn from(facts: &HostFacts) -> Self {
        Self {
            kernel: facts.kernel.clone(),
            driver: Some(Text(facts.driver)),
            reserved_regions: facts.reserved_regions.as_ref().map(|list| list.iter().cloned().map(Text).collect()),
            usable: pairs(facts.usable.as_ref()),
            aperture: facts.aperture.map(Pair),
            windows: pairs(facts.windows.as_ref()),
            bars: facts.bars.as_ref().map(|bars| bars.iter().copied().map(Pair).collect()),
            inbound: pairs(facts.inbound.as_ref()),
            acs_isolated: facts.acs_isolated,
            sources: facts.sources.iter().map(|(fact, source)| (Text(*fact), Text(*source))).collect(),
        }
    }
}

/// A value that is written as text.
#[derive(Deserialize, Serialize)]
#[serde(
    try_from = "String",
    into = "String",
    bound = "T: Clone + std::fmt::Display + std::str::FromStr, T::Err: std::error::Error"
)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Text<T>(pub T);

impl<T> TryFrom<String> for Text<T>
where
    T: std::str::FromStr,
    T::Err: std::error::Error,
{
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(Self).map_err(|error: T::Err| match error.source() {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        })
    }
}

impl<T: std::fmt::Display> From<Text<T>> for String {
    fn from(value: Text<T>) -> Self {
        value.0.to_string()
    }
}

/// A range, as two hexadecimal addresses, both inclusive.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(try_from = "[String; 2]", into = "[String; 2]")]
struct Pair(IovaRange);

impl TryFrom<[String; 2]> for Pair {
    type Error = String;

    fn try_from([start, last]: [String; 2]) -> Result<Self, String> {
        let address = |text: &str| parse_address(text).map_err(|error| error.to_string());
        let range = IovaRange::new(address(&start)?, address(&last)?);
        range.map(Self).ok_or_else(|| format!("the range {start} to {last} ends before it starts"))
    }
}

impl From<Pair> for [String; 2] {
    fn from(pair: Pair) -> Self {
        [pair.0.start(), pair.0.last()].map(|address| format!("{address:#x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN_INPUT: &str = r#"{ "policy": { "relaxable": "ignore" },
      "endpoints": [ { "id": "0000:00:03.0",
        "facts": { "kernel": "6.12", "driver": "intel-vtd",
          "reserved_regions": ["0x00000000fee00000 0x00000000feefffff msi"],
          "usable": [["0x0", "0xfedfffff"], ["0xfef00000", "0xffffffffffff"]],
          "aperture": null, "windows": [["0x80000000", "0xdfffffff"]], "bars": [],
          "inbound": null, "acs_isolated": null,
          "sources": { "windows": "proc-iomem", "usable": "iommufd" } } } ] }"#;

    #[test]
    fn facts_survive_a_round_trip() {
        let file = FactsFile::from_json(PLAN_INPUT).unwrap();
        let facts = file.get(EndpointId(0x18)).unwrap();
        assert_eq!(facts.usable.as_ref().unwrap().to_string(), "0x0-0xfedfffff, 0xfef00000-0xffffffffffff");
        assert_eq!(facts.reserved_regions.as_ref().unwrap().len(), 1);
        assert_eq!(facts.sources, [(Fact::Usable, Source::Iommufd), (Fact::Windows, Source::ProcIomem)].into());
        assert_eq!(file.policy, Policy::default());
        assert_eq!(FactsFile::from_json(&file.to_json()).unwrap(), file);
    }

    #[test]
    fn a_bad_file_is_refused_with_line_and_reason() {
        for (from, to, reason) in [
            ("\"0xfedfffff\"", "\"fish\"", "`fish` is not a hexadecimal address"),
            ("\"usable\"", "\"useable\"", "unknown field `useable`"),
            ("feefffff msi", "feefffff", "is not `START END TYPE`"),
            ("0000:00:03.0", "03", "`03` is not a PCI address"),
            ("intel-vtd", "intel", "`intel` is not the name of an IOMMU driver"),
            ("proc-iomem", "rumour", "`rumour` is not the name of a source of facts"),
            ("\"ignore\"", "\"sometimes\"", "unknown variant `sometimes`"),
            ("[\"0x0\", \"0xfedfffff\"]", "[\"0x2\", \"0x1\"]", "ends before it starts"),
        ] {
            let error = FactsFile::from_json(&PLAN_INPUT.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("line "), "{error}");
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("facts.json");
        fs::write(&path, r#"{"endpoints":[{"id":"00:03.0","facts":{}},{"id":"0000:00:03.0","facts":{}}]}"#).unwrap();
        assert!(matches!(FactsFile::read(&path), Err(FactsError::Twice { .. })));
    }
}
