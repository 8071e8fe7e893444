// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sockets that are passed.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixDatagram, UnixStream};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket};

use super::*;

/// What a service manager sets for the process that it starts.
const ACTIVATION: &str = "export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=vhost-user;";

/// Has a frontend use a device that listens on a passed socket, and leave.
fn serves_a_listener(place: &Place, start: Start) {
    let listener = place.listener();
    // Whoever made it may have had it so for its own use.
    listener.set_nonblocking(true).unwrap();
    let daemon = start.third(listener).start();
    // The socket is there before the daemon is.
    drop(use_device(UnixStream::connect(&place.socket).unwrap()));
    let ended = daemon.end();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("listening on the socket that was passed"), "{}", ended.err);
    assert!(place.socket.exists(), "it is whoever's made it");
}

#[test]
fn a_listening_socket_is_served() {
    serves_a_listener(&Place::new(), Start::with(&["--fd=3"]));
}

#[test]
fn a_service_managers_socket_is_served() {
    serves_a_listener(&Place::new(), Start::with(&[]).script(ACTIVATION));
    // What is said by number is what is meant.
    serves_a_listener(&Place::new(), Start::with(&["--fd=3"]).script(ACTIVATION));
}

#[test]
fn a_service_managers_control_socket_is_served() {
    for (names, is_control_first) in [("vhost-user:control", false), ("control:vhost-user", true)] {
        let (place, control) = (Place::new(), Place::new());
        let (first, second) = if is_control_first { (&control, &place) } else { (&place, &control) };
        let start = Start::with(&[]).third(first.listener()).fourth(second.listener());
        let start = start.script("export LISTEN_PID=$$ LISTEN_FDS=2;").environment("LISTEN_FDNAMES", names);
        let daemon = start.start();
        let mut client = UnixStream::connect(&control.socket).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"{\"version\":1,\"request\":\"list\"}\n").unwrap();
        let mut answer = String::new();
        BufReader::new(&client).read_line(&mut answer).unwrap();
        assert!(answer.contains("\"endpoints\":[]"), "{answer}");
        drop(use_device(UnixStream::connect(&place.socket).unwrap()));
        let ended = daemon.end();
        assert_eq!(ended.code, Some(0), "{}", ended.err);
    }
}

#[test]
fn one_control_socket_is_enough() {
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=control;";
    let place = Place::new();
    let option = |name, path: PathBuf| format!("--{name}={}", path.display());
    let (socket, control) =
        (option("socket-path", place.path("other")), option("control-path", place.path("control/socket")));
    let listener = place.listener();
    for options in [&[socket.as_str(), &control][..], &[&socket, &control, "--check"], &[&socket, "--control-fd=3"]] {
        let Ended { code, err, .. } = Start::with(options).script(script).third(listener.try_clone().unwrap()).run();
        assert_eq!(code, Some(2), "{err}");
        assert!(err.contains("passes a control socket") && err.contains("choose one"), "{err}");
    }
    // It is no socket for a VMM.
    let Ended { code, err, .. } = Start::with(&[]).script(script).third(listener).run();
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("there is no socket to serve"), "{err}");
}

#[test]
fn a_connection_is_served() {
    for leaves in [true, false] {
        let (frontend, passed) = UnixStream::pair().unwrap();
        // Whoever made it may have had it so for its own use.
        passed.set_nonblocking(true).unwrap();
        let daemon = Start::with(&["--fd=3"]).third(passed).start();
        let (machine, _) = use_device(frontend);
        let machine = (!leaves).then_some(machine);
        let said = if leaves {
            let ended = daemon.end();
            assert_eq!(ended.code, Some(0), "{}", ended.err);
            ended.err
        } else {
            daemon.end_well()
        };
        assert!(said.contains("serving the connection that was passed"), "{said}");
        assert!(said.contains("every endpoint is blocked"), "{said}");
        drop(machine);
    }
}

#[test]
fn a_connection_over_which_the_protocol_is_broken_is_closed() {
    use std::io::Read;

    let (mut frontend, passed) = UnixStream::pair().unwrap();
    // Others may have the file too: that the daemon ends does not close it.
    let _kept = passed.try_clone().unwrap();
    let daemon = Start::with(&["--fd=3"]).third(passed).start();
    frontend.write_all(&[0xff; 64]).unwrap();
    assert_eq!(daemon.end().code, Some(4));
    frontend.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(frontend.read(&mut [0]).unwrap(), 0);
}

#[test]
fn what_is_no_socket_to_serve_is_named() {
    let place = Place::new();
    let file = File::create(place.path("file")).unwrap();
    let idle = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let packets =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let files: [(OwnedFd, &str); 7] = [
        (file.into(), "a regular file is not a Unix stream socket"),
        (null().into(), "a character device is not"),
        (std::io::pipe().unwrap().0.into(), "a pipe is not"),
        (tcp.into(), "a socket of another family is not"),
        (UnixDatagram::unbound().unwrap().into(), "a Unix socket of another type is not"),
        (packets.0, "a Unix socket of another type is not"),
        (idle, "a socket that is neither is not a Unix stream socket that listens or is connected"),
    ];
    for (file, says) in files {
        let copy = file.try_clone().unwrap();
        for start in [Start::with(&["--fd=3"]).third(file), Start::with(&[]).script(ACTIVATION).third(copy)] {
            let Ended { code, err, .. } = start.run();
            assert_eq!(code, Some(2), "{err}");
            assert!(err.contains(&format!("fd 3: {says}")), "{err}");
        }
    }
    for (option, says) in [("--fd=99", "fd 99 is not open"), ("--fd=0", "standard input"), ("--fd=-1", "-1")] {
        let Ended { code, err, .. } = Start::with(&[option]).run();
        assert_eq!(code, Some(2), "{err}");
        assert!(err.contains(says), "{err}");
    }
}

#[test]
fn sockets_of_another_process_are_left_alone() {
    let place = Place::new();
    for script in [
        "export LISTEN_PID=1 LISTEN_FDS=1;",
        "export LISTEN_PID=$(($$ + 1)) LISTEN_FDS=1;",
        "export LISTEN_FDS=1;",
        "export LISTEN_PID=$$;",
    ] {
        let place = Place::new();
        let Ended { code, err, .. } = Start::with(&[]).script(script).third(place.listener()).run();
        assert_eq!(code, Some(2), "{script} {err}");
        assert!(err.contains("there is no socket to serve"), "{err}");
    }
    // Then the path is what is meant.
    place.start(Start::with(&[]).script("export LISTEN_PID=1 LISTEN_FDS=1;")).end_well();
}

#[test]
fn a_service_manager_passes_one_socket_that_listens() {
    let place = Place::new();
    let listener = place.listener();
    let (connection, _other) = UnixStream::pair().unwrap();
    let path = format!("--socket-path={}", place.path("other").display());
    for (script, file, options, says) in [
        (
            "export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=a:b;",
            OwnedFd::from(listener.try_clone().unwrap()),
            &[][..],
            "passes 2 sockets (a:b)",
        ),
        ("export LISTEN_PID=$$ LISTEN_FDS=0;", listener.try_clone().unwrap().into(), &[], "passes 0 sockets"),
        ("export LISTEN_PID=$$ LISTEN_FDS=many;", listener.try_clone().unwrap().into(), &[], "LISTEN_FDS=`many`"),
        ("export LISTEN_PID=me LISTEN_FDS=1;", listener.try_clone().unwrap().into(), &[], "LISTEN_PID=`me`"),
        (ACTIVATION, connection.into(), &[], "set Accept=no"),
        (ACTIVATION, listener.into(), &[path.as_str()], "choose one"),
    ] {
        let Ended { code, err, .. } = Start::with(options).script(script).third(file).run();
        assert_eq!(code, Some(2), "{script} {err}");
        assert!(err.contains(says), "{err}");
    }
    assert!(!place.path("other").exists());
}
