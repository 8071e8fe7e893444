// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the programs print. Whoever reads that may have gone: this is no reason to leave the work half done, as `println!` and
//! `eprintln!` would, which panic.

use std::fmt;
use std::io::{self, ErrorKind, Write};

/// The standard output cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to the standard output")]
pub struct OutputError(#[source] io::Error);

/// Writes to the standard output. That nobody reads it, as behind `| head`, is no failure: whether somebody does is returned.
///
/// # Errors
///
/// [`OutputError`]
pub fn put(text: &str) -> Result<bool, OutputError> {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(OutputError(error)),
    }
}

/// Says a line on the standard error. Where nobody reads there is nobody to tell.
pub fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}
