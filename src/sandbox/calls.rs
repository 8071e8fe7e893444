// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which calls of the kernel each kind of thread has a use for.

#![forbid(unsafe_code)]

use nix::libc;
use rustix::fs::OFlags;

use crate::host::iommufd::{DETACH_REQUEST, SHARED_REQUESTS};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ThreadKind {
    /// The first one: waits for the connection's end and for signals, blocks every endpoint, removes the sockets.
    Main,
    /// Waits for the frontend; and the connection's thread, which it starts.
    Connection,
    /// Serves the rings.
    Rings,
    /// Hands messages of a passed connection on.
    Relay,
    /// Serves the control socket.
    Control,
    /// Watches the devices' nodes.
    Nodes,
    /// Writes the metrics.
    Metrics,
    /// Writes the log.
    Log,
    /// The process that holds the devices after the daemon.
    Watcher,
}

/// A call, by its number, and which of its kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub number: i64,
    pub only: Only,
}

/// What an argument must be, counted from 0; its lower 32 bits are compared.
#[derive(Clone, Copy, Debug)]
pub(super) enum Only {
    /// Anything.
    Any,
    /// One of these values.
    OneOf { argument: u8, values: &'static [u32] },
    /// None of these bits.
    Without { argument: u8, bits: u32 },
    /// This process's number.
    Itself { argument: u8 },
}

const fn any(number: i64) -> Call {
    Call { number, only: Only::Any }
}

const fn one_of(number: i64, argument: u8, values: &'static [u32]) -> Call {
    Call { number, only: Only::OneOf { argument, values } }
}

const fn without(number: i64, argument: u8, bits: i32) -> Call {
    Call { number, only: Only::Without { argument, bits: bits.cast_unsigned() } }
}

const fn fcntl(commands: &'static [u32]) -> Call {
    one_of(libc::SYS_fcntl, 1, commands)
}

const fn ioctl(requests: &'static [u32]) -> Call {
    one_of(libc::SYS_ioctl, 1, requests)
}

/// What glibc and Rust's runtime try and do without: a new thread by `clone3`, whose flags a filter cannot see (`clone`, which glibc
/// takes instead, has them in an argument); files that are read, such as `/proc/sys/vm/overcommit_memory` when the allocator gives
/// memory back (malloc/arena.c), or this program's for the trace of a panic, which the daemon's own hook leaves out. They are answered
/// with ENOSYS, if they are in the thread's list, and nothing is done.
pub(super) const NOT_THERE: &[Call] = &[
    any(libc::SYS_clone3),
    any(libc::SYS_getcwd),
    OPEN_TO_READ,
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_readlink),
    any(libc::SYS_readlinkat),
];

const OPEN_TO_READ: Call = without(libc::SYS_openat, 2, libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | libc::O_PATH);

/// `PR_SET_VMA` of include/uapi/linux/prctl.h: glibc can be told to name its memory.
const PR_SET_VMA: u32 = 0x5356_4d41;

/// The allocator, locks, time, the log, signals' handlers, the end of a thread and of the process.
const EVERY: &[Call] = &[
    any(libc::SYS_brk),
    any(libc::SYS_clock_gettime),
    any(libc::SYS_clock_nanosleep),
    any(libc::SYS_close),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
    // Rust's runtime in builds with debug assertions: whether what it closes is open.
    fcntl(&[libc::F_GETFD.cast_unsigned()]),
    any(libc::SYS_futex),
    any(libc::SYS_getcwd),
    any(libc::SYS_getpid),
    // Each thread's first hash map.
    any(libc::SYS_getrandom),
    any(libc::SYS_gettid),
    any(libc::SYS_madvise),
    without(libc::SYS_mmap, 2, libc::PROT_EXEC),
    without(libc::SYS_mprotect, 2, libc::PROT_EXEC),
    any(libc::SYS_mremap),
    any(libc::SYS_munmap),
    any(libc::SYS_nanosleep),
    OPEN_TO_READ,
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_poll),
    any(libc::SYS_ppoll),
    one_of(libc::SYS_prctl, 0, &[PR_SET_VMA]),
    any(libc::SYS_read),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_readlink),
    any(libc::SYS_readlinkat),
    any(libc::SYS_recvfrom),
    any(libc::SYS_restart_syscall),
    // Rust's runtime, before the signal of a bad access ends the process.
    one_of(libc::SYS_rt_sigaction, 0, &[libc::SIGSEGV.cast_unsigned()]),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_sched_yield),
    // Handlers write to a pipe that is a socket.
    any(libc::SYS_sendto),
    any(libc::SYS_sigaltstack),
    // abort().
    Call { number: libc::SYS_tgkill, only: Only::Itself { argument: 0 } },
    any(libc::SYS_write),
    any(libc::SYS_writev),
];

/// The host's page tables, by an iommufd and devices that are shared with the VMM.
const HOST: &[Call] = &[ioctl(SHARED_REQUESTS)];

/// What the watcher of devices is told and answers, and whether it has ended.
const TELL_WATCHER: &[Call] =
    &[any(libc::SYS_recvmsg), any(libc::SYS_sendmsg), any(libc::SYS_wait4), any(libc::SYS_waitid)];

const MAIN: &[Call] = &[
    // The connection is closed.
    any(libc::SYS_shutdown),
    // Which file is at the path of a socket.
    any(libc::SYS_statx),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_unlink),
    #[cfg(not(target_arch = "x86_64"))]
    any(libc::SYS_unlinkat),
];

/// Flags of a thread: glibc's, and musl's, which has `CLONE_DETACHED` too.
const THREAD: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID)
    .cast_unsigned();

const CONNECTION: &[Call] = &[
    any(libc::SYS_accept4),
    any(libc::SYS_clone3),
    one_of(libc::SYS_clone, 0, &[THREAD, THREAD | libc::CLONE_DETACHED.cast_unsigned()]),
    one_of(libc::SYS_prctl, 0, &[libc::PR_SET_NAME.cast_unsigned()]),
    any(libc::SYS_rseq),
    any(libc::SYS_sched_getaffinity),
    any(libc::SYS_set_robust_list),
    any(libc::SYS_epoll_ctl),
    fcntl(&[
        libc::F_DUPFD_CLOEXEC.cast_unsigned(),
        libc::F_GET_SEALS.cast_unsigned(),
        // Which end of a pipe a state is to go through.
        libc::F_GETFL.cast_unsigned(),
    ]),
    any(libc::SYS_fstat),
    any(libc::SYS_fstatfs),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    any(libc::SYS_shutdown),
    any(libc::SYS_statx),
];

const RINGS: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_preadv2),
];

const RELAY: &[Call] = &[any(libc::SYS_recvmsg), any(libc::SYS_sendmsg), any(libc::SYS_shutdown)];

const CONTROL: &[Call] = &[
    any(libc::SYS_accept4),
    any(libc::SYS_fstat),
    any(libc::SYS_geteuid),
    // Who asks.
    one_of(libc::SYS_getsockopt, 2, &[libc::SO_PEERCRED.cast_unsigned()]),
    ioctl(&[FIONBIO]),
    // How VFIO's files are numbered.
    any(libc::SYS_pread64),
    // The devices' nodes.
    any(libc::SYS_statx),
];

#[expect(clippy::cast_possible_truncation, reason = "requests have 32 bits")]
const FIONBIO: u32 = libc::FIONBIO as u32;

/// The directory of nodes comes and goes, and is watched anew.
const NODES: &[Call] = &[any(libc::SYS_statx), any(libc::SYS_inotify_add_watch)];

/// How rustix opens a file that is made anew: with `O_LARGEFILE`, which glibc's headers have as 0 where files are large anyway.
const MAKE_ANEW: u32 =
    OFlags::CREATE.union(OFlags::EXCL).union(OFlags::WRONLY).union(OFlags::CLOEXEC).union(OFlags::LARGEFILE).bits();

/// A file is made anew and then put in the place of the one before.
const METRICS: &[Call] = &[
    one_of(libc::SYS_openat, 2, &[MAKE_ANEW]),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_renameat),
    any(libc::SYS_renameat2),
    any(libc::SYS_unlinkat),
];

const WATCHER: &[Call] = &[
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    any(libc::SYS_fstat),
    any(libc::SYS_pread64),
    ioctl(&[DETACH_REQUEST]),
];

impl ThreadKind {
    /// What it is called in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main thread",
            Self::Connection => "connection's thread",
            Self::Rings => "rings' thread",
            Self::Relay => "relay's thread",
            Self::Control => "control socket's thread",
            Self::Nodes => "thread that watches devices' nodes",
            Self::Metrics => "metrics' thread",
            Self::Log => "log's thread",
            Self::Watcher => "watcher of devices",
        }
    }

    /// The calls that it has a use for.
    pub(super) fn calls(self) -> impl Iterator<Item = &'static Call> {
        let parts: &[&[Call]] = match self {
            Self::Main => &[EVERY, HOST, TELL_WATCHER, MAIN],
            Self::Connection => &[EVERY, HOST, CONNECTION],
            Self::Rings => &[EVERY, HOST, RINGS],
            Self::Relay => &[EVERY, RELAY],
            Self::Control => &[EVERY, HOST, TELL_WATCHER, CONTROL],
            Self::Nodes => &[EVERY, HOST, TELL_WATCHER, NODES],
            Self::Metrics => &[EVERY, METRICS],
            Self::Log => &[EVERY],
            Self::Watcher => &[EVERY, WATCHER],
        };
        parts.iter().flat_map(|part| part.iter()).collect::<Vec<_>>().into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ThreadKind; 9] = [
        ThreadKind::Main,
        ThreadKind::Connection,
        ThreadKind::Rings,
        ThreadKind::Relay,
        ThreadKind::Control,
        ThreadKind::Nodes,
        ThreadKind::Metrics,
        ThreadKind::Log,
        ThreadKind::Watcher,
    ];

    /// One of them would be lost.
    #[test]
    fn no_list_has_a_call_with_and_without_a_condition() {
        for kind in KINDS {
            let is_any = |call: &&Call| matches!(call.only, Only::Any);
            let same = |call: &&Call, other: &Call| call.number == other.number && !matches!(other.only, Only::Any);
            let twice = kind.calls().filter(is_any).find(|call| kind.calls().any(|other| same(call, other)));
            assert!(twice.is_none(), "{kind:?}: {twice:?}");
        }
    }

    #[test]
    fn every_list_makes_a_filter() {
        for kind in KINDS {
            // In a thread that ends with it.
            let confine = move || super::super::seccomp::give_up(super::super::SeccompMode::Kill, kind);
            std::thread::spawn(confine).join().unwrap().unwrap();
        }
    }
}
