// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What holds the devices when the daemon is gone.
//!
//! The VMM holds the same iommufd, so the guest's mappings would outlive a daemon that is killed, and nobody would follow the
//! guest any more. So the same program runs once more, with nothing but the devices' files and a pipe from the daemon: when the
//! pipe is closed without a word, it detaches the devices, and their DMA is refused.

use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};

use log::warn;

use crate::fd::{Adopted, FileKind, adopt, close_inherited};
use crate::host::iommufd::VfioDevice;

/// The argument that makes the program a watcher, before the numbers of files.
const ARGUMENT: &str = "--watch-devices";
/// What the daemon says when it has blocked every endpoint itself. Anything else is the place of a device that is gone.
const ALL_IS_WELL: u8 = u8::MAX;

/// A watcher that runs.
#[derive(Debug)]
pub(super) struct Watcher {
    pipe: ChildStdin,
    child: Child,
}

impl Watcher {
    /// Starts a watcher for these inherited files. To be called before they are adopted.
    ///
    /// # Errors
    ///
    /// The program cannot be started once more.
    pub fn start(devices: &[RawFd]) -> io::Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg(ARGUMENT)
            .args(devices.iter().map(ToString::to_string))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let pipe = child.stdin.take().ok_or_else(|| io::Error::other("no pipe"))?;
        Ok(Self { pipe, child })
    }

    /// Has the watcher close the file of a device that is gone, by its place in the list that it was started with.
    pub fn release(&mut self, place: usize) {
        let sent = u8::try_from(place).map_err(io::Error::other).and_then(|place| self.pipe.write_all(&[place]));
        if let Err(error) = sent {
            warn!("the watcher does not listen: {error}");
        }
    }
}

impl Drop for Watcher {
    /// Whatever was to be blocked is.
    fn drop(&mut self) {
        if self.pipe.write_all(&[ALL_IS_WELL]).is_ok() {
            // It ends at once.
            let _ = self.child.wait();
        }
    }
}

/// Whether this process was started to be a watcher; if so, does that until the daemon is gone.
pub fn watch_if_asked() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next()? != ARGUMENT {
        return None;
    }
    let mut devices: Vec<Option<VfioDevice>> = arguments.map(|number| device(number.parse().ok()?)).collect();
    close_inherited();
    // What ends the daemon must not end this process.
    let _ = rustix::process::setsid();
    let mut stdin = io::stdin().lock();
    let mut word = [0];
    loop {
        match stdin.read(&mut word) {
            Ok(1) if word == [ALL_IS_WELL] => return Some(ExitCode::SUCCESS),
            Ok(1) => {
                if let Some(device) = devices.get_mut(usize::from(word[0])) {
                    *device = None;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Ok(_) | Err(_) => break,
        }
    }
    for device in devices.iter().flatten() {
        device.detach();
    }
    eprintln!("vhost-device-iommu: the daemon ended without a word: the devices were detached, their DMA is refused");
    Some(ExitCode::SUCCESS)
}

/// A device whose file cannot be had is left out: the daemon says what is wrong with it.
fn device(number: RawFd) -> Option<VfioDevice> {
    let Adopted { file, node, .. } = adopt(number, FileKind::VfioDevice).ok()?;
    VfioDevice::new(file, node).ok()
}
