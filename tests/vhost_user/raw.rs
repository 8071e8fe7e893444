// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front end that says what it likes, and a backend that hears it.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;
use crate::common::processes::{PATIENCE, wait_until};

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_MAX_MEM_SLOTS: u32 = 36;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

/// Version 1, and an answer is wanted.
const FLAGS: u32 = 1 | 8;
const HEADER_SIZE: usize = 12;

/// Where the guest's memory is for the backend, and how much there is.
pub const USER: u64 = 0x7000_0000;
pub const SIZE: u64 = 0x2_0000;

/// A message whose header says that so many bytes follow.
pub fn claiming(code: u32, length: u32, body: &[u8]) -> Vec<u8> {
    let header = [code, FLAGS, length].map(u32::to_ne_bytes);
    [header.as_flattened(), body].concat()
}

pub fn message(code: u32, body: &[u8]) -> Vec<u8> {
    claiming(code, body.len() as u32, body)
}

/// The numbers of a message's body.
pub fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// Two numbers of half the size: most messages about a ring.
pub fn ring(index: u32, number: u32) -> Vec<u8> {
    [index, number].map(u32::to_ne_bytes).concat()
}

/// A memory table of one region.
pub fn table(region: &[u64; 4]) -> Vec<u8> {
    [ring(1, 0), words(region)].concat()
}

/// The body of a message about one region: guest-physical address, size, user address, offset in the file.
pub fn region(region: &[u64; 4]) -> Vec<u8> {
    [words(&[0]), words(region)].concat()
}

/// A file of so many bytes that can be guest memory.
pub fn memfd(size: u64) -> File {
    let file: OwnedFd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    file.set_len(size).unwrap();
    file
}

/// An event file that blocks.
pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// Writes to an event file.
pub fn kick(file: impl AsFd) {
    File::from(file.as_fd().try_clone_to_owned().unwrap()).write_all(&1u64.to_ne_bytes()).unwrap();
}

/// Puts a request into the ring of [`Victim::start_ring`], of which so many came before.
pub fn put_request(memory: &File, before: u16, request: &[u8]) {
    let descriptor = |start: u64, length: usize, flags: u16, next: u16| {
        [&start.to_le_bytes()[..], &(length as u32).to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    let descriptors = [descriptor(0x3000, request.len(), 1, 1), descriptor(0x4000, 4, 2, 0)].concat();
    memory.write_all_at(&descriptors, 0).unwrap();
    memory.write_all_at(request, 0x3000).unwrap();
    memory.write_all_at(&[0xaa; 4], 0x4000).unwrap();
    memory.write_all_at(&(before + 1).to_le_bytes(), 0x1002).unwrap();
}

/// Waits until so many requests were answered, and how the last one was: status and used length.
pub fn answer(memory: &File, count: u16) -> (u8, u32) {
    let read = |at: u64| {
        let mut bytes = [0; 4];
        memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    wait_until(&format!("request {count} is not answered"), || read(0x2002)[..2] == count.to_le_bytes());
    let element = 0x2004 + 8 * (u64::from(count) - 1);
    assert_eq!(read(0x4000)[1..], [0; 3]);
    (read(0x4000)[0], u32::from_le_bytes(read(element + 4)))
}

pub struct RawFrontend {
    pub stream: UnixStream,
}

impl RawFrontend {
    /// Sends bytes, with files at the first of them; whether anybody reads.
    pub fn send(&self, bytes: &[u8], files: &[RawFd]) -> bool {
        match self.stream.send_with_fds(&[bytes], files) {
            Ok(sent) => {
                assert_eq!(sent, bytes.len());
                true
            }
            Err(_) => false,
        }
    }

    /// The next answer, and what it answers; `None` if the connection is over.
    pub fn receive(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut header = [0; HEADER_SIZE];
        self.read(&mut header)?;
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; field(8) as usize];
        self.read(&mut body)?;
        Some((field(0), body))
    }

    fn read(&mut self, bytes: &mut [u8]) -> Option<()> {
        match self.stream.read_exact(bytes) {
            Ok(()) => Some(()),
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => None,
            Err(error) => panic!("no answer: {error}"),
        }
    }

    /// Sends a message; the body of its answer, or `None` if the connection is over.
    pub fn call(&mut self, code: u32, body: &[u8], files: &[RawFd]) -> Option<Vec<u8>> {
        self.send(&message(code, body), files);
        let (answered, body) = self.receive()?;
        assert_eq!(answered, code);
        Some(body)
    }

    /// Sends a message that is answered with nothing but whether it was done; `None` if the connection is over.
    pub fn ask(&mut self, code: u32, body: &[u8], files: &[RawFd]) -> Option<bool> {
        let answer = self.call(code, body, files)?;
        Some(u64::from_ne_bytes(answer.try_into().unwrap()) == 0)
    }

    /// Whether the backend goes on to listen.
    pub fn is_heard(&mut self) -> bool {
        self.call(GET_FEATURES, &[], &[]).is_some()
    }
}

/// A backend for a hostile front end.
pub struct Victim {
    pub host: FakeHost,
    pub backend: Arc<IommuBackend>,
    pub frontend: RawFrontend,
    daemon: Served,
}

impl Victim {
    /// A backend that nothing has been said to.
    pub fn new() -> Self {
        let (host, backend) = device(true, BackendOptions { on_stop: OnStop::Keep, polling: Polling::Off });
        let (daemon, stream) = serve(&backend);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { host, backend, frontend: RawFrontend { stream }, daemon }
    }

    /// A backend with everything negotiated that it offers, and guest memory from address 0 on.
    pub fn ready(memory: &File) -> Self {
        let mut victim = Self::new();
        let frontend = &mut victim.frontend;
        let features = frontend.call(GET_FEATURES, &[], &[]).unwrap();
        // Without answers yet.
        frontend.send(&message(SET_FEATURES, &features), &[]);
        let protocol = frontend.call(GET_PROTOCOL_FEATURES, &[], &[]).unwrap();
        assert_eq!(frontend.ask(SET_PROTOCOL_FEATURES, &protocol, &[]), Some(true));
        let table = table(&[0, SIZE, USER, 0]);
        assert_eq!(frontend.ask(SET_MEM_TABLE, &table, &[memory.as_raw_fd()]), Some(true));
        victim
    }

    /// Starts the request ring, at the start of memory.
    pub fn start_ring(&mut self, kick: impl AsFd, call: impl AsFd) {
        let addresses = words(&[0, USER, USER + 0x2000, USER + 0x1000, 0]);
        for (code, body, file) in [
            (SET_VRING_NUM, ring(0, 16), None),
            (SET_VRING_BASE, ring(0, 0), None),
            (SET_VRING_ADDR, addresses, None),
            (SET_VRING_CALL, words(&[0]), Some(call.as_fd())),
            (SET_VRING_KICK, words(&[0]), Some(kick.as_fd())),
            (SET_VRING_ENABLE, ring(0, 1), None),
        ] {
            let file = file.map(|file| file.as_raw_fd());
            assert_eq!(self.frontend.ask(code, &body, file.as_slice()), Some(true), "message {code}");
        }
    }

    /// The front end goes, and whatever it did, nothing is left of it.
    pub fn end(self) {
        let Self { host, backend, frontend, daemon } = self;
        drop(frontend);
        wait_until("the library's threads do not end", || daemon.is_finished());
        let result = daemon.join().unwrap();
        assert!(!matches!(result, Err(vhost_user_backend::Error::WaitDaemon(_))), "a thread of the library panicked");
        backend.shut_down();
        assert_eq!(host.attachment(ID), Attachment::Blocked);
        assert_eq!(host.table_count(), 0);
    }
}
