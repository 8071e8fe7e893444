// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory BARs of a PCI function, where the CPU sees them and where they are on the bus.

use std::io::{self, Read};
use std::path::Path;

use super::limited;
use super::sysfs::SysfsError;
use crate::range::{IovaRange, parse_address};

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bar {
    /// Where the CPU sees it.
    pub cpu: IovaRange,
    /// Where it is on the bus; `None` if the function does not tell, as virtual functions do not.
    pub bus: Option<IovaRange>,
}

/// How many BARs a function has at most.
const BARS: usize = 6;

/// The memory BARs of the function with this directory in sysfs.
///
/// # Errors
///
/// [`SysfsError`]
pub(super) fn bars(device: &Path) -> Result<Vec<Bar>, SysfsError> {
    let registers = registers(device);
    let resources = resources(&device.join("resource"))?;
    let bars = resources.into_iter().zip(registers).filter_map(|(cpu, start)| {
        let cpu = cpu?;
        let bus = start.and_then(|start| IovaRange::from_length(start, cpu.length()?));
        Some(Bar { cpu, bus })
    });
    Ok(bars.collect())
}

/// What lies behind each BAR: of the lines `START END FLAGS` of a `resource` file the first six. A device without the file
/// has none.
fn resources(path: &Path) -> Result<Vec<Option<IovaRange>>, SysfsError> {
    // include/linux/ioport.h
    const IORESOURCE_MEM: u64 = 0x200;
    let text = match limited::read_text(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(SysfsError::Read { path: path.to_owned(), source }),
    };
    let resource = |line: &str| {
        let bad = || SysfsError::Name { path: path.to_owned(), expected: "a list of START END FLAGS" };
        let fields: Vec<u64> =
            line.split_whitespace().map(parse_address).collect::<Result<_, _>>().map_err(|_| bad())?;
        let [start, last, flags] = fields[..] else {
            return Err(bad());
        };
        if flags & IORESOURCE_MEM == 0 || start == 0 {
            return Ok(None);
        }
        IovaRange::new(start, last).map(Some).ok_or_else(bad)
    };
    text.lines().take(BARS).map(resource).collect()
}

/// The address in each BAR register that has a memory address other than zero. The registers are in the first 64 bytes of
/// configuration space, which everybody may read; a device that does not answer has ones there.
fn registers(device: &Path) -> [Option<u64>; BARS] {
    // PCI Local Bus Specification 3.0, 6.1 and 6.2.5.
    const HEADER_TYPE: usize = 0x0e;
    const FIRST_BAR: usize = 0x10;
    let mut header = [0; 64];
    let mut starts = [None; BARS];
    if limited::open(&device.join("config")).and_then(|mut file| file.read_exact(&mut header)).is_err() {
        return starts;
    }
    let count = match header.get(HEADER_TYPE).map(|kind| kind & 0x7f) {
        Some(0) => BARS,
        Some(1) => 2,
        _ => 0,
    };
    let mut words = header.get(FIRST_BAR..).unwrap_or_default().chunks_exact(4).take(count);
    let mut starts_left = starts.iter_mut();
    while let (Some(low), Some(start)) = (words.next().map(word), starts_left.next()) {
        if low & 1 != 0 {
            continue;
        }
        let is_64_bit = low & 6 == 4;
        let high = if is_64_bit { words.next().map_or(0, word) } else { 0 };
        let address = u64::from(high) << 32 | u64::from(low & !0xf);
        *start = (address != 0).then_some(address);
        if is_64_bit {
            // The upper half is a register of its own, and no BAR.
            starts_left.next();
        }
    }
    starts
}

fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const RESOURCE: &str = "0x00000000c0000000 0x00000000c000ffff 0x0000000000040200
0x000000000000c000 0x000000000000c01f 0x0000000000040101
0x0000380000000000 0x000038000000ffff 0x000000000014220c
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
";

    fn device(resource: &str, header: &[(usize, u32)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("resource"), resource).unwrap();
        let mut config = [0; 64];
        for (at, value) in header {
            config[*at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        if !header.is_empty() {
            fs::write(directory.path().join("config"), config).unwrap();
        }
        directory
    }

    fn shown(device: &Path) -> Vec<(String, Option<String>)> {
        let bars = bars(device).unwrap().into_iter();
        bars.map(|bar| (bar.cpu.to_string(), bar.bus.map(|bus| bus.to_string()))).collect()
    }

    #[test]
    fn registers_say_where_a_bar_is_on_the_bus() {
        // A bridge that shows the bus at 0x40000000 to the CPU at 0xc0000000; and a BAR of 64 bits.
        let header = [(0x10, 0x4000_0000), (0x14, 0xc001), (0x18, 0x0000_000c), (0x1c, 0x3800)];
        let device = device(RESOURCE, &header);
        let expected = [
            ("0xc0000000-0xc000ffff", "0x40000000-0x4000ffff"),
            ("0x380000000000-0x38000000ffff", "0x380000000000-0x38000000ffff"),
        ];
        let expected = expected.map(|(cpu, bus)| (cpu.to_owned(), Some(bus.to_owned())));
        assert_eq!(shown(device.path()), expected);
    }

    #[test]
    fn without_registers_only_the_cpus_side_is_known() {
        let gone = [(0x0c, u32::MAX), (0x10, u32::MAX), (0x14, u32::MAX), (0x18, u32::MAX)];
        for header in [&[][..], &[(0x10, 0)], &gone] {
            let device = device(RESOURCE, header);
            let bars = bars(device.path()).unwrap();
            assert_eq!(bars.len(), 2);
            assert!(bars.iter().all(|bar| bar.bus.is_none()), "{header:x?}");
        }
        let bridge = device(RESOURCE, &[(0x0c, 0x0001_0000), (0x10, 0xc000_0000), (0x18, 0x1000_0000)]);
        let bars = bars(bridge.path()).unwrap();
        assert!(
            bars[0].bus.is_some() && bars[1].bus.is_none(),
            "a bridge has two BARs, and other registers after them"
        );
    }

    #[test]
    fn a_bad_file_is_named_and_none_is_no_bar() {
        let device = device("0x1 0x2\n", &[]);
        assert!(bars(device.path()).unwrap_err().to_string().contains("resource"));
        assert_eq!(bars(&device.path().join("nothing")).unwrap(), []);
        // What is there and cannot be read is not the same as nothing.
        fs::create_dir_all(device.path().join("other/resource")).unwrap();
        let error = bars(&device.path().join("other")).unwrap_err();
        assert!(matches!(error, SysfsError::Read { .. }), "{error}");
    }
}
