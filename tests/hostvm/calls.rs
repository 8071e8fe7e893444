// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The system calls that a process makes, counted from outside: whatever it says of itself, and the same way for every program.

use std::collections::BTreeMap;
use std::fs;

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Linux, `arch/x86/entry/syscalls/syscall_64.tbl`.
const IOCTL: u64 = 16;

/// Linux, `include/uapi/linux/iommufd.h`: `_IO(';', number)`, the number counted from `IOMMUFD_CMD_BASE`.
const IOAS_COPY: u64 = 0x3b83;
const IOAS_MAP: u64 = 0x3b85;
const IOAS_UNMAP: u64 = 0x3b86;
const IOAS_MAP_FILE: u64 = 0x3b8f;

/// A system call's number, and which request it is if it is an ioctl.
type Call = (u64, Option<u64>);

/// How often each system call was made.
#[derive(Debug, Default)]
pub struct Calls(BTreeMap<Call, u64>);

impl Calls {
    /// Those that map something in the host's IOMMU.
    pub fn maps(&self) -> u64 {
        [IOAS_COPY, IOAS_MAP, IOAS_MAP_FILE].map(|request| self.ioctls(request)).iter().sum()
    }

    /// Those that unmap something in the host's IOMMU.
    pub fn unmaps(&self) -> u64 {
        self.ioctls(IOAS_UNMAP)
    }

    fn ioctls(&self, request: u64) -> u64 {
        self.0.get(&(IOCTL, Some(request))).copied().unwrap_or_default()
    }
}

/// Counts the system calls of all threads that a process has, while something is done. The process is slower meanwhile.
pub fn count_calls<T: Send>(process: u32, act: impl FnOnce() -> T + Send) -> (T, Calls) {
    let threads = threads_of(process);
    for thread in &threads {
        ptrace::seize(*thread, Options::PTRACE_O_TRACESYSGOOD).unwrap();
        ptrace::interrupt(*thread).unwrap();
        waitpid(*thread, Some(WaitPidFlag::__WALL)).unwrap();
        ptrace::syscall(*thread, None).unwrap();
    }
    let mut calls = Calls::default();
    let result = std::thread::scope(|scope| {
        // Whoever attached to a thread must be who waits for it: the work is done elsewhere.
        let worker = scope.spawn(act);
        while !worker.is_finished() {
            for thread in &threads {
                calls.look(*thread);
            }
            std::thread::yield_now();
        }
        worker.join().unwrap()
    });
    for thread in threads {
        ptrace::interrupt(thread).unwrap();
        waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        ptrace::detach(thread, None).unwrap();
    }
    (result, calls)
}

/// The threads of a process.
pub fn threads_of(process: u32) -> Vec<Pid> {
    let entries = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    entries.map(|entry| Pid::from_raw(entry.unwrap().file_name().to_str().unwrap().parse().unwrap())).collect()
}

impl Calls {
    /// Looks whether a thread has stopped, and lets it go on.
    fn look(&mut self, thread: Pid) {
        let signal = match waitpid(thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)).unwrap() {
            WaitStatus::StillAlive => return,
            WaitStatus::PtraceSyscall(_) => {
                self.count(thread);
                None
            }
            WaitStatus::PtraceEvent(..) => None,
            WaitStatus::Stopped(_, signal) => Some(signal),
            other => panic!("a thread that is traced: {other:?}"),
        };
        ptrace::syscall(thread, signal).unwrap();
    }

    /// Counts the call that a thread stopped at, if it stopped before it and not after.
    fn count(&mut self, thread: Pid) {
        let registers = ptrace::getregs(thread).unwrap();
        // What Linux has there before a call (arch/x86/entry/entry_64.S).
        let before = i64::from(-(Errno::ENOSYS as i32)).cast_unsigned();
        if registers.rax == before {
            let request = (registers.orig_rax == IOCTL).then_some(registers.rsi);
            *self.0.entry((registers.orig_rax, request)).or_default() += 1;
        }
    }
}
