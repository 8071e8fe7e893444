// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files that were opened by somebody else.

#[cfg(any(feature = "iommufd", feature = "type1"))]
mod kind;

#[cfg(any(feature = "iommufd", feature = "type1"))]
pub use kind::{DeviceNumbers, FileKind, VfioMajor, WrongFile};
#[cfg(feature = "daemon")]
pub use passed::AdoptError;
#[cfg(feature = "daemon")]
pub(crate) use passed::{Adopted, PassedSocket, adopt, adopt_listener, adopt_socket, adopt_writable, close_inherited};

/// Another descriptor of a file that is known by its number only.
///
/// # Errors
///
/// There are too many open files, or the number is negative, as of a file that was never opened.
#[cfg(feature = "vhost")]
pub(crate) fn duplicate(file: &impl std::os::fd::AsRawFd) -> std::io::Result<std::os::fd::OwnedFd> {
    let number = file.as_raw_fd();
    if number < 0 {
        return Err(rustix::io::Errno::BADF.into());
    }
    // SAFETY: the number is not -1, and whatever has it keeps its file open: it is lent to this function until that returns.
    #[allow(unsafe_code)]
    let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    Ok(rustix::io::fcntl_dupfd_cloexec(file, 0)?)
}

/// Files that were passed to this process by number.
#[cfg(feature = "daemon")]
mod passed {
    // Adopting a passed descriptor.
    #![allow(unsafe_code)]

    use std::fs::File;
    use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;
    use std::sync::Mutex;

    use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

    use super::kind::{LISTENER, SOCKET, WRITABLE, check_listens, check_writable, listens};
    use super::{FileKind, WrongFile};

    /// A file that was adopted.
    #[derive(Debug)]
    pub(crate) struct Adopted {
        /// The file.
        pub file: OwnedFd,
        /// The name of its device node below `/dev`, such as `vfio/devices/vfio0`.
        pub node: String,
        /// Where sysfs describes the device.
        pub sysfs: PathBuf,
    }

    /// A socket that was adopted.
    #[derive(Debug)]
    pub(crate) enum PassedSocket {
        /// Others connect to it.
        Listening(UnixListener),
        /// Somebody is at the other end.
        Connected(UnixStream),
    }

    /// A number that is no usable file.
    #[derive(Debug, thiserror::Error)]
    pub enum AdoptError {
        /// Standard input, output and error are not passed for this.
        #[error("fd {0} is standard input, output or error: pass {1} by a number above 2")]
        Standard(RawFd, &'static str),
        /// Nothing is open there.
        #[error("fd {number} is not open: open {expected} and let this process inherit it")]
        NotOpen {
            /// The number.
            number: RawFd,
            /// What was expected.
            expected: &'static str,
            /// What the kernel said.
            source: std::io::Error,
        },
        /// It was adopted before, or opened by this process.
        #[error("fd {0} is given twice, or was not inherited")]
        NotInherited(RawFd),
        /// It is something else.
        #[error("fd {number}")]
        WrongFile {
            /// The number.
            number: RawFd,
            /// What it is.
            source: WrongFile,
        },
    }

    /// One at a time: between looking at a descriptor's flag and setting it.
    static ADOPTING: Mutex<()> = Mutex::new(());

    /// Takes over a file that this process inherited, once, after making sure that it is what it should be. To be called
    /// while the process starts, before anything else could have received or opened files without the close-on-exec flag.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]; the file is left alone.
    pub(crate) fn adopt(number: RawFd, kind: FileKind) -> Result<Adopted, AdoptError> {
        let (file, (node, sysfs)) = take_over(number, kind.name(), |file| kind.check(&file))?;
        Ok(Adopted { file, node, sysfs })
    }

    /// Takes over a Unix stream socket, as [`adopt`] does a device's file.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]; the socket is left alone.
    pub(crate) fn adopt_socket(number: RawFd) -> Result<PassedSocket, AdoptError> {
        let (socket, listens) = take_over(number, SOCKET, listens)?;
        Ok(if listens { PassedSocket::Listening(socket.into()) } else { PassedSocket::Connected(socket.into()) })
    }

    /// Takes over a file that can be written to, as [`adopt`] does a device's file.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]; the file is left alone.
    pub(crate) fn adopt_writable(number: RawFd) -> Result<File, AdoptError> {
        let (file, ()) = take_over(number, WRITABLE, check_writable)?;
        Ok(file.into())
    }

    /// Takes over a Unix stream socket that listens, as [`adopt`] does a device's file.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]; the socket is left alone.
    pub(crate) fn adopt_listener(number: RawFd) -> Result<UnixListener, AdoptError> {
        let (socket, ()) = take_over(number, LISTENER, check_listens)?;
        Ok(socket.into())
    }

    /// Takes over a file for which a check holds, and returns what that found.
    fn take_over<T>(
        number: RawFd,
        expected: &'static str,
        check: impl FnOnce(BorrowedFd<'_>) -> Result<T, WrongFile>,
    ) -> Result<(OwnedFd, T), AdoptError> {
        if number <= 2 {
            return Err(AdoptError::Standard(number, expected));
        }
        let _one_at_a_time = ADOPTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: nothing but the number is used: if it is not open, or the kernel has it closed meanwhile, the calls below
        // fail with EBADF.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        let not_open = |errno: Errno| AdoptError::NotOpen { number, expected, source: errno.into() };
        // A file that came through exec has the flag cleared; every file that Rust code opens, and every one that was
        // adopted, has it set. So nobody in this process owns what passes here.
        if fcntl_getfd(borrowed).map_err(not_open)?.contains(FdFlags::CLOEXEC) {
            return Err(AdoptError::NotInherited(number));
        }
        let found = check(borrowed).map_err(|source| AdoptError::WrongFile { number, source })?;
        fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(not_open)?;
        // SAFETY: the descriptor is open and was inherited, so nothing in this process owns it; the flag that was just set
        // keeps it from being adopted again.
        let file = unsafe { OwnedFd::from_raw_fd(number) };
        Ok((file, found))
    }

    /// Closes every file that this process inherited but standard input, output and error, and those that were adopted. To be
    /// called while the process starts, as [`adopt`].
    pub(crate) fn close_inherited() {
        let _one_at_a_time = ADOPTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let names = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
        let numbers: Vec<RawFd> = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        for number in numbers.into_iter().filter(|number| *number > 2) {
            // SAFETY: as in `take_over`.
            let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
            if fcntl_getfd(borrowed).is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC)) {
                // SAFETY: as in `take_over`: it was inherited, so nothing in this process owns it.
                drop(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use std::fs::File;
        use std::os::fd::{AsRawFd, IntoRawFd};

        use super::*;

        /// A file as exec would leave it.
        fn inherited(path: &str) -> RawFd {
            let file = File::open(path).unwrap();
            fcntl_setfd(&file, FdFlags::empty()).unwrap();
            file.into_raw_fd()
        }

        #[test]
        fn what_is_not_the_right_file_is_named() {
            let text = |number| {
                let error = adopt(number, FileKind::Iommufd).unwrap_err();
                format!("{error}: {}", std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default())
            };
            assert!(text(0).contains("standard input"));
            assert!(text(1_000_000).contains("not open"));
            assert!(text(inherited("/")).contains("a directory is not /dev/iommu"));
            assert!(text(inherited("/dev/null")).contains("/dev/null is not /dev/iommu"));
        }

        #[test]
        fn only_a_socket_that_listens_is_adopted_as_one() {
            let of = |socket: OwnedFd| {
                fcntl_setfd(&socket, FdFlags::empty()).unwrap();
                adopt_listener(socket.into_raw_fd())
            };
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            let adopted = of(UnixListener::bind(&path).unwrap().into()).unwrap();
            assert_eq!(adopted.local_addr().unwrap().as_pathname(), Some(path.as_path()));
            for (socket, found) in [
                (File::open("/dev/null").unwrap().into(), "a character device"),
                (std::os::unix::net::UnixStream::pair().unwrap().0.into(), "a socket that does not listen"),
                (std::os::unix::net::UnixDatagram::unbound().unwrap().into(), "a Unix socket of another type"),
                (std::net::TcpListener::bind("127.0.0.1:0").unwrap().into(), "a socket of another family"),
            ] {
                let error = of(socket).unwrap_err();
                let cause = std::error::Error::source(&error).unwrap().to_string();
                assert!(cause.contains(found), "{cause}");
            }
        }

        #[test]
        fn a_file_of_this_process_is_not_adopted() {
            let file = File::open("/dev/null").unwrap();
            let error = adopt(file.as_raw_fd(), FileKind::VfioDevice).unwrap_err();
            assert!(matches!(error, AdoptError::NotInherited(_)));
        }
    }
}
