// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest of a few instructions on /dev/kvm drives the device by its registers: it finds it, sets up its queues, kicks them through
//! ioeventfds and is interrupted through an irqfd. An emulated device behind it does DMA.

#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use kvm_ioctls::{Kvm, VcpuExit};
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::embed::{EmbeddedIommu, Transport};
use virtio_iommu::host::HostGroup;
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::reserved::EndpointView;
use virtio_iommu::translate::{Limits, Translation};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

mod guest;
#[path = "../common/left_out.rs"]
mod left_out;
#[path = "../../examples/microvm/mmio.rs"]
mod mmio;

use guest::{Script, Vm};
use left_out::left_out;
use mmio::{Interrupt, Registers};

const IOMMU: u32 = 0xd000_0000;
/// The emulated device: I/O virtual address, value, command, result.
const DMA: u32 = 0xd000_1000;
const DMA_WRITE: u32 = 1;
const DMA_READ: u32 = 2;
const DMA_REFUSED: u32 = 0xdead_0000;
const ENDPOINT: EndpointId = EndpointId(0x18);
const IRQ: u32 = 5;

/// Runs a script on a machine of its own; the memory that it leaves.
fn run(script: &Script) -> Option<GuestMemoryMmap> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            left_out(&format!("/dev/kvm ({error})"));
            return None;
        }
    };
    let mut vm = Vm::new(&kvm, script);
    let interrupt = EventFd::new(0).unwrap();
    vm.fd.register_irqfd(&interrupt, IRQ).unwrap();
    let interrupt = Arc::new(Interrupt::new(interrupt));

    let group = Translation::new(Limits::default()).group(vec![ENDPOINT]);
    let translator = group.translator(ENDPOINT).unwrap();
    let group = Arc::new(group);
    let settings = Settings { boot_bypass: false, ..Settings::new("0-ffffffffffff".parse().unwrap(), 0x1000) };
    let endpoints = vec![(ENDPOINT, EndpointView::default())];
    let mut device = VirtioIommu::new(settings, endpoints, vec![Arc::clone(&group) as Arc<dyn HostGroup>]).unwrap();
    device.set_memory(GuestRam::in_software(&[(GuestAddress(0), guest::MEMORY_SIZE as u64)]).unwrap());
    let memory = Arc::new(vm.memory.clone());
    let iommu = EmbeddedIommu::new(device, memory, Arc::clone(&interrupt) as Arc<dyn Transport>).unwrap();
    group.on_refused(iommu.waker());
    for queue in 0..2 {
        let address = kvm_ioctls::IoEventAddress::Mmio(u64::from(IOMMU) + mmio::QUEUE_NOTIFY);
        vm.fd.register_ioevent(iommu.kick(queue).unwrap(), &address, u32::from(queue)).unwrap();
    }
    let iommu = Arc::new(Mutex::new(iommu));

    // The loop's thread ends with the test's process.
    let subscriber = Arc::clone(&iommu);
    std::thread::spawn(move || {
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(subscriber);
        loop {
            manager.run().unwrap();
        }
    });

    let mut registers = Registers::new(iommu, interrupt).unwrap();
    let mut dma = [0u32; 4];
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        assert!(Instant::now() < deadline, "the guest does not end");
        match vm.vcpu.run().unwrap() {
            VcpuExit::IoOut(guest::END, _) => break,
            VcpuExit::IoOut(guest::WAITING, _) => std::thread::yield_now(),
            VcpuExit::MmioRead(address, bytes) if address < u64::from(DMA) => {
                registers.read(address - u64::from(IOMMU), bytes);
            }
            VcpuExit::MmioWrite(address, bytes) if address < u64::from(DMA) => {
                registers.write(address - u64::from(IOMMU), bytes);
            }
            VcpuExit::MmioRead(address, bytes) => {
                let value = dma[(address - u64::from(DMA)) as usize / 4];
                bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
            }
            VcpuExit::MmioWrite(address, bytes) => {
                let register = address as u32 - DMA;
                let value = u32::from_le_bytes(bytes.try_into().unwrap());
                dma[register as usize / 4] = value;
                let seen = translator.memory(&vm.memory);
                let at = GuestAddress(u64::from(dma[0]));
                dma[3] = match (register, value) {
                    (8, DMA_WRITE) => seen.write_obj(dma[1], at).map_or(DMA_REFUSED, |()| 0),
                    (8, DMA_READ) => seen.read_obj(at).unwrap_or(DMA_REFUSED),
                    _ => continue,
                };
            }
            other => {
                let other = format!("{other:?}");
                panic!("the guest stopped: {other} {:x?}", vm.vcpu.get_regs());
            }
        }
    }
    Some(vm.memory.clone())
}

#[test]
fn a_guest_maps_and_unmaps_and_its_device_follows() {
    let mut script = Script::new();
    let magic = script.read(IOMMU);
    let id = script.read(IOMMU + 8);
    let input_range_end = script.read(IOMMU + 0x110);
    script.enable_interrupts();
    script.start_device();

    let attach = script.request(&[1, 1, ENDPOINT.0, 0, 0]);
    let map = script.request(&[3, 1, 0x40_0000, 0, 0x40_0fff, 0, 0x5_0000, 0, 3]);
    let write = script.dma(0x40_0010, 0x1122_3344, DMA_WRITE);
    let read = script.dma(0x40_0010, 0, DMA_READ);
    let beyond = script.dma(0x40_1000, 0x5566_7788, DMA_WRITE);
    let event = script.wait_for_event();
    let unmap = script.request(&[4, 1, 0x40_0000, 0, 0x40_0fff, 0, 0]);
    let after_unmap = script.dma(0x40_0010, 0x9999_9999, DMA_WRITE);
    script.end();
    let Some(memory) = run(&script) else { return };

    let word = |address: u32| memory.read_obj::<u32>(GuestAddress(u64::from(address))).unwrap();
    assert_eq!([magic, id, input_range_end].map(word), [u32::from_le_bytes(*b"virt"), 23, 0xffff_ffff]);
    assert_eq!([attach, map, unmap].map(word), [0; 3], "each status is OK, and the tail zero");
    assert_eq!([write, read].map(word), [0, 0x1122_3344]);
    assert_eq!([beyond, after_unmap].map(word), [DMA_REFUSED; 2]);
    assert_eq!(word(0x5_0010), 0x1122_3344, "the guest's memory has what the device wrote, and nothing since");
    // Reason: mapping. Flags: a write, with an address.
    assert_eq!([0, 4, 8, 16, 20].map(|offset| word(event + offset)), [2, 0x102, ENDPOINT.0, 0x40_1000, 0]);
}

#[test]
fn a_reset_by_the_guest_takes_its_mappings_away() {
    let mut script = Script::new();
    script.enable_interrupts();
    script.start_device();
    let attach = script.request(&[1, 1, ENDPOINT.0, 0, 0]);
    let map = script.request(&[3, 1, 0x40_0000, 0, 0x40_0fff, 0, 0x5_0000, 0, 3]);
    let before = script.dma(0x40_0000, 0x1111_1111, DMA_WRITE);
    script.reset_device();
    let between = script.dma(0x40_0000, 0x2222_2222, DMA_WRITE);
    script.start_device();
    // The access in between was refused: that is an event for whoever drives the device now.
    script.wait_for_event();
    let unknown = script.request(&[4, 1, 0x40_0000, 0, 0x40_0fff, 0, 0]);
    let again = script.request(&[1, 1, ENDPOINT.0, 0, 0]);
    let after = script.dma(0x40_0000, 0x3333_3333, DMA_WRITE);
    script.end();
    let Some(memory) = run(&script) else { return };
    let word = |address: u32| memory.read_obj::<u32>(GuestAddress(u64::from(address))).unwrap();
    assert_eq!([attach, map, before].map(word), [0; 3]);
    assert_eq!([between, after].map(word), [DMA_REFUSED; 2]);
    assert_eq!([unknown, again].map(word), [6, 0], "the domain is gone");
    assert_eq!(word(0x5_0000), 0x1111_1111);
}

#[test]
fn a_guest_that_breaks_its_queue_is_told_to_reset() {
    let mut script = Script::new();
    script.enable_interrupts();
    script.start_device();
    script.break_request_queue();
    // Status: needs reset, beside what the driver set.
    script.wait_for_register(IOMMU + 0x70, 0x4f);
    script.wait_for_interrupt();
    script.reset_device();
    let status = script.read(IOMMU + 0x70);
    script.start_device();
    let attach = script.request(&[1, 1, ENDPOINT.0, 0, 0]);
    script.end();
    let Some(memory) = run(&script) else { return };
    let word = |address: u32| memory.read_obj::<u32>(GuestAddress(u64::from(address))).unwrap();
    assert_eq!([status, attach].map(word), [0, 0]);
}
