// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What docs/operators.md has an operator type, typed: the blocks that are marked `walk`, in their order.

use std::fs;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use crate::guest::{DISPLAY, KERNEL, MACHINE, image_md5, read_console, wait_for_line};
use crate::pci::{NVME, bind_to_vfio, find_all};

const DOCUMENT: &str = include_str!("../../docs/operators.md");
const DIRECTORY: &str = "/tmp/my-guest";
/// In a group with another one, both of which VFIO has.
const REFUSED: &str = "0000:00:1f.2";
const SIBLING: &str = "0000:00:1f.3";

/// A block of commands.
#[derive(Debug)]
struct Block {
    commands: String,
    /// The exit code that the document says they end with.
    exit: i32,
    /// Whether they go on while those after them are typed.
    is_background: bool,
}

/// The blocks to be typed: ```` ```sh walk ````, with `exit=N` and `background`.
fn blocks() -> Vec<Block> {
    let mut found = Vec::new();
    let mut lines = DOCUMENT.lines();
    while let Some(line) = lines.next() {
        let Some(words) = line.strip_prefix("```sh walk") else { continue };
        let mut block = Block { commands: String::new(), exit: 0, is_background: false };
        for word in words.split_whitespace() {
            if let Some(code) = word.strip_prefix("exit=") {
                block.exit = code.parse().unwrap();
            } else {
                assert_eq!(word, "background", "docs/operators.md: {line}");
                block.is_background = true;
            }
        }
        for command in lines.by_ref().take_while(|line| *line != "```") {
            block.commands.push_str(command);
            block.commands.push('\n');
        }
        found.push(block);
    }
    found
}

/// A shell with the names that the document sets at its top.
fn shell(script: &str) -> Command {
    let [device, second] = find_all(NVME)[..] else { panic!("the host VM has two disks") };
    let mut command = Command::new("sh");
    // With QEMU's own devices, as an operator's command line has them: a display in the first slot.
    command.current_dir("/tmp").args(["-ec", script, "sh", "/vmm/run"]);
    command.args(MACHINE.iter().filter(|word| **word != "-nodefaults")).args(["-nic", "none", "-monitor", "none"]);
    // The guest's kernel has the hot-plug of PCI Express, and not that of ACPI.
    command.args(["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off", "-m", "256"]);
    command.args(DISPLAY).args(KERNEL).args(["-append", "console=ttyS0 quiet panic=-1 guest.plugs=1"]);
    command.env("DEVICE", device.to_string()).env("SECOND", second.to_string());
    command.env("REFUSED", REFUSED).env("DIRECTORY", DIRECTORY).stdin(Stdio::null());
    command
}

fn log() -> String {
    fs::read_to_string(format!("{DIRECTORY}/daemon.log")).unwrap_or_default()
}

/// The guest that the document runs.
struct Guest {
    vmm: Child,
    console: Receiver<String>,
}

impl Guest {
    fn boot(commands: &str) -> Self {
        // What is killed is to be QEMU, not a shell.
        let mut vmm = shell(&format!("exec {commands}")).stdout(Stdio::piped()).spawn().unwrap();
        let console = read_console(vmm.stdout.take().unwrap());
        Self { vmm, console }
    }

    /// Waits for a line of the guest that has this text in it.
    fn wait_for(&self, text: &str) -> String {
        wait_for_line(&self.console, text, log)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

/// Types a block that ends; what it printed.
fn type_in(block: &Block) -> String {
    let Output { status, stdout, stderr } = shell(&block.commands).output().unwrap();
    let said = String::from_utf8_lossy(&stdout).into_owned();
    println!("$ {}{said}{}", block.commands, String::from_utf8_lossy(&stderr));
    assert_eq!(status.code(), Some(block.exit), "docs/operators.md: {}; the daemon says:\n{}", block.commands, log());
    said
}

/// What must be seen when a command of the document was typed: a part of the command, and of what it prints.
const SEEN: [(&str, &str); 11] = [
    ("check \"$DEVICE\"", "/dev/iommu can be opened"),
    ("inspect", "0xfee00000-0xfeefffff"),
    ("plan --facts", "input range: "),
    ("status", "the domain's mappings"),
    ("told", "0xfee00000-0xfeefffff"),
    ("faults", ""),
    ("add \"$SECOND\"", ""),
    ("remove", ""),
    ("check \"$REFUSED\"", "-> assign 0000:00:1f.3 too, or unbind it"),
    ("memlock", "locked in all"),
    ("--print", "exec 8<>/dev/iommu"),
];

#[test]
#[ignore = "runs in the host VM: make test"]
fn operators_are_told_what_works() {
    for device in [REFUSED, SIBLING] {
        bind_to_vfio(device.parse().unwrap());
    }
    let mut guest = None;
    let mut missing: Vec<_> = SEEN.iter().collect();
    for block in blocks() {
        if block.is_background {
            let started = Guest::boot(&block.commands);
            assert!(started.wait_for(" md5 ").ends_with(&image_md5()));
            started.wait_for("waits for a disk");
            guest = Some(started);
            continue;
        }
        let said = type_in(&block);
        for (command, shown) in SEEN.iter().filter(|(command, _)| block.commands.contains(command)) {
            assert!(said.contains(shown), "`{shown}` is not in what this says: {}", block.commands);
            missing.retain(|(seen, _)| seen != command);
        }
        let running = guest.as_ref();
        if block.commands.contains("viommuctl add") {
            assert!(running.unwrap().wait_for("plugged md5").ends_with(&image_md5()));
        } else if block.commands.contains("viommuctl remove") {
            running.unwrap().wait_for("guest: unplugged 0000:01:00.0");
            running.unwrap().wait_for("guest: done");
        }
    }
    assert!(missing.is_empty(), "docs/operators.md does not have typed: {missing:?}");
    drop(guest);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !log().contains("every endpoint is blocked;") {
        assert!(Instant::now() < deadline, "the daemon ends with QEMU: {}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
}
