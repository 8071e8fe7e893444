// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket itself: made in a directory of its owner's, or passed in.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use crate::fd::{AdoptError, adopt_listener};
use crate::paths::directory_of;
use crate::vhost_user::{SocketError, bind, examine as examine_socket};

/// A control socket that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Others could put something else in its place.
    #[error(
        "{} can be written by others: put the control socket into a directory of its own, with access for its owner only (one that \
         is not there is made)", .0.display()
    )]
    Directory(PathBuf),
    /// The directory cannot be had.
    #[error("cannot use the directory {} (it is made where its parent is there)", .path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The passed file is no such socket.
    #[error(transparent)]
    File(#[from] AdoptError),
}

impl ListenError {
    /// Whether the arguments are at fault.
    pub const fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Directory(_) | Self::File(_) | Self::Socket(SocketError::NotASocket(_) | SocketError::InUse(_))
        )
    }
}

/// Where the control socket is to be.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// At a path. The directory is made if it is not there; only its last part.
    Path(&'a Path),
    /// It is inherited by this number, and listens already.
    Fd(RawFd),
}

/// Listens. To be called while the process has one thread.
///
/// # Errors
///
/// [`ListenError`]; whatever is at the path is left alone.
pub fn listen(place: Place<'_>) -> Result<UnixListener, ListenError> {
    match place {
        Place::Path(path) => {
            let directory = directory_of(path);
            match DirBuilder::new().mode(0o700).create(directory) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (),
                result => result.map_err(|source| ListenError::Io { path: directory.to_owned(), source })?,
            }
            check_directory(directory)?;
            Ok(bind(path)?)
        }
        Place::Fd(number) => Ok(adopt_listener(number)?),
    }
}

/// What [`listen`] would answer, as far as looking tells. Nothing is made; a file that was passed is taken over.
///
/// # Errors
///
/// [`ListenError`]
pub fn examine(place: Place<'_>) -> Result<(), ListenError> {
    match place {
        Place::Path(path) => {
            let directory = directory_of(path);
            if directory.exists() {
                check_directory(directory)?;
                return Ok(examine_socket(path)?);
            }
            // Only its last part would be made.
            let above = fs::metadata(directory_of(directory));
            above.map(drop).map_err(|source| ListenError::Io { path: directory.to_owned(), source })
        }
        Place::Fd(number) => Ok(adopt_listener(number).map(drop)?),
    }
}

/// Makes sure that nobody else can rename or replace what is in a directory.
fn check_directory(directory: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Io { path: directory.to_owned(), source };
    let metadata = fs::metadata(directory).map_err(failed)?;
    let is_own = metadata.uid() == geteuid().as_raw() || metadata.uid() == 0;
    if !is_own || metadata.mode() & 0o022 != 0 {
        return Err(ListenError::Directory(directory.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_directory_is_the_owners() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control/socket");
        drop(listen(Place::Path(&path)).unwrap());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(path.parent().unwrap()), mode(&path)), (0o700, 0o600));
        for open in [0o720, 0o702, 0o1777] {
            fs::set_permissions(directory.path(), fs::Permissions::from_mode(open)).unwrap();
            let error = listen(Place::Path(&directory.path().join("socket"))).unwrap_err();
            assert!(matches!(error, ListenError::Directory(_)) && error.is_usage());
            assert!(!directory.path().join("socket").exists());
        }
        let error = listen(Place::Path(&directory.path().join("not/there/socket"))).unwrap_err();
        assert!(matches!(error, ListenError::Io { .. }));
    }
}
