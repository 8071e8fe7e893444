// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the process ends when memory that it was given is taken away under it.

use std::io;

use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::standard_error::write_line_now;

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
