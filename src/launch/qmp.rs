// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's monitor, as far as plugging a device needs it: one command at a time, with files, and the event that a device is gone.

use std::io::{self, BufRead, BufReader};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control::passing::send;
use crate::id::PciAddress;

/// How long QEMU may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a guest may take to let a device go.
const GUESTS_PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// The part of a line that came before nothing came for a while.
    line: Vec<u8>,
    /// The devices that QEMU said are gone.
    deleted: Vec<String>,
}

/// A monitor that does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens.
    #[error("cannot reach QEMU's monitor at {}: start QEMU with -qmp unix:PATH,server=on,wait=off, and let no one else have it", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke, or nothing came in time.
    #[error("QEMU's monitor does not answer")]
    Broken(#[source] io::Error),
    /// It is no monitor.
    #[error("what listens there is not QEMU's monitor")]
    Format(#[from] serde_json::Error),
    /// QEMU refused.
    #[error("QEMU refuses {command}: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// What it said.
        reason: String,
    },
    /// The guest did not let the device go.
    #[error("the guest did not let {0} go in 30 seconds: the endpoint was left as it is")]
    Held(String),
}

impl Qmp {
    /// Connects to a monitor.
    ///
    /// # Errors
    ///
    /// [`QmpError`]
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).and_then(|stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(stream)
        });
        let stream = stream.map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        let mut qmp = Self { stream: BufReader::new(stream), line: Vec::new(), deleted: Vec::new() };
        // The greeting.
        qmp.next()?;
        qmp.execute("qmp_capabilities", &json!({}), &[])?;
        Ok(qmp)
    }

    /// Plugs a host device, whose file is passed, into a bus.
    ///
    /// # Errors
    ///
    /// [`QmpError`]
    pub fn plug(&mut self, guest: PciAddress, bus: &str, file: BorrowedFd<'_>) -> Result<(), QmpError> {
        let id = device_id(guest);
        self.execute("getfd", &json!({ "fdname": id }), &[file])?;
        let address = format!("{:x}.{:x}", guest.device(), guest.function());
        let device = json!({ "driver": "vfio-pci", "id": id, "fd": id, "iommufd": super::qemu::IOMMUFD, "bus": bus, "addr": address });
        self.execute("device_add", &device, &[])
    }

    /// Has a device unplugged that was plugged so, and waits until the guest has let it go and QEMU has closed it.
    ///
    /// # Errors
    ///
    /// [`QmpError`]
    pub fn unplug(&mut self, guest: PciAddress) -> Result<(), QmpError> {
        let id = device_id(guest);
        let deadline = Instant::now() + GUESTS_PATIENCE;
        self.execute("device_del", &json!({ "id": id }), &[])?;
        while !self.deleted.contains(&id) && Instant::now() < deadline {
            match self.next() {
                Err(QmpError::Broken(error)) if is_timeout(&error) => (),
                result => _ = result?,
            }
        }
        if self.deleted.contains(&id) {
            return Ok(());
        }
        Err(QmpError::Held(id))
    }

    fn execute(&mut self, command: &'static str, arguments: &Value, files: &[BorrowedFd<'_>]) -> Result<(), QmpError> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        send(self.stream.get_ref(), line.as_bytes(), files).map_err(QmpError::Broken)?;
        loop {
            let message = self.next()?;
            if let Some(error) = message.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("it does not say why").to_owned();
                return Err(QmpError::Refused { command, reason });
            }
            // Events come at any time.
            if message.get("return").is_some() {
                return Ok(());
            }
        }
    }

    /// The next message; devices that are gone are noted.
    fn next(&mut self) -> Result<Value, QmpError> {
        self.stream.read_until(b'\n', &mut self.line).map_err(QmpError::Broken)?;
        if !self.line.ends_with(b"\n") {
            return Err(QmpError::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        let message: Value = serde_json::from_slice(&std::mem::take(&mut self.line))?;
        let text = |pointer| message.pointer(pointer).and_then(Value::as_str);
        if text("/event") == Some("DEVICE_DELETED") {
            self.deleted.extend(text("/data/device").map(ToOwned::to_owned));
        }
        Ok(message)
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// What QEMU calls a device that is plugged, by its place in the guest.
fn device_id(guest: PciAddress) -> String {
    format!("viommu-{:02x}-{:02x}.{:x}", guest.bus(), guest.device(), guest.function())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::control::passing::receive;

    /// A monitor that answers so, line by line, and returns what it was asked with how many files.
    fn monitor(answers: &'static [&'static str], work: impl FnOnce(&Path)) -> Vec<(Value, usize)> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"QMP\":{}}\n").unwrap();
            let mut asked = Vec::new();
            for answer in answers {
                let (mut buffer, mut files) = (vec![0; 4096], Vec::new());
                let length = receive(&stream, &mut buffer, &mut files).unwrap().length;
                asked.push((serde_json::from_slice(&buffer[..length]).unwrap(), files.len()));
                stream.write_all(answer.as_bytes()).unwrap();
            }
            asked
        });
        work(&path);
        serving.join().unwrap()
    }

    const GUEST: &str = "02:00.0";

    #[test]
    fn a_device_is_plugged_by_its_file_and_unplugged() {
        let answers = &[
            "{\"return\":{}}\n",
            "{\"event\":\"NIC\"}\n{\"return\":{}}\n",
            "{\"return\":{}}\n",
            "{\"return\":{}}\n{\"event\":\"DEVICE_DELETED\",\"data\":{\"path\":\"x\"}}\n\
             {\"event\":\"DEVICE_DELETED\",\"data\":{\"device\":\"viommu-02-00.0\"}}\n",
        ];
        let asked = monitor(answers, |path| {
            let mut qmp = Qmp::connect(path).unwrap();
            let file = std::fs::File::open("/dev/null").unwrap();
            qmp.plug(GUEST.parse().unwrap(), "viommu-port1", file.as_fd()).unwrap();
            qmp.unplug(GUEST.parse().unwrap()).unwrap();
        });
        assert_eq!(asked[1], (json!({ "execute": "getfd", "arguments": { "fdname": "viommu-02-00.0" } }), 1));
        let device = json!({ "driver": "vfio-pci", "id": "viommu-02-00.0", "fd": "viommu-02-00.0", "iommufd": "viommu-iommufd",
            "bus": "viommu-port1", "addr": "0.0" });
        assert_eq!(asked[2], (json!({ "execute": "device_add", "arguments": device }), 0));
        assert_eq!(asked[3].0["execute"], "device_del");
    }

    #[test]
    fn what_qemu_says_against_it_is_told() {
        let answers = &["{\"return\":{}}\n", "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no such bus\"}}\n"];
        monitor(answers, |path| {
            let error = Qmp::connect(path).unwrap().unplug(GUEST.parse().unwrap()).unwrap_err();
            assert_eq!(error.to_string(), "QEMU refuses device_del: no such bus");
        });
        let error = Qmp::connect(Path::new("/nowhere")).unwrap_err();
        assert!(error.to_string().contains("-qmp unix:PATH"));
    }
}
