// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MAP and UNMAP.

use super::*;

fn attached() -> Machine {
    let mut machine = Machine::new(Flavour::Iommufd);
    machine.attach(1, LONE);
    machine
}

#[test]
fn permissions_are_kept() {
    let mut machine = attached();
    machine.map(1, "1000-1fff", 0, READ);
    machine.map(1, "2000-2fff", 0, WRITE);
    machine.map(1, "3000-3fff", 0, READ | WRITE);
    let calls = machine.host.calls();
    assert_eq!(machine.map(1, "4000-4fff", 0, 0), OK);
    assert_eq!(machine.host.calls(), calls, "a mapping that allows nothing stays in the table");
    let allowed = |iova| {
        let host = &machine.host;
        [Access::READ, Access::WRITE].map(|access| host.dma(LONE, iova, access).is_some())
    };
    assert_eq!(allowed(0x1000), [true, false]);
    assert_eq!(allowed(0x2000), [false, true]);
    assert_eq!(allowed(0x3000), [true, true]);
    assert_eq!(allowed(0x4000), [false, false]);
    machine.check_invariants();
    assert_eq!(machine.map(1, "4000-4fff", 0, READ), INVAL, "its addresses are taken");
    assert_eq!(machine.unmap(1, "0-ffff"), OK);
}

#[test]
fn misaligned_map_should_be_range() {
    let mut machine = attached();
    for (iova, physical) in
        [("1001-2000", 0), ("1000-1ffe", 0), ("1000-2000", 0), ("1000-1fff", 1), ("1000-1fff", 0x800)]
    {
        assert_eq!(machine.map(1, iova, physical, READ), RANGE, "{iova} {physical:#x}");
    }
}

#[test]
fn map_outside_input_range_is_range() {
    let mut machine = attached();
    assert_eq!(machine.map(1, "1000000000000-1000000000fff", 0, READ), RANGE);
    assert_eq!(machine.map(1, "fffffffff000-1000000000fff", 0, READ), RANGE);
    assert_eq!(machine.map(1, "fffffffff000-ffffffffffff", 0, READ), OK);
}

#[test]
fn overlapping_map_should_be_inval() {
    let mut machine = attached();
    machine.map(1, "10000-1ffff", 0, READ);
    for iova in ["10000-1ffff", "12000-12fff", "0-fffff", "f000-10fff", "1f000-20fff"] {
        assert_eq!(machine.map(1, iova, 0, READ), INVAL, "{iova}");
    }
    assert_eq!(machine.map(1, "f000-ffff", 0, READ), OK);
    assert_eq!(machine.map(1, "20000-20fff", 0, READ), OK);
}

#[test]
fn map_over_a_reserved_region_should_be_rejected() {
    let mut machine = attached();
    let calls = machine.host.calls();
    for iova in ["fee00000-fee00fff", "fedff000-fee00fff", "feeff000-fef00fff", "fed00000-ff0fffff"] {
        assert_eq!(machine.map(1, iova, 0, READ), INVAL, "{iova}");
    }
    assert_eq!(machine.host.calls(), calls, "the host is not asked");
    assert_eq!(machine.map(1, "fedff000-fedfffff", 0, READ), OK);
}

#[test]
fn a_host_bridge_window_refuses_nothing() {
    // Where many hosts have their 32-bit window, and AMD Seattle has both of its.
    let mut machine = attached();
    for iova in ["80000000-80ffffff", "40000000-40ffffff", "100000000-100ffffff"] {
        assert_eq!(machine.map(1, iova, 0, READ), OK, "{iova}");
    }
    machine.check_invariants();
}

#[test]
fn map_outside_guest_ram_is_fault_as_a_whole() {
    let mut machine = attached();
    assert_eq!(machine.map(1, "1000-1fff", RAM_SIZE, READ), FAULT);
    assert_eq!(machine.map(1, "1000-2fff", RAM_SIZE - 0x1000, READ), FAULT);
    assert_eq!(machine.map(1, "1000-1fff", RAM_SIZE, 0), FAULT);
    assert_eq!(machine.map(1, "1000-2fff", RAM_SIZE / 2 - 0x1000, READ), OK, "it spans two regions");
    assert_eq!(machine.reads(LONE, 0x2000), Some(RAM_SIZE / 2));
}

#[test]
fn map_of_no_domain_should_be_noent_and_of_a_bypass_domain_inval() {
    let mut machine = attached();
    machine.attach_bypass(2, LEFT);
    for (domain, status) in [(7, NOENT), (2, INVAL)] {
        assert_eq!(machine.map(domain, "1000-1fff", 0, READ), status);
        assert_eq!(machine.unmap(domain, "1000-1fff"), status);
    }
}

#[test]
fn the_seven_examples_of_unmap() {
    let examples: [(&[&str], &str, u8); 7] = [
        (&[], "0-4fff", OK),
        (&["0-9fff"], "0-9fff", OK),
        (&["0-4fff", "5000-9fff"], "0-9fff", OK),
        (&["0-9fff"], "0-4fff", RANGE),
        (&["0-4fff", "5000-9fff"], "0-4fff", OK),
        (&["0-4fff"], "0-9fff", OK),
        (&["0-4fff", "a000-efff"], "0-efff", OK),
    ];
    for flavour in [Flavour::Iommufd, Flavour::Type1] {
        for (maps, iova, status) in examples {
            let mut machine = Machine::new(flavour);
            machine.attach(1, LONE);
            for map in maps {
                assert_eq!(machine.map(1, map, 0, READ), OK);
            }
            let calls = machine.host.calls();
            assert_eq!(machine.unmap(1, iova), status, "{maps:?} {iova}");
            let expected = u64::from(status == OK && !maps.is_empty());
            assert_eq!(machine.host.calls(), calls + expected, "one call removes them all");
            assert!(machine.device.next_notice().is_none());
            let left = maps.iter().filter(|map| status != OK || !range(iova).covers(range(map))).count();
            assert_eq!(machine.host.mappings(LONE).len(), left);
            machine.check_invariants();
        }
    }
}

#[test]
fn unmap_that_would_split_should_remove_nothing() {
    let mut machine = attached();
    for map in ["0-fff", "1000-1fff", "2000-4fff"] {
        machine.map(1, map, 0, READ);
    }
    assert_eq!(machine.unmap(1, "0-2fff"), RANGE);
    assert_eq!(machine.unmap(1, "3000-ffff"), RANGE);
    assert_eq!(machine.unmap(1, "3000-3fff"), RANGE);
    assert_eq!(machine.host.mappings(LONE).len(), 3);
    assert_eq!(machine.send(&unmap_bytes(1, IovaRange::ALL), 4).status, OK);
    assert!(machine.host.mappings(LONE).is_empty());
}

#[test]
fn there_is_a_cap_on_mappings() {
    let mut machine = Machine::with(Flavour::Iommufd, Settings { max_mappings: 2, ..settings() });
    machine.attach(1, LONE);
    assert_eq!(machine.map(1, "0-fff", 0, READ), OK);
    assert_eq!(machine.map(1, "1000-1fff", 0, 0), OK);
    assert_eq!(machine.map(1, "2000-2fff", 0, READ), NOMEM);
    assert_eq!(machine.unmap(1, "0-fff"), OK);
    assert_eq!(machine.map(1, "2000-2fff", 0, READ), OK);
}

#[test]
fn there_is_a_cap_on_mappings_of_all_domains_together() {
    let mut machine = Machine::with(Flavour::Iommufd, Settings { max_mappings_in_all: 2, ..settings() });
    machine.attach(1, LONE);
    machine.attach(2, LEFT);
    assert_eq!(machine.map(1, "0-fff", 0, READ), OK);
    assert_eq!(machine.map(2, "0-fff", 0, READ), OK);
    assert_eq!(machine.map(1, "1000-1fff", 0, READ), NOMEM);
    assert_eq!(machine.map(2, "1000-1fff", 0, READ), NOMEM);
    assert_eq!(machine.detach(2, LEFT), OK);
    assert_eq!(machine.map(1, "1000-1fff", 0, READ), OK);
}

#[test]
fn software_endpoints_need_no_host() {
    let group: Arc<dyn HostGroup> = Arc::new(SoftwareGroup::new(vec![LONE], 0x1000));
    let mut device = VirtioIommu::new(settings(), vec![(LONE, msi_view())], vec![group]).unwrap();
    device.set_memory(ram());
    let mut send = |bytes: &[u8]| {
        let mut tail = [0xaa; 4];
        assert_eq!(device.handle(bytes, &mut tail), 4);
        tail[0]
    };
    assert_eq!(send(&attach_bytes(1, LONE, 0)), OK);
    assert_eq!(send(&map_bytes(1, range("0-fff"), 0, READ)), OK);
    assert_eq!(send(&map_bytes(1, range("0-fff"), 0, READ)), INVAL);
    assert_eq!(send(&unmap_bytes(1, range("0-ffff"))), OK);
    assert_eq!(send(&map_bytes(1, range("0-fff"), 0, READ)), OK);
}

#[test]
fn without_a_host_a_large_map_is_answered_at_once() {
    let group: Arc<dyn HostGroup> = Arc::new(SoftwareGroup::new(vec![LONE], 0x1000));
    let mut device = VirtioIommu::new(settings(), vec![(LONE, msi_view())], vec![group]).unwrap();
    device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 8 * GIB)]).unwrap());
    let mut tail = [0xaa; 4];
    assert_eq!(device.handle(&attach_bytes(1, LONE, 0), &mut tail), 4);
    let progress = device.begin(&large_map(), &mut tail);
    assert!(matches!(progress, Progress::Answered { used: 4 }), "{progress:?}");
    assert_eq!(tail, [OK, 0, 0, 0]);
}

const GIB: u64 = 1 << 30;

/// A machine with eight GiB of memory and an endpoint in domain 1.
fn large() -> Machine {
    let mut machine = attached();
    machine.device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 8 * GIB)]).unwrap());
    machine
}

fn large_map() -> Vec<u8> {
    // 3.5 GiB, from the middle of a step.
    map_bytes(1, range("120000000-1ffffffff"), 0x1_0000_0000, READ)
}

/// Takes steps until there is an answer; its status and how many steps it took.
fn finish(machine: &mut Machine, mut progress: Progress) -> (u8, usize) {
    let mut reply = [0xaa; 4];
    let mut steps = 1;
    while let Progress::Unfinished(map) = progress {
        progress = machine.device.go_on(map, &mut reply);
        steps += 1;
    }
    assert!(matches!(progress, Progress::Answered { used: 4 }), "{progress:?}");
    assert_eq!(reply[1..], [0; 3]);
    (reply[0], steps)
}

#[test]
fn a_large_map_is_done_in_steps_and_undone_in_one() {
    let mut machine = large();
    let progress = machine.device.begin(&large_map(), &mut [0; 4]);
    assert_eq!(machine.host.mappings(LONE).len(), 1);
    assert_eq!(machine.host.dma(LONE, 0x1_3fff_ffff, Access::READ), Some(0x1_1fff_ffff));
    assert_eq!(machine.host.dma(LONE, 0x1_4000_0000, Access::READ), None);
    assert_eq!(finish(&mut machine, progress), (OK, 4));
    let mapped: Vec<IovaRange> = machine.host.mappings(LONE).iter().map(|mapping| mapping.iova).collect();
    let steps = ["120000000-13fffffff", "140000000-17fffffff", "180000000-1bfffffff", "1c0000000-1ffffffff"];
    assert_eq!(mapped, steps.map(range));
    for iova in [0x1_2000_0000, 0x1_7fff_ffff, 0x1_8000_0000, 0x1_ffff_ffff] {
        assert_eq!(machine.host.dma(LONE, iova, Access::READ), Some(iova - 0x2000_0000));
    }
    machine.check_invariants();
    let calls = machine.host.calls();
    assert_eq!(machine.unmap(1, "120000000-13fffffff"), RANGE, "it is one mapping");
    assert_eq!(machine.unmap(1, "120000000-1ffffffff"), OK);
    assert_eq!(machine.host.calls() - calls, 1);
    machine.check_invariants();
}

#[test]
fn a_large_map_that_fails_at_any_step_leaves_nothing() {
    for step in 0..4 {
        let mut machine = large();
        machine.map(1, "1000-1fff", 0, READ);
        let before = machine.snapshot();
        machine.host.fail_after(step, Failure::Error(HostErrorKind::NoMemory));
        let progress = machine.device.begin(&large_map(), &mut [0; 4]);
        let (status, steps) = match progress {
            Progress::Answered { used } => {
                assert_eq!(used, 4);
                (NOMEM, 1)
            }
            unfinished @ Progress::Unfinished(_) => finish(&mut machine, unfinished),
        };
        assert_eq!((status, steps), (NOMEM, step as usize + 1));
        assert_eq!(machine.snapshot(), before);
        let fault = machine.device.take_fault().unwrap();
        assert_eq!((fault.reason, fault.address), (FaultReason::Mapping, Some(0x1_2000_0000)));
        assert_eq!(machine.device.take_fault(), None);
        machine.check_invariants();
        assert_eq!(machine.request(&large_map()), OK);
    }
}

/// What may happen between two steps of a MAP, and what is answered then.
#[test]
fn a_large_map_is_given_up_when_its_domain_or_memory_goes() {
    type Event = fn(&mut VirtioIommu);
    let less = |device: &mut VirtioIommu| {
        device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 5 * GIB)]).unwrap());
    };
    let events: [(Event, u8); 5] = [
        (|_| (), OK),
        (VirtioIommu::reset, NOENT),
        (|device| assert!(device.remove_endpoint(LONE)), NOENT),
        (VirtioIommu::shut_down, NOENT),
        (less, FAULT),
    ];
    for (event, expected) in events {
        let mut machine = large();
        let progress = machine.device.begin(&large_map(), &mut [0; 4]);
        event(&mut machine.device);
        assert_eq!(finish(&mut machine, progress).0, expected);
        if expected != OK {
            assert_eq!(machine.host.dma(LONE, 0x1_2000_0000, Access::READ), None);
            assert_eq!(machine.host.mappings(LONE), []);
        }
    }
}

/// While a MAP is under way its part can be taken away only by what no driver does; then it is given up.
#[test]
fn a_large_map_whose_part_was_unmapped_is_given_up() {
    let mut machine = large();
    let progress = machine.device.begin(&large_map(), &mut [0; 4]);
    assert_eq!(machine.unmap(1, "0-ffffffffffff"), OK);
    assert_eq!(finish(&mut machine, progress), (DEVERR, 2));
    assert_eq!(machine.host.mappings(LONE), []);
    machine.check_invariants();
}

#[test]
fn a_large_map_is_given_up_when_its_domain_cannot_be_kept_in_step() {
    let mut machine = large();
    assert_eq!(machine.map(1, "1000-1fff", 7 * GIB + GIB / 2, READ), OK);
    let progress = machine.device.begin(&large_map(), &mut [0; 4]);
    // Memory leaves under the other mapping; neither can that be unmapped, nor is there a fresh table.
    machine.host.fail_after(0, Failure::Error(HostErrorKind::Other));
    machine.host.fail_after(1, Failure::Error(HostErrorKind::NoMemory));
    machine.device.set_memory(GuestRam::in_software(&[(GuestAddress(0), 7 * GIB + GIB / 2)]).unwrap());
    assert!(machine.is_blocked(LONE));
    assert_eq!(finish(&mut machine, progress), (DEVERR, 2));
    assert_eq!(machine.unmap(1, "1000-1fff"), OK, "it is the only mapping, and the domain starts afresh");
    assert!(!machine.is_blocked(LONE));
    machine.check_invariants();
}

#[test]
fn a_large_mapping_that_allows_nothing_takes_no_steps() {
    let mut machine = large();
    let calls = machine.host.calls();
    assert_eq!(machine.map(1, "120000000-1ffffffff", 0, 0), OK);
    assert_eq!(machine.host.calls(), calls);
    assert_eq!(machine.map(1, "1ffffffff000-1fffffffffff", 0, READ), OK);
}
