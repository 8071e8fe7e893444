// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors as people read them.

#![forbid(unsafe_code)]

use std::error::Error;

/// An error with its causes, on one line.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        // A transparent error says the same as its cause.
        if !text.ends_with(&next_text) {
            text = format!("{text}: {next_text}");
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot do it")]
    struct Outer(#[source] io::Error);

    #[test]
    fn causes_follow_what_they_caused() {
        assert_eq!(with_causes(&Outer(io::Error::other("too late"))), "cannot do it: too late");
    }
}
