// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sockets that a service manager passes: `sd_listen_fds(3)`.

use std::env;
use std::os::fd::RawFd;

/// The first number that is passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// What the control socket is called. The VMM's may have any other name, or none.
const CONTROL: &str = "control";

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
    /// They cannot be told apart, or there are too many.
    #[error(
        "the service manager passes {count} sockets{}: one for the VMM, and one with FileDescriptorName={CONTROL} to be the control \
         socket, are served", named(.names)
    )]
    Sockets {
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

/// The sockets that were passed to this process, by their numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PassedSockets {
    /// The VMM's.
    pub frontend: Option<RawFd>,
    /// The one with the name [`CONTROL`].
    pub control: Option<RawFd>,
}

/// What was passed to this process; nothing if nothing is for it.
///
/// # Errors
///
/// [`ActivationError`]
pub(super) fn passed() -> Result<PassedSockets, ActivationError> {
    let variable = |name| env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    let variables =
        Variables { pid: variable("LISTEN_PID"), count: variable("LISTEN_FDS"), names: variable("LISTEN_FDNAMES") };
    sockets(variables, std::process::id())
}

fn sockets(variables: Variables, own: u32) -> Result<PassedSockets, ActivationError> {
    let (Some(pid), Some(count)) = (variables.pid, variables.count) else {
        return Ok(PassedSockets::default());
    };
    // What was passed to another process, and left in the environment.
    if number("LISTEN_PID", &pid, "the number of a process")? != own {
        return Ok(PassedSockets::default());
    }
    let count = number("LISTEN_FDS", &count, "a number of files")?;
    let names = variables.names.unwrap_or_default();
    let is_control = |place| names.split(':').nth(place) == Some(CONTROL);
    let (frontend, control) = match (count, is_control(0), is_control(1)) {
        (1, false, _) => (Some(FIRST), None),
        (1, true, _) => (None, Some(FIRST)),
        (2, false, true) => (Some(FIRST), Some(FIRST + 1)),
        (2, true, false) => (Some(FIRST + 1), Some(FIRST)),
        _ => return Err(ActivationError::Sockets { count, names }),
    };
    Ok(PassedSockets { frontend, control })
}

fn number(variable: &'static str, value: &str, expected: &'static str) -> Result<u32, ActivationError> {
    value.parse().map_err(|_| ActivationError::Variable { variable, value: value.to_owned(), expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: PassedSockets = PassedSockets { frontend: None, control: None };

    fn look(pid: Option<&str>, count: Option<&str>, names: Option<&str>) -> Result<PassedSockets, ActivationError> {
        let own = |text: &str| text.to_owned();
        sockets(Variables { pid: pid.map(own), count: count.map(own), names: names.map(own) }, 42)
    }

    #[test]
    fn sockets_are_taken_by_the_process_that_they_are_for() {
        assert_eq!(look(Some("42"), Some("1"), Some("a")), Ok(PassedSockets { frontend: Some(3), ..NONE }));
        for (pid, count) in [(None, Some("1")), (Some("42"), None), (Some("41"), Some("1")), (Some("41"), Some("x"))] {
            assert_eq!(look(pid, count, Some("a")), Ok(NONE));
        }
    }

    #[test]
    fn the_control_socket_is_known_by_its_name() {
        for (count, names, frontend, control) in [
            ("1", None, Some(3), None),
            ("1", Some("control"), None, Some(3)),
            ("1", Some("controls"), Some(3), None),
            ("2", Some("vhost-user:control"), Some(3), Some(4)),
            ("2", Some("control:"), Some(4), Some(3)),
        ] {
            assert_eq!(look(Some("42"), Some(count), names), Ok(PassedSockets { frontend, control }), "{names:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (pid, count, names, text) in [
            ("42", "0", Some("a:b"), "passes 0 sockets (a:b)"),
            ("42", "2", Some("a:b"), "passes 2 sockets (a:b)"),
            ("42", "2", None, "passes 2 sockets:"),
            ("42", "2", Some("control:control"), "passes 2 sockets (control:control)"),
            ("42", "3", Some("a:control:b"), "passes 3 sockets"),
            ("42", "-1", None, "LISTEN_FDS=`-1`"),
            ("42", "99999999999", None, "LISTEN_FDS=`99999999999`"),
            ("", "1", None, "LISTEN_PID=``"),
        ] {
            let said = look(Some(pid), Some(count), names).unwrap_err().to_string();
            assert!(said.contains(text), "{said}");
        }
    }
}
