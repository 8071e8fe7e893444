// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's sockets: for their owner only, and in place of nothing but a socket that is dead.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::paths::directory_of;

/// A socket that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Something that is no socket is there.
    #[error("{} exists and is not a socket: it is left alone; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// Somebody listens there.
    #[error("{} is in use by another process: stop it or choose another path", .0.display())]
    InUse(PathBuf),
    /// It cannot be made or examined.
    #[error("cannot listen on {}", .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What is at a path where a socket could be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nothing.
    Free,
    /// A socket that nobody listens on, as far as the kernel's list tells.
    Taken,
}

/// Looks whether a socket can be at a path, and touches nothing.
///
/// # Errors
///
/// [`SocketError`]
pub(crate) fn examine(path: &Path) -> Result<(), SocketError> {
    look(path).map(drop)
}

fn look(path: &Path) -> Result<Place, SocketError> {
    let failed = |source| SocketError::Io { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::metadata(directory_of(path)).map_err(failed)?;
            Ok(Place::Free)
        }
        Err(error) => Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) if is_listened_on(path) => Err(SocketError::InUse(path.to_owned())),
        Ok(_) => Ok(Place::Taken),
    }
}

/// Listens on a path, with access for the owner only. The socket is known by its absolute path, if that is not too long, so that
/// whoever looks for it in the kernel's list finds it.
///
/// # Errors
///
/// [`SocketError`]; whatever is at the path is left alone.
pub(crate) fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    make_room(path)?;
    listen(path).map_err(|errno| SocketError::Io { path: path.to_owned(), source: errno.into() })
}

/// The file of a socket that this process made, removed when this is dropped; unless somebody has put another one in its place, as who
/// finds it dead may. That it is gone already is no failure.
#[derive(Debug)]
pub(super) struct Leftover {
    path: PathBuf,
    file: Option<FileIdentity>,
}

/// Which file it is. Some file systems use an inode's number again at once; when it was made tells them apart, where that is known.
#[derive(Debug, PartialEq, Eq)]
struct FileIdentity {
    device: u64,
    inode: u64,
    created: Option<SystemTime>,
}

impl Leftover {
    /// The socket that was made there just now.
    pub fn at(path: PathBuf) -> Self {
        let file = file_at(&path);
        Self { path, file }
    }
}

impl Drop for Leftover {
    fn drop(&mut self) {
        if self.file.is_some() && file_at(&self.path) == self.file {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn file_at(path: &Path) -> Option<FileIdentity> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some(FileIdentity { device: metadata.dev(), inode: metadata.ino(), created: metadata.created().ok() })
}

/// Removes a socket that is dead.
///
/// # Errors
///
/// [`SocketError`]; whatever else is at the path is left alone.
pub(crate) fn make_room(path: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::Io { path: path.to_owned(), source };
    if look(path)? == Place::Free {
        return Ok(());
    }
    // By nobody that this process can see. Connecting tells for sure.
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        Err(error) => Err(failed(error)),
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
    }
}

fn listen(path: &Path) -> rustix::io::Result<UnixListener> {
    // include/net/af_unix.h has as many connections wait.
    const WAITING: i32 = 128;
    let absolute = std::path::absolute(path).ok();
    let address = absolute.and_then(|absolute| SocketAddrUnix::new(absolute).ok());
    let address = address.map_or_else(|| SocketAddrUnix::new(path), Ok)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The file is made with the socket's own mode (net/unix/af_unix.c): unlike the process's mask, no other thread has it.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, WAITING)?;
    Ok(UnixListener::from(socket))
}

/// Whether somebody listens there, as far as the kernel's list tells. It is asked first because connecting would take the
/// place of the one frontend that a daemon waits for. Of another program, it does not find a socket that was bound by a
/// relative path which is not the one that is asked for, nor one in another network namespace.
fn is_listened_on(path: &Path) -> bool {
    // include/uapi/linux/net.h
    const SO_ACCEPTCON: u32 = 1 << 16;
    let Ok(list) = fs::read("/proc/net/unix") else {
        return false;
    };
    let file = |path: &Path| fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let asked = file(path);
    list.split(|byte| *byte == b'\n').filter_map(bound_socket).any(|(flags, name)| {
        let is_same = name == path || (name.is_absolute() && asked.is_some() && file(name) == asked);
        flags & SO_ACCEPTCON != 0 && is_same
    })
}

/// The flags of a socket in the kernel's list, and the path that it is bound to.
fn bound_socket(line: &[u8]) -> Option<(u32, &Path)> {
    // Number, references, protocol, flags, type, state, inode; then one blank, and the path as it is, with the blanks in it.
    let mut rest = line;
    let mut flags = None;
    for field in 0..7 {
        rest = rest.trim_ascii_start();
        let end = rest.iter().position(|byte| *byte == b' ')?;
        let (text, behind) = rest.split_at(end);
        if field == 3 {
            flags = u32::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok();
        }
        rest = behind;
    }
    Some((flags?, Path::new(OsStr::from_bytes(rest.strip_prefix(b" ")?))))
}

/// Closes a socket and waits until nobody listens: a process that another test starts has a copy of every file for a moment.
#[cfg(test)]
pub(crate) fn close(listener: UnixListener, path: &Path) {
    drop(listener);
    while std::os::unix::net::UnixStream::connect(path).is_ok() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_a_dead_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path), Err(SocketError::InUse(_))));
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "whoever listens was not disturbed");
        close(listener, &path);
        drop(bind(&path).unwrap());
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(matches!(bind(&file), Err(SocketError::NotASocket(_))));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(bind(&link), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    }

    #[test]
    fn only_the_own_socket_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let first = bind(&path).unwrap();
        let leftover = Leftover::at(path.clone());
        close(first, &path);
        let _second = bind(&path).unwrap();
        drop(leftover);
        assert!(path.exists(), "another process listens there");
        drop(Leftover::at(path.clone()));
        assert!(!path.exists());
        drop(Leftover::at(path));
    }

    #[test]
    fn who_listens_is_found_by_any_name_of_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let with_blanks = directory.path().join("a  place with blanks ");
        fs::create_dir(&with_blanks).unwrap();
        let path = with_blanks.join("socket of it");
        let listener = bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let linked = directory.path().join("linked");
        std::os::unix::fs::symlink(&with_blanks, &linked).unwrap();
        for name in [path.clone(), linked.join("socket of it"), with_blanks.join("../linked/socket of it")] {
            assert!(is_listened_on(&name), "{}", name.display());
            assert!(matches!(bind(&name), Err(SocketError::InUse(_))));
        }
        assert!(listener.accept().is_err(), "whoever listens was not disturbed");
        assert!(!is_listened_on(&with_blanks.join("socket")), "a part of a name");
        close(listener, &path);
        assert!(!is_listened_on(&path));
    }

    #[test]
    fn one_that_is_bound_by_a_relative_path_is_known_by_its_absolute_one() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let relative = Path::new(directory.path().file_name().unwrap()).join("socket");
        let listener = bind(&relative).unwrap();
        let name = listener.local_addr().unwrap().as_pathname().unwrap().to_owned();
        assert_eq!(name, std::env::current_dir().unwrap().join(&relative));
        assert!(is_listened_on(&relative) && is_listened_on(&name));
        drop(listener);
        // What is too long for an address in its absolute form is bound as it is.
        let parent = relative.parent().unwrap();
        let mut long = relative.clone();
        while long.as_os_str().len() + parent.as_os_str().len() + 4 < 108 {
            long = parent.join("..").join(long);
        }
        let absolute = std::env::current_dir().unwrap().join(&long);
        let expected = [&absolute, &long].into_iter().find(|name| name.as_os_str().len() < 108).unwrap();
        let listener = bind(&long).unwrap();
        assert_eq!(listener.local_addr().unwrap().as_pathname(), Some(expected.as_path()));
    }
}
