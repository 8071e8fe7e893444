// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What client and daemon say to each other: one JSON object a line, in either direction.
//!
//! A line of the client's is `{"version":1,"request":"list"}` or `{"version":1,"request":{"domain":{"domain":1}}}`; a line of the
//! daemon's is `{"version":1,"reply":{"domain":{...}}}`, and `{"version":1,"reply":{"refused":{...}}}` for what it did not do. One
//! request is answered by one line, and a client waits for it before it sends the next. (Faults that are followed come as lines of
//! their own.) Keys that are not known are refused, so that a mistyped one is not taken for one that was left out.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use super::counters::{Bucket, Count, Durations, Stats, Times};
pub use super::level::Level;
use crate::access::Access;
use crate::id::{EndpointId, PciAddress};
use crate::range::{ParseRangeError, parse_address};
use crate::reserved::facts::{Facts, Text};

/// The version of all this.
pub const VERSION: u32 = 1;
/// How many bytes a line of a client's may have, without its end.
pub const LONGEST_LINE: usize = 256 << 10;
/// How many devices can be added, or endpoints removed, at once.
pub const MOST_DEVICES: usize = 32;
/// How many mappings a page has at most, and if nothing else is asked for.
pub const LARGEST_PAGE: u32 = 1024;

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Call {
    version: u32,
    request: Request,
}

#[derive(Debug, Deserialize)]
struct VersionOnly {
    version: u32,
}

#[derive(Debug, Deserialize, Serialize)]
struct Answer {
    version: u32,
    reply: Reply,
}

/// What a client asks for.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Which endpoints there are.
    List,
    /// Adds all devices of a host IOMMU group, whose files come with the line, in their order.
    Add(Addition),
    /// Takes endpoints away. They are answered for when their files are closed; the answer names those that may not be.
    Remove {
        /// The endpoints, at most [`MOST_DEVICES`].
        endpoints: Vec<Text<EndpointId>>,
    },
    /// The VMM has bound devices that were added: those that are to be blocked are blocked now, which they could not be before.
    Bound,
    /// What a domain is.
    Domain {
        /// Its number.
        domain: u32,
    },
    /// A page of a domain's mappings.
    Mappings {
        /// The domain's number.
        domain: u32,
        /// Mappings that end before this address are left out.
        #[serde(default)]
        from: Text<Address>,
        /// How many at most; no more than [`LARGEST_PAGE`], which is also the default.
        #[serde(default = "largest_page")]
        limit: u32,
    },
    /// What the guest is told of each endpoint.
    Plan,
    /// The faults that are remembered.
    Faults {
        /// Only those with a higher number.
        #[serde(default)]
        after: u64,
        /// Whether to go on with each that comes, until the client or the daemon ends.
        #[serde(default)]
        follow: bool,
    },
    /// What has been counted.
    Stats,
    /// Changes how much is logged.
    LogLevel {
        /// How much: `off`, `error`, `warn`, `info`, `debug` or `trace`.
        level: Level,
    },
}

const fn largest_page() -> u32 {
    LARGEST_PAGE
}

/// The devices of a host IOMMU group, and what is known of them.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Addition {
    /// The number of the group on the host.
    pub group: u32,
    /// All devices of the group that are bound to VFIO: each must be among the devices.
    pub vfio_members: Vec<Text<PciAddress>>,
    /// The devices, as many as files, at most [`MOST_DEVICES`].
    pub devices: Vec<Device>,
}

/// A device that is to be an endpoint.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// What the guest calls it.
    pub id: Text<EndpointId>,
    /// Its address on the host.
    pub host: Text<PciAddress>,
    /// The name of its file in `/dev/vfio/devices`.
    pub node: String,
    /// The smallest page that its IOMMU maps, in bytes, if that is known.
    #[serde(default)]
    pub granule: Option<u64>,
    /// What the host shows of its group.
    pub facts: Facts,
}

/// What the daemon answers.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// To `list`.
    Endpoints(Vec<Endpoint>),
    /// To `add`: what the guest is told of the new endpoints, as `viommuctl plan --json` prints it.
    Added(serde_json::Value),
    /// To `remove`.
    Removed(Removal),
    /// To `domain`.
    Domain(Domain),
    /// To `mappings`.
    Mappings(Page),
    /// To `plan`: as `viommuctl plan --json` prints it.
    Plan(serde_json::Value),
    /// To `faults`.
    Faults(Faults),
    /// One more fault, for a client that follows them.
    Fault(Fault),
    /// To `stats`.
    Stats(Box<Stats>),
    /// To `log-level`: how much is logged now.
    LogLevel(Level),
    /// Devices that are bound are where they are to be.
    Settled,
    /// To anything: it was not done, and nothing was changed, unless the message says otherwise.
    Refused(Refusal),
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Endpoint {
    /// What the guest calls it.
    pub id: Text<EndpointId>,
    /// The device on the host.
    pub host: Text<PciAddress>,
    /// The number of its IOMMU group on the host.
    pub group: u32,
    /// The name of its file below `/dev`.
    pub node: String,
    /// The domain that the guest has attached it to.
    pub domain: Option<u32>,
    /// What its DMA goes through.
    pub translation: Translation,
    /// The other endpoints of its group: they reach what it reaches.
    pub siblings: Vec<Text<EndpointId>>,
}

/// What the DMA of an endpoint's group goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Translation {
    /// What the VMM set up.
    AsFound,
    /// Nothing: it is refused.
    Blocked,
    /// Guest memory as it is.
    Bypass,
    /// The domain's mappings.
    Domain,
}

/// What was taken away.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Removal {
    /// The endpoints.
    pub endpoints: Vec<Text<EndpointId>>,
    /// Endpoints of the same groups that stay: as long as the host does not take the devices away, they reach what these reach.
    pub siblings: Vec<Text<EndpointId>>,
    /// Those of the endpoints whose files somebody else may hold still.
    #[serde(default)]
    pub held: Vec<Held>,
}

/// An endpoint that was removed and reaches nothing, but whose file the watcher did not say that it closed: before it does, the host
/// cannot have the device back.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Held {
    /// The endpoint.
    pub endpoint: Text<EndpointId>,
    /// Why, for people.
    pub reason: String,
}

/// A domain.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Domain {
    /// Its number.
    pub domain: u32,
    /// The endpoints that are attached.
    pub endpoints: Vec<Text<EndpointId>>,
    /// Whether every address means itself.
    pub bypass: bool,
    /// How many mappings it has.
    pub mappings: u64,
    /// Whether the host could not be brought in step: DMA is refused until the domain is emptied.
    pub poisoned: bool,
}

/// Mappings of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Page {
    /// The domain.
    pub domain: u32,
    /// The mappings, ascending.
    pub mappings: Vec<Mapping>,
    /// Where to go on, if there are more.
    pub next: Option<Text<Address>>,
}

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Mapping {
    /// The first virtual address.
    pub start: Text<Address>,
    /// The last one.
    pub end: Text<Address>,
    /// Where the first one leads in guest memory.
    pub physical: Text<Address>,
    /// Whether it may be read.
    pub read: bool,
    /// Whether it may be written.
    pub write: bool,
}

impl Mapping {
    /// What an endpoint may do there.
    pub const fn access(&self) -> Access {
        Access { read: self.read, write: self.write }
    }
}

/// Faults.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Faults {
    /// How many there were since the daemon started: the number of the last one.
    pub recorded: u64,
    /// Those that are remembered, in their order.
    pub faults: Vec<Fault>,
}

/// A fault.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Fault {
    /// Its number: they are counted from 1 on.
    pub number: u64,
    /// When it was seen, in milliseconds since 1970.
    pub time: u64,
    /// Whose access it was.
    pub endpoint: Text<EndpointId>,
    /// Why.
    pub reason: FaultReason,
    /// The address, if one is known.
    pub address: Option<Text<Address>>,
    /// Whether it was to be read.
    pub read: bool,
    /// Whether it was to be written.
    pub write: bool,
}

/// Why an access did not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultReason {
    /// The endpoint is in no domain.
    Domain,
    /// The address is not mapped, or not for this access.
    Mapping,
    /// Anything else.
    Unknown,
}

/// What was wrong with a request, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The kind of thing that was wrong, for programs.
    pub kind: RefusalKind,
    /// What was wrong and what to do, for people.
    pub message: String,
}

/// Kinds of things that are wrong with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// The line is no request.
    Malformed,
    /// The version is not spoken here.
    Version,
    /// Files came that were not asked for, or too few, or others than asked for.
    Files,
    /// Whoever asks may not.
    NotPermitted,
    /// There are too many clients, or the client is too slow.
    Busy,
    /// There is no such endpoint or domain.
    NotFound,
    /// Something is there already.
    Taken,
    /// It does not fit what the guest was told.
    DoesNotFit,
    /// The host does not do what it should.
    Host,
}

impl Refusal {
    pub(super) fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// An address, which is written as `0x1000`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address(pub u64);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl FromStr for Address {
    type Err = ParseRangeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_address(text).map(Self)
    }
}

impl Default for Text<Address> {
    fn default() -> Self {
        Self(Address::default())
    }
}

/// A line, without its end.
///
/// # Errors
///
/// What is wrong with it, and where.
pub fn read_request(line: &[u8]) -> Result<Request, Refusal> {
    let malformed = |error: &serde_json::Error| {
        let text = format!("this is no request: {error}. One is {{\"version\":{VERSION},\"request\":\"list\"}}");
        Refusal::new(RefusalKind::Malformed, text)
    };
    let VersionOnly { version } = serde_json::from_slice(line).map_err(|error| malformed(&error))?;
    if version != VERSION {
        let text = format!("version {version} is not spoken here: use version {VERSION}, or a newer daemon");
        return Err(Refusal::new(RefusalKind::Version, text));
    }
    let Call { request, .. } = serde_json::from_slice(line).map_err(|error| malformed(&error))?;
    Ok(request)
}

/// The line for a request, with its end.
pub fn write_request(request: Request) -> Vec<u8> {
    line(&Call { version: VERSION, request })
}

/// What a line of the daemon's says.
///
/// # Errors
///
/// It is none of this version.
pub fn read_reply(line: &[u8]) -> Result<Reply, serde_json::Error> {
    serde_json::from_slice(line).map(|Answer { reply, .. }| reply)
}

/// The line for a reply, with its end.
pub fn write_reply(reply: Reply) -> Vec<u8> {
    line(&Answer { version: VERSION, reply })
}

fn line(message: &impl Serialize) -> Vec<u8> {
    // Texts, numbers, lists and truth values: nothing that JSON cannot say.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_scripts_write_them() {
        for (text, expected) in [
            (r#""list""#, "List"),
            (r#"{"domain":{"domain":7}}"#, "Domain { domain: 7 }"),
            (r#"{"mappings":{"domain":7}}"#, "Mappings { domain: 7, from: Text(Address(0)), limit: 1024 }"),
            (
                r#"{"mappings":{"domain":7,"from":"0x1000","limit":2}}"#,
                "Mappings { domain: 7, from: Text(Address(4096)), limit: 2 }",
            ),
            (r#"{"remove":{"endpoints":["00:03.0"]}}"#, "Remove { endpoints: [Text(EndpointId(24))] }"),
            (r#"{"faults":{}}"#, "Faults { after: 0, follow: false }"),
            (r#"{"log-level":{"level":"debug"}}"#, "LogLevel { level: Debug }"),
        ] {
            let request = read_request(format!(r#"{{"version":1,"request":{text}}}"#).as_bytes()).unwrap();
            assert_eq!(format!("{request:?}"), expected);
            let line = write_request(request);
            assert_eq!(line.last(), Some(&b'\n'));
            let again = read_request(line.strip_suffix(b"\n").unwrap()).unwrap();
            assert_eq!(format!("{again:?}"), expected);
        }
    }

    #[test]
    fn what_is_no_request_is_refused_with_the_reason() {
        use RefusalKind::{Malformed, Version};
        for (text, kind, reason) in [
            ("", Malformed, "EOF"),
            ("list", Malformed, "line 1 column 1"),
            (r#"{"version":1}"#, Malformed, "missing field `request`"),
            (r#"{"request":"list"}"#, Malformed, "missing field `version`"),
            (r#"{"version":2,"request":"whatever"}"#, Version, "use version 1"),
            (r#"{"version":1,"request":"lst"}"#, Malformed, "unknown variant `lst`"),
            (r#"{"version":1,"request":"list","more":1}"#, Malformed, "unknown field `more`"),
            (r#"{"version":1,"request":{"domain":{"domain":1,"id":2}}}"#, Malformed, "unknown field `id`"),
            (r#"{"version":1,"request":{"domain":{"domain":-1}}}"#, Malformed, "-1"),
            (r#"{"version":1,"request":{"remove":{"endpoints":["3"]}}}"#, Malformed, "`3` is not a PCI address"),
            (r#"{"version":1,"request":{"mappings":{"domain":1,"from":"x"}}}"#, Malformed, "`x` is not a hexadecimal"),
            (r#"{"version":1,"request":"list"}{}"#, Malformed, "trailing characters"),
        ] {
            let refusal = read_request(text.as_bytes()).unwrap_err();
            assert_eq!(refusal.kind, kind, "{text}");
            assert!(refusal.message.contains(reason), "{text}: {refusal}");
        }
    }

    #[test]
    fn replies_are_read_as_they_are_written() {
        let fault = Fault {
            number: 3,
            time: 1,
            endpoint: Text(EndpointId(8)),
            reason: FaultReason::Mapping,
            address: Some(Text(Address(0x1000))),
            read: true,
            write: false,
        };
        let line = write_reply(Reply::Fault(fault.clone()));
        let expected = "{\"version\":1,\"reply\":{\"fault\":{\"number\":3,\"time\":1,\"endpoint\":\"0000:00:01.0\",\
                        \"reason\":\"mapping\",\"address\":\"0x1000\",\"read\":true,\"write\":false}}}\n";
        assert_eq!(String::from_utf8(line).unwrap(), expected);
        let read = read_reply(expected.trim_end().as_bytes()).unwrap();
        assert!(matches!(read, Reply::Fault(read) if read == fault));
    }
}
