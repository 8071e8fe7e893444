// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One thread that serves all clients, and waits for none of them.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{error, warn};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;

use super::connection::{Connection, Outcome};
use super::protocol::{RefusalKind, Reply, read_request};
use super::registry::Registry;
use super::service::Service;
use crate::vhost_user::{Pass, Throttle};

/// How long is waited for files or memory.
const SHORTAGE: Duration = Duration::from_millis(100);

/// What clients may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many clients there may be; 16 by default.
    pub clients: usize,
    /// How long a client may take to go on with a line that it has begun, or to read what it was sent; 10 seconds by default.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { clients: 16, patience: Duration::from_secs(10) }
    }
}

/// A control socket that is served.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    service: Service,
    limits: Limits,
    clients: Vec<Connection>,
    /// Is written when there are faults.
    faults: Arc<OwnedFd>,
    throttle: Throttle,
}

impl ControlServer {
    /// A server for the endpoints of a registry. There can be one for a backend.
    ///
    /// # Errors
    ///
    /// No event descriptor can be had, or the socket cannot be used.
    pub fn new(listener: UnixListener, registry: Arc<Registry>, limits: Limits) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let faults = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let notifier = Arc::clone(&faults);
        let tell = move || {
            // It can only be full, and then the server is about to be woken.
            let _ = rustix::io::write(notifier.as_fd(), &1u64.to_ne_bytes());
        };
        if !registry.backend.on_faults(tell) {
            return Err(io::Error::other("there is a control socket already"));
        }
        Ok(Self {
            listener,
            service: Service::new(registry),
            limits,
            clients: Vec::new(),
            faults,
            throttle: Throttle::new(Instant::now()),
        })
    }

    /// Serves clients for ever: until the process ends, or the socket fails.
    pub fn run(mut self) {
        loop {
            if let Err(error) = self.turn() {
                error!("the control socket is not served any more: {error}");
                return;
            }
        }
    }

    /// Waits until there is something to do, and does it.
    fn turn(&mut self) -> io::Result<()> {
        let patience = self.limits.patience;
        let deadline = self.clients.iter().filter_map(|client| client.deadline(patience)).min();
        let ready = self.wait(deadline)?;
        let now = Instant::now();
        if ready.faults {
            // Nothing to read means that it was read before.
            let _ = rustix::io::read(self.faults.as_fd(), &mut [0u8; 8]);
            self.service.look_at_faults();
        }
        let mut clients = std::mem::take(&mut self.clients);
        let mut ready_clients = ready.clients.into_iter();
        clients.retain_mut(|client| {
            let can = ready_clients.next().unwrap_or(PollFlags::empty());
            self.serve(client, can, now) == Outcome::Stays
        });
        self.clients = clients;
        if ready.listener {
            self.accept(now)?;
        }
        Ok(())
    }

    /// Warns of what clients do, but not as often as they like.
    fn warn(&mut self, text: fmt::Arguments<'_>) {
        if let Pass::Yes { held_back } = self.throttle.ask(Instant::now()) {
            if held_back > 0 {
                warn!("{held_back} messages about clients of the control socket were held back");
            }
            warn!("{text}");
        }
    }

    fn wait(&self, deadline: Option<Instant>) -> io::Result<Ready> {
        let wanted = |client: &Connection| if client.has_output() { PollFlags::OUT } else { PollFlags::IN };
        let clients = self.clients.iter().map(|client| PollFd::from_borrowed_fd(client.socket(), wanted(client)));
        let mut waiting = vec![PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&self.faults, PollFlags::IN)];
        waiting.extend(clients);
        // Lines that came together are handled in turn.
        let is_pending = self.clients.iter().any(|client| !client.has_output() && client.has_line());
        let timeout = if is_pending { Some(Duration::ZERO) } else { deadline.map(|at| at - Instant::now().min(at)) };
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut waiting, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => (),
            Err(Errno::NOMEM) => std::thread::sleep(SHORTAGE),
            Err(errno) => return Err(errno.into()),
        }
        let mut events = waiting.iter().map(PollFd::revents);
        let mut next = || events.next().unwrap_or(PollFlags::empty());
        let (listener, faults) = (!next().is_empty(), !next().is_empty());
        Ok(Ready { listener, faults, clients: events.collect() })
    }

    /// Reads, does and writes what there is of a client's.
    fn serve(&mut self, client: &mut Connection, can: PollFlags, now: Instant) -> Outcome {
        if can.intersects(PollFlags::ERR) {
            return Outcome::Ends;
        }
        // What came together with the line before is answered before it is seen that nothing more comes.
        let reads = !client.has_output() && !client.has_line();
        if reads && can.intersects(PollFlags::IN | PollFlags::HUP) && client.read(now) == Outcome::Ends {
            return Outcome::Ends;
        }
        if let Some((line, files)) = client.next_line(now) {
            match read_request(&line) {
                Ok(request) => {
                    let answered = self.service.answer(request, files);
                    client.reply(answered.reply, now);
                    client.following = answered.following;
                }
                Err(refusal) => client.reply(Reply::Refused(refusal), now),
            }
        }
        loop {
            self.tell_of_faults(client, now);
            if !client.has_output() {
                break;
            }
            match client.write() {
                Outcome::Ends => return Outcome::Ends,
                // When it has read that, there is more.
                Outcome::Stays if client.has_output() => break,
                Outcome::Stays => (),
            }
        }
        match client.deadline(self.limits.patience) {
            Some(deadline) if deadline <= now => {
                self.warn(format_args!("a client of the control socket was too slow"));
                Outcome::Ends
            }
            _ => Outcome::Stays,
        }
    }

    /// Tells a client that follows faults of those that it does not know, if it has read all that it was told.
    fn tell_of_faults(&self, client: &mut Connection, now: Instant) {
        let Some(known) = client.following.filter(|_| !client.has_output()) else { return };
        for fault in self.service.faults_after(known) {
            client.following = Some(fault.number);
            client.reply(Reply::Fault(fault.clone()), now);
        }
    }

    fn accept(&mut self, now: Instant) -> io::Result<()> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            // Whoever came is gone again.
            Err(error) if error.kind() == ErrorKind::WouldBlock || error.kind() == ErrorKind::ConnectionAborted => {
                return Ok(());
            }
            Err(error)
                if matches!(
                    error.raw_os_error().map(Errno::from_raw_os_error),
                    Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
                ) =>
            {
                self.warn(format_args!("a client of the control socket cannot be served: {error}"));
                std::thread::sleep(SHORTAGE);
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error),
        };
        let may = may_ask(&stream);
        let Ok(mut client) = Connection::new(stream) else { return Ok(()) };
        if let Err(refusal) = may {
            self.warn(format_args!("a client of the control socket was refused: {refusal}"));
            client.refuse(RefusalKind::NotPermitted, refusal, now);
        } else if self.clients.len() >= self.limits.clients {
            let text = format!("there are {} clients already: end one of them, or try later", self.clients.len());
            client.refuse(RefusalKind::Busy, text, now);
        } else {
            self.clients.push(client);
            return Ok(());
        }
        // It is told, if it has room for that, and closed.
        let _ = client.write();
        Ok(())
    }
}

/// What is ready.
struct Ready {
    listener: bool,
    faults: bool,
    /// In the order of the clients.
    clients: Vec<PollFlags>,
}

/// Only root and the user that the daemon runs as may ask: the socket's mode says so too, and a socket that is passed may have any.
fn may_ask(stream: &UnixStream) -> Result<(), String> {
    let peer = socket_peercred(stream).map_err(|errno| format!("who asks is not known: {errno}"))?;
    if peer.uid.is_root() || peer.uid == geteuid() {
        return Ok(());
    }
    Err(format!("user {} may not ask: run as root, or as user {}", peer.uid.as_raw(), geteuid().as_raw()))
}
