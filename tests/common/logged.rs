// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the library logs in this process.

#![allow(dead_code, reason = "not every test uses everything")]

use std::sync::Mutex;

use log::{LevelFilter, Log, Metadata, Record};

static LINES: Lines = Lines(Mutex::new(Vec::new()));

struct Lines(Mutex<Vec<String>>);

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

/// Has lines kept from now on. Once in a process.
pub fn keep() {
    log::set_logger(&LINES).unwrap();
    log::set_max_level(LevelFilter::Info);
}

/// The lines so far.
pub fn lines() -> Vec<String> {
    LINES.0.lock().unwrap().clone()
}
