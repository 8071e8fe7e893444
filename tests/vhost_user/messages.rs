// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every message with too much, too little and the wrong files; and front ends that go at any moment.

use std::os::fd::{AsRawFd, RawFd};

use super::raw::*;
use crate::common::alone::{alone, open_files, resident_memory};

/// What a message is answered with that is in order.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Whether it was done; it was.
    Done,
    /// So many bytes.
    Bytes(usize),
}

/// A message that the backend takes.
struct Known {
    code: u32,
    body: Vec<u8>,
    /// How many files belong to it; `None` if they do not matter.
    files: Option<usize>,
    answer: Answer,
}

/// Every message that is understood, as it is right for [`Victim::ready`].
fn known() -> Vec<Known> {
    use Answer::{Bytes, Done};
    let features = |code| {
        let mut victim = Victim::ready(&memfd(SIZE));
        let features = victim.frontend.call(code, &[], &[]).unwrap();
        victim.end();
        features
    };
    let config = [36u32, 1, 0].map(u32::to_ne_bytes).concat();
    let config = [config, vec![1]].concat();
    let new = region(&[0x10_0000, SIZE, USER + SIZE, 0]);
    let addresses = words(&[0, USER, USER + 0x2000, USER + 0x1000, 0]);
    let known = |code, body: Vec<u8>, files, answer| Known { code, body, files: Some(files), answer };
    vec![
        known(GET_FEATURES, vec![], 0, Bytes(8)),
        known(SET_FEATURES, features(GET_FEATURES), 0, Done),
        known(3, vec![], 0, Done),
        known(4, vec![], 0, Done),
        known(SET_MEM_TABLE, table(&[0, SIZE, USER, 0]), 1, Done),
        known(SET_VRING_NUM, ring(0, 16), 0, Done),
        known(SET_VRING_ADDR, addresses, 0, Done),
        known(SET_VRING_BASE, ring(0, 7), 0, Done),
        known(GET_VRING_BASE, ring(0, 0), 0, Bytes(8)),
        known(SET_VRING_KICK, words(&[0]), 1, Done),
        known(SET_VRING_CALL, words(&[0]), 1, Done),
        known(SET_VRING_ERR, words(&[0]), 1, Done),
        known(GET_PROTOCOL_FEATURES, vec![], 0, Bytes(8)),
        known(SET_PROTOCOL_FEATURES, features(GET_PROTOCOL_FEATURES), 0, Done),
        known(GET_QUEUE_NUM, vec![], 0, Bytes(8)),
        known(SET_VRING_ENABLE, ring(0, 1), 0, Done),
        known(24, config.clone(), 0, Bytes(13)),
        known(25, config, 0, Done),
        known(34, vec![], 0, Done),
        known(GET_MAX_MEM_SLOTS, vec![], 0, Bytes(8)),
        known(ADD_MEM_REG, new, 1, Done),
        // The files of this one are closed and not looked at.
        Known { code: REM_MEM_REG, body: region(&[0, SIZE, USER, 0]), files: None, answer: Done },
        // Answered with a refusal: an event is no pipe.
        known(42, ring(0, 0), 1, Bytes(8)),
    ]
}

/// As [`Known`], but not for its length.
const CHECK_DEVICE_STATE: u32 = 43;
/// More files come with a message than the library takes.
const TOO_MANY: usize = 33;

/// What a front end sends, and what is to become of it.
struct Attempt<'a> {
    code: u32,
    /// What the header says of the length.
    length: u32,
    body: &'a [u8],
    files: &'a [RawFd],
    /// `None` if it is not to be said.
    expected: Option<bool>,
    answer: Option<Answer>,
}

impl Attempt<'_> {
    fn check(&self, memory: &std::fs::File) {
        let Self { code, length, body, files, .. } = *self;
        let what = format!("message {code}, {} bytes said to be {length}, {} files", body.len(), files.len());
        let mut victim = Victim::ready(memory);
        let frontend = &mut victim.frontend;
        frontend.send(&claiming(code, length, body), files);
        // Something else, to see whether anybody listens.
        let probe = if code == GET_QUEUE_NUM { GET_FEATURES } else { GET_QUEUE_NUM };
        frontend.send(&message(probe, &[]), &[]);
        // Whatever comes before a header that lies can be taken for its end.
        if length as usize > body.len() {
            frontend.stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut answers = Vec::new();
        let mut is_heard = false;
        while !is_heard && let Some((answered, body)) = frontend.receive() {
            is_heard = answered == probe;
            answers.push((answered, body));
        }
        if let Some(expected) = self.expected {
            assert_eq!(is_heard, expected, "{what}");
        }
        if let Some(answer) = self.answer {
            let (answered, body) = &answers[0];
            let right = match answer {
                Answer::Done => *body == words(&[0]),
                Answer::Bytes(count) => body.len() == count,
            };
            assert!(*answered == code && right && answers.len() == 2, "{what}: {answers:x?}");
        } else if self.expected == Some(false) {
            // A refusal may be said; nothing else is.
            assert!(answers.iter().all(|(answered, body)| *answered == code && *body != words(&[0])), "{what}");
        }
        victim.end();
    }
}

/// All that a front end can do wrong with a message's length and files ends its connection, and nothing else: no panic, no file that
/// is kept.
#[test]
fn every_message_of_a_wrong_length_or_with_wrong_files_ends_the_connection() {
    alone("messages::every_message_of_a_wrong_length_or_with_wrong_files_ends_the_connection", || {
        let known = known();
        let memory = memfd(SIZE);
        let events: Vec<_> = (0..TOO_MANY).map(|_| event()).collect();
        let before = open_files();
        for code in (0..=50).chain([0x7fff_ffff, u32::MAX]) {
            let this = known.iter().find(|known| known.code == code);
            let right = this.map_or(&[][..], |known| &known.body);
            let exact = right.len();
            let mut lengths = vec![0, 1, exact.saturating_sub(1), exact, exact + 1, 4096];
            lengths.sort_unstable();
            lengths.dedup();
            for count in [0, 1, 2, 8, 16, TOO_MANY] {
                let mut files: Vec<RawFd> = events.iter().take(count).map(AsRawFd::as_raw_fd).collect();
                if matches!(code, SET_MEM_TABLE | ADD_MEM_REG) {
                    files.fill(memory.as_raw_fd());
                }
                for length in &lengths {
                    let mut body = right.to_vec();
                    body.resize(*length, 0);
                    let in_order = this.is_some_and(|known| {
                        *length == exact && known.files.is_none_or(|files| files == count) && count != TOO_MANY
                    });
                    let is_heard = in_order || (code == CHECK_DEVICE_STATE && count == 0);
                    Attempt {
                        code,
                        length: *length as u32,
                        body: &body,
                        files: &files,
                        // The library forgets such a message, and takes what follows for the next.
                        expected: (count != TOO_MANY).then_some(is_heard),
                        answer: this.filter(|_| in_order).map(|known| known.answer),
                    }
                    .check(&memory);
                }
                for length in [exact as u32 + 8, 4097, u32::MAX] {
                    let expected = (count != TOO_MANY && code != CHECK_DEVICE_STATE).then_some(false);
                    Attempt { code, length, body: right, files: &files, expected, answer: None }.check(&memory);
                }
            }
            assert_eq!(open_files(), before, "message {code}");
        }
    });
}

/// What a good front end says, message by message, with files.
fn good_session(memory: RawFd, event: RawFd) -> Vec<(Vec<u8>, Option<RawFd>)> {
    let addresses = words(&[0, USER, USER + 0x2000, USER + 0x1000, 0]);
    let config = [0u32, 40, 0].map(u32::to_ne_bytes).concat();
    let mut right = known();
    let mut features = |code| std::mem::take(&mut right.iter_mut().find(|known| known.code == code).unwrap().body);
    vec![
        (message(3, &[]), None),
        (message(GET_FEATURES, &[]), None),
        (message(SET_FEATURES, &features(SET_FEATURES)), None),
        (message(GET_PROTOCOL_FEATURES, &[]), None),
        (message(SET_PROTOCOL_FEATURES, &features(SET_PROTOCOL_FEATURES)), None),
        (message(24, &[config, vec![0; 40]].concat()), None),
        (message(SET_MEM_TABLE, &table(&[0, SIZE, USER, 0])), Some(memory)),
        (message(SET_VRING_NUM, &ring(0, 16)), None),
        (message(SET_VRING_BASE, &ring(0, 0)), None),
        (message(SET_VRING_ADDR, &addresses), None),
        (message(SET_VRING_CALL, &words(&[0])), Some(event)),
        (message(SET_VRING_KICK, &words(&[0])), Some(event)),
        (message(SET_VRING_ENABLE, &ring(0, 1)), None),
        (message(ADD_MEM_REG, &region(&[0x10_0000, SIZE, USER + SIZE, 0])), Some(memory)),
        (message(REM_MEM_REG, &region(&[0x10_0000, SIZE, USER + SIZE, 0])), None),
        (message(GET_VRING_BASE, &ring(0, 0)), None),
    ]
}

/// A front end that goes after any byte of what it says leaves nothing behind: no file, no thread, no memory to speak of.
#[test]
fn a_frontend_may_go_after_any_byte() {
    alone("messages::a_frontend_may_go_after_any_byte", || {
        let (memory, event) = (memfd(SIZE), event());
        let session = good_session(memory.as_raw_fd(), event.as_raw_fd());
        let length: usize = session.iter().map(|(bytes, _)| bytes.len()).sum();
        let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
        let before = (open_files(), threads());
        for end in 0..=length {
            let mut victim = Victim::new();
            let mut left = end;
            for (bytes, file) in &session {
                let now = bytes.len().min(left);
                left -= now;
                if now != 0 {
                    assert!(victim.frontend.send(&bytes[..now], file.as_slice()), "{end} bytes");
                }
            }
            if end == length {
                // All of it was understood.
                while victim.frontend.receive().expect("an answer").0 != GET_VRING_BASE {}
            }
            victim.end();
        }
        assert_eq!((open_files(), threads()), before);
    });
}

/// As many front ends as come one after the other, each with a backend of its own.
#[test]
fn a_thousand_connections_leave_nothing_behind() {
    alone("messages::a_thousand_connections_leave_nothing_behind", || {
        let (memory, event) = (memfd(SIZE), event());
        let before = open_files();
        let mut settled = 0;
        for round in 0..1000 {
            let mut victim = Victim::ready(&memory);
            victim.start_ring(&event, &event);
            assert!(victim.frontend.is_heard());
            victim.end();
            if round == 200 {
                settled = resident_memory();
            }
        }
        assert_eq!(open_files(), before);
        let after = resident_memory();
        assert!(after < settled + 0x80_0000, "{settled:#x} bytes became {after:#x}");
    });
}
