// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A monitor that is played by the tests.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};

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
    retry: Duration::from_millis(20),
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
    let mut qmp = Qmp::connect_with(&monitor.path(), Patience { answer: Duration::from_millis(100), ..SHORT }).unwrap();
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
        let port =
            json!({ "bus": 0, "slot": 16, "function": 0, "qdev_id": "port", "pci_bridge": { "devices": [device] } });
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

#[test]
fn a_guest_that_is_busy_is_asked_again_and_what_it_let_go_meanwhile_is_gone() {
    for (text, gone_meanwhile) in [
        ("Hot-unplug failed: guest is busy (power indicator blinking)", false),
        ("Device viommu-02-00.0 is already in the process of unplug", true),
    ] {
        let tries = AtomicU32::new(0);
        let monitor = FakeMonitor::new(move |command, _, _| match command {
            "device_del" if tries.fetch_add(1, Ordering::Relaxed) == 0 => {
                let busy = refused("GenericError", text);
                if gone_meanwhile { vec![busy, deleted(ID)] } else { vec![busy] }
            }
            "device_del" if gone_meanwhile => vec![refused("DeviceNotFound", "Device not found")],
            "device_del" => vec![DONE.to_owned(), deleted(ID)],
            _ => vec![DONE.to_owned()],
        });
        assert_eq!(connect(&monitor).unplug(guest()).unwrap(), Unplugged::LetGo, "{text}");
        assert_eq!(monitor.commands(), ["device_del", "device_del"], "{text}");
    }
}

#[test]
fn a_guest_that_is_always_busy_is_not_asked_for_ever_and_what_cannot_be_unplugged_once() {
    for (text, is_asked_again) in [("guest is busy", true), ("Bus does not support hotplugging", false)] {
        let monitor = FakeMonitor::new(move |command, _, _| match command {
            "device_del" => vec![refused("GenericError", text)],
            _ => vec![DONE.to_owned()],
        });
        let error = connect(&monitor).unplug(guest()).unwrap_err();
        assert_eq!(error.to_string(), format!("QEMU refuses device_del: {text}"));
        assert_eq!(monitor.commands().len() > 1, is_asked_again, "{text}");
    }
}
