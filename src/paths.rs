// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Paths as they are given.

#![forbid(unsafe_code)]

use std::path::Path;

/// The directory that a file of this path is in: the current one for a bare name.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_in_the_current_directory() {
        for (path, directory) in
            [("socket", "."), ("./socket", "."), ("run/socket", "run"), ("/socket", "/"), ("/", ".")]
        {
            assert_eq!(directory_of(Path::new(path)), Path::new(directory), "{path}");
        }
    }
}
