// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long to watch a queue before waiting for a kick.
//!
//! Linux spins on the used ring, with interrupts off, until a request is answered. What it waits for is mostly the kick: an exit of
//! the virtual CPU, and a thread that is woken. Whoever is looking at the queue already needs neither.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Whether a queue is watched after work, with kicks suppressed, in case more comes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Polling {
    /// It is not.
    #[default]
    Off,
    /// As long as that has been worth it: not at all while little comes, up to 200 µs while much does, and never where there is only
    /// one CPU to watch and to work.
    Auto,
    /// So long, up to [`LONGEST`](Self::LONGEST).
    For(Duration),
}

impl Polling {
    /// The longest time that can be asked for: whatever else the thread has to do waits that long.
    pub const LONGEST: Duration = Duration::from_millis(10);
}

/// A text that does not say how long to watch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not `auto`, or a number of microseconds from 0 to {limit}", limit = Polling::LONGEST.as_micros())]
pub struct ParsePollingError(String);

impl FromStr for Polling {
    type Err = ParsePollingError;

    /// `auto`, or microseconds.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let time = text.parse().ok().filter(|_| digits).map(Duration::from_micros);
        match time {
            Some(Duration::ZERO) => Ok(Self::Off),
            Some(time) if time <= Self::LONGEST => Ok(Self::For(time)),
            _ => Err(ParsePollingError(text.to_owned())),
        }
    }
}

impl fmt::Display for Polling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("0"),
            Self::Auto => f.write_str("auto"),
            Self::For(time) => write!(f, "{}", time.as_micros()),
        }
    }
}

/// How long a queue is watched next. It never looks at a clock: it is told the time.
#[derive(Debug)]
pub struct Watch {
    polling: Polling,
    /// How long the queue is watched after work; zero: not at all.
    length: Duration,
    /// When the thread was woken. It comes back to its other work after a while, however much there is.
    woken: Option<Instant>,
    /// When there was no more work before the thread went to wait.
    idle_since: Option<Instant>,
}

impl Watch {
    /// The longest time that is watched of its own accord, as the kernel's for a halted virtual CPU (Linux, `halt_poll_ns`).
    const MOST: Duration = Duration::from_micros(200);
    /// The shortest: below the time that a kick takes, nothing would be gained.
    const LEAST: Duration = Duration::from_micros(10);
    /// How long a thread stays with the queue once it was woken, in times that it is watched.
    const TURN: u32 = 10;

    /// A queue that was never watched, on a machine with so many CPUs.
    pub fn new(polling: Polling, cpus: usize) -> Self {
        let (polling, length) = match polling {
            Polling::For(time) => (polling, time.min(Polling::LONGEST)),
            Polling::Auto if cpus > 1 => (polling, Duration::ZERO),
            Polling::Auto | Polling::Off => (Polling::Off, Duration::ZERO),
        };
        Self { polling, length, woken: None, idle_since: None }
    }

    /// The thread was woken to look at the queue.
    pub fn woken(&mut self, now: Instant) {
        self.woken = Some(now);
        let Some(idle) = self.idle_since.take().map(|since| now.saturating_duration_since(since)) else { return };
        if self.polling != Polling::Auto {
            return;
        }
        if idle <= Self::MOST {
            // Watching longer would have saved the kick.
            self.length = (self.length * 2).clamp(Self::LEAST, Self::MOST);
        } else {
            self.length = Some(self.length / 2).filter(|length| *length >= Self::LEAST).unwrap_or_default();
        }
    }

    /// Whether the queue is watched at all, after the next work.
    pub const fn is_on(&self) -> bool {
        !self.length.is_zero()
    }

    /// Until when to watch the queue, now that there is no more work; `None`: wait for a kick.
    pub fn until(&mut self, now: Instant) -> Option<Instant> {
        self.idle_since = Some(now);
        let turn_ends = self.woken? + self.length * Self::TURN;
        (self.is_on() && now < turn_ends).then(|| turn_ends.min(now + self.length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(time: u64) -> Duration {
        Duration::from_micros(time)
    }

    /// A thread that is woken each time so long after it found no more work; how long it watches in the end.
    fn woken_after(watch: &mut Watch, now: &mut Instant, gap: Duration, times: usize) -> Duration {
        for _ in 0..times {
            watch.until(*now);
            *now += gap;
            watch.woken(*now);
        }
        watch.until(*now).map_or(Duration::ZERO, |until| until - *now)
    }

    #[test]
    fn it_is_watched_while_much_comes_and_not_at_all_when_little_does() {
        let (mut watch, mut now) = (Watch::new(Polling::Auto, 2), Instant::now());
        watch.woken(now);
        assert_eq!(watch.until(now), None, "nothing is known yet");
        assert_eq!(woken_after(&mut watch, &mut now, us(50), 1), us(10));
        assert_eq!(woken_after(&mut watch, &mut now, us(50), 2), us(40));
        assert_eq!(woken_after(&mut watch, &mut now, us(200), 100), us(200));
        assert_eq!(woken_after(&mut watch, &mut now, us(201), 1), us(100));
        assert_eq!(woken_after(&mut watch, &mut now, us(5000), 3), us(12) + Duration::from_nanos(500));
        assert_eq!(woken_after(&mut watch, &mut now, us(5000), 1), Duration::ZERO);
        assert_eq!(woken_after(&mut watch, &mut now, us(5000), 100), Duration::ZERO);
    }

    #[test]
    fn a_fixed_time_stays_and_none_is_none() {
        let mut now = Instant::now();
        for (polling, cpus, expected) in
            [(Polling::For(us(30)), 1, us(30)), (Polling::Off, 8, Duration::ZERO), (Polling::Auto, 1, Duration::ZERO)]
        {
            let mut watch = Watch::new(polling, cpus);
            for gap in [us(20), us(20), us(100_000), us(100_000)] {
                assert_eq!(woken_after(&mut watch, &mut now, gap, 1), expected, "{polling}");
            }
        }
    }

    #[test]
    fn a_thread_that_was_woken_comes_back_to_its_other_work() {
        let (mut watch, start) = (Watch::new(Polling::For(us(100)), 2), Instant::now());
        assert_eq!(watch.until(start), None, "it was not woken");
        watch.woken(start);
        assert_eq!(watch.until(start + us(900)), Some(start + us(1000)));
        assert_eq!(watch.until(start + us(950)), Some(start + us(1000)));
        assert_eq!(watch.until(start + us(1000)), None);
    }

    #[test]
    fn it_is_read_and_shown() {
        for (text, polling) in [("auto", Polling::Auto), ("0", Polling::Off), ("10000", Polling::For(us(10_000)))] {
            assert_eq!((text.parse(), polling.to_string().as_str()), (Ok(polling), text));
        }
        for text in ["", "10001", "-1", "+5", "5us", "Auto", "99999999999999999999"] {
            let error = text.parse::<Polling>().unwrap_err().to_string();
            assert_eq!(error, format!("`{text}` is not `auto`, or a number of microseconds from 0 to 10000"));
        }
    }
}
