// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The socket that a service manager passes: `sd_listen_fds(3)`.

use std::env;
use std::os::fd::RawFd;

/// The first number that is passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// What a service manager passes cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActivationError {
    /// A variable has a value that it cannot have.
    #[error("{variable}=`{value}` is not {expected}: start this process without it, or as sd_listen_fds(3) says")]
    Variable {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// There is not exactly one.
    #[error("the service manager passes {count} sockets{}, and one is served: give the service one socket unit", named(.names))]
    Count {
        /// How many there are.
        count: u32,
        /// What they are called, separated by colons; empty if that is not said.
        names: String,
    },
}

fn named(names: &str) -> String {
    if names.is_empty() { String::new() } else { format!(" ({names})") }
}

/// The variables, as the service manager sets them.
#[derive(Debug, Default)]
struct Variables {
    pid: Option<String>,
    count: Option<String>,
    names: Option<String>,
}

/// The number of the one socket that was passed to this process; `None` if there is nothing for it.
///
/// # Errors
///
/// [`ActivationError`]
pub(super) fn passed() -> Result<Option<RawFd>, ActivationError> {
    let variable = |name| env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    let variables =
        Variables { pid: variable("LISTEN_PID"), count: variable("LISTEN_FDS"), names: variable("LISTEN_FDNAMES") };
    one(variables, std::process::id())
}

fn one(variables: Variables, own: u32) -> Result<Option<RawFd>, ActivationError> {
    let (Some(pid), Some(count)) = (variables.pid, variables.count) else {
        return Ok(None);
    };
    // What was passed to another process, and left in the environment.
    if number("LISTEN_PID", &pid, "the number of a process")? != own {
        return Ok(None);
    }
    match number("LISTEN_FDS", &count, "a number of files")? {
        1 => Ok(Some(FIRST)),
        count => Err(ActivationError::Count { count, names: variables.names.unwrap_or_default() }),
    }
}

fn number(variable: &'static str, value: &str, expected: &'static str) -> Result<u32, ActivationError> {
    value.parse().map_err(|_| ActivationError::Variable { variable, value: value.to_owned(), expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(pid: Option<&str>, count: Option<&str>) -> Result<Option<RawFd>, ActivationError> {
        let own = |text: &str| text.to_owned();
        one(Variables { pid: pid.map(own), count: count.map(own), names: Some("a:b".to_owned()) }, 42)
    }

    #[test]
    fn one_socket_is_taken_by_the_process_that_it_is_for() {
        assert_eq!(look(Some("42"), Some("1")), Ok(Some(3)));
        for (pid, count) in [(None, Some("1")), (Some("42"), None), (Some("41"), Some("1")), (Some("41"), Some("x"))] {
            assert_eq!(look(pid, count), Ok(None));
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (pid, count, text) in [
            ("42", "0", "passes 0 sockets (a:b)"),
            ("42", "2", "passes 2 sockets (a:b)"),
            ("42", "-1", "LISTEN_FDS=`-1`"),
            ("42", "99999999999", "LISTEN_FDS=`99999999999`"),
            ("", "1", "LISTEN_PID=``"),
        ] {
            let said = look(Some(pid), Some(count)).unwrap_err().to_string();
            assert!(said.contains(text), "{said}");
        }
    }
}
