// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be done to a device, drawn from few endpoints, domains and pages, so that operations meet.

use arbitrary::Arbitrary;

use super::machine::PAGE;

/// One thing done to the device.
#[derive(Arbitrary, Clone, Debug)]
pub enum Operation {
    Attach {
        domain: u8,
        endpoint: u8,
        flags: u8,
    },
    Detach {
        domain: u8,
        endpoint: u8,
    },
    Map {
        domain: u8,
        page: u8,
        pages: u8,
        to: u8,
        flags: u8,
    },
    /// Into a domain that maps much, so that caps are met.
    MapMore {
        page: u8,
        to: u8,
    },
    Unmap {
        domain: u8,
        page: u8,
        pages: u8,
    },
    /// A call of the host after so many more fails.
    Fail {
        after: u8,
        short: bool,
        kind: u8,
    },
    Rare(Rare),
}

/// What is done less often.
#[derive(Arbitrary, Clone, Debug)]
pub enum Rare {
    /// A request of any bytes, with so many for the reply.
    Raw {
        kind: u8,
        bytes: [u8; 20],
        length: u8,
        writable: u16,
    },
    /// As MAP and UNMAP, with a start or an end that is no page's.
    Misaligned {
        domain: u8,
        page: u8,
        pages: u8,
        by: u16,
        unmaps: bool,
        at_end: bool,
    },
    Probe {
        endpoint: u8,
        writable: u16,
    },
    StopFailing,
    Config {
        offset: u8,
        value: u8,
    },
    Features {
        bypass_config: bool,
    },
    /// Guest memory is another from now on.
    Memory(u8),
    Reset,
    SystemReset,
    /// The state is saved, and restored by another device on another host.
    Move,
}

/// What a run starts from, and what is done then.
#[derive(Arbitrary, Clone, Debug)]
pub struct Input {
    pub type1: bool,
    pub boot_bypass: bool,
    /// Which endpoints are attached to domain 1 at first: a bit for each.
    pub attached: u8,
    pub operations: Vec<Operation>,
}

impl Operation {
    /// The request that it is, and how many bytes there are for the reply.
    pub fn request(&self) -> Option<(Vec<u8>, usize)> {
        let request = match *self {
            Self::Attach { domain, endpoint, flags } => {
                let flags = pick(flags, &[0, 0, 0, 0, 0, 0, 1, 1, 1, 2, u32::MAX]);
                fields(1, &[few(domain), near(endpoint), flags, 0])
            }
            Self::Detach { domain, endpoint } => fields(2, &[few(domain), near(endpoint), 0, 0]),
            Self::Map { domain, page, pages, to, flags } => {
                let pages = pick(pages, &[1, 1, 1, 2, 2, 3, 5, 11, 0]);
                let flags = pick(flags, &[3, 3, 3, 1, 1, 2, 0, 4, 5]);
                map(few(domain), u64::from(page % 24), pages, to, flags)
            }
            Self::MapMore { page, to } => map(1, u64::from(page % 64), 1, to, 3),
            Self::Unmap { domain, page, pages } => {
                let pages = pick(pages, &[1, 1, 1, 2, 3, 5, 24, 64, 0, EVERYTHING]);
                let mut bytes = range(4, few(domain), u64::from(page % 24), pages);
                bytes.extend([0; 4]);
                bytes
            }
            Self::Fail { .. } => return None,
            Self::Rare(ref rare) => return rare.request(),
        };
        Some((request, 4))
    }
}

impl Rare {
    fn request(&self) -> Option<(Vec<u8>, usize)> {
        match *self {
            Self::Raw { kind, bytes, length, writable } => {
                let mut request = bytes.repeat(4);
                request[0] = kind % 8;
                request.truncate(usize::from(length % 81));
                Some((request, usize::from(writable % 256)))
            }
            Self::Misaligned { domain, page, pages, by, unmaps, at_end } => {
                Some((misaligned(few(domain), page % 24, pages % 4, by, unmaps, at_end), 4))
            }
            Self::Probe { endpoint, writable } => {
                let mut bytes = fields(5, &[near(endpoint)]);
                bytes.resize(72, 0);
                // Most are as long as they are to be.
                let writable = if writable % 4 == 0 { writable / 4 % 256 } else { 128 + 4 };
                Some((bytes, usize::from(writable)))
            }
            _ => None,
        }
    }
}

fn misaligned(domain: u32, page: u8, pages: u8, by: u16, unmaps: bool, at_end: bool) -> Vec<u8> {
    let (page, pages) = (page.into(), pages.into());
    let mut bytes = if unmaps { range(4, domain, page, pages) } else { map(domain, page, pages, 0, 3) };
    let at = if at_end { 16 } else { 8 };
    for (byte, more) in bytes[at..].iter_mut().zip((by & 0xfff).to_le_bytes()) {
        *byte ^= more;
    }
    bytes.resize(if unmaps { 28 } else { 36 }, 0);
    bytes
}

/// One of several, of which some are there more often.
pub fn pick<T: Copy>(byte: u8, from: &[T]) -> T {
    from[usize::from(byte) % from.len()]
}

/// One of a few domains; the last two are outside of the domain range.
fn few(domain: u8) -> u32 {
    pick(domain, &[1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 0, 5])
}

/// An endpoint of the device, or one next to them.
fn near(endpoint: u8) -> u32 {
    pick(endpoint, &[8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 7])
}

/// A request of this type with these fields.
pub fn fields(kind: u8, fields: &[u32]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    bytes
}

fn map(domain: u32, page: u64, pages: u64, to: u8, flags: u32) -> Vec<u8> {
    let mut bytes = range(3, domain, page, pages);
    // Guest memory is there most of the time.
    let to = if to >= 0xe0 { to % 64 } else { 16 + to % 40 };
    bytes.extend((u64::from(to) * PAGE).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// As many pages as an UNMAP of all that there can be has.
const EVERYTHING: u64 = u64::MAX;

/// Domain and range of a MAP or UNMAP of so many pages.
fn range(kind: u8, domain: u32, page: u64, pages: u64) -> Vec<u8> {
    let (start, last) = match pages {
        EVERYTHING => (0, u64::MAX),
        _ => (page * PAGE, ((page + pages) * PAGE).wrapping_sub(1)),
    };
    let mut bytes = fields(kind, &[domain]);
    bytes.extend(start.to_le_bytes());
    bytes.extend(last.to_le_bytes());
    bytes
}
