// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a launch puts its files and the daemon's socket: where nobody else can put any, or a link for them to follow.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

/// For its owner only.
const PRIVATE: u32 = 0o700;
/// The modes that let others write.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// A directory for the files of a launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Directory {
    /// One that there must not be yet: somebody else could have made it, where everybody can make directories.
    New(PathBuf),
    /// One that may be there from before, if nobody else can write to it.
    Given(PathBuf),
}

/// A directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// It was to be new.
    #[error("{} exists already, and may be somebody else's: remove it, or give a directory with --directory", .0.display())]
    Exists(PathBuf),
    /// It is something else.
    #[error("{} is not a directory (a link to one is not, either): choose another --directory", .0.display())]
    NotADirectory(PathBuf),
    /// Somebody else has it.
    #[error("{} belongs to user {owner}, not to user {user}: choose another --directory", .path.display())]
    NotOwned {
        /// The directory.
        path: PathBuf,
        /// Who has it.
        owner: u32,
        /// Who this process is.
        user: u32,
    },
    /// Others could replace what is put there.
    #[error("others can write to {} (mode {mode:o}): `chmod go-w` it, or choose another --directory", .path.display())]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It cannot be made or examined.
    #[error("cannot make {}", .path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Directory {
    /// Its path.
    pub fn path(&self) -> &Path {
        match self {
            Self::New(path) | Self::Given(path) => path,
        }
    }

    /// Makes it, with access for its owner only; one that is given also with the directories above it, unless it is there.
    ///
    /// # Errors
    ///
    /// [`DirectoryError`]; nothing is changed.
    pub fn make(&self) -> Result<(), DirectoryError> {
        let path = self.path();
        let failed = |source| DirectoryError::Io { path: path.to_owned(), source };
        if let (Self::Given(_), Some(above)) = (self, path.parent()) {
            DirBuilder::new().recursive(true).mode(PRIVATE).create(above).map_err(failed)?;
        }
        match DirBuilder::new().mode(PRIVATE).create(path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(error)),
            Err(_) if matches!(self, Self::New(_)) => Err(DirectoryError::Exists(path.to_owned())),
            Err(_) => examine(path, geteuid().as_raw()),
        }
    }
}

/// Whether a directory is the user's alone to write to.
fn examine(path: &Path, user: u32) -> Result<(), DirectoryError> {
    let path = path.to_owned();
    let metadata = match fs::symlink_metadata(&path) {
        Ok(metadata) => metadata,
        Err(source) => return Err(DirectoryError::Io { path, source }),
    };
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if !metadata.is_dir() {
        Err(DirectoryError::NotADirectory(path))
    } else if owner != user {
        Err(DirectoryError::NotOwned { path, owner, user })
    } else if mode & WRITABLE_BY_OTHERS != 0 {
        Err(DirectoryError::Writable { path, mode })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn one_that_is_to_be_new_is_made_once() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("virtio-iommu-1");
        let directory = Directory::New(path.clone());
        directory.make().unwrap();
        assert_eq!(mode(&path), 0o700);
        assert!(matches!(directory.make(), Err(DirectoryError::Exists(_))), "whoever made it");
        let planted = place.path().join("planted");
        symlink(place.path(), &planted).unwrap();
        assert!(matches!(Directory::New(planted).make(), Err(DirectoryError::Exists(_))));
        let nested = Directory::New(place.path().join("above/below"));
        assert!(matches!(nested.make(), Err(DirectoryError::Io { .. })), "only itself");
    }

    #[test]
    fn one_that_is_given_may_be_there_if_nobody_else_can_write_to_it() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("above/below");
        let directory = Directory::Given(path.clone());
        directory.make().unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o700, 0o700));
        directory.make().unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        directory.make().unwrap();
        for open in [0o720, 0o702, 0o1777] {
            fs::set_permissions(&path, Permissions::from_mode(open)).unwrap();
            assert!(matches!(directory.make(), Err(DirectoryError::Writable { mode, .. }) if mode == open));
        }
        fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        let link = place.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(matches!(Directory::Given(link).make(), Err(DirectoryError::NotADirectory(_))));
        let file = place.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(matches!(Directory::Given(file).make(), Err(DirectoryError::NotADirectory(_))));
        let user = geteuid().as_raw();
        assert!(examine(&path, user).is_ok());
        let error = examine(&path, user + 1).unwrap_err();
        assert!(matches!(error, DirectoryError::NotOwned { owner, .. } if owner == user), "{error}");
    }
}
