// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests, resets, changes of memory, moves to another host and failures of the host in any order: the device does what the oracle
//! does. Both are those of the test `oracle`.

use arbitrary::{Arbitrary, Unstructured};

#[path = "../../../tests/oracle/machine.rs"]
mod machine;
#[allow(clippy::from_iter_instead_of_collect, reason = "it says what is made")]
#[path = "../../../tests/oracle/model.rs"]
mod model;
#[path = "../../../tests/oracle/operation.rs"]
mod operation;

/// Does to device and oracle what the input says, and compares them after each step.
pub fn check(bytes: &[u8]) {
    if let Ok(input) = operation::Input::arbitrary_take_rest(Unstructured::new(bytes)) {
        machine::run(&input);
    }
}
