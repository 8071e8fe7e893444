// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bypass switch, while devices write.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_iommu::access::Access;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::fake::Attachment;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::translate::{Limits, Translation, Translator};
use vm_memory::GuestAddress;

use crate::common::alone::Ends;
use crate::common::{attach, map};
use crate::machine::{LEFT, LONE, Machine, OK, READ, RIGHT, WRITE, settings};

/// In no domain.
const FREE: EndpointId = EndpointId(0x20);
/// In a domain.
const MAPPED: EndpointId = EndpointId(0x21);

#[test]
fn a_write_of_anything_but_bypass_and_anything_but_0_and_1_is_ignored() {
    for bypass in [1, 0] {
        let mut machine = Machine::new();
        machine.device.write_config(36, &[bypass]);
        let (before, config, calls) = (machine.view(), machine.device.config(), machine.host.calls());
        assert_eq!(config[36], bypass);
        for value in (0..=u8::MAX).filter(|value| *value > 1) {
            machine.device.write_config(36, &[value]);
        }
        for offset in (0..64).chain([usize::MAX - 36, usize::MAX]) {
            for length in 0..40 {
                // What would switch it, but for bypass itself.
                let mut bytes = vec![1 - bypass; length];
                if let Some(byte) = 36usize.checked_sub(offset).and_then(|at| bytes.get_mut(at)) {
                    *byte = 0xff;
                }
                machine.device.write_config(offset, &bytes);
            }
        }
        assert_eq!((machine.view(), machine.device.config(), machine.host.calls()), (before, config, calls));
        machine.device.write_config(36, &[1 - bypass]);
        assert_eq!(machine.device.config()[36], 1 - bypass);
        assert_eq!([LONE, LEFT, RIGHT].map(|id| machine.is_blocked(id)), [bypass == 1; 3]);
    }
}

/// Where an access of two pages lands, as a whole; `None` if it is refused as a whole.
fn lands(translator: &Translator, iova: u64) -> Option<u64> {
    translator.with_translation(iova, 0x2000, Access::WRITE, |segments| {
        let pieces: Vec<_> = segments.collect();
        match pieces[..] {
            [Ok(segment)] => {
                assert_eq!(segment.length, 0x2000);
                Some(segment.start.0)
            }
            [Err(_)] => None,
            _ => panic!("half of an access: {pieces:?}"),
        }
    })
}

#[test]
fn an_access_is_all_of_the_old_policy_or_all_of_the_new() {
    let translation = Translation::new(Limits::default());
    let groups = [FREE, MAPPED].map(|id| translation.group(vec![id]));
    let [free, mapped] = [0, 1].map(|index| groups[index].translator([FREE, MAPPED][index]).unwrap());
    let groups = groups.map(|group| Arc::new(group) as Arc<dyn HostGroup>).to_vec();
    let views = [FREE, MAPPED].map(|id| (id, EndpointView::default())).to_vec();
    let device = VirtioIommu::new(Settings { boot_bypass: false, ..settings() }, views, groups).unwrap();
    let mut machine = Machine { device, ..Machine::new() };
    // In two regions, so that two pages take two lookups.
    let regions = [(GuestAddress(0), 0x6000), (GuestAddress(0x6000), 0x1_0000)];
    machine.device.set_memory(GuestRam::in_software(&regions).unwrap());
    assert_eq!(machine.send(&attach(1, MAPPED.0, 0), 4).status, OK);
    assert_eq!(machine.send(&map(1, 0x5000, 0x2000, 0x8000, READ | WRITE), 4).status, OK);
    assert_eq!(lands(&free, 0x5000), None, "it is in no domain, and bypass is off");
    let ended = AtomicBool::new(false);
    let (passed, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                match lands(&free, 0x5000) {
                    Some(place) => {
                        assert_eq!(place, 0x5000, "neither policy says so");
                        passed.fetch_add(1, Ordering::Relaxed);
                    }
                    None => _ = refused.fetch_add(1, Ordering::Relaxed),
                }
                assert_eq!(lands(&mapped, 0x5000), Some(0x8000), "an endpoint in a domain is not concerned");
                assert_eq!(lands(&mapped, 0x8000), None);
            }
        });
        let _ends = Ends(&ended);
        let mut turns = 0u32;
        while turns < 2000 || passed.load(Ordering::Relaxed) < 100 || refused.load(Ordering::Relaxed) < 100 {
            let bypass = turns.is_multiple_of(2);
            machine.device.write_config(36, &[u8::from(bypass)]);
            // Once that has returned, by the new one.
            assert_eq!(lands(&free, 0x5000), bypass.then_some(0x5000), "turn {turns}");
            turns += 1;
            if turns.is_multiple_of(64) {
                std::thread::yield_now();
            }
        }
    });
}

#[test]
fn the_switch_leaves_endpoints_in_domains_where_they_are() {
    let mut machine = Machine::new();
    assert_eq!(machine.request(&attach(1, LONE.0, 0)), OK);
    assert_eq!(machine.request(&map(1, 0x5000, 0x1000, 0x8000, READ)), OK);
    assert_eq!(machine.request(&attach(2, LEFT.0, 1)), OK);
    let (lone, left) = (machine.host.attachment(LONE), machine.host.attachment(LEFT));
    assert!(matches!((lone, left), (Attachment::Table(_), Attachment::Table(_))));
    let calls = machine.host.calls();
    for bypass in [0, 1, 0] {
        machine.device.write_config(36, &[bypass]);
        assert_eq!((machine.host.attachment(LONE), machine.host.attachment(LEFT)), (lone, left));
        assert_eq!(machine.host.calls(), calls, "they are not even attached anew");
        assert_eq!((machine.reads(LONE, 0x5000), machine.reads(LONE, 0x8000)), (Some(0x8000), None));
        assert_eq!(machine.reads(RIGHT, 0x8000), Some(0x8000), "a bypass domain, whatever the switch says");
    }
}
