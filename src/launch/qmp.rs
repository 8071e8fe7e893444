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
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(20),
            unmentioned: Duration::from_secs(5),
            plug: Duration::from_secs(600),
            guest: Duration::from_secs(30),
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
    #[error("the guest did not let {id} go in {} seconds: try again when its kernel is up, and can take out devices", .patience.as_secs())]
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

    /// Has a device unplugged that was plugged so, and waits until the guest has let it go and QEMU has closed it.
    ///
    /// # Errors
    ///
    /// [`QmpError`]
    pub(super) fn unplug(&mut self, guest: PciAddress) -> Result<Unplugged, QmpError> {
        self.unplug_until(guest, Instant::now() + self.patience.guest)
    }

    /// Has a device unplugged that was plugged just now: while the guest still takes it in, QEMU refuses, and is asked again.
    ///
    /// # Errors
    ///
    /// [`QmpError`]
    pub(super) fn take_back(&mut self, guest: PciAddress) -> Result<Unplugged, QmpError> {
        let deadline = Instant::now() + self.patience.guest;
        let pause = self.patience.guest / 30;
        loop {
            match self.unplug_until(guest, deadline) {
                Err(QmpError::Refused { .. }) if Instant::now() + pause < deadline => std::thread::sleep(pause),
                result => return result,
            }
        }
    }

    fn unplug_until(&mut self, guest: PciAddress, deadline: Instant) -> Result<Unplugged, QmpError> {
        let id = device_id(guest);
        // What was said earlier is not about this time.
        self.kept.retain(|kept| *kept != id);
        match self.execute("device_del", &json!({ "id": id }), &[]) {
            Err(error) if error.is_not_found() => return self.look_for_other(guest),
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::super::fake_monitor::{DONE, FakeMonitor, deleted, refused};
    use super::*;

    const GUEST: &str = "02:00.0";
    const ID: &str = "viommu-02-00.0";
    /// Nobody waits long in tests.
    const SHORT: Patience = Patience {
        answer: Duration::from_secs(20),
        unmentioned: Duration::from_millis(50),
        plug: Duration::from_millis(500),
        guest: Duration::from_millis(600),
    };

    fn guest() -> PciAddress {
        GUEST.parse().unwrap()
    }

    fn connect(monitor: &FakeMonitor) -> Qmp {
        Qmp::connect_with(&monitor.path(), SHORT).unwrap()
    }

    fn plug(monitor: &FakeMonitor, is_one_of_several: bool) -> Result<(), QmpError> {
        let file = std::fs::File::open("/dev/null").unwrap();
        let plug = Plug { guest: guest(), bus: "viommu-port1", file: file.as_fd(), is_one_of_several };
        connect(monitor).plug(&plug)
    }

    #[test]
    fn a_device_is_plugged_by_its_file_and_unplugged() {
        let monitor = FakeMonitor::new(|command, _, _| match command {
            "getfd" => vec!["{\"event\":\"NIC\"}".to_owned(), DONE.to_owned()],
            "device_del" => {
                let other = json!({ "event": "DEVICE_DELETED", "data": { "path": "x" } }).to_string();
                vec![DONE.to_owned(), other, deleted(ID)]
            }
            _ => vec![DONE.to_owned()],
        });
        plug(&monitor, false).unwrap();
        assert_eq!(connect(&monitor).unplug(guest()).unwrap(), Unplugged::LetGo);
        let device = json!({ "driver": "vfio-pci", "id": ID, "fd": ID, "iommufd": "viommu-iommufd", "bus": "viommu-port1",
            "addr": "0.0", "multifunction": false });
        assert_eq!(
            monitor.asked(),
            [
                ("getfd".to_owned(), json!({ "fdname": ID }), 1),
                ("device_add".to_owned(), device, 0),
                ("device_del".to_owned(), json!({ "id": ID }), 0)
            ]
        );
    }

    #[test]
    fn what_qemu_says_against_it_is_told_and_the_file_is_closed() {
        let monitor = FakeMonitor::new(|command, _, _| match command {
            "device_add" => vec![refused("GenericError", "no such bus")],
            "closefd" => vec![refused("GenericError", "no such file")],
            _ => vec![DONE.to_owned()],
        });
        let error = plug(&monitor, true).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refuses device_add: no such bus");
        assert_eq!(monitor.commands(), ["getfd", "device_add", "closefd"]);
        assert_eq!(monitor.asked()[1].1["multifunction"], true);
        assert_eq!(monitor.asked()[2].1, json!({ "fdname": ID }));
        let error = Qmp::connect(Path::new("/nowhere")).unwrap_err();
        assert!(error.to_string().contains("-qmp unix:PATH"));
    }

    #[test]
    fn a_device_that_takes_long_to_plug_is_waited_for_but_not_for_ever() {
        for (delay, is_late) in [(200, false), (1000, true)] {
            let monitor = FakeMonitor::new(move |command, _, _| {
                if command == "device_add" {
                    std::thread::sleep(Duration::from_millis(delay));
                }
                vec![DONE.to_owned()]
            });
            let result = plug(&monitor, false);
            assert_eq!(matches!(&result, Err(QmpError::Broken(error)) if is_timeout(error)), is_late, "{result:?}");
            assert_eq!(result.is_err(), is_late);
            // Whether QEMU still needs the file is not known.
            assert_eq!(monitor.commands(), ["getfd", "device_add"]);
        }
    }

    #[test]
    fn a_late_answer_is_not_taken_for_that_to_the_next_command() {
        let monitor = FakeMonitor::new(|command, _, _| match command {
            "device_add" => vec![refused("GenericError", "no room")],
            "closefd" => {
                std::thread::sleep(Duration::from_millis(300));
                vec![DONE.to_owned()]
            }
            _ => vec![DONE.to_owned()],
        });
        let mut qmp =
            Qmp::connect_with(&monitor.path(), Patience { answer: Duration::from_millis(100), ..SHORT }).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let plug = Plug { guest: guest(), bus: "viommu-port1", file: file.as_fd(), is_one_of_several: false };
        assert!(matches!(qmp.plug(&plug), Err(QmpError::Refused { .. })));
        // It comes meanwhile.
        std::thread::sleep(Duration::from_millis(400));
        assert!(matches!(qmp.unplug(guest()), Err(QmpError::Broken(_))));
        assert_eq!(monitor.commands(), ["getfd", "device_add", "closefd"]);
    }

    #[test]
    fn a_device_that_is_gone_is_gone_but_not_one_that_somebody_else_plugged() {
        let at = |slot: u8, id: &str| {
            let device = json!({ "bus": 2, "slot": slot, "function": 0, "qdev_id": id });
            let port = json!({ "bus": 0, "slot": 16, "function": 0, "qdev_id": "port", "pci_bridge": { "devices": [device] } });
            json!({ "return": [{ "bus": 0, "devices": [port] }] }).to_string()
        };
        for (buses, expected) in [(at(1, "other"), None), (at(0, "other"), Some("other"))] {
            let monitor = FakeMonitor::new(move |command, _, _| match command {
                "device_del" => vec![refused("DeviceNotFound", "Device not found")],
                "query-pci" => vec![buses.clone()],
                _ => vec![DONE.to_owned()],
            });
            match (connect(&monitor).unplug(guest()), expected) {
                (Ok(Unplugged::WasNotThere), None) => (),
                (Err(QmpError::Other { id, .. }), Some(expected)) => assert_eq!(id, expected),
                (result, _) => panic!("{result:?}"),
            }
        }
    }

    #[test]
    fn a_guest_is_waited_for_once_however_much_is_said_meanwhile() {
        let monitor = FakeMonitor::new(|command, _, voice| {
            if command == "device_del" {
                voice.line(DONE);
                for _ in 0..20 {
                    voice.line("{\"event\":\"NIC\"}");
                    // A part of a line counts as little.
                    voice.part("{\"event\":");
                    std::thread::sleep(Duration::from_millis(100));
                    voice.line("\"NIC\"}");
                }
                return Vec::new();
            }
            vec![DONE.to_owned()]
        });
        let mut qmp = connect(&monitor);
        let start = Instant::now();
        let error = qmp.unplug(guest()).unwrap_err();
        assert!(matches!(error, QmpError::Held { .. }), "{error:?}");
        let taken = start.elapsed();
        assert!(taken >= SHORT.guest && taken < SHORT.guest * 2, "{taken:?}");
    }

    #[test]
    fn a_guest_that_refuses_is_not_waited_for() {
        let monitor = FakeMonitor::new(|command, _, _| match command {
            "device_del" => {
                let event = json!({ "event": "DEVICE_UNPLUG_GUEST_ERROR", "data": { "device": ID, "path": "x" } });
                vec![DONE.to_owned(), event.to_string()]
            }
            _ => vec![DONE.to_owned()],
        });
        let error = connect(&monitor).unplug(guest()).unwrap_err();
        assert_eq!(error.to_string(), "the guest refuses to let viommu-02-00.0 go");
    }
}
