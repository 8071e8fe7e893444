// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's sockets: for their owner only, and in place of nothing but a socket that is dead.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::process::umask;

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

/// Listens on a path, with access for the owner only. To be called while the process has one thread: for a moment the
/// process's file mode mask is another.
///
/// # Errors
///
/// [`SocketError`]; whatever is at the path is left alone.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |source| SocketError::Io { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => (),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) if is_listened_on(path) => return Err(SocketError::InUse(path.to_owned())),
        // Nobody that this process can see. Connecting tells for sure.
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed)?,
            Err(error) => return Err(failed(error)),
            Ok(_) => return Err(SocketError::InUse(path.to_owned())),
        },
    }
    // The mode of a socket comes from the mask alone. There is only one thread yet.
    let before = umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let listener = UnixListener::bind(path);
    umask(before);
    listener.map_err(failed)
}

/// Whether somebody listens there, as far as the kernel's list tells. It is asked first because connecting would take the
/// place of the one frontend that a daemon waits for.
fn is_listened_on(path: &Path) -> bool {
    // include/uapi/linux/net.h
    const SO_ACCEPTCON: u32 = 1 << 16;
    let Ok(list) = fs::read_to_string("/proc/net/unix") else {
        return false;
    };
    let absolute = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    // Number, references, protocol, flags, type, state, inode, path.
    list.lines().any(|line| {
        let mut fields = line.split_whitespace();
        let flags = fields.nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        let name = fields.nth(3).map(Path::new);
        flags.is_some_and(|flags| flags & SO_ACCEPTCON != 0) && (name == Some(path) || name == Some(absolute.as_path()))
    })
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
        drop(listener);
        drop(bind(&path).unwrap());
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(matches!(bind(&file), Err(SocketError::NotASocket(_))));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(bind(&link), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    }
}
