// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Clients that do not keep to the protocol, are slow, or are not meant to ask.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Instant;

use super::*;
use crate::common::left_out::left_out;
use crate::common::processes::wait_until;

const HURRY: Limits = Limits { clients: 4, patience: Duration::from_millis(300) };

/// The server goes on.
fn goes_on(bench: &Bench) {
    assert!(bench.ask(&json!("list"))["endpoints"].is_array());
}

#[test]
fn what_is_no_request_is_refused_and_the_next_one_answered() {
    let bench = Bench::new();
    let mut client = bench.client();
    for (line, kind) in [
        (&b"\n"[..], "malformed"),
        (b"list\n", "malformed"),
        (b"\xff\xfe\0\n", "malformed"),
        (b"{\"version\":2,\"request\":\"list\"}\n", "version"),
        (b"{\"version\":1,\"request\":\"list\",\"and\":\"more\"}\n", "malformed"),
        (b"{\"version\":1,\"request\":{\"add\":{}}}\n", "malformed"),
        (b"{\"version\":1,\"request\":{\"domain\":{\"domain\":4294967296}}}\n", "malformed"),
    ] {
        client.write(line);
        let reply = client.next().unwrap();
        assert_eq!(refusal(&reply).0, kind, "{reply}");
        assert!(client.ask(&json!("list"))["endpoints"].is_array());
    }
    let deep = [b"[".repeat(100_000), b"\n".to_vec()].concat();
    client.write(&deep);
    assert_eq!(refusal(&client.next().unwrap()).0, "malformed");
}

#[test]
fn a_line_that_is_too_long_ends_its_client() {
    let bench = Bench::new();
    // As long as it may be, it is read.
    let mut client = bench.client();
    let request = b"{\"version\":1,\"request\":\"list\"}";
    let padded = [request.to_vec(), vec![b' '; (256 << 10) - request.len()], b"\n".to_vec()].concat();
    client.write(&padded);
    assert!(client.next().unwrap()["endpoints"].is_array());
    // Without an end it is refused when it is too long, and no more of it is taken.
    for end in [&b""[..], b"\n"] {
        let mut client = bench.client();
        let long = [vec![b' '; (256 << 10) + 1], end.to_vec()].concat();
        // It may be closed before all is written.
        let _ = client.stream.get_mut().write_all(&long);
        let reply = client.next().unwrap();
        let (kind, message) = refusal(&reply);
        assert!(kind == "malformed" && message.contains("at most 262144 bytes"), "{message}");
        assert!(client.next().is_none());
    }
    goes_on(&bench);
}

#[test]
fn half_a_line_is_waited_for_and_no_longer() {
    let bench = Bench::with(HURRY, &[]);
    let mut half = bench.client();
    half.write(b"{\"version\":1,");
    let mut idle = bench.client();
    let started = Instant::now();
    assert!(half.next().is_none(), "it is closed");
    assert!(started.elapsed() >= Duration::from_millis(250));
    // One that has said nothing may take its time, and so may one that drips.
    assert!(idle.ask(&json!("list"))["endpoints"].is_array());
    let mut dripping = bench.client();
    for byte in b"{\"version\":1,\"request\"".iter().cycle().take(40) {
        std::thread::sleep(Duration::from_millis(20));
        if dripping.stream.get_mut().write_all(&[*byte]).is_err() {
            return;
        }
    }
    panic!("bytes now and then keep a line open");
}

#[test]
fn half_a_line_and_the_end_is_no_request() {
    let bench = Bench::new();
    let mut client = bench.client();
    client.write(b"{\"version\":1,\"request\":{\"remove\":{\"endpoints\":[\"00:03.0\"]}}}");
    client.stream.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    assert!(client.next().is_none());
    assert_eq!(bench.ask(&json!("list"))["endpoints"].as_array().unwrap().len(), 1);
}

#[test]
fn a_client_that_does_not_read_is_closed() {
    let bench = Bench::with(HURRY, &[]);
    let mut client = bench.client();
    // Its own patience ends with another error.
    client.stream.get_ref().set_write_timeout(Some(PATIENCE)).unwrap();
    // More than the kernel keeps for it: then no more of its requests are read.
    let line = b"{\"version\":1,\"request\":\"plan\"}\n".repeat(1000);
    let error = std::iter::repeat_with(|| client.stream.get_mut().write_all(&line)).find_map(Result::err).unwrap();
    assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
    goes_on(&bench);
}

#[test]
fn what_came_before_the_clients_end_is_answered() {
    let bench = Bench::new();
    let mut client = bench.client();
    let line = b"{\"version\":1,\"request\":\"list\"}\n";
    client.write(&line.repeat(5));
    client.stream.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    for _ in 0..5 {
        assert!(client.next().expect("an answer")["endpoints"].is_array());
    }
    assert!(client.next().is_none());
}

#[test]
fn clients_are_counted() {
    let bench = Bench::with(HURRY, &[]);
    let mut clients: Vec<Client> = (0..4).map(|_| bench.client()).collect();
    for client in &mut clients {
        client.ask(&json!("list"));
    }
    let mut more = bench.client();
    let reply = more.next().unwrap();
    let (kind, message) = refusal(&reply);
    assert!(kind == "busy" && message.contains("4 clients"), "{message}");
    assert!(more.next().is_none());
    // The others are served, and when one goes another may come.
    clients[0].ask(&json!("list"));
    clients.pop();
    clients[0].ask(&json!("list"));
    serves_again(&bench);
    for _ in 0..1000 {
        drop(UnixStream::connect(bench.path()));
    }
    serves_again(&bench);
}

/// There is room for one more client, once those that have gone are seen to have.
fn serves_again(bench: &Bench) {
    let is_served = || {
        let mut client = bench.client();
        let written = client.stream.get_mut().write_all(b"{\"version\":1,\"request\":\"list\"}\n");
        written.is_ok() && client.next().is_some_and(|reply| reply["endpoints"].is_array())
    };
    wait_until("clients that are gone are counted", is_served);
}

#[test]
fn files_that_nobody_asked_for_are_refused_and_closed() {
    let bench = Bench::new();
    let (file, closed) = files::pipe();
    let reply = bench.client().ask_with(&json!("list"), &[file]);
    assert_eq!(refusal(&reply).0, "files");
    assert!(closed.is_closed());
    // More than any request takes.
    let (file, closed) = files::pipe();
    let reply = bench.client().ask_with(&json!({ "add": addition() }), &files::copies(&file, 40));
    assert_eq!(refusal(&reply).0, "files");
    drop(file);
    assert!(closed.is_closed());
    // Some with each byte of a line, which is never ended.
    let (file, closed) = files::pipe();
    let mut dripping = bench.client();
    for _ in 0..40 {
        files::send(dripping.stream.get_ref(), b" ", &[std::os::fd::AsFd::as_fd(&file)]);
        std::thread::sleep(Duration::from_millis(2));
        if closed_by_server(&dripping) {
            break;
        }
    }
    assert_eq!(refusal(&dripping.next().unwrap()).0, "files");
    drop(file);
    assert!(closed.is_closed());
    // With half a line, and then the end.
    let (file, closed) = files::pipe();
    let client = bench.client();
    files::send(client.stream.get_ref(), b"{", &[std::os::fd::AsFd::as_fd(&file)]);
    drop((client, file));
    goes_on(&bench);
    goes_on(&bench);
    assert!(closed.is_closed());
}

/// Whether there is an answer, or the end, to be read.
fn closed_by_server(client: &Client) -> bool {
    let mut waiting = [rustix::event::PollFd::new(client.stream.get_ref(), rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut waiting, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

#[test]
fn another_user_may_not_ask() {
    if !rustix::process::geteuid().is_root() {
        left_out("root, to become another user");
        return;
    }
    let bench = Bench::new();
    // The socket's mode and its directory would keep it out: it is let in to be refused by what it is.
    for path in [bench.directory.path().to_owned(), bench.path()] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_viommuctl"));
    command.args(["status", "--control"]).arg(bench.path());
    assert!(command.output().unwrap().status.success());
    let output = command.uid(12345).gid(12345).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("user 12345 may not ask"), "{said}");
    goes_on(&bench);
}
