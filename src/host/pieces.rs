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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::host::HostErrorKind;
    use crate::memory::GuestRam;

    /// Maps three pages at 0x8000, of which the last is refused: where they were put, what was taken back, and what came of it.
    fn map_two_of_three(gone: Result<u64, HostErrorKind>) -> (Vec<u64>, Option<IovaRange>, Result<(), MapError>) {
        let error = |kind| HostError::new(kind, "", None);
        let ram = GuestRam::in_software(&[(GuestAddress(0), 0x1000)]).unwrap();
        let page = ram.segments(GuestAddress(0), 0x1000).unwrap().remove(0);
        let (places, taken_back) = (RefCell::new(Vec::new()), RefCell::new(None));
        let map = |iova, _: &HostSegment| {
            places.borrow_mut().push(iova);
            if places.borrow().len() < 3 { Ok(()) } else { Err(error(HostErrorKind::NoMemory)) }
        };
        let unmap = |iova| {
            *taken_back.borrow_mut() = Some(iova);
            gone.map_err(error)
        };
        let result = map_pieces("8000-afff".parse().unwrap(), &[page.clone(), page.clone(), page], map, unmap);
        (places.into_inner(), taken_back.into_inner(), result)
    }

    #[test]
    fn pieces_follow_each_other_and_what_was_mapped_before_a_failure_is_taken_back() {
        let (places, taken_back, result) = map_two_of_three(Ok(0x2000));
        assert_eq!(places, [0x8000, 0x9000, 0xa000]);
        assert_eq!(taken_back, Some("8000-9fff".parse().unwrap()));
        let Err(MapError::Refused(error)) = result else { panic!("{result:?}") };
        assert_eq!(error.kind, HostErrorKind::NoMemory);
    }

    #[test]
    fn what_could_not_be_taken_back_is_said() {
        for gone in [Ok(0x1000), Ok(0x3000), Err(HostErrorKind::Other)] {
            let (.., result) = map_two_of_three(gone);
            let Err(MapError::LeftBehind(error)) = result else { panic!("{gone:?}: {result:?}") };
            assert_eq!(error.kind, HostErrorKind::NoMemory, "why it was not mapped, {gone:?}");
        }
    }
}
