// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What holds the devices when the daemon is gone.
//!
//! The VMM holds the same iommufd, so the guest's mappings would outlive a daemon that is killed, and nobody would follow the
//! guest any more. So the same program runs once more, with nothing but the devices' files and a socket to the daemon: when the
//! socket is closed without a word, it detaches the devices, and their DMA is refused.
//!
//! It says that it is confined before it listens. The daemon sends single bytes, and waits for the answer to those that have one.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use log::warn;

use crate::causes::with_causes;
use crate::control::passing::{receive, send};
use crate::control::{Keeper, KeeperError, MOST_ENDPOINTS};
use crate::fd::{Adopted, DeviceNumbers, FileKind, adopt, close_inherited};
use crate::host::iommufd::VfioDevice;
use crate::sandbox::{Sandbox, SeccompMode};
use crate::standard_error::write_line_now;

/// The argument that makes the program a watcher, before how it is to be confined and the numbers of files.
const ARGUMENT: &str = "--watch-devices";
/// What the daemon says when it has blocked every endpoint itself.
const ALL_IS_WELL: u8 = u8::MAX;
/// What the daemon says with the file of a device that was added; the answer is its place. Any lower byte is the place of a device
/// whose file is to be closed, and is answered by itself.
const HOLD: u8 = u8::MAX - 1;
/// The answer to a file that cannot be held.
const REFUSED: u8 = u8::MAX;
/// What the watcher says when it has given up what it has no use for.
const CONFINED: u8 = 1;
/// How it is not to be confined.
const NOT_AT_ALL: &str = "unconfined";
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A watcher that runs.
#[derive(Debug)]
pub(super) struct Watcher {
    socket: UnixStream,
    child: Child,
    /// What it was asked and has not answered yet, the oldest first.
    unanswered: VecDeque<Question>,
    /// How long an answer may take, and its end.
    patience: Duration,
}

/// What it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    Hold,
    Release,
}

impl Watcher {
    /// Starts a watcher for these inherited files, whose places are those in this list. To be called before they are adopted. It
    /// confines itself, if a way is given; [`is_confined`](Self::is_confined) waits for that.
    ///
    /// # Errors
    ///
    /// The program cannot be started once more.
    pub fn start(devices: &[RawFd], confined: Option<SeccompMode>) -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let child = Command::new("/proc/self/exe")
            .arg(ARGUMENT)
            .arg(name_of(confined))
            .args(devices.iter().map(ToString::to_string))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { socket, child, unanswered: VecDeque::new(), patience: PATIENCE })
    }

    /// Waits until it is confined, and whether it is; why it is not, it says on the standard error. To be asked once, before all else.
    pub fn is_confined(&mut self) -> bool {
        let mut word = [0];
        self.socket.read_exact(&mut word).is_ok() && word == [CONFINED]
    }

    /// A socket whose other end is closed when the watcher ends.
    ///
    /// # Errors
    ///
    /// No more files can be had.
    pub fn end(&self) -> io::Result<UnixStream> {
        self.socket.try_clone()
    }

    /// Says something, and waits for the answer.
    fn ask(&mut self, question: Question, word: u8, files: &[BorrowedFd<'_>]) -> Result<u8, KeeperError> {
        while let Some(question) = self.unanswered.front().copied() {
            // A file that came to be held too late is no endpoint's.
            match (question, self.answer()?) {
                (Question::Hold, place) if place != REFUSED => self.say(Question::Release, place, &[])?,
                _ => (),
            }
        }
        self.say(question, word, files)?;
        self.answer()
    }

    fn say(&mut self, question: Question, word: u8, files: &[BorrowedFd<'_>]) -> Result<(), KeeperError> {
        send(&self.socket, &[word], files).map_err(|error| self.failure(error))?;
        self.unanswered.push_back(question);
        Ok(())
    }

    /// Waits for the answer to the oldest question that has none.
    fn answer(&mut self) -> Result<u8, KeeperError> {
        let mut answer = [0];
        self.socket.read_exact(&mut answer).map_err(|error| self.failure(error))?;
        self.unanswered.pop_front();
        Ok(answer[0])
    }

    fn failure(&mut self, error: io::Error) -> KeeperError {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof, WouldBlock};
        match error.kind() {
            // Its socket is closed before the devices' files are.
            BrokenPipe | ConnectionReset | UnexpectedEof if self.ends() => KeeperError::Gone,
            BrokenPipe | ConnectionReset | UnexpectedEof | WouldBlock => KeeperError::Late,
            _ => KeeperError::Io(error),
        }
    }

    /// Whether it has ended, soon at least: then all its files are closed.
    fn ends(&mut self) -> bool {
        let deadline = Instant::now() + self.patience;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Ok(status) => return status.is_some(),
                Err(_) => return false,
            }
        }
    }
}

impl Keeper for Watcher {
    fn hold(&mut self, file: BorrowedFd<'_>) -> Result<u8, KeeperError> {
        match self.ask(Question::Hold, HOLD, &[file])? {
            REFUSED => Err(KeeperError::Refused),
            place => Ok(place),
        }
    }

    fn release(&mut self, place: u8) -> Result<(), KeeperError> {
        match self.ask(Question::Release, place, &[]) {
            Ok(_) | Err(KeeperError::Gone) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Watcher {
    /// Whatever was to be blocked is.
    fn drop(&mut self) {
        match self.socket.write_all(&[ALL_IS_WELL]) {
            Ok(()) if self.ends() => (),
            Ok(()) => warn!(
                "the watcher has not closed the devices' files yet, as while the host resets a device: it ends then"
            ),
            Err(error) => warn!("the watcher does not listen: {error}"),
        }
    }
}

/// Whether this process was started to be a watcher; if so, does that until the daemon is gone.
pub fn watch_if_asked() -> Option<ExitCode> {
    // Those of a daemon may be paths, which can be anything.
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != ARGUMENT {
        return None;
    }
    let confined = arguments.next()?.into_string().ok()?;
    let number = |number: OsString| number.to_str()?.parse().ok();
    let devices: Vec<Option<VfioDevice>> = arguments.map(|text| adopted(number(text)?)).collect();
    close_inherited();
    // What ends the daemon must not end this process.
    let _ = rustix::process::setsid();
    let numbers = DeviceNumbers::open().ok();
    if let Err(error) = confine(&confined) {
        write_line_now(&format!("vhost-device-iommu: the watcher of devices cannot be confined: {error}"));
        return Some(ExitCode::from(5));
    }
    let left = match send(io::stdin(), &[CONFINED], &[]) {
        Ok(()) => watch(io::stdin(), devices, |file| passed(file, numbers.as_ref()?)),
        Err(_) => devices,
    };
    for device in left.iter().flatten() {
        device.detach();
    }
    if left.iter().any(Option::is_some) {
        write_line_now(
            "vhost-device-iommu: the daemon ended without a word: the devices were detached, their DMA is refused",
        );
    }
    Some(ExitCode::SUCCESS)
}

fn name_of(confined: Option<SeccompMode>) -> String {
    let value = confined.as_ref().and_then(SeccompMode::to_possible_value);
    value.map_or(NOT_AT_ALL.to_owned(), |value| value.get_name().to_owned())
}

fn confine(name: &str) -> Result<(), String> {
    if name == NOT_AT_ALL {
        return Ok(());
    }
    let mode = SeccompMode::from_str(name, false)?;
    Sandbox::enter_watcher(mode).map_err(|error| with_causes(&error))
}

/// Holds devices by their places as the daemon says, until it is gone. What is to be detached then: nothing if it said that all is
/// well.
fn watch<D>(socket: impl AsFd, mut devices: Vec<Option<D>>, open: impl Fn(OwnedFd) -> Option<D>) -> Vec<Option<D>> {
    let mut word = [0];
    loop {
        let mut files = Vec::new();
        match receive(&socket, &mut word, &mut files) {
            Ok(received) if received.length == 1 => (),
            Ok(_) | Err(_) => return devices,
        }
        let answer = match word[0] {
            ALL_IS_WELL => return Vec::new(),
            HOLD => files.pop().and_then(&open).and_then(|device| hold(&mut devices, device)).unwrap_or(REFUSED),
            place => {
                if let Some(device) = devices.get_mut(usize::from(place)) {
                    *device = None;
                }
                place
            }
        };
        if send(&socket, &[answer], &[]).is_err() {
            return devices;
        }
    }
}

/// Puts a device to the first place that is free; `None` if there is none.
fn hold<D>(devices: &mut Vec<Option<D>>, device: D) -> Option<u8> {
    let free = devices.iter().position(Option::is_none).unwrap_or(devices.len());
    let place = u8::try_from(free).ok().filter(|_| free < MOST_ENDPOINTS)?;
    match devices.get_mut(free) {
        Some(slot) => *slot = Some(device),
        None => devices.push(Some(device)),
    }
    Some(place)
}

/// A device whose file cannot be had is left out: the daemon says what is wrong with it.
fn adopted(number: RawFd) -> Option<VfioDevice> {
    let Adopted { file, node, .. } = adopt(number, FileKind::VfioDevice).ok()?;
    VfioDevice::new(file, node).ok()
}

fn passed(file: OwnedFd, numbers: &DeviceNumbers) -> Option<VfioDevice> {
    VfioDevice::of_major(file, numbers.vfio().ok()??, "a device that was added".to_owned()).ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::mpsc;

    use super::*;
    use crate::fd::VfioMajor;

    /// A device that tells when it is closed.
    struct Held(&'static str, mpsc::Sender<&'static str>);

    impl Drop for Held {
        fn drop(&mut self) {
            self.1.send(self.0).unwrap();
        }
    }

    #[test]
    fn devices_come_and_go_and_what_is_left_is_detached() {
        let (closed, is_closed) = mpsc::channel();
        let (socket, theirs) = UnixStream::pair().unwrap();
        let first = vec![Some(Held("first", closed.clone())), None];
        let watching = std::thread::spawn(move || {
            let open = |file: OwnedFd| {
                let is_device = VfioMajor::check(VfioMajor::for_tests(1), &file).is_ok();
                is_device.then(|| Held("added", closed.clone()))
            };
            let left = watch(theirs, first, open);
            left.iter().flatten().map(|held| held.0).collect::<Vec<_>>()
        });
        let child = Command::new("true").spawn().unwrap();
        let mut watcher =
            Watcher { socket: socket.try_clone().unwrap(), child, unanswered: VecDeque::new(), patience: PATIENCE };
        let null = File::open("/dev/null").unwrap();
        let root = File::open("/").unwrap();
        assert_eq!(watcher.hold(null.as_fd()).unwrap(), 1, "the first place that is free");
        assert_eq!(watcher.hold(null.as_fd()).unwrap(), 2);
        assert!(watcher.hold(root.as_fd()).is_err());
        watcher.release(0).unwrap();
        assert_eq!(is_closed.try_recv(), Ok("first"), "it is closed before the answer");
        watcher.release(2).unwrap();
        assert_eq!(is_closed.try_recv(), Ok("added"));
        watcher.release(200).unwrap();
        assert_eq!(watcher.hold(null.as_fd()).unwrap(), 0);
        // The daemon is killed: nothing is said.
        socket.shutdown(std::net::Shutdown::Both).unwrap();
        drop(watcher);
        assert_eq!(watching.join().unwrap(), ["added", "added"]);
    }

    /// A watcher that is played by the test, at the other end of the socket.
    fn played(child: Child) -> (Watcher, UnixStream) {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let patience = Duration::from_millis(100);
        socket.set_read_timeout(Some(patience)).unwrap();
        (Watcher { socket, child, unanswered: VecDeque::new(), patience }, theirs)
    }

    fn hear(theirs: &mut UnixStream) -> u8 {
        let mut word = [0];
        theirs.read_exact(&mut word).unwrap();
        word[0]
    }

    #[test]
    fn an_answer_that_comes_late_is_not_taken_for_anothers() {
        let (mut watcher, mut theirs) = played(Command::new("true").spawn().unwrap());
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(watcher.release(3), Err(KeeperError::Late)));
        assert!(matches!(watcher.hold(null.as_fd()), Err(KeeperError::Late)), "it is not asked while it is late");
        assert_eq!(hear(&mut theirs), 3);
        theirs.write_all(&[3]).unwrap();
        assert!(matches!(watcher.hold(null.as_fd()), Err(KeeperError::Late)));
        assert_eq!(hear(&mut theirs), HOLD);
        // The file that nobody waits for any more is at place 7; that it is let go is said first.
        theirs.write_all(&[7, 7, 5]).unwrap();
        assert_eq!(watcher.hold(null.as_fd()).unwrap(), 5);
        assert_eq!([hear(&mut theirs), hear(&mut theirs)], [7, HOLD]);
        assert!(watcher.unanswered.is_empty());
    }

    #[test]
    fn a_watcher_that_is_gone_holds_nothing_and_takes_nothing() {
        let (mut watcher, theirs) = played(Command::new("true").spawn().unwrap());
        drop(theirs);
        let null = File::open("/dev/null").unwrap();
        watcher.release(3).unwrap();
        assert!(matches!(watcher.hold(null.as_fd()), Err(KeeperError::Gone)));
        assert_eq!(watcher.end().unwrap().read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_watcher_that_does_not_end_holds_nobody_up() {
        let (watcher, mut theirs) =
            played(Command::new("sleep").arg("60").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let pid = rustix::process::Pid::from_child(&watcher.child);
        let (told, dropped) = mpsc::channel();
        std::thread::spawn(move || {
            drop(watcher);
            told.send(()).unwrap();
        });
        assert_eq!(hear(&mut theirs), ALL_IS_WELL);
        dropped.recv_timeout(4 * PATIENCE).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    #[test]
    fn nothing_is_detached_if_all_is_well() {
        let (mut socket, theirs) = UnixStream::pair().unwrap();
        socket.write_all(&[ALL_IS_WELL]).unwrap();
        assert!(watch(theirs, vec![Some(())], |_| None).is_empty());
    }
}
