// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's log, on the standard error.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::panic::PanicHookInfo;

use clap::ValueEnum;
use env_logger::fmt::Formatter;
use env_logger::{Builder, Target};
use log::{Level, LevelFilter, Record};
use serde::Serialize;

use super::log_writer::LogOutput;
use crate::standard_error::write_line_now;

/// How lines of the log look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Time, level, module and message.
    #[default]
    Text,
    /// A JSON object for each line: `time` (RFC 3339, UTC), `level`, `target`, `message`.
    Json,
    /// The message after its priority, as `sd-daemon(3)` has it.
    Journal,
}

/// Starts the log. The level is set by `log::set_max_level` alone, and can be changed by it later; `RUST_LOG` narrows what modules may
/// log. What the virtqueues' library logs is the guest's doing, line by line, and is left out.
///
/// A panic, which ends the process, is one line past all that: it waits for nobody who does not read.
///
/// To be called once; later calls change nothing.
pub fn start_log(level: Option<LevelFilter>, format: LogFormat) {
    let directives = std::env::var("RUST_LOG").ok().filter(|directives| !directives.trim().is_empty());
    let mut builder = Builder::new();
    match &directives {
        Some(directives) => builder.parse_filters(directives),
        None => builder.filter_level(LevelFilter::Trace),
    };
    builder.filter_module("virtio_queue", LevelFilter::Off);
    builder.format(match format {
        LogFormat::Text => text,
        LogFormat::Json => json,
        LogFormat::Journal => journal,
    });
    builder.target(Target::Pipe(Box::new(LogOutput)));
    let logger = builder.build();
    let by_environment = if directives.is_some() { logger.filter() } else { LevelFilter::Info };
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level.unwrap_or(by_environment));
        std::panic::set_hook(Box::new(say_panic));
    }
}

fn say_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("without a name");
    write_line_now(&format!("vhost-device-iommu: thread {name} {}", one_line(&panic.to_string())));
}

fn text(to: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let message = record.args().to_string();
    writeln!(to, "[{} {:<5} {}] {}", to.timestamp(), record.level(), record.target(), one_line(&message))
}

fn journal(to: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let priority = match record.level() {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    writeln!(to, "<{priority}>{}", one_line(&record.args().to_string()))
}

fn json(to: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    #[derive(Serialize)]
    struct Line<'a> {
        time: String,
        level: &'a str,
        target: &'a str,
        message: String,
    }
    let line = Line {
        time: to.timestamp_micros().to_string(),
        level: record.level().as_str(),
        target: record.target(),
        message: record.args().to_string(),
    };
    let line = serde_json::to_string(&line)?;
    writeln!(to, "{line}")
}

/// A message with its control characters escaped: names of files can have any, and must not make lines of their own.
fn one_line(message: &str) -> Cow<'_, str> {
    if !message.contains(char::is_control) {
        return message.into();
    }
    let mut line = String::with_capacity(message.len());
    for character in message.chars() {
        if character.is_control() {
            // A String takes everything.
            let _ = write!(line, "{}", character.escape_default());
        } else {
            line.push(character);
        }
    }
    line.into()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    const ASKED: &str = "VIRTIO_IOMMU_TEST_PANICS";

    #[test]
    fn panics_if_asked() {
        if std::env::var_os(ASKED).is_some() {
            start_log(None, LogFormat::Text);
            panic!("two\nlines");
        }
    }

    #[test]
    fn a_panic_is_one_line_and_waits_for_nobody_who_does_not_read() {
        for is_full in [false, true] {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            if is_full {
                rustix::io::ioctl_fionbio(&writer, true).unwrap();
                while rustix::io::write(&writer, b".").is_ok() {}
                rustix::io::ioctl_fionbio(&writer, false).unwrap();
            }
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "vhost_user::logging::tests::panics_if_asked", "--nocapture"]).env(ASKED, "");
            let mut child =
                command.stdout(Stdio::null()).stderr(writer.as_fd().try_clone_to_owned().unwrap()).spawn().unwrap();
            drop((command, writer));
            let deadline = Instant::now() + Duration::from_secs(20);
            while child.try_wait().unwrap().is_none() {
                if Instant::now() > deadline {
                    child.kill().unwrap();
                    panic!("it does not end");
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(child.wait().unwrap().code(), Some(101));
            let mut said = String::new();
            File::from(reader).read_to_string(&mut said).unwrap();
            if !is_full {
                assert!(said.starts_with("vhost-device-iommu: thread vhost_user::logging::tests"), "{said}");
                assert!(said.contains(r":\ntwo\nlines") && said.lines().count() == 1, "{said}");
            }
        }
    }

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(one_line("a range: 0x0-0xfff \u{b5}s"), "a range: 0x0-0xfff \u{b5}s");
        assert_eq!(one_line("no such file: a\n<0>b\x1b[2J\0"), "no such file: a\\n<0>b\\u{1b}[2J\\u{0}");
    }
}
