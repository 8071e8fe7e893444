// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Device trees and `/proc/iomem`, good and bad, with what they say worked out anew.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::bridge::{self, BridgeWindow, HostBridge, IomemError};
use virtio_iommu::reserved::device_tree;

use crate::wire::{self, Field, operations, record};

const BRIDGE: HostBridge = HostBridge { segment: 0, bus: 0 };
/// From the root down to a host bridge.
const NODES: [&str; 4] = ["base", "base/soc", "base/soc/bus", "base/soc/bus/pcie"];
const PCIE: usize = 3;
const NAMES: [&str; 4] = ["ranges", "dma-ranges", "#address-cells", "#size-cells"];

record! {
    /// A line of `/proc/iomem`.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Line {
        /// How deep it is.
        pub depth: u8,
        /// Its first address.
        pub start: u64,
        /// How many more there are.
        pub more: u32,
        /// What it is.
        pub name: u8,
    }
}

operations! {
    /// A property of a node.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Property {
        /// Any bytes.
        Raw { node: u8, name: u8, bytes: Vec<u8>, },
        /// Cells of an address and of a size.
        Cells { node: u8, address: u8, size: u8, },
        /// One more entry of `ranges` or `dma-ranges` of the bridge, for a bus above with so many cells.
        Window { inbound: bool, space: u8, bus: u64, cells: u8, cpu: u64, size: u32, },
        /// One more entry of `ranges` of the bus above, with so many cells of each kind.
        Bus { below: u64, above: u64, size: u32, cells: u8, },
    }
}

fn check_lines(lines: &[Line]) {
    const LABELS: [&str; 4] = ["PCI Bus 0000:00", "PCI Bus 0000:01", "System RAM", "PCI Bus 0001:00"];
    let (mut text, mut expected, mut hidden) = (String::new(), Vec::new(), false);
    for line in lines {
        let (depth, label) = (usize::from(line.depth % 3), LABELS[usize::from(line.name) % LABELS.len()]);
        let (start, last) = (line.start, line.start.saturating_add(line.more.into()));
        writeln!(text, "{:width$}{start:08x}-{last:08x} : {label}", "", width = depth * 2).expect("a string grows");
        if depth == 0 && label == LABELS[0] {
            hidden |= last == 0;
            expected.push(IovaRange::new(start, last).expect("it does not end before it starts"));
        }
    }
    let found = bridge::windows_in(&text, Path::new("iomem"), BRIDGE).expect("all lines are in order");
    assert_eq!(found, (!expected.is_empty() && !hidden).then_some(expected));
}

fn check_text(text: &str) {
    match bridge::windows_in(text, Path::new("iomem"), BRIDGE) {
        Ok(windows) => {
            let named = |line: &&str| line.split_once(" : ").is_some_and(|(_, name)| name == "PCI Bus 0000:00");
            let named = text.lines().filter(|line| !line.starts_with(' ')).filter(named);
            assert!(windows.is_none_or(|windows| windows.len() == named.count()), "a window is lost");
        }
        Err(IomemError::Line { line, text: bad, .. }) => assert_eq!(text.lines().nth(line - 1), Some(&*bad)),
        Err(error) => panic!("{error}"),
    }
}

/// A tree in memory: properties by path.
type Tree = BTreeMap<PathBuf, Vec<u8>>;

fn tree(properties: &[Property]) -> Tree {
    let mut tree = Tree::new();
    for property in properties {
        match property {
            Property::Raw { node, name, bytes } => {
                let path = Path::new(NODES[usize::from(node % 4)]).join(NAMES[usize::from(name % 4)]);
                tree.insert(path, bytes.clone());
            }
            Property::Cells { node, address, size } => {
                let node = Path::new(NODES[usize::from(node % 4)]);
                for (name, cells) in [("#address-cells", address % 6), ("#size-cells", size % 6)] {
                    tree.insert(node.join(name), u32::from(cells).to_be_bytes().to_vec());
                }
            }
            Property::Window { inbound, space, bus, cells, cpu, size } => {
                let name = if *inbound { "dma-ranges" } else { "ranges" };
                let entry = tree.entry(Path::new(NODES[PCIE]).join(name)).or_default();
                entry.extend([*space, 0, 0, 0]);
                entry.extend(bus.to_be_bytes());
                entry.extend(&number(*cpu, *cells));
                entry.extend(u64::from(*size).to_be_bytes());
            }
            Property::Bus { below, above, size, cells } => {
                let entry = tree.entry(Path::new(NODES[2]).join("ranges")).or_default();
                for address in [*below, *above, u64::from(*size)] {
                    entry.extend(&number(address, *cells));
                }
            }
        }
    }
    tree
}

/// The last cells of a number, one or two of them.
fn number(value: u64, cells: u8) -> Vec<u8> {
    value.to_be_bytes()[if cells.is_multiple_of(2) { 0 } else { 4 }..].to_vec()
}

/// Something that is not as the specification has it.
struct Wrong;

/// An entry of `ranges`: the kind of space, and addresses below and above.
type Entry = (u32, IovaRange, IovaRange);

/// What a tree says, worked out node by node.
struct Reader<'t>(&'t Tree);

impl Reader<'_> {
    fn words(&self, node: usize, name: &str) -> Result<Option<Vec<u32>>, Wrong> {
        let Some(bytes) = self.0.get(&Path::new(NODES[node]).join(name)) else { return Ok(None) };
        let whole = bytes.len().is_multiple_of(4);
        let words = bytes.chunks_exact(4).map(|word| u32::from_be_bytes(word.try_into().expect("four bytes")));
        if whole { Ok(Some(words.collect())) } else { Err(Wrong) }
    }

    /// The node's own, or of the next one above that has it.
    fn cells(&self, node: usize, name: &str) -> Result<usize, Wrong> {
        for node in (0..=node).rev() {
            match self.words(node, name)?.as_deref() {
                None => (),
                Some([cells @ 0..=4]) => return Ok(*cells as usize),
                Some(_) => return Err(Wrong),
            }
        }
        Ok(1)
    }

    /// The entries of a property, those of no size left out.
    fn entries(&self, node: usize, name: &str, (address, size): (usize, usize)) -> Result<Option<Vec<Entry>>, Wrong> {
        let Some(words) = self.words(node, name)? else { return Ok(None) };
        let above = self.cells(node.saturating_sub(1), "#address-cells")?;
        let each = address + above + size;
        if each == 0 || !words.len().is_multiple_of(each) {
            return Err(Wrong);
        }
        let mut entries = Vec::new();
        for entry in words.chunks(each) {
            let last_two = |cells: &[u32]| {
                let mut number = 0u64;
                for cell in &cells[cells.len().saturating_sub(2)..] {
                    number = number << 32 | u64::from(*cell);
                }
                number
            };
            let length = last_two(&entry[address + above..]);
            if length == 0 {
                continue;
            }
            let range = |cells| {
                let start: u64 = last_two(cells);
                start.checked_add(length - 1).and_then(|last| IovaRange::new(start, last)).ok_or(Wrong)
            };
            let space = if address == 3 { entry[0] } else { 0 };
            entries.push((space, range(&entry[..address])?, range(&entry[address..address + above])?));
        }
        Ok(Some(entries))
    }

    /// Where the CPU has what is at an address of the bus below a node.
    fn to_cpu(&self, node: usize, address: IovaRange) -> Result<Option<IovaRange>, Wrong> {
        if node == 0 {
            return Ok(Some(address));
        }
        let cells = (self.cells(node, "#address-cells")?, self.cells(node, "#size-cells")?);
        let Some(entries) = self.entries(node, "ranges", cells)? else { return Ok(None) };
        if entries.is_empty() {
            return self.to_cpu(node - 1, address);
        }
        let Some((_, below, above)) = entries.iter().find(|(_, below, _)| below.covers(address)) else {
            return Ok(None);
        };
        let start = above.start() + (address.start() - below.start());
        let above = IovaRange::new(start, start + (address.last() - address.start())).ok_or(Wrong)?;
        self.to_cpu(node - 1, above)
    }

    fn bridge(&self) -> Result<(Vec<BridgeWindow>, Option<RangeSet>), Wrong> {
        let is_memory = |space: u32| space >> 25 & 1 == 1;
        let mut windows = Vec::new();
        for (space, bus, cpu) in self.entries(PCIE, "ranges", (3, 2))?.unwrap_or_default() {
            if is_memory(space) {
                windows.push(BridgeWindow { bus, cpu: self.to_cpu(PCIE - 1, cpu)? });
            }
        }
        let inbound = self.entries(PCIE, "dma-ranges", (3, 2))?.filter(|entries| !entries.is_empty());
        let memory = |entries: Vec<Entry>| {
            entries.into_iter().filter(|(space, ..)| is_memory(*space)).map(|(_, bus, _)| bus).collect()
        };
        Ok((windows, inbound.map(memory)))
    }
}

fn check_tree(tree: &Tree) {
    let read = |path: &Path| tree.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into());
    let found = device_tree::parse(Path::new(NODES[PCIE]), &read);
    match (found, Reader(tree).bridge()) {
        (Ok(found), Ok((windows, inbound))) => {
            assert_eq!(found.windows, windows);
            assert_eq!(found.inbound, inbound);
        }
        (Err(error), Err(Wrong)) => {
            let named = tree.keys().any(|path| error.to_string().contains(path.to_str().expect("plain names")));
            assert!(named, "an error names its property: {error}");
        }
        (Ok(found), Err(Wrong)) => panic!("what is wrong is read as {found:?}"),
        (Err(error), Ok(_)) => panic!("nothing is wrong: {error}"),
    }
}

/// What is known of one place of a window holds for another.
fn check_window(mut bytes: &[u8]) {
    let mut range = || IovaRange::from_length(u64::take(&mut bytes), u64::from(u32::take(&mut bytes)) + 1);
    let (Some(cpu), Some(known), Some(bus), Some(piece)) = (range(), range(), range(), range()) else { return };
    let Some(window) = BridgeWindow::behind(cpu, (known, bus)) else { return };
    assert_eq!((window.cpu, window.bus.size()), (Some(cpu), cpu.size()));
    let away = |from: IovaRange, to: IovaRange| i128::from(to.start()) - i128::from(from.start());
    let offset = away(known, bus);
    assert_eq!(away(cpu, window.bus).rem_euclid(1 << 64), offset.rem_euclid(1 << 64), "it is at another offset");
    match window.on_bus(piece) {
        None => assert!(!cpu.covers(piece), "{piece} is in {cpu}"),
        Some(seen) => {
            assert!(cpu.covers(piece) && window.bus.covers(seen), "{seen} is out of {}", window.bus);
            assert_eq!(away(cpu, piece), away(window.bus, seen));
        }
    }
}

/// Reads what the bytes stand for, in one of several forms.
pub fn check(mut bytes: &[u8]) {
    match u8::take(&mut bytes) % 4 {
        0 => check_tree(&tree(&wire::all::<Property>(bytes))),
        1 => check_lines(&wire::all::<Line>(bytes)),
        2 => check_text(&String::from_utf8_lossy(bytes)),
        _ => check_window(bytes),
    }
}

/// A tree of each depth, and tables of resources.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let tree = |properties: &[Property]| [vec![0], wire::bytes_of(properties)].concat();
    let cells = |node, address, size| Property::Cells { node, address, size };
    let window = |inbound, bus, cells, cpu| Property::Window { inbound, space: 2, bus, cells, cpu, size: 0x1000_0000 };
    let line = |depth, start, more, name| Line { depth, start, more, name };
    let mut translating = vec![3];
    for (start, more) in
        [(0x50_0000_0000u64, 0xfff_ffffu32), (0x50_0000_0000, 0xfff), (0x4000_0000, 0xfff), (0x50_0000_1000, 9)]
    {
        start.put(&mut translating);
        more.put(&mut translating);
    }
    vec![
        (
            "two-cells",
            tree(&[
                cells(0, 2, 2),
                window(false, 0x4000_0000, 2, 0x4000_0000),
                window(true, 0, 2, 0),
                Property::Raw { node: 1, name: 0, bytes: vec![] },
                Property::Bus { below: 0, above: 0x80_0000_0000, size: u32::MAX, cells: 2 },
            ]),
        ),
        (
            "one-cell",
            tree(&[window(false, 0x4000_0000, 1, 0x5000_0000), Property::Raw { node: 2, name: 0, bytes: vec![] }]),
        ),
        ("wrong", tree(&[cells(1, 5, 1), window(false, u64::MAX, 1, 0)])),
        (
            "iomem",
            [vec![1], wire::bytes_of(&[line(0, 0, 0xfff, 2), line(0, 0x8000_0000, 0x5fff_ffff, 0), line(1, 0x8000_0000, 0xffff, 1)])]
                .concat(),
        ),
        (
            "iomem-text",
            [&[2], &b"00000000-00000fff : Reserved\n000a0000-000bffff : PCI Bus 0000:00\n  1-2 : a\n2-1 : PCI Bus 0000:00\n"[..]]
                .concat(),
        ),
        ("translating", translating),
    ]
}
