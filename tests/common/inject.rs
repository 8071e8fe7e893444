// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Threads of another process that are made to make calls which their program never makes. x86-64 only.

use std::time::Duration;

use nix::libc::user_regs_struct;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long the `syscall` instruction is.
const INSTRUCTION: u64 = 2;
/// A call that every list has.
const HARMLESS: i64 = nix::libc::SYS_getpid;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was made, and returned this.
    Returned(i64),
    /// It was not made: the thread was sent SIGSYS, which it did not get to see.
    Trapped,
    /// It was not made: the process is dead by this signal.
    Killed(Signal),
}

/// A thread that is stopped in a call in which it waits. It goes on when this is dropped.
pub struct Stopped {
    thread: Pid,
    registers: user_regs_struct,
    is_dead: bool,
}

impl Stopped {
    /// Stops a thread of a process that this one may trace, when it waits in a call.
    pub fn new(thread: Pid) -> Self {
        for _ in 0..1000 {
            ptrace::seize(thread, ptrace::Options::PTRACE_O_TRACESYSGOOD).unwrap();
            ptrace::interrupt(thread).unwrap();
            let status = wait(thread);
            assert!(matches!(status, WaitStatus::PtraceEvent(..)), "{status:?}");
            let registers = ptrace::getregs(thread).unwrap();
            if registers.orig_rax.cast_signed() >= 0 {
                return Self { thread, registers, is_dead: false };
            }
            ptrace::detach(thread, None).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("the thread does not wait in any call");
    }

    /// Puts bytes, and zeros after them, where the thread's stack is not used.
    pub fn put(&self, bytes: &[u8]) -> u64 {
        let at = (self.registers.rsp - 0x2000) & !7;
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len() / 8 * 8 + 16, 0);
        for (word, place) in bytes.chunks_exact(8).zip((at..).step_by(8)) {
            let word = i64::from_ne_bytes(word.try_into().unwrap());
            ptrace::write(self.thread, place as ptrace::AddressType, word).unwrap();
        }
        at
    }

    /// Has the thread make a call.
    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> Outcome {
        self.prepare(number, arguments);
        match self.step() {
            WaitStatus::PtraceSyscall(_) => (),
            status => panic!("the call does not begin: {status:?}"),
        }
        match self.step() {
            WaitStatus::PtraceSyscall(_) => (),
            status => panic!("the call does not end: {status:?}"),
        }
        let returned = ptrace::getregs(self.thread).unwrap().rax.cast_signed();
        // A signal is told of before the next call begins.
        self.prepare(HARMLESS, [0; 6]);
        match self.step() {
            WaitStatus::Stopped(_, Signal::SIGSYS) => Outcome::Trapped,
            WaitStatus::Signaled(_, signal, _) => {
                self.is_dead = true;
                Outcome::Killed(signal)
            }
            WaitStatus::PtraceSyscall(_) => {
                assert!(matches!(self.step(), WaitStatus::PtraceSyscall(_)));
                Outcome::Returned(returned)
            }
            status => panic!("after the call: {status:?}"),
        }
    }

    /// Whether the thread is dead in a while, without having gone on.
    pub fn dies(mut self) -> bool {
        for _ in 0..10_000 {
            if waitpid(self.thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) != Ok(WaitStatus::StillAlive) {
                self.is_dead = true;
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    fn prepare(&self, number: i64, [rdi, rsi, rdx, r10, r8, r9]: [u64; 6]) {
        let (rip, rax) = (self.registers.rip - INSTRUCTION, number.cast_unsigned());
        // No call is to be made again.
        let orig_rax = u64::MAX;
        ptrace::setregs(
            self.thread,
            user_regs_struct { rip, rax, orig_rax, rdi, rsi, rdx, r10, r8, r9, ..self.registers },
        )
        .unwrap();
    }

    fn step(&self) -> WaitStatus {
        ptrace::syscall(self.thread, None).unwrap();
        wait(self.thread)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if !self.is_dead {
            let _ = ptrace::setregs(self.thread, self.registers);
            let _ = ptrace::detach(self.thread, None);
        }
    }
}

fn wait(thread: Pid) -> WaitStatus {
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap()
}
