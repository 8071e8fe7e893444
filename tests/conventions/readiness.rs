// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whoever starts the daemon is told when a frontend can connect, not earlier, and not if none ever can.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};

use super::*;

#[test]
fn a_frontend_can_connect_as_soon_as_the_newline_is_there() {
    for _ in 0..20 {
        let place = Place::new();
        let daemon = place.start(Start::with(&[]));
        // At the first attempt.
        drop(UnixStream::connect(&place.socket).unwrap());
        assert_eq!(daemon.end().code, Some(0));
    }
}

#[test]
fn nothing_is_written_if_the_start_fails() {
    let place = Place::new();
    for options in [&["--input-range=0-fff0"][..], &["--check"]] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let start = Start::with(options).option("socket-path", &place.socket).option("ready-fd", Path::new("4"));
        start.fourth(writer).run();
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, "", "{options:?}");
    }
}

#[test]
fn a_ready_fd_that_cannot_be_written_to_is_refused_and_one_that_nobody_reads_is_not() {
    let place = Place::new();
    let (reader, writer) = std::io::pipe().unwrap();
    let start = || Start::with(&[]).option("socket-path", &place.socket);
    let Ended { code, err, .. } = start().option("ready-fd", Path::new("3")).third(reader).run();
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("--ready-fd: fd 3: a file that can only be read is not"), "{err}");
    // Its reader is gone. The frontend may come all the same.
    let daemon = start().option("ready-fd", Path::new("3")).third(writer).start();
    drop(Machine::connect(&place.socket, guest_memory(0x20_0000)));
    let ended = daemon.end();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("--ready-fd cannot be written to"), "{}", ended.err);
}

/// What the service manager is told, message by message.
fn notified(manager: &UnixDatagram, name: &str) {
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let next = || {
        let mut bytes = [0; 256];
        let length = manager.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    };
    let place = Place::new();
    let start = || Start::with(&[]).option("socket-path", &place.socket).environment("NOTIFY_SOCKET", name);
    let daemon = start().start();
    assert_eq!(next(), "READY=1\nSTATUS=Waiting for the frontend");
    let frontend = UnixStream::connect(&place.socket).unwrap();
    assert_eq!(next(), "STATUS=Serving a frontend");
    drop(frontend);
    assert_eq!(next(), "STOPPING=1\nSTATUS=Blocking every endpoint");
    assert_eq!(daemon.end().code, Some(0));
    let daemon = start().start();
    assert_eq!(next(), "READY=1\nSTATUS=Waiting for the frontend");
    daemon.end_well();
    assert_eq!(next(), "STOPPING=1\nSTATUS=Blocking every endpoint");
}

#[test]
fn a_service_manager_is_notified() {
    let place = Place::new();
    let path = place.path("notify");
    notified(&UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap());
}

#[test]
fn a_service_manager_with_an_abstract_name_is_notified() {
    let name = format!("virtio-iommu-conventions-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    notified(&UnixDatagram::bind_addr(&address).unwrap(), &format!("@{name}"));
}

#[test]
fn a_service_manager_that_is_not_there_keeps_nobody_from_being_served() {
    let place = Place::new();
    for name in ["/nowhere/notify", "@virtio-iommu-nobody", "relative"] {
        let said = place.start(Start::with(&[]).environment("NOTIFY_SOCKET", name)).end_well();
        assert!(said.contains(&format!("NOTIFY_SOCKET={name} cannot be reached")), "{said}");
    }
}
