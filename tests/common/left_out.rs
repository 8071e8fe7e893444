// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests that cannot run where they are.

use std::io::Write;

/// Says that this test, or what it has left to do, is not done here, and what it needs. Where `CI` is in the environment everything
/// must be there: the test fails then.
pub fn left_out(needs: &str) {
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    assert!(std::env::var_os("CI").is_none(), "{test} is left out: it needs {needs}");
    // Not captured, as what is printed would be.
    let _ = writeln!(std::io::stderr(), "left out: {test} needs {needs}");
}
