// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that want more than there is. Memory is measured, each test in a process of its own; time is not, but how much of a
//! processor's time a full table takes of a request, beside an empty one.

use rustix::time::{ClockId, clock_gettime};
use virtio_iommu::device::Settings;
use virtio_iommu::host::fake::Flavour;

use crate::common::alone::{alone, resident_memory};
use crate::common::{attach, detach, map, unmap};
use crate::machine::{INVAL, LONE, Machine, NOENT, NOMEM, OK, READ, settings, unmap_to};

/// The default of [`Settings::max_mappings`].
const MAPPINGS: u64 = 1 << 20;

/// How many requests are timed.
const SOME: usize = 512;

/// Where a page is mapped: none beside another, and all of them above the doorbell.
fn iova(page: u64) -> u64 {
    (1 << 32) + (page << 13)
}

/// How long this thread had a processor for, in nanoseconds.
fn processor_time(act: impl FnOnce()) -> i64 {
    let now = || {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        now.tv_sec * 1_000_000_000 + now.tv_nsec
    };
    let start = now();
    act();
    now() - start
}

impl Machine {
    /// Sends a request without a ring; its status.
    fn handle(&mut self, bytes: &[u8]) -> u8 {
        let mut reply = [0xaa; 4];
        assert_eq!(self.device.handle(bytes, &mut reply), 4);
        assert_eq!(reply[1..], [0; 3]);
        reply[0]
    }

    /// Maps so many pages.
    fn fill(&mut self, count: u64) {
        for page in 0..count {
            assert_eq!(self.handle(&map(1, iova(page), 0x1000, 0, READ)), OK, "mapping {page}");
        }
    }
}

/// All numbers below 2^20, each far from the one before.
fn scattered() -> impl Iterator<Item = u64> {
    (0..MAPPINGS as u32).map(|index| u64::from(index.reverse_bits() >> 12))
}

#[test]
fn the_largest_table_takes_no_more_and_no_request_walks_through_it() {
    alone("limits::the_largest_table_takes_no_more_and_no_request_walks_through_it", || {
        let mut machine = Machine::new();
        assert_eq!(machine.handle(&attach(1, LONE.0, 0)), OK);
        // UNMAPs of what is not mapped, and of single mappings, all over the table.
        let unmap_scattered = |machine: &mut Machine, count: u64, offset: u64| {
            let pages: Vec<u64> = scattered().filter(|page| *page < count).take(SOME).collect();
            processor_time(|| {
                for page in &pages {
                    assert_eq!(machine.handle(&unmap(1, iova(*page) + offset, 0x1000)), OK);
                }
            })
        };
        machine.fill(1 << 12);
        let (nothing_of_few, one_of_few) =
            (unmap_scattered(&mut machine, 1 << 12, 0x1000), unmap_scattered(&mut machine, 1 << 12, 0));
        assert_eq!(machine.handle(&unmap_to(1, 0, u64::MAX)), OK);

        machine.fill(MAPPINGS);
        for _ in 0..3 {
            assert_eq!(machine.handle(&map(1, iova(MAPPINGS), 0x1000, 0, READ)), NOMEM, "one more");
        }
        assert_eq!(machine.reads(LONE, iova(MAPPINGS)), None);
        let calls = machine.host.calls();
        let nothing_of_many = unmap_scattered(&mut machine, MAPPINGS, 0x1000);
        assert_eq!(machine.host.calls(), calls, "there is nothing for the host to do");
        let one_of_many = unmap_scattered(&mut machine, MAPPINGS, 0);
        assert_eq!(machine.host.calls() - calls, SOME as u64);
        // One that walks takes 256 times as long.
        assert!(nothing_of_many < nothing_of_few * 32, "{nothing_of_many} ns rather than {nothing_of_few}");
        assert!(one_of_many < one_of_few * 32, "{one_of_many} ns rather than {one_of_few}");

        let calls = machine.host.calls();
        assert_eq!(machine.handle(&unmap_to(1, 0, u64::MAX)), OK);
        assert_eq!(machine.host.calls() - calls, 1, "all of them in one request, and one call");
        assert_eq!(machine.host.mappings(LONE), []);
        assert_eq!(machine.handle(&unmap_to(1, 0, u64::MAX)), OK, "there is nothing any more");
        assert_eq!(machine.host.calls() - calls, 1);
        assert_eq!(machine.request(&map(1, iova(MAPPINGS), 0x1000, 0, READ)), OK, "there is room again");
    });
}

#[test]
fn a_million_endpoints_that_there_are_not_leave_no_trace() {
    alone("limits::a_million_endpoints_that_there_are_not_leave_no_trace", || {
        let mut machine = Machine::new();
        assert_eq!(machine.handle(&attach(1, LONE.0, 0)), OK);
        let (before, calls) = (machine.view(), machine.host.calls());
        let at_first = resident_memory();
        for number in 0..1u32 << 20 {
            // All over the numbers that there are, and none of those of endpoints; every other for bypass.
            let id = (number << 12) | 0xfff;
            assert_eq!(machine.handle(&attach(id, id, number & 1)), NOENT);
            if number % 16 == 0 {
                assert_eq!(machine.handle(&detach(1, id)), NOENT);
                assert_eq!(machine.handle(&map(id, 0x1000, 0x1000, 0, READ)), NOENT);
                assert_eq!(machine.handle(&detach(id, LONE.0)), INVAL);
            }
        }
        assert!(resident_memory() < at_first + (2 << 20), "{} bytes more", resident_memory() - at_first);
        assert_eq!((machine.view(), machine.host.calls()), (before, calls));
    });
}

#[test]
fn endpoints_that_come_and_go_between_domains_leave_no_trace() {
    alone("limits::endpoints_that_come_and_go_between_domains_leave_no_trace", || {
        for flavour in [Flavour::Iommufd, Flavour::Type1] {
            let mut machine = Machine::with(flavour, Settings { max_domains: 2, ..settings() });
            let mut at_first = None;
            for domain in 0..20_000u32 {
                // From one domain to the next, each of which is new, and gone when it is left.
                assert_eq!(machine.handle(&attach(domain, LONE.0, 0)), OK, "domain {domain}");
                assert_eq!(machine.handle(&map(domain, 0x1000, 0x1000, 0, READ)), OK);
                if domain % 5 == 0 {
                    assert_eq!(machine.handle(&detach(domain, LONE.0)), OK);
                }
                if domain % 1000 == 1 {
                    assert_eq!((machine.device.save().domains.len(), machine.host.table_count()), (1, 1));
                    let now = resident_memory();
                    assert!(now < *at_first.get_or_insert(now) + (2 << 20), "{flavour:?}: memory grows");
                }
            }
        }
    });
}
