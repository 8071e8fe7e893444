// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files, network, and other processes, by Landlock. What is open stays open.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::SandboxError;
use crate::paths::directory_of;

/// What is asked for; the kernel gives what it has of it.
const NEWEST: ABI = ABI::V10;

/// Gives up all access to files by name, TCP, abstract sockets and signals of other processes, for this thread and those that it
/// starts. Files in the directories of these sockets can be removed still, and in that of the one that is replaced also made, written and
/// renamed: Landlock has no rule for one file that is not there yet, or is removed. Returns the version of Landlock's interface, and `None` where the kernel has none.
///
/// # Errors
///
/// [`SandboxError`], where the kernel has Landlock.
pub(super) fn give_up(sockets: &[PathBuf], replaced: Option<&Path>) -> Result<Option<u8>, SandboxError> {
    let failed = SandboxError::Landlock;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    let removing = sockets.iter().map(|path| (path.as_path(), BitFlags::from(AccessFs::RemoveFile)));
    let replacing = AccessFs::MakeReg | AccessFs::WriteFile | AccessFs::RemoveFile;
    for (path, access) in removing.chain(replaced.map(|path| (path, replacing))) {
        let directory = directory_of(path);
        // Nothing is to be removed where nothing was made.
        if !directory.exists() {
            continue;
        }
        let directory =
            PathFd::new(directory).map_err(|source| SandboxError::Directory { path: path.to_owned(), source })?;
        rules = rules.add_rule(PathBeneath::new(directory, access)).map_err(failed)?;
    }
    let status = rules.restrict_self().map_err(failed)?;
    match (status.landlock, status.ruleset) {
        (LandlockStatus::NotEnabled | LandlockStatus::NotImplemented, _) => Ok(None),
        (_, RulesetStatus::NotEnforced) => Err(SandboxError::NotEnforced),
        (LandlockStatus::Available { effective_abi, .. }, _) => Ok(Some(effective_abi as u8)),
    }
}
