// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Counters.

use std::fmt;

use crate::request::{RequestKind, Status};

/// Requests of one kind, by the status that they were answered with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count([u64; Status::ALL.len()]);

impl Count {
    const fn add(&mut self, status: Status) {
        #[expect(clippy::indexing_slicing, reason = "there is a place for each status")]
        {
            self.0[status as usize] += 1;
        }
    }

    /// Answered with a status.
    pub const fn of(&self, status: Status) -> u64 {
        #[expect(clippy::indexing_slicing, reason = "there is a place for each status")]
        self.0[status as usize]
    }

    /// Answered with `VIRTIO_IOMMU_S_OK`.
    pub const fn ok(&self) -> u64 {
        self.of(Status::Ok)
    }

    /// Answered with any other status.
    pub fn failed(&self) -> u64 {
        self.0.iter().skip(1).sum()
    }
}

/// What a device has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// ATTACH requests.
    pub attach: Count,
    /// DETACH requests.
    pub detach: Count,
    /// MAP requests.
    pub map: Count,
    /// UNMAP requests.
    pub unmap: Count,
    /// PROBE requests.
    pub probe: Count,
    /// Buffers returned unwritten: of unknown type, without room for a status, or chains that cannot be read.
    pub unreadable: u64,
    /// Fault events that were taken for the guest.
    pub faults_sent: u64,
    /// Fault events for which there was no room.
    pub faults_dropped: u64,
    /// Notices for which there was no room.
    pub notices_dropped: u64,
}

impl Statistics {
    pub(super) const fn count(&mut self, kind: RequestKind, status: Status) {
        let count = match kind {
            RequestKind::Attach => &mut self.attach,
            RequestKind::Detach => &mut self.detach,
            RequestKind::Map => &mut self.map,
            RequestKind::Unmap => &mut self.unmap,
            RequestKind::Probe => &mut self.probe,
        };
        count.add(status);
    }

    /// Requests that were answered with anything but OK.
    pub fn failed(&self) -> u64 {
        [&self.attach, &self.detach, &self.map, &self.unmap, &self.probe].into_iter().map(Count::failed).sum()
    }
}

impl fmt::Display for Statistics {
    /// On one line: `5 PROBE, 5 ATTACH, 0 DETACH, 278 MAP, 268 UNMAP; 0 failed, 0 unreadable`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [
            ("PROBE", self.probe),
            ("ATTACH", self.attach),
            ("DETACH", self.detach),
            ("MAP", self.map),
            ("UNMAP", self.unmap),
        ];
        for (index, (name, count)) in kinds.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{} {name}", count.ok() + count.failed())?;
        }
        write!(f, "; {} failed, {} unreadable", self.failed(), self.unreadable)
    }
}
