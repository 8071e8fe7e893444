// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device tree says of a PCI host bridge: its windows (`ranges`), and where the devices behind it reach memory
//! (`dma-ranges`). Formats are those of the Devicetree Specification 0.4, 2.3.8 and 2.3.9, and of IEEE 1275's PCI binding.

use std::io;
use std::path::{Path, PathBuf};

use super::bridge::BridgeWindow;
use super::limited;
use crate::range::{IovaRange, RangeSet};

/// A PCI host bridge as the device tree describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[doc(hidden)]
pub struct BridgeNode {
    /// Its memory windows.
    pub windows: Vec<BridgeWindow>,
    /// The bus addresses at which devices reach memory; `None` if the tree does not restrict them.
    pub inbound: Option<RangeSet>,
}

/// A node that cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum DeviceTreeError {
    /// A property cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The property.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A property has another size than it should.
    #[error("{} has {length} bytes, which is not {expected}", .path.display())]
    Size {
        /// The property.
        path: PathBuf,
        /// Its size.
        length: usize,
        /// What it should be.
        expected: String,
    },
    /// A node is further below the root than any is.
    #[error("{} is more than {} levels below the root of its device tree", .node.display(), DEEPEST)]
    TooDeep {
        /// The node.
        node: PathBuf,
    },
    /// Something in a property passes the end of an address space.
    #[error("{}, entry {entry}: {size:#x} bytes from {start:#x} on pass the end of the address space", .path.display())]
    Wraps {
        /// The property.
        path: PathBuf,
        /// Which entry, from 1 on.
        entry: usize,
        /// Its first address.
        start: u64,
        /// Its size.
        size: u64,
    },
}

/// No property of these has thousands of entries.
const LARGEST_PROPERTY: usize = 64 << 10;
/// No tree is deeper.
const DEEPEST: usize = 16;
/// Cells of an address and of a size on a PCI bus.
const PCI_CELLS: (usize, usize) = (3, 2);

/// An entry of `ranges` or `dma-ranges`: addresses on the bus below a node, and the same on the bus above it.
struct Entry {
    /// The first cell of a PCI address, with the kind of space; 0 elsewhere.
    space: u32,
    below: IovaRange,
    above: IovaRange,
}

/// How a property is read, by its path: its bytes, or `NotFound` if the node does not have it.
#[doc(hidden)]
pub type ReadProperty<'r> = dyn Fn(&Path) -> io::Result<Vec<u8>> + 'r;

/// Reads the node of a host bridge.
///
/// # Errors
///
/// [`DeviceTreeError`]
pub(super) fn read(node: &Path) -> Result<BridgeNode, DeviceTreeError> {
    parse(node, &limited::read)
}

/// Understands the node of a host bridge, in a tree that is wherever `read` finds it.
///
/// # Errors
///
/// [`DeviceTreeError`]
#[doc(hidden)]
pub fn parse(node: &Path, read: &ReadProperty<'_>) -> Result<BridgeNode, DeviceTreeError> {
    if node.ancestors().take_while(|node| !is_root(node)).nth(DEEPEST).is_some() {
        return Err(DeviceTreeError::TooDeep { node: node.to_owned() });
    }
    let is_memory = |entry: &Entry| matches!(entry.space >> 24 & 3, 2 | 3);
    let mut buses = Buses { node, read, known: Vec::new() };
    let mut windows = Vec::new();
    for entry in entries(node, "ranges", PCI_CELLS, read)?.into_iter().flatten().filter(is_memory) {
        windows.push(BridgeWindow { bus: entry.below, cpu: buses.follow(entry.above)? });
    }
    let inbound = entries(node, "dma-ranges", PCI_CELLS, read)?;
    // Linux takes an empty property for no restriction (devm_of_pci_get_host_bridge_resources()).
    let inbound = inbound.filter(|entries| !entries.is_empty());
    let inbound = inbound.map(|entries| entries.iter().filter(|entry| is_memory(entry)).map(|e| e.below).collect());
    Ok(BridgeNode { windows, inbound })
}

/// The buses between a node and the root, each read once, when an address gets so far.
struct Buses<'n, 'r> {
    node: &'n Path,
    read: &'r ReadProperty<'r>,
    /// What the buses make of addresses, from the lowest on; `None` for one that does not lead on.
    known: Vec<Option<Vec<Entry>>>,
}

impl Buses<'_, '_> {
    /// Follows an address to the CPU; `None` where a bus does not lead on.
    fn follow(&mut self, mut address: IovaRange) -> Result<Option<IovaRange>, DeviceTreeError> {
        for (level, bus) in self.node.ancestors().skip(1).take_while(|bus| !is_root(bus)).enumerate() {
            if self.known.len() == level {
                let cells = (cells(bus, "#address-cells", self.read)?, cells(bus, "#size-cells", self.read)?);
                self.known.push(entries(bus, "ranges", cells, self.read)?);
            }
            let above = match self.known.get(level).and_then(Option::as_deref) {
                None => None,
                Some([]) => Some(address),
                Some(entries) => entries.iter().find_map(|entry| entry.translate(address)),
            };
            match above {
                Some(above) => address = above,
                None => return Ok(None),
            }
        }
        Ok(Some(address))
    }
}

impl Entry {
    fn translate(&self, address: IovaRange) -> Option<IovaRange> {
        if !self.below.covers(address) {
            return None;
        }
        let start = self.above.start().checked_add(address.start() - self.below.start())?;
        IovaRange::from_length(start, address.length()?)
    }
}

/// The entries of a property, those of no size left out; `None` if the node does not have it.
fn entries(
    node: &Path,
    name: &str,
    below: (usize, usize),
    read: &ReadProperty<'_>,
) -> Result<Option<Vec<Entry>>, DeviceTreeError> {
    let path = node.join(name);
    let Some(words) = property(&path, read)? else {
        return Ok(None);
    };
    let (address_cells, size_cells) = below;
    let parent_cells = node.parent().map_or(Ok(1), |parent| cells(parent, "#address-cells", read))?;
    let length = address_cells + parent_cells + size_cells;
    if length == 0 || !words.len().is_multiple_of(length) {
        let expected = format!("a number of entries of {length} cells");
        return Err(DeviceTreeError::Size { path, length: words.len() * 4, expected });
    }
    let mut entries = Vec::new();
    for (index, entry) in words.chunks_exact(length).enumerate() {
        let (child, rest) = entry.split_at(address_cells);
        let (parent, size) = rest.split_at(parent_cells);
        let space = if address_cells == 3 { child.first().copied().unwrap_or(0) } else { 0 };
        let size = number(size);
        if size == 0 {
            continue;
        }
        let range = |cells: &[u32]| {
            let start = number(cells);
            let wraps = DeviceTreeError::Wraps { path: path.clone(), entry: index + 1, start, size };
            IovaRange::from_length(start, size).ok_or(wraps)
        };
        entries.push(Entry { space, below: range(child)?, above: range(parent)? });
    }
    Ok(Some(entries))
}

/// The number in the last two cells: what stands before them is no part of an address of 64 bits.
fn number(cells: &[u32]) -> u64 {
    cells.iter().fold(0, |number, cell| number << 32 | u64::from(*cell))
}

/// How many cells an address or a size has on the bus below a node: the node says, or one above it, or it is one
/// (`of_n_addr_cells()` of Linux).
fn cells(node: &Path, name: &str, read: &ReadProperty<'_>) -> Result<usize, DeviceTreeError> {
    for node in node.ancestors() {
        let path = node.join(name);
        if let Some(words) = property(&path, read)? {
            return match words[..] {
                [count @ 0..=4] => Ok(count as usize),
                _ => Err(DeviceTreeError::Size {
                    path,
                    length: words.len() * 4,
                    expected: "one cell up to 4".to_owned(),
                }),
            };
        }
        if is_root(node) {
            break;
        }
    }
    Ok(1)
}

/// The root of a tree is the directory `base` in sysfs.
fn is_root(node: &Path) -> bool {
    node.file_name().is_none_or(|name| name == "base")
}

/// The cells of a property; `None` if it is not there.
fn property(path: &Path, read: &ReadProperty<'_>) -> Result<Option<Vec<u32>>, DeviceTreeError> {
    let bytes = match read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DeviceTreeError::Read { path: path.to_owned(), source }),
    };
    let length = bytes.len();
    if length > LARGEST_PROPERTY || !length.is_multiple_of(4) {
        let expected = "a list of cells of 4 bytes".to_owned();
        return Err(DeviceTreeError::Size { path: path.to_owned(), length, expected });
    }
    let cell = |bytes: &[u8]| bytes.iter().fold(0, |cell, byte| cell << 8 | u32::from(*byte));
    Ok(Some(bytes.chunks_exact(4).map(cell).collect()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const MEM32: u32 = 0x0200_0000;
    const MEM64: u32 = 0x4300_0000;
    const IO: u32 = 0x0100_0000;

    /// A tree with a host bridge in `/soc`, whose addresses have two cells.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(tree.node()).unwrap();
            tree.put("soc/#address-cells", &[2]);
            tree.put("soc/#size-cells", &[2]);
            tree.put("soc/ranges", &[]);
            tree.put("#address-cells", &[2]);
            tree
        }

        fn node(&self) -> PathBuf {
            self.0.path().join("base/soc/pcie@f0000000")
        }

        fn put(&self, property: &str, cells: &[u32]) {
            let bytes: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
            fs::write(self.0.path().join("base").join(property), bytes).unwrap();
        }

        fn put_pci(&self, property: &str, cells: &[u32]) {
            self.put(&format!("soc/pcie@f0000000/{property}"), cells);
        }

        fn windows(&self) -> Vec<String> {
            let windows = read(&self.node()).unwrap().windows.into_iter();
            windows.map(|w| format!("{} at {}", w.bus, w.cpu.map_or("-".to_owned(), |cpu| cpu.to_string()))).collect()
        }
    }

    #[test]
    fn windows_are_memory_on_the_bus_with_the_cpus_side_apart() {
        let tree = Tree::new();
        let io = [IO, 0, 0, 0, 0xefff_0000, 0, 0x1_0000];
        let low = [MEM32, 0, 0x4000_0000, 0x50, 0, 0, 0x4000_0000];
        let high = [MEM64, 1, 0, 1, 0, 0x7f, 0];
        let nothing = [MEM32, 0, 0, 0, 0, 0, 0];
        tree.put_pci("ranges", &[io, low, high, nothing].concat());
        let expected = [
            "0x40000000-0x7fffffff at 0x5000000000-0x503fffffff",
            "0x100000000-0x7fffffffff at 0x100000000-0x7fffffffff",
        ];
        assert_eq!(tree.windows(), expected);
        assert_eq!(read(&tree.node()).unwrap().inbound, None);
    }

    #[test]
    fn the_cpus_side_goes_through_every_bus_above() {
        let tree = Tree::new();
        tree.put_pci("ranges", &[MEM32, 0, 0x4000_0000, 0, 0x1000_0000, 0, 0x100_0000]);
        tree.put("soc/ranges", &[0, 0, 0x80, 0, 0, 0x2000_0000]);
        assert_eq!(tree.windows(), ["0x40000000-0x40ffffff at 0x8010000000-0x8010ffffff"]);
        tree.put("soc/ranges", &[0, 0x0800_0000, 0x80, 0, 0, 0x2000_0000]);
        assert_eq!(tree.windows(), ["0x40000000-0x40ffffff at 0x8008000000-0x8008ffffff"]);
        tree.put("soc/ranges", &[0, 0x2000_0000, 0x80, 0, 0, 0x2000_0000]);
        assert_eq!(tree.windows(), ["0x40000000-0x40ffffff at -"], "no entry leads on");
        fs::remove_file(tree.0.path().join("base/soc/ranges")).unwrap();
        assert_eq!(tree.windows(), ["0x40000000-0x40ffffff at -"], "the bus is not on the CPU's");
    }

    #[test]
    fn dma_ranges_say_where_devices_reach_memory() {
        let tree = Tree::new();
        let inbound = |tree: &Tree| read(&tree.node()).unwrap().inbound.map(|set| set.to_string());
        tree.put_pci("dma-ranges", &[]);
        assert_eq!(inbound(&tree), None, "nothing is restricted");
        let low = [MEM64, 0, 0x8000_0000, 0, 0x8000_0000, 0, 0x8000_0000];
        let high = [MEM64, 1, 0, 1, 0, 0, 0x8000_0000];
        tree.put_pci("dma-ranges", &[low, high].concat());
        assert_eq!(inbound(&tree).as_deref(), Some("0x80000000-0x17fffffff"));
    }

    #[test]
    fn cells_of_the_bus_above_are_found_further_up() {
        let tree = Tree::new();
        fs::remove_file(tree.0.path().join("base/soc/#address-cells")).unwrap();
        tree.put("#address-cells", &[1]);
        tree.put_pci("ranges", &[MEM32, 0, 0x4000_0000, 0x5000_0000, 0, 0x1000]);
        assert_eq!(tree.windows(), ["0x40000000-0x40000fff at 0x50000000-0x50000fff"]);
        fs::remove_file(tree.0.path().join("base/#address-cells")).unwrap();
        assert_eq!(tree.windows().len(), 1, "nobody says: one");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let says = |property: &str, cells: &[u32]| {
            let tree = Tree::new();
            tree.put(property, cells);
            read(&tree.node()).unwrap_err().to_string()
        };
        let ranges = "soc/pcie@f0000000/ranges";
        assert!(says(ranges, &[1, 2]).contains("ranges has 8 bytes, which is not a number of entries of 7 cells"));
        let wraps = says(ranges, &[MEM64, u32::MAX, 0, 0, 0, 2, 0]);
        assert!(wraps.contains("ranges, entry 1: 0x200000000 bytes from 0xffffffff00000000 on"), "{wraps}");
        let tree = Tree::new();
        fs::write(tree.node().join("dma-ranges"), [0; 5]).unwrap();
        assert!(read(&tree.node()).unwrap_err().to_string().contains("dma-ranges has 5 bytes"));
        // As many cells as a property may have are no number of entries; three more are.
        tree.put_pci("dma-ranges", &vec![0; LARGEST_PROPERTY / 4]);
        assert!(read(&tree.node()).unwrap_err().to_string().ends_with("a number of entries of 7 cells"));
        tree.put_pci("dma-ranges", &vec![0; LARGEST_PROPERTY / 4 + 3]);
        assert!(read(&tree.node()).unwrap_err().to_string().ends_with("a list of cells of 4 bytes"), "too large");
        tree.put_pci("dma-ranges", &[0; 7]);
        for cells in [&[5][..], &[1, 1]] {
            tree.put("soc/#address-cells", cells);
            let length = cells.len() * 4;
            let expected = format!("has {length} bytes, which is not one cell up to 4");
            assert!(read(&tree.node()).unwrap_err().to_string().ends_with(&expected), "{expected}");
        }
        fs::create_dir(tree.node().join("ranges")).unwrap();
        assert!(matches!(read(&tree.node()), Err(DeviceTreeError::Read { .. })));
    }

    /// However many windows a bridge has, what is above it is read once; and not from any depth.
    #[test]
    fn a_large_tree_takes_no_more_reading_than_its_levels() {
        use std::cell::Cell;
        let reads = |levels: usize, windows: u32| {
            let reads = Cell::new(0);
            let read = |path: &Path| {
                reads.set(reads.get() + 1);
                let name = path.file_name().unwrap().to_str().unwrap();
                let window = |at: u32| [MEM32, 0, at << 12, at << 12, 0, 0x1000];
                let cells: Vec<u32> = match name {
                    "#address-cells" | "#size-cells" => vec![1],
                    "ranges" if path.parent().unwrap().ends_with("pcie") => (0..windows).flat_map(window).collect(),
                    "ranges" => Vec::new(),
                    _ => return Err(io::ErrorKind::NotFound.into()),
                };
                Ok(cells.iter().flat_map(|cell| cell.to_be_bytes()).collect())
            };
            let node = format!("/tree/base{}/pcie", "/bus".repeat(levels - 1));
            let found = parse(Path::new(&node), &read).map(|node| node.windows.len());
            (found, reads.get())
        };
        let (found, few) = reads(DEEPEST, 1);
        assert_eq!(found.unwrap(), 1);
        let (found, many) = reads(DEEPEST, 100);
        assert_eq!((found.unwrap(), many), (100, few));
        let (found, none) = reads(DEEPEST + 1, 100);
        assert!(found.unwrap_err().to_string().ends_with("is more than 16 levels below the root of its device tree"));
        assert_eq!(none, 0);
    }
}
