// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's monitor, as far as plugging a device needs it: one command at a time, with files, and the events that a device is gone or
//! that the guest keeps it.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::output::say;
use crate::control::lines::Lines;
use crate::control::passing::send;
use crate::id::PciAddress;

#[cfg(test)]
mod tests;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// QEMU, to take a command and to answer it.
    pub answer: Duration,
    /// QEMU, to plug a device, before it is said that this goes on.
    pub unmentioned: Duration,
    /// QEMU, to plug a device: it pins all of the guest's memory meanwhile.
    pub plug: Duration,
    /// A guest, to let a device go.
    pub guest: Duration,
    /// Until a guest is asked again that could not be asked.
    pub retry: Duration,
}

/// How many seconds a guest has to let a device go.
pub(super) const GUEST_PATIENCE: u32 = 30;

impl Default for Patience {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(20),
            unmentioned: Duration::from_secs(5),
            plug: Duration::from_secs(600),
            guest: Duration::from_secs(GUEST_PATIENCE.into()),
            retry: Duration::from_secs(1),
        }
    }
}

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines,
    patience: Patience,
    /// A command was not answered: the next answer may be to that.
    is_out_of_step: bool,
    /// The devices that QEMU said are gone.
    deleted: Vec<String>,
    /// The devices that QEMU said the guest does not let go.
    kept: Vec<String>,
}

/// A device that is to be plugged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plug<'a> {
    /// Where the guest is to have it.
    pub guest: PciAddress,
    /// What QEMU calls the bus.
    pub bus: &'a str,
    /// Its file.
    pub file: BorrowedFd<'a>,
    /// Whether it is one of several functions of its slot.
    pub is_one_of_several: bool,
}

/// How a device came to be unplugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unplugged {
    /// The guest let it go.
    LetGo,
    /// QEMU had none.
    WasNotThere,
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
    /// The connection broke, or nothing came in time: whether QEMU has done, or still does, what it was asked is not known.
    #[error("QEMU's monitor does not answer")]
    Broken(#[source] io::Error),
    /// It is no monitor.
    #[error("what listens there is not QEMU's monitor")]
    Format(#[from] serde_json::Error),
    /// QEMU refused, and did nothing.
    #[error("QEMU refuses {command}: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// The class of the error, for programs.
        class: String,
        /// What it said.
        reason: String,
    },
    /// The guest did not let the device go.
    #[error(
        "the guest did not let {id} go in {} seconds: try again when its kernel is up, and can take out devices, or wait longer (--wait)",
        .patience.as_secs()
    )]
    Held {
        /// What QEMU calls the device.
        id: String,
        /// How long the guest was waited for.
        patience: Duration,
    },
    /// The guest said that it does not let the device go.
    #[error("the guest refuses to let {0} go")]
    Kept(String),
    /// The device at that place was plugged by somebody else.
    #[error(
        "what the guest has at {guest} is not a device that `add --qmp` plugged, but QEMU's `{id}`: unplug that in QEMU first"
    )]
    Other {
        /// Where the guest has it.
        guest: PciAddress,
        /// What QEMU calls it.
        id: String,
    },
}

impl QmpError {
    /// Whether QEMU knows no such device.
    fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "DeviceNotFound")
    }

    /// Whether QEMU refuses only while the guest takes a device in, or out. It has no class for that: hw/pci/pcie.c has the texts.
    fn is_passing(&self) -> bool {
        let texts = ["guest is busy", "in the process of unplug"];
        matches!(self, Self::Refused { reason, .. } if texts.iter().any(|text| reason.contains(text)))
    }
}

impl Qmp {
    /// Connects to a monitor.
    ///
    /// # Errors
    ///
    /// [`QmpError::Connect`] if there is none, [`QmpError::Broken`] if it does not greet: it may serve somebody else.
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        Self::connect_with(path, Patience::default())
    }

    /// Connects to a monitor whose guest is given so much time to let a device go.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub(super) fn connect_and_wait_for_guest(path: &Path, guest: Duration) -> Result<Self, QmpError> {
        Self::connect_with(path, Patience { guest, ..Patience::default() })
    }

    /// Connects to a monitor that is given so much time.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub(super) fn connect_with(path: &Path, patience: Patience) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).and_then(|stream| {
            stream.set_write_timeout(Some(patience.answer))?;
            Ok(stream)
        });
        let stream = stream.map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        // More than it needs for all PCI devices of a guest.
        let lines = Lines::new(stream, 1 << 20);
        let mut qmp = Self { lines, patience, is_out_of_step: false, deleted: Vec::new(), kept: Vec::new() };
        // The greeting.
        qmp.next(Instant::now() + patience.answer)?;
        qmp.execute("qmp_capabilities", &json!({}), &[])?;
        Ok(qmp)
    }

    /// Plugs a host device, whose file is passed, into a bus.
    ///
    /// # Errors
    ///
    /// [`QmpError::Refused`]: the guest has not got it, and QEMU was told to close the file. After any other error whether the guest has
    /// it, or will have it, is not known.
    pub(super) fn plug(&mut self, plug: &Plug<'_>) -> Result<(), QmpError> {
        let id = device_id(plug.guest);
        self.execute("getfd", &json!({ "fdname": id }), &[plug.file])?;
        let result = self.add_device(&id, plug);
        if matches!(result, Err(QmpError::Refused { .. })) {
            // QEMU has no file by this name any more if it refused after it had looked at the device.
            let _ = self.execute("closefd", &json!({ "fdname": id }), &[]);
        }
        result
    }

    fn add_device(&mut self, id: &str, plug: &Plug<'_>) -> Result<(), QmpError> {
        let address = format!("{:x}.{:x}", plug.guest.device(), plug.guest.function());
        let device = json!({ "driver": "vfio-pci", "id": id, "fd": id, "iommufd": super::qemu::IOMMUFD, "bus": plug.bus,
            "addr": address, "multifunction": plug.is_one_of_several });
        let start = Instant::now();
        self.send("device_add", &device, &[])?;
        match self.answer("device_add", start + self.patience.unmentioned) {
            Err(QmpError::Broken(error)) if is_timeout(&error) => (),
            result => return result.map(|_| ()),
        }
        say(format_args!(
            "viommuctl: QEMU still plugs {}: it pins the guest's memory, which takes long if there is much; it is waited for, for up to \
             {} minutes",
            plug.guest,
            self.patience.plug.as_secs() / 60
        ));
        self.answer("device_add", start + self.patience.plug).map(|_| ())
    }

    /// Has a device unplugged that was plugged so, and waits until the guest has let it go and QEMU has closed it. While QEMU refuses
    /// because the guest still takes it in, or out, it is asked again.
    ///
    /// # Errors
    ///
    /// [`QmpError`]
    pub(super) fn unplug(&mut self, guest: PciAddress) -> Result<Unplugged, QmpError> {
        let deadline = Instant::now() + self.patience.guest;
        let pause = self.patience.retry;
        loop {
            match self.unplug_until(guest, deadline) {
                Err(error) if error.is_passing() && Instant::now() + pause < deadline => std::thread::sleep(pause),
                result => return result,
            }
        }
    }

    fn unplug_until(&mut self, guest: PciAddress, deadline: Instant) -> Result<Unplugged, QmpError> {
        let id = device_id(guest);
        // What was said earlier is not about this time.
        self.kept.retain(|kept| *kept != id);
        match self.execute("device_del", &json!({ "id": id }), &[]) {
            Err(error) if error.is_not_found() && !self.deleted.contains(&id) => return self.look_for_other(guest),
            Err(error) if error.is_not_found() => (),
            result => _ = result?,
        }
        while !self.deleted.contains(&id) {
            if self.kept.contains(&id) {
                return Err(QmpError::Kept(id));
            }
            match self.next(deadline) {
                Err(QmpError::Broken(error)) if is_timeout(&error) => {
                    return Err(QmpError::Held { id, patience: self.patience.guest });
                }
                result => _ = result?,
            }
        }
        Ok(Unplugged::LetGo)
    }

    /// There is no device by the name that is ours. If the guest has another one at that place, its endpoint is still needed.
    fn look_for_other(&mut self, guest: PciAddress) -> Result<Unplugged, QmpError> {
        let buses = self.execute("query-pci", &json!({}), &[])?;
        match buses.as_array().into_iter().flatten().find_map(|bus| device_at(bus, guest)) {
            Some(id) => Err(QmpError::Other { guest, id }),
            None => Ok(Unplugged::WasNotThere),
        }
    }

    fn execute(
        &mut self,
        command: &'static str,
        arguments: &Value,
        files: &[BorrowedFd<'_>],
    ) -> Result<Value, QmpError> {
        if self.is_out_of_step {
            return Err(QmpError::Broken(io::Error::other("it did not answer the command before")));
        }
        self.send(command, arguments, files)?;
        let answer = self.answer(command, Instant::now() + self.patience.answer);
        self.is_out_of_step = matches!(answer, Err(QmpError::Broken(_) | QmpError::Format(_)));
        answer
    }

    fn send(&self, command: &'static str, arguments: &Value, files: &[BorrowedFd<'_>]) -> Result<(), QmpError> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        send(self.lines.stream(), line.as_bytes(), files).map_err(QmpError::Broken)
    }

    /// What QEMU answers to a command.
    fn answer(&mut self, command: &'static str, deadline: Instant) -> Result<Value, QmpError> {
        loop {
            let mut message = self.next(deadline)?;
            if let Some(error) = message.get("error") {
                let text = |key| error.get(key).and_then(Value::as_str);
                let class = text("class").unwrap_or_default().to_owned();
                let reason = text("desc").unwrap_or("it does not say why").to_owned();
                return Err(QmpError::Refused { command, class, reason });
            }
            // Events come at any time.
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// The next message; what it says of devices is noted.
    fn next(&mut self, deadline: Instant) -> Result<Value, QmpError> {
        let message: Value = serde_json::from_slice(&self.lines.next(deadline).map_err(QmpError::Broken)?)?;
        let text = |pointer| message.pointer(pointer).and_then(Value::as_str);
        if let Some(device) = text("/data/device") {
            match text("/event") {
                Some("DEVICE_DELETED") => self.deleted.push(device.to_owned()),
                Some("DEVICE_UNPLUG_GUEST_ERROR") => self.kept.push(device.to_owned()),
                _ => (),
            }
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

/// What QEMU calls the device at this place on a bus or behind a bridge there, as `query-pci` shows a bus. A bridge that the firmware
/// has not numbered yet shows bus 0 behind it: no endpoint is there.
fn device_at(bus: &Value, guest: PciAddress) -> Option<String> {
    let is_there = |device: &Value| {
        let is = |key, number: u8| device.get(key).and_then(Value::as_u64) == Some(number.into());
        guest.segment() == 0 && is("bus", guest.bus()) && is("slot", guest.device()) && is("function", guest.function())
    };
    bus.get("devices").and_then(Value::as_array)?.iter().find_map(|device| {
        if is_there(device) {
            return Some(device.get("qdev_id").and_then(Value::as_str).unwrap_or_default().to_owned());
        }
        device_at(device.get("pci_bridge")?, guest)
    })
}
