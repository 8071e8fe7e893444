// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an endpoint may do with a mapping.

#![forbid(unsafe_code)]

use std::fmt;

/// The accesses that a mapping allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Access {
    /// The endpoint may read.
    pub read: bool,
    /// The endpoint may write.
    pub write: bool,
}

impl Access {
    /// Reading only.
    pub const READ: Self = Self { read: true, write: false };
    /// Writing only.
    pub const WRITE: Self = Self { read: false, write: true };
    /// Both.
    pub const READ_WRITE: Self = Self { read: true, write: true };
    /// Neither: the addresses are taken, and nothing gets through.
    pub const NONE: Self = Self { read: false, write: false };

    /// Whether nothing is allowed.
    pub const fn is_none(self) -> bool {
        !self.read && !self.write
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.read, self.write) {
            (true, true) => "read-write",
            (true, false) => "read-only",
            (false, true) => "write-only",
            (false, false) => "no access",
        })
    }
}
