// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The end of a process whose guest memory is gone.

// Installing a signal handler.
#![allow(unsafe_code)]

use std::io;

use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The exit code: what the host or the frontend gave is not there.
const EXIT_CODE: c_int = 3;

/// Has the process end with 3 and a line on the standard error when memory is touched that is not there (SIGBUS): whoever has the file
/// behind guest memory can make it shorter. Nothing sensible can be done without it, nor can the devices be blocked from a signal
/// handler: the watcher does that, as when the process is killed.
///
/// # Errors
///
/// Whatever the kernel says.
pub(crate) fn end_at_missing_memory() -> io::Result<()> {
    // Once: a second one in the handler ends the process.
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_RESETHAND | SaFlags::SA_ONSTACK;
    let action = SigAction::new(SigHandler::SigAction(end), flags, SigSet::empty());
    // SAFETY: the handler makes two system calls and reads the structure that it is given; it takes no lock, allocates nothing, and does
    // not return. The handler that was there before, of Rust's runtime, tells overflows of the stack, for which Linux sends SIGSEGV.
    unsafe { sigaction(Signal::SIGBUS, &action) }?;
    Ok(())
}

extern "C" fn end(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a structure that is valid until the handler returns.
    let code = unsafe { (*info).si_code };
    // SAFETY: descriptor 2 is the standard error, or whatever a launcher left there; writing does not close it.
    let stderr = unsafe { rustix::fd::BorrowedFd::borrow_raw(2) };
    // Nobody can be told if it fails.
    let _ = rustix::io::write(stderr, message(code).as_bytes());
    signal_hook::low_level::exit(EXIT_CODE);
}

/// What is known of it, and no more.
const fn message(code: c_int) -> &'static str {
    match code {
        libc::BUS_ADRERR => {
            "vhost-device-iommu: SIGBUS: guest memory was cut off (its file became shorter; seal it with F_SEAL_SHRINK), or memory of \
             another file is missing: ending, DMA of the devices is refused\n"
        }
        libc::BUS_MCEERR_AR | libc::BUS_MCEERR_AO => {
            "vhost-device-iommu: SIGBUS: the host reports memory that is broken: ending, DMA of the devices is refused\n"
        }
        _ => "vhost-device-iommu: SIGBUS, and not for memory that is missing: ending, DMA of the devices is refused\n",
    }
}
