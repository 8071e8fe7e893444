// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Privileges of the process: capabilities, those that executing a program could give, and what others of the same user may see of it.

#![forbid(unsafe_code)]

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::SandboxError;

/// Which capabilities stay, if they are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// None.
    Nothing,
    /// `CAP_IPC_LOCK`: without it the kernel begins to count guest memory that is pinned against `RLIMIT_MEMLOCK`.
    LockedMemory,
}

/// Gives privileges up for this thread and those that it starts, and core dumps for the process.
///
/// # Errors
///
/// [`SandboxError::Privilege`]
pub(super) fn give_up(kept: Kept) -> Result<(), SandboxError> {
    let failed = |what| move |errno: Errno| SandboxError::Privilege(what, errno.into());
    set_no_new_privs(true).map_err(failed("new privileges (no_new_privs)"))?;
    // Its memory is the guest's, and its files are the guest's devices: neither is for a core file, nor for other processes of the
    // same user by ptrace and /proc.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("core dumps (PR_SET_DUMPABLE)"))?;
    clear_ambient_capability_set().map_err(failed("ambient capabilities"))?;
    clear_bounding_set().map_err(failed("the bounding set of capabilities"))?;
    keep_only(kept).map_err(failed("capabilities"))
}

/// Whoever may not change the set has no use for it either: no program is executed any more.
fn clear_bounding_set() -> Result<(), Errno> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(capability) {
            // The kernel has no more.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno),
            Ok(false) => (),
            Ok(true) => match remove_capability_from_bounding_set(capability) {
                Err(Errno::PERM) => break,
                result => result?,
            },
        }
    }
    Ok(())
}

fn keep_only(kept: Kept) -> Result<(), Errno> {
    let CapabilitySets { effective, permitted, .. } = capabilities(None)?;
    let kept = match kept {
        Kept::Nothing => CapabilitySet::empty(),
        Kept::LockedMemory => CapabilitySet::IPC_LOCK,
    };
    let sets = CapabilitySets {
        effective: effective & kept,
        permitted: permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets)
}
