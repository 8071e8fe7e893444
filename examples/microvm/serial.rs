// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The serial port, between the guest and this process's standard input and output.

use std::io::{self, IsTerminal, Stdin, Stdout};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::terminal::Terminal;

use crate::mmio::lock;

/// The first of its ports.
pub const COM1: u16 = 0x3f8;
/// How many there are.
pub const COM1_SIZE: u8 = 8;
/// Its interrupt.
pub const COM1_IRQ: u32 = 4;

/// The port's registers.
pub type Uart = Serial<Line, Drained, Stdout>;

/// An interrupt, by an irqfd.
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Written to when the guest has read all that there was.
pub struct Drained(Arc<EventFd>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // It can only be full, and then it is readable.
        let _ = self.0.write(1);
    }
}

/// Gives the port what is typed.
pub struct Keyboard {
    uart: Arc<Mutex<Uart>>,
    drained: Arc<EventFd>,
    is_waiting: bool,
}

const INPUT: u32 = 0;
const DRAINED: u32 = 1;

/// The serial port, and what feeds it. A terminal is made to pass every key on until [`restore_terminal`].
///
/// # Errors
///
/// No event file can be had, or the terminal does not follow.
pub fn open(interrupt: EventFd) -> io::Result<(Arc<Mutex<Uart>>, Keyboard)> {
    let drained = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let uart = Serial::with_events(Line(interrupt), Drained(Arc::clone(&drained)), io::stdout());
    let uart = Arc::new(Mutex::new(uart));
    if io::stdin().is_terminal() {
        io::stdin().lock().set_raw_mode()?;
    }
    Ok((Arc::clone(&uart), Keyboard { uart, drained, is_waiting: false }))
}

/// Gives the terminal back as terminals are.
pub fn restore_terminal() {
    if io::stdin().is_terminal() {
        // There is nobody left to be told.
        let _ = io::stdin().lock().set_canon_mode();
    }
}

impl Keyboard {
    fn listen(&mut self, ops: &mut EventOps) {
        // A file that cannot be waited for, such as /dev/null, has nothing to give.
        self.is_waiting = ops.add(Events::with_data(&io::stdin(), INPUT, EventSet::IN)).is_ok();
    }

    /// Passes on what the port has room for; whether there may be more at once.
    fn pass_on(&self, input: &Stdin) -> bool {
        let mut uart = lock(&self.uart);
        let mut bytes = [0; 64];
        let room = uart.fifo_capacity().min(bytes.len());
        let Some(bytes) = bytes.get_mut(..room).filter(|bytes| !bytes.is_empty()) else { return false };
        match input.lock().read_raw(bytes) {
            Ok(0) | Err(_) => false,
            // In loopback mode nothing comes in from outside.
            Ok(length) => bytes.get(..length).is_some_and(|bytes| uart.enqueue_raw_bytes(bytes).is_ok()),
        }
    }
}

impl MutEventSubscriber for Keyboard {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == DRAINED {
            let _ = self.drained.read();
            if !self.is_waiting {
                self.listen(ops);
            }
        } else if !self.pass_on(&io::stdin()) {
            // Full, or at its end: looked at again when the guest has read.
            self.is_waiting = ops.remove(Events::empty(&io::stdin())).is_err();
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.listen(ops);
        if let Err(error) = ops.add(Events::with_data(&*self.drained, DRAINED, EventSet::IN)) {
            eprintln!("the serial port cannot be waited for: {error}");
        }
    }
}
