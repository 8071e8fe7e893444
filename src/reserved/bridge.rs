// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host bridge windows: evidence about what a region of a group may really be, and never reported for their own sake.
//!
//! `/proc/iomem` is where Linux shows them on machines with ACPI: the lines `PCI Bus SSSS:BB` at the top level, in addresses
//! of the CPU. Who may not know the addresses sees zeroes.

use std::io;
use std::path::{Path, PathBuf};

use super::limited;
use crate::range::{IovaRange, parse_address};

/// A host bridge: segment and number of its root bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostBridge {
    /// The PCI segment.
    pub segment: u16,
    /// The number of the bus behind it.
    pub bus: u8,
}

/// A memory window of a host bridge. Where a bridge translates, it is at different addresses on its two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BridgeWindow {
    /// Where it is on the bus behind the bridge: where devices see it.
    pub bus: IovaRange,
    /// Where the CPU sees it; `None` if that is not known.
    pub cpu: Option<IovaRange>,
}

impl BridgeWindow {
    /// A window that the CPU sees at `cpu`, behind a bridge that shows `known.0` of the CPU at `known.1` of the bus.
    /// `None` if that passes an end of the address space.
    pub fn behind(cpu: IovaRange, known: (IovaRange, IovaRange)) -> Option<Self> {
        let offset = known.0.start().wrapping_sub(known.1.start());
        let bus = IovaRange::new(cpu.start().wrapping_sub(offset), cpu.last().wrapping_sub(offset))?;
        Some(Self { bus, cpu: Some(cpu) })
    }

    /// Where something is on the bus that the CPU sees in this window.
    pub fn on_bus(&self, cpu: IovaRange) -> Option<IovaRange> {
        let own = self.cpu.filter(|own| own.covers(cpu))?;
        Self::behind(cpu, (own, self.bus)).map(|window| window.bus)
    }
}

/// `/proc/iomem` that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum IomemError {
    /// The file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line cannot be understood.
    #[error("{}, line {line}: `{text}` is not `START-END : NAME`", .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
        /// What it says.
        text: String,
    },
}

/// The memory windows of a host bridge, as the CPU sees them; `None` if they are not shown, or not to this user.
///
/// `proc` is the directory of a proc file system, or a copy.
///
/// # Errors
///
/// [`IomemError`]
pub fn windows(proc: &Path, bridge: HostBridge) -> Result<Option<Vec<IovaRange>>, IomemError> {
    let path = proc.join("iomem");
    let text = match limited::read_text(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(IomemError::Read { path, source }),
    };
    windows_in(&text, &path, bridge)
}

/// The windows of a host bridge in the text of `/proc/iomem`; `path` is where it came from, for errors.
///
/// # Errors
///
/// [`IomemError::Line`]
#[doc(hidden)]
pub fn windows_in(text: &str, path: &Path, bridge: HostBridge) -> Result<Option<Vec<IovaRange>>, IomemError> {
    let name = format!("PCI Bus {:04x}:{:02x}", bridge.segment, bridge.bus);
    let mut windows = Vec::new();
    for (index, line) in text.lines().enumerate() {
        // What is indented lies in what stands above it: the window of a bridge further down.
        if line.starts_with(' ') {
            continue;
        }
        let bad = || IomemError::Line { path: path.to_owned(), line: index + 1, text: line.to_owned() };
        let (range, label) = line.split_once(" : ").ok_or_else(bad)?;
        let (start, last) = range.split_once('-').ok_or_else(bad)?;
        let address = |text: &str| parse_address(text).map_err(|_| bad());
        let (start, last) = (address(start)?, address(last)?);
        if label != name {
            continue;
        }
        // Zeroes are no address: the file hides them from those who may not know.
        if last == 0 {
            return Ok(None);
        }
        windows.push(IovaRange::new(start, last).ok_or_else(bad)?);
    }
    Ok((!windows.is_empty()).then_some(windows))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const IOMEM: &str = "\
00000000-00000fff : Reserved
000a0000-000bffff : PCI Bus 0000:00
80000000-8fffffff : PCI Bus 0000:00
  80000000-801fffff : PCI Bus 0000:01
90000000-dfffffff : PCI Bus 0000:00
e0000000-efffffff : PCI ECAM 0000 [bus 00-ff]
f0000000-f0ffffff : PCI Bus 0001:40
100000000-17fffffff : System RAM
";

    fn read(text: &str, bridge: HostBridge) -> Result<Option<String>, IomemError> {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("iomem"), text).unwrap();
        windows(directory.path(), bridge).map(|windows| windows.map(|windows| format!("{windows:?}")))
    }

    const FIRST: HostBridge = HostBridge { segment: 0, bus: 0 };

    #[test]
    fn only_the_bridges_own_top_level_windows_count() {
        assert_eq!(
            read(IOMEM, FIRST).unwrap().as_deref(),
            Some("[0xa0000-0xbffff, 0x80000000-0x8fffffff, 0x90000000-0xdfffffff]")
        );
        let other = HostBridge { segment: 1, bus: 0x40 };
        assert_eq!(read(IOMEM, other).unwrap().as_deref(), Some("[0xf0000000-0xf0ffffff]"));
        assert_eq!(read(IOMEM, HostBridge { segment: 0, bus: 1 }).unwrap(), None);
    }

    #[test]
    fn a_bridge_may_show_the_bus_elsewhere() {
        let range = |text: &str| text.parse::<IovaRange>().unwrap();
        let bar = (range("5000000000-5000000fff"), range("40000000-40000fff"));
        let window = BridgeWindow::behind(range("5000000000-503fffffff"), bar).unwrap();
        assert_eq!(window.bus, range("40000000-7fffffff"));
        assert_eq!(window.on_bus(range("5001000000-5001000fff")), Some(range("41000000-41000fff")));
        assert_eq!(window.on_bus(range("503ffff000-5040000fff")), None, "it reaches out");
        assert_eq!(BridgeWindow::behind(range("0-5000000fff"), bar), None, "it would begin below zero");
    }

    #[test]
    fn zeroes_are_not_known_rather_than_a_window_at_zero() {
        let hidden = "00000000-00000000 : System RAM\n00000000-00000000 : PCI Bus 0000:00\n";
        assert_eq!(read(hidden, FIRST).unwrap(), None);
        assert_eq!(windows(Path::new("/nowhere"), FIRST).unwrap(), None);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_not_taken_for_none() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("iomem")).unwrap();
        assert!(matches!(windows(directory.path(), FIRST), Err(IomemError::Read { .. })));
    }

    #[test]
    fn a_bad_line_is_named() {
        for bad in ["fish", "1-2", "1 : System RAM", "x-2 : System RAM", "2-1 : PCI Bus 0000:00"] {
            let error = read(&format!("0-1 : Reserved\n{bad}\n"), FIRST).unwrap_err().to_string();
            assert!(error.contains("line 2") && error.contains(bad), "{error}");
        }
    }
}
