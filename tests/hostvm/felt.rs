// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest feels of its IOMMU, beside what it would feel of QEMU's own: counts, which are checked, and times, which are shown
//! (`make felt`). There both guests are in one host, each with a disk of its own, and take turns: times of an emulated machine say
//! something only beside what was measured a second before and after, and a host that starts more than two guests has been seen to
//! stall.

use serde_json::{Value, json};

use crate::calls::{Calls, count_calls};
use crate::contender::{Guest, Invalidation, Iommu};
use crate::pci::{NVME, boot_word, dma_faults, find, find_all};

/// How often each guest has its turn.
const ROUNDS: usize = 9;

/// What a guest is told to do, many times.
#[derive(Clone, Copy, Debug)]
enum Work {
    /// So many reads of 4 KiB, one after the other.
    Reads(u32),
    /// A page that is mapped and unmapped over and over for so many seconds, by the kernel's benchmark.
    Pairs(u32),
}

/// What one operation took.
#[derive(Clone, Copy, Debug)]
struct Cost {
    nanoseconds: f64,
    mmio_exits: f64,
    wake_ups: Option<f64>,
}

/// What one operation had the host's IOMMU asked for by the process whose virtio-iommu the guest has.
#[derive(Clone, Copy, Debug)]
struct HostCalls {
    maps: f64,
    unmaps: f64,
}

/// Has a guest work; how many operations that was, and how many nanoseconds each took.
fn run(guest: &mut Guest, work: Work) -> (f64, f64) {
    let said = match work {
        Work::Reads(count) => guest.run(&format!("reads {count}")),
        Work::Pairs(seconds) => guest.run(&format!("maps {seconds}")),
    };
    let numbers: Vec<f64> = said.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
    match (work, &numbers[..]) {
        (Work::Reads(_), [count, nanoseconds]) => (*count, nanoseconds / count),
        // The kernel does not say how many there were, but its loop does next to nothing else.
        (Work::Pairs(_), [seconds, map, unmap]) => (seconds * 1e9 / (map + unmap), map + unmap),
        _ => panic!("the guest says `{said}`"),
    }
}

/// What work takes, with nothing in its way.
fn cost(guest: &mut Guest, work: Work) -> Cost {
    let (exits, wake_ups) = (guest.mmio_exits(), guest.wake_ups());
    let (operations, nanoseconds) = run(guest, work);
    let each = |count| number(count) / operations;
    Cost {
        nanoseconds,
        mmio_exits: each(guest.mmio_exits() - exits),
        wake_ups: wake_ups.zip(guest.wake_ups()).map(|(before, after)| each(after - before)),
    }
}

/// What work has the host's IOMMU asked for. Being counted slows it down: nothing is timed meanwhile.
fn host_calls(guest: &mut Guest, work: Work) -> HostCalls {
    let ((said, _), calls) = count_calls(guest.device(), || run(guest, work));
    let operations = match work {
        Work::Reads(_) => said,
        // Each maps a page: here it is known how many there were.
        Work::Pairs(_) => number(calls.maps()),
    };
    println!("{work:?}: {operations} operations, {said} by what the guest says; {calls:?}");
    let each = |count: fn(&Calls) -> u64| number(count(&calls)) / operations;
    HostCalls { maps: each(Calls::maps), unmaps: each(Calls::unmaps) }
}

/// A count, to be divided.
fn number(count: u64) -> f64 {
    u32::try_from(count).unwrap().into()
}

/// What is not the work's doing, for one operation: the thread may be woken by something else once in a while. What is counted here
/// comes in whole numbers for each operation.
const NOISE: f64 = 0.5;

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_read_takes_two_wake_ups_and_two_calls_of_the_host_and_no_exit_to_the_vmm() {
    // With polling, how often it is woken depends on how fast the guest is.
    let options = ["--poll-us=0".to_owned()];
    let mut guest = Guest::start("daemon", find(NVME), Iommu::Daemon(&options), Invalidation::Strict);
    assert_eq!(guest.wait_until_up(), "DMA");
    assert!(guest.mmio_exits() > 0, "a guest that boots leaves for its VMM");
    let reads = Work::Reads(64);
    let cost = cost(&mut guest, reads);
    let calls = host_calls(&mut guest, reads);
    println!("{cost:?}, {calls:?}");
    assert!(calls.maps > 1.0 - NOISE && calls.unmaps > 1.0 - NOISE, "each read is mapped, and unmapped at once");
    let limits = [
        ("exits to the VMM", cost.mmio_exits, 0.0),
        ("wake-ups: one for each request", cost.wake_ups.unwrap(), 2.0),
        ("MAPs of the host", calls.maps, 1.0),
        ("UNMAPs of the host", calls.unmaps, 1.0),
    ];
    let exceeded: Vec<_> = limits.into_iter().filter(|(_, count, most)| *count > most + NOISE).collect();
    assert!(exceeded.is_empty(), "for each read (what, how often, at most): {exceeded:?}");
    guest.end();
    assert_eq!(dma_faults(), Vec::<String>::new());
}

/// Two guests: one behind the daemon, which has these options, and one behind QEMU's own device.
fn start_both(options: &[String], invalidation: Invalidation) -> [Guest; 2] {
    let disks = find_all(NVME);
    let mut guests = [
        Guest::start("daemon", disks[0], Iommu::Daemon(options), invalidation),
        Guest::start("qemu", disks[1], Iommu::Qemu, invalidation),
    ];
    let expected = if invalidation == Invalidation::Strict { "DMA" } else { "DMA-FQ" };
    for guest in &mut guests {
        assert_eq!(guest.wait_until_up(), expected);
    }
    guests
}

/// Prints a line of JSON for each kind of work, which `tests/hostvm/felt` collects.
#[test]
#[ignore = "make felt"]
fn measure() {
    let (invalidation, said) = match boot_word("felt.invalidation").as_deref() {
        Some("strict") => (Invalidation::Strict, "strict"),
        Some("lazy") => (Invalidation::Lazy, "lazy"),
        other => panic!("felt.invalidation is {other:?}"),
    };
    let options = boot_word("felt.options").unwrap_or_default();
    let list: Vec<String> = options.split_terminator(',').map(ToOwned::to_owned).collect();
    let mut guests = start_both(&list, invalidation);
    for (operation, work) in [("read of 4 KiB", Work::Reads(64)), ("map + unmap", Work::Pairs(1))] {
        if matches!(work, Work::Pairs(_)) {
            for guest in &mut guests {
                assert_eq!(guest.run("bind"), "bound to dma_map_benchmark");
            }
        }
        for guest in &mut guests {
            run(guest, work);
        }
        let rounds: Vec<[Cost; 2]> = (0..ROUNDS).map(|_| guests.each_mut().map(|guest| cost(guest, work))).collect();
        let calls = guests.each_mut().map(|guest| host_calls(guest, work));
        let mut figures = summary(&rounds, calls);
        figures["options"] = if options.is_empty() { "default" } else { &options }.into();
        figures["invalidation"] = said.into();
        figures["operation"] = operation.into();
        println!("felt| {figures}");
        println!("felt-row| {}", row(&figures));
    }
    for guest in &mut guests {
        guest.end();
    }
    assert_eq!(dma_faults(), Vec::<String>::new());
}

/// The middle of an odd number of figures, the least, and the greatest.
fn spread(figures: impl Iterator<Item = f64>) -> Value {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    json!({ "median": figures[figures.len() / 2], "least": figures[0], "greatest": figures[figures.len() - 1] })
}

/// What was measured of both guests.
fn summary(rounds: &[[Cost; 2]], calls: [HostCalls; 2]) -> Value {
    let of_guest = |guest: usize| {
        let costs = || rounds.iter().map(move |round| round[guest]);
        let wake_ups: Option<Vec<f64>> = costs().map(|cost| cost.wake_ups).collect();
        json!({
            "ns": spread(costs().map(|cost| cost.nanoseconds)),
            "mmio_exits": spread(costs().map(|cost| cost.mmio_exits)),
            "wake_ups": wake_ups.map(|wake_ups| spread(wake_ups.into_iter())),
            "host_maps": calls[guest].maps,
            "host_unmaps": calls[guest].unmaps,
        })
    };
    let ratios = rounds.iter().map(|[ours, qemu]| ours.nanoseconds / qemu.nanoseconds);
    json!({ "time_to_qemu": spread(ratios), "ours": of_guest(0), "qemu": of_guest(1) })
}

/// These figures as a row of the table.
fn row(figures: &Value) -> String {
    let text = |key: &str| figures[key].as_str().unwrap().to_owned();
    let figure = |value: &Value| value.as_f64().unwrap();
    let both = |show: &dyn Fn(&Value) -> String| format!("{} / {}", show(&figures["ours"]), show(&figures["qemu"]));
    let ratio = &figures["time_to_qemu"];
    let columns = [
        text("options"),
        text("invalidation"),
        text("operation"),
        format!("{:.2} ({:.2}-{:.2})", figure(&ratio["median"]), figure(&ratio["least"]), figure(&ratio["greatest"])),
        both(&|guest| format!("{:.2} ms", figure(&guest["ns"]["median"]) / 1e6)),
        both(&|guest| format!("{:.2}", figure(&guest["mmio_exits"]["median"]))),
        format!("{:.2}", figure(&figures["ours"]["wake_ups"]["median"])),
        both(&|guest| format!("{:.2} + {:.2}", figure(&guest["host_maps"]), figure(&guest["host_unmaps"]))),
    ];
    format!("| {} |", columns.join(" | "))
}
