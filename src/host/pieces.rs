// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mapping that is several of the host's, as guest memory is in several pieces there.

#![forbid(unsafe_code)]

use super::{HostError, MapError};
use crate::memory::HostSegment;
use crate::range::IovaRange;

/// Maps consecutive pieces of memory from the start of a range on, or none of them: what was mapped before a failure is taken back.
///
/// # Errors
///
/// [`MapError`]
pub(super) fn map_pieces(
    iova: IovaRange,
    pieces: &[HostSegment],
    map: impl Fn(u64, &HostSegment) -> Result<(), HostError>,
    unmap: impl FnOnce(IovaRange) -> Result<u64, HostError>,
) -> Result<(), MapError> {
    let mut done = 0;
    for piece in pieces {
        let Err(error) = map(iova.start() + done, piece) else {
            done += piece.length();
            continue;
        };
        let Some(mapped) = IovaRange::from_length(iova.start(), done) else {
            return Err(MapError::Refused(error));
        };
        return match unmap(mapped) {
            Ok(gone) if gone == done => Err(MapError::Refused(error)),
            Ok(_) | Err(_) => Err(MapError::LeftBehind(error)),
        };
    }
    Ok(())
}
