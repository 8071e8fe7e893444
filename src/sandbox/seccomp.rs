// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lists of calls made into filters, and put in force.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use nix::libc;
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use super::calls::{Call, NOT_THERE, Only};
use super::{SandboxError, SeccompMode, ThreadKind};

/// Gives up what is not in the list of this kind of thread, for this thread and those that it starts.
///
/// # Errors
///
/// [`SandboxError::Seccomp`]
pub(super) fn give_up(mode: SeccompMode, kind: ThreadKind) -> Result<(), SandboxError> {
    let refused = match mode {
        SeccompMode::Off => return Ok(()),
        SeccompMode::Kill => SeccompAction::KillProcess,
        SeccompMode::Trap => SeccompAction::Trap,
        SeccompMode::Log => SeccompAction::Log,
    };
    let failed = |source| SandboxError::Seccomp { thread: kind.name(), source };
    // Of two filters' answers the kernel takes the stricter one, and an error is stricter than leave.
    let not_there = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let filters = compile(NOT_THERE.iter(), SeccompAction::Allow, not_there)
        .and_then(|not_there| Ok([not_there, compile(kind.calls(), refused, SeccompAction::Allow)?]))
        .map_err(failed)?;
    filters.iter().try_for_each(|filter| apply_filter(filter)).map_err(failed)
}

fn compile<'a>(
    calls: impl Iterator<Item = &'a Call>,
    of_others: SeccompAction,
    of_these: SeccompAction,
) -> Result<BpfProgram, Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in calls {
        let known = rules.entry(call.number).or_default();
        known.extend(rules_of(&call.only)?);
    }
    let machine = TargetArch::try_from(ARCH)?;
    Ok(SeccompFilter::new(rules, of_others, of_these, machine)?.try_into()?)
}

/// The rules of which one must hold; none, if any call will do.
fn rules_of(only: &Only) -> Result<Vec<SeccompRule>, Error> {
    // The kernel looks at no more of these arguments.
    let rule = |argument, operation, value: u32| -> Result<SeccompRule, Error> {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operation, value.into())?;
        Ok(SeccompRule::new(vec![condition])?)
    };
    match *only {
        Only::Any => Ok(Vec::new()),
        Only::OneOf { argument, values } => {
            values.iter().map(|value| rule(argument, SeccompCmpOp::Eq, *value)).collect()
        }
        Only::Without { argument, bits } => Ok(vec![rule(argument, SeccompCmpOp::MaskedEq(bits.into()), 0)?]),
        Only::Itself { argument } => Ok(vec![rule(argument, SeccompCmpOp::Eq, std::process::id())?]),
    }
}
