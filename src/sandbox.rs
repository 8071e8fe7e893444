// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the daemon gives up before it reads the first byte of a frontend's: privileges, the file system and the network, and all calls
//! of the kernel but those that each of its threads has a use for.
//!
//! Everything that is to be worked on is open by then, or comes as an open file later. What holds for the whole process
//! is given up while there is one thread, and every later thread inherits it; then each thread has its own list of
//! calls. And how the process ends when memory that it was given is taken away under it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::Builder;
use std::time::Duration;

use clap::ValueEnum;
use landlock::{PathFdError, RulesetError};
use log::{info, warn};
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::standard_error::write_line_now;

mod calls;
mod files;
mod privileges;
mod seccomp;

pub(crate) use calls::ThreadKind;

/// How long a thread may take to confine itself.
const PATIENCE: Duration = Duration::from_secs(10);

/// What becomes of a thread that makes a call which is not in its list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SeccompMode {
    /// The process is killed.
    Kill,
    /// The thread gets SIGSYS, which ends the process unless a debugger catches it.
    Trap,
    /// The call is made, and the kernel's log has it.
    Log,
    /// No call is looked at.
    Off,
}

/// A process that cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// How many threads there are is not known.
    #[error("how many threads this process has is not known: cannot look at /proc/self/task")]
    Threads(#[source] io::Error),
    /// There are threads that would not be confined.
    #[error("the process has {0} threads already, which would not be confined")]
    NotAlone(usize),
    /// A privilege cannot be given up.
    #[error("{0} cannot be given up")]
    Privilege(&'static str, #[source] io::Error),
    /// The directory of a socket, in which that is removed at the end, cannot be named to Landlock.
    #[error("the directory of {} cannot be opened", .path.display())]
    Directory {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: PathFdError,
    },
    /// Landlock is there, and does not take the rules.
    #[error("the kernel's Landlock does not take the rules")]
    Landlock(#[source] RulesetError),
    /// Landlock is there, and enforces nothing.
    #[error("the kernel has Landlock, and does not enforce the rules")]
    NotEnforced,
    /// There is no list of calls for this machine, or the kernel does not take it.
    #[error("the list of calls of the {thread} does not hold")]
    Seccomp {
        /// Whose list it is.
        thread: &'static str,
        /// Why.
        source: seccompiler::Error,
    },
    /// A thread does not say that it is confined.
    #[error("the {0} did not say that it is confined")]
    Silent(&'static str),
}

/// A thread that was not started.
#[derive(Debug)]
pub(crate) enum StartError {
    /// It cannot be had.
    Thread(io::Error),
    /// It cannot be confined, and has ended.
    Sandbox(SandboxError),
}

/// A process that has given up what it must, as far as the operator wants that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sandbox(SeccompMode);

impl Sandbox {
    /// A process that keeps everything.
    pub const fn off() -> Self {
        Self(SeccompMode::Off)
    }

    /// Gives up what holds for the whole process, which must have one thread: new privileges, capabilities, core dumps, files and
    /// network. Sockets at these paths can be removed at the end, and a file at this one be replaced.
    ///
    /// # Errors
    ///
    /// [`SandboxError`]; what was given up before stays so.
    pub fn enter(mode: SeccompMode, sockets: &[PathBuf], replaced: Option<&Path>) -> Result<Self, SandboxError> {
        let threads = std::fs::read_dir("/proc/self/task").map_err(SandboxError::Threads)?.count();
        if threads != 1 {
            return Err(SandboxError::NotAlone(threads));
        }
        privileges::give_up(privileges::Kept::LockedMemory)?;
        match files::give_up(sockets, replaced)? {
            Some(version) => info!("confined: files and network are out of reach (Landlock {version})"),
            None => warn!(
                "the kernel has no Landlock, or it is not turned on (lsm=landlock,...): files and network are kept out of reach by \
                 seccomp alone"
            ),
        }
        if mode == SeccompMode::Off {
            warn!("--seccomp off: every call of the kernel can be made");
        }
        Ok(Self(mode))
    }

    /// Gives up what the watcher of devices has no use for, which is one thread and holds its files already.
    ///
    /// # Errors
    ///
    /// [`SandboxError`]; what was given up before stays so.
    pub fn enter_watcher(mode: SeccompMode) -> Result<(), SandboxError> {
        privileges::give_up(privileges::Kept::Nothing)?;
        files::give_up(&[], None)?;
        Self(mode).confine_thread(ThreadKind::Watcher)
    }

    /// Gives up every call that this thread, and threads that it starts from here on, have no use for.
    ///
    /// # Errors
    ///
    /// [`SandboxError::Seccomp`]
    pub fn confine_thread(self, kind: ThreadKind) -> Result<(), SandboxError> {
        seccomp::give_up(self.0, kind)
    }

    /// Starts a thread, and returns when it is confined.
    ///
    /// # Errors
    ///
    /// [`StartError`]; the thread does not run.
    pub fn spawn(self, kind: ThreadKind, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
        let (tell, confined) = mpsc::sync_channel(1);
        let run = move || {
            let result = self.confine_thread(kind);
            let is_confined = result.is_ok();
            // Whoever waits no longer has given up.
            if tell.send(result).is_ok() && is_confined {
                work();
            }
        };
        Builder::new().name(name.to_owned()).spawn(run).map_err(StartError::Thread)?;
        Self::wait(kind, &confined).map_err(StartError::Sandbox)
    }

    /// Waits until a thread says that it is confined.
    ///
    /// # Errors
    ///
    /// [`SandboxError`]; what it says, or that it does not.
    pub fn wait(kind: ThreadKind, confined: &mpsc::Receiver<Result<(), SandboxError>>) -> Result<(), SandboxError> {
        confined.recv_timeout(PATIENCE).unwrap_or(Err(SandboxError::Silent(kind.name())))
    }
}

/// The exit code: what the host or the frontend gave is not there.
const MISSING_MEMORY: c_int = 3;

/// Has the process end with 3 and a line on the standard error when memory is touched that is not there (SIGBUS): whoever has the file
/// behind guest memory can make it shorter. Nothing sensible can be done without it, nor can the devices be blocked from a signal
/// handler: the watcher does that, as when the process is killed.
///
/// # Errors
///
/// Whatever the kernel says.
#[expect(unsafe_code, reason = "installing a signal handler")]
pub(crate) fn end_at_missing_memory() -> io::Result<()> {
    // Once: a second one in the handler ends the process.
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_RESETHAND | SaFlags::SA_ONSTACK;
    let action = SigAction::new(SigHandler::SigAction(end), flags, SigSet::empty());
    // SAFETY: the handler makes three system calls and reads the structure that it is given; it takes no lock, allocates nothing, and does
    // not return. The handler that was there before, of Rust's runtime, tells overflows of the stack, for which Linux sends SIGSEGV.
    unsafe { sigaction(Signal::SIGBUS, &action) }?;
    Ok(())
}

#[expect(unsafe_code, reason = "a signal handler's argument")]
extern "C" fn end(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a structure that is valid until the handler returns.
    let code = unsafe { (*info).si_code };
    write_line_now(message(code));
    signal_hook::low_level::exit(MISSING_MEMORY);
}

/// What is known of it, and no more.
const fn message(code: c_int) -> &'static str {
    match code {
        libc::BUS_ADRERR => {
            "vhost-device-iommu: SIGBUS: guest memory was cut off (its file became shorter; seal it with F_SEAL_SHRINK), or memory of \
             another file is missing: ending, DMA of the devices is refused"
        }
        libc::BUS_MCEERR_AR | libc::BUS_MCEERR_AO => {
            "vhost-device-iommu: SIGBUS: the host reports memory that is broken: ending, DMA of the devices is refused"
        }
        _ => "vhost-device-iommu: SIGBUS, and not for memory that is missing: ending, DMA of the devices is refused",
    }
}
