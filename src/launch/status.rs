// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a daemon has and has counted, for people.

use std::fmt::Write;
use std::time::Duration;

use super::show::table;
use crate::control::protocol::{Count, Durations, Endpoint, Stats, Translation};

/// Endpoints, and what was counted and measured.
pub fn show(endpoints: &[Endpoint], stats: &Stats) -> String {
    let mut rows = table(&["endpoint", "host device", "group", "domain", "its DMA goes through"]);
    for endpoint in endpoints {
        let Endpoint { id, host, group, domain, translation, .. } = endpoint;
        let domain = domain.map_or_else(|| "none".to_owned(), |domain| domain.to_string());
        let through = match translation {
            Translation::AsFound => "what the VMM set up",
            Translation::Blocked => "nothing: it is refused",
            Translation::Bypass => "guest memory as it is",
            Translation::Domain => "the domain's mappings",
        };
        rows.add_row([&id.0.to_string(), &host.0.to_string(), &group.to_string(), &domain, through]);
    }
    format!("{rows}\n{}", show_stats(stats))
}

fn show_stats(stats: &Stats) -> String {
    let kinds = [
        ("PROBE", &stats.probe),
        ("ATTACH", &stats.attach),
        ("DETACH", &stats.detach),
        ("MAP", &stats.map),
        ("UNMAP", &stats.unmap),
    ];
    let mut text = format!("domains: {}, mappings: {}\n", stats.domains, stats.mappings);
    let header = ["request", "OK", "other", "waits (half, 99 %)", "own work", "the host's", "other than OK"];
    let mut rows = table(&header);
    for (name, count) in kinds {
        let Count { ok, failed, statuses, times } = count;
        let durations =
            |durations: Option<&Durations>| durations.map_or_else(|| "not measured".to_owned(), show_durations);
        let times = times.as_ref();
        let statuses: Vec<_> = statuses.iter().map(|(status, count)| format!("{count} {status}")).collect();
        rows.add_row([
            name,
            &ok.to_string(),
            &failed.to_string(),
            &durations(times.map(|times| &times.waiting)),
            &durations(times.map(|times| &times.own)),
            &durations(times.map(|times| &times.host)),
            &statuses.join(", "),
        ]);
    }
    // A String takes everything.
    let _ = writeln!(text, "{rows}\n{} buffers were no requests", stats.unreadable);
    let Stats { faults, faults_sent, faults_dropped, groups, groups_blocked, .. } = stats;
    let _ = writeln!(
        text,
        "faults: {faults}, of which the guest took {faults_sent} and {faults_dropped} found no room for it\n\
         host groups: {groups}, of which {groups_blocked} blocked"
    );
    text
}

/// How long half of them and 99 of a hundred are at most.
fn show_durations(durations: &Durations) -> String {
    if durations.count == 0 {
        return String::new();
    }
    let at_most = |percent| durations.percentile(percent).map_or_else(|| "longer".to_owned(), human_duration);
    format!("{}, {}", at_most(50), at_most(99))
}

/// A duration as people read it.
fn human_duration(duration: Duration) -> String {
    format!("{duration:.0?}")
}
