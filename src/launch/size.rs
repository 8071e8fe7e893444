// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sizes of memory, as QEMU's command line has them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size such as 512M or 4G")]
pub struct ParseSizeError(String);

const UNITS: [(char, u32); 5] = [('B', 0), ('K', 10), ('M', 20), ('G', 30), ('T', 40)];

impl FromStr for Size {
    type Err = ParseSizeError;

    /// Reads a decimal number with B, K, M, G or T; without a unit it is in MiB, as QEMU has it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseSizeError(text.to_owned());
        let unit = text.chars().last().map(|last| last.to_ascii_uppercase());
        let known = UNITS.iter().find(|(letter, _)| Some(*letter) == unit);
        let (digits, shift) = match known {
            Some((_, shift)) => (text.get(..text.len() - 1).unwrap_or_default(), *shift),
            None => (text, 20),
        };
        let number: u64 = digits.parse().map_err(|_| error())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for Size {
    /// In the largest unit that it is a multiple of; it is read back as the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, shift): &&(char, u32)| self.0 != 0 && self.0.trailing_zeros() >= *shift;
        match UNITS.iter().rev().find(fits) {
            Some((letter, shift)) => write!(f, "{}{letter}", self.0 >> shift),
            None => f.write_str("0"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_qemu() {
        for (text, bytes) in [("256", 256 << 20), ("4G", 4 << 30), ("512m", 512 << 20), ("1T", 1 << 40), ("8K", 8192)] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "G", "-1G", "4GB", "1.5G", "99999999999T"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size(256 << 20).to_string(), "256M");
        for bytes in [0, 1, 4097, 256 << 20, 3 << 40, u64::MAX] {
            assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }
    }
}
