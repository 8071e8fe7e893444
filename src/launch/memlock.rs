// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How much memory a guest with assigned devices has locked, how many mappings it has, and whether this host grants that.
//!
//! The kernel counts a page again for each I/O address space that it is mapped in (`iommufd`, by default for each user): in the VMM's
//! own, in the one for bypass, and in that of each domain. A guest may have each device in a domain of its own, and all memory
//! mapped in each.

use std::fmt;
use std::fs;

use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use super::show::table;
use super::size::Size;

/// What is to be worked out.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// The guest's memory.
    pub memory: Size,
    /// In pages of which size it is mapped.
    pub page: Size,
    /// How many devices are assigned to it.
    pub devices: u64,
    /// How many mappings a domain may have: what the daemon is given as `--max-mappings`.
    pub max_mappings: u64,
    /// How many all domains may have together: `--max-mappings-in-all`.
    pub max_mappings_in_all: u64,
}

/// What a process may lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// As much as it likes: it has `CAP_IPC_LOCK`.
    Capability,
    /// As much as it likes: `RLIMIT_MEMLOCK` is unlimited.
    Unlimited,
    /// So many bytes, by `RLIMIT_MEMLOCK`.
    Limit(u64),
}

impl Grant {
    /// What this process, and those that it starts, may lock.
    pub fn of_this_process() -> Self {
        // include/uapi/linux/capability.h
        const CAP_IPC_LOCK: u32 = 14;
        if effective_capabilities().is_some_and(|set| set >> CAP_IPC_LOCK & 1 == 1) {
            return Self::Capability;
        }
        getrlimit(Resource::Memlock).current.map_or(Self::Unlimited, Self::Limit)
    }

    /// Whether so many bytes may be locked.
    pub const fn covers(self, bytes: u64) -> bool {
        match self {
            Self::Capability | Self::Unlimited => true,
            Self::Limit(limit) => bytes <= limit,
        }
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capability => f.write_str("unlimited (CAP_IPC_LOCK)"),
            Self::Unlimited => f.write_str("unlimited (RLIMIT_MEMLOCK)"),
            Self::Limit(limit) => write!(f, "{} (RLIMIT_MEMLOCK)", Size(*limit)),
        }
    }
}

fn effective_capabilities() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(set.trim(), 16).ok()
}

/// How many bytes may be locked at most, for a guest with so many devices; as many as can be said, if there are more.
pub const fn locked_at_most(memory: u64, devices: u64) -> u64 {
    // The VMM's own table and bypass, and each device's domain.
    memory.saturating_mul(devices.saturating_add(2))
}

/// What has so many bytes be locked. The shell counts in units of 1024, and half a one is none.
pub(super) fn how_to_raise(locked: u64) -> String {
    format!(
        "raise the limit of VMM and daemon: `ulimit -l {}`, or LimitMEMLOCK={} in a systemd unit; or give both CAP_IPC_LOCK",
        locked.div_ceil(1024),
        Size(locked)
    )
}

/// One thing that is needed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    /// What it is.
    pub what: String,
    /// How much is needed.
    pub needed: u64,
    /// What there is, for people; empty for a part of something else.
    pub granted: String,
    /// Whether that is enough; `None` for a part of something else, and for what only other VMMs need.
    pub enough: Option<bool>,
    /// Whether it is a number of bytes.
    #[serde(skip)]
    is_size: bool,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// Whether this host grants all of it.
    pub granted: bool,
    /// What is needed.
    pub needs: Vec<Need>,
    /// What to do, if it is not.
    pub remedies: Vec<String>,
}

/// What a guest needs, and whether it is granted.
pub fn needs(demand: &Demand, grant: Grant, type1_limit: Option<u64>) -> Needs {
    let Demand { memory: Size(memory), page: Size(page), devices, max_mappings, max_mappings_in_all } = *demand;
    let size = |what: String, needed| Need { what, needed, granted: String::new(), enough: None, is_size: true };
    let count = |what: &str, needed, granted: String, enough| Need {
        what: what.to_owned(),
        needed,
        granted,
        enough,
        is_size: false,
    };
    let of_devices = memory.saturating_mul(devices);
    let locked = locked_at_most(memory, devices);
    let mappings = memory.div_ceil(page.max(1));
    let in_all = mappings.saturating_mul(devices);
    let mut needs = vec![
        size("locked: the VMM's own table".to_owned(), memory),
        size("locked: bypass".to_owned(), memory),
        size(format!("locked: all memory mapped by the guest, in {devices} domains"), of_devices),
        Need {
            granted: grant.to_string(),
            enough: Some(grant.covers(locked)),
            ..size("locked in all".to_owned(), locked)
        },
        count(
            "mappings of a domain",
            mappings,
            format!("{max_mappings} (--max-mappings)"),
            Some(mappings <= max_mappings),
        ),
        count(
            "mappings of all domains",
            in_all,
            format!("{max_mappings_in_all} (--max-mappings-in-all)"),
            Some(in_all <= max_mappings_in_all),
        ),
    ];
    if let Some(limit) = type1_limit {
        let what = "mappings of a VFIO type1 container (only where a VMM uses that)";
        needs.push(count(what, mappings, format!("{limit} (vfio_iommu_type1.dma_entry_limit)"), None));
    }
    let mut remedies = Vec::new();
    if !grant.covers(locked) {
        remedies.push(how_to_raise(locked));
    }
    if mappings > max_mappings {
        remedies.push(format!("give the daemon --max-mappings {mappings}, or the guest larger pages"));
    }
    if in_all > max_mappings_in_all {
        remedies.push(format!("give the daemon --max-mappings-in-all {in_all}, or the guest larger pages"));
    }
    Needs { granted: remedies.is_empty(), needs, remedies }
}

/// How many mappings a VFIO type1 container may have on this host, if that is known.
pub fn type1_limit() -> Option<u64> {
    let text = fs::read_to_string("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit").ok()?;
    text.trim().parse().ok()
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = table(&["", "at most", "granted here", ""]);
        for Need { what, needed, granted, enough, is_size } in &self.needs {
            let needed = if *is_size { Size(*needed).to_string() } else { needed.to_string() };
            let verdict = match enough {
                Some(true) => "ok",
                Some(false) => "NOT enough",
                None => "",
            };
            table.add_row([what, &needed, granted, verdict]);
        }
        write!(f, "{table}")?;
        for remedy in &self.remedies {
            write!(f, "\n-> {remedy}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand() -> Demand {
        let page = Size(2 << 20);
        Demand { memory: Size(96 << 30), page, devices: 2, max_mappings: 1 << 20, max_mappings_in_all: 1 << 22 }
    }

    #[test]
    fn each_table_locks_all_memory() {
        let answer = needs(&demand(), Grant::Limit(384 << 30), Some(65535));
        assert!(answer.granted && answer.remedies.is_empty());
        let needed: Vec<u64> = answer.needs.iter().map(|need| need.needed).collect();
        assert_eq!(needed, [96 << 30, 96 << 30, 192 << 30, 384 << 30, 49152, 98304, 49152]);
        let text = answer.to_string();
        assert!(text.contains("384G") && text.contains("384G (RLIMIT_MEMLOCK)") && !text.contains("NOT"), "{text}");
        for grant in [Grant::Capability, Grant::Unlimited] {
            assert!(needs(&demand(), grant, None).granted);
        }
    }

    #[test]
    fn what_is_not_granted_is_named_with_what_to_do() {
        let answer = needs(&demand(), Grant::Limit((384 << 30) - 1), None);
        assert!(!answer.granted);
        assert_eq!(answer.remedies.len(), 1);
        assert!(answer.to_string().contains("LimitMEMLOCK=384G"), "{answer}");
        // Page by page there are 25 million.
        let answer = needs(&Demand { page: Size(4096), ..demand() }, Grant::Unlimited, Some(65535));
        assert_eq!(answer.remedies.len(), 2);
        assert!(answer.remedies[0].contains("--max-mappings 25165824"), "{answer}");
        assert!(answer.remedies[1].contains("--max-mappings-in-all 50331648"), "{answer}");
        let endless = Demand { memory: Size(u64::MAX), page: Size(0), devices: u64::MAX, ..demand() };
        assert!(!needs(&endless, Grant::Limit(u64::MAX - 1), None).granted);
    }
}
