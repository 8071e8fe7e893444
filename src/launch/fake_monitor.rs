// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A monitor for tests: it answers as it is told, and keeps what it was asked.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::control::passing::receive;

/// The answer that a command was done.
pub(super) const DONE: &str = "{\"return\":{}}";

/// A command, its arguments, and how many files came with it.
pub(super) type Asked = (String, Value, usize);

/// The answer that a command was refused.
pub(super) fn refused(class: &str, reason: &str) -> String {
    json!({ "error": { "class": class, "desc": reason } }).to_string()
}

/// The event that a device is gone.
pub(super) fn deleted(id: &str) -> String {
    json!({ "event": "DEVICE_DELETED", "data": { "device": id, "path": "x" } }).to_string()
}

/// Serves one connection after the other, until the tests end.
pub(super) struct FakeMonitor {
    directory: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// What a monitor says at once.
pub(super) struct Voice<'a>(&'a UnixStream);

impl Voice<'_> {
    /// A line; nobody may listen any more.
    pub fn line(&self, text: &str) {
        self.part(&format!("{text}\n"));
    }

    /// A part of a line.
    pub fn part(&self, text: &str) {
        let _ = (&*self.0).write_all(text.as_bytes());
    }
}

impl FakeMonitor {
    /// A monitor that says these lines to a command and its arguments; if there are none, it hangs up.
    pub fn new(answer: impl Fn(&str, &Value, &Voice<'_>) -> Vec<String> + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("qmp")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&stream.unwrap(), &kept, &answer);
            }
        });
        Self { directory, asked }
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    /// What it was asked, apart from how it is greeted.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// The commands alone.
    pub fn commands(&self) -> Vec<String> {
        self.asked().into_iter().map(|(command, ..)| command).collect()
    }
}

fn serve(stream: &UnixStream, asked: &Mutex<Vec<Asked>>, answer: &impl Fn(&str, &Value, &Voice<'_>) -> Vec<String>) {
    let voice = Voice(stream);
    voice.line("{\"QMP\":{}}");
    loop {
        let (mut buffer, mut files) = (vec![0; 4096], Vec::new());
        let Ok(received) = receive(stream, &mut buffer, &mut files) else { return };
        if received.length == 0 {
            return;
        }
        let message: Value = serde_json::from_slice(&buffer[..received.length]).unwrap();
        let command = message["execute"].as_str().unwrap();
        if command == "qmp_capabilities" {
            voice.line(DONE);
            continue;
        }
        asked.lock().unwrap().push((command.to_owned(), message["arguments"].clone(), files.len()));
        let lines = answer(command, &message["arguments"], &voice);
        if lines.is_empty() {
            return;
        }
        for line in lines {
            voice.line(&line);
        }
    }
}
