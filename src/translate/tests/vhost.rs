// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices in the host's kernel, beside a model of the kernel's part.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ::rustix::io::Errno;
use ::vhost::{VhostAccess, VhostIotlbType};
use vm_memory::GuestMemoryBackend;

use super::*;
use crate::host::vhost::model::{Entry, Kernel};
use crate::translate::vhost::{NewVhostIotlbError, VhostIotlb, VhostIotlbError};

struct Device {
    machine: Machine,
    iotlb: Arc<VhostIotlb<Kernel, Arc<Memory>>>,
    /// Where the kernel writes its questions.
    kernel: UnixStream,
    stopped: Arc<AtomicUsize>,
}

impl Device {
    fn new() -> Self {
        let machine = Machine::new(Limits::default(), false);
        let (backend, kernel) = Kernel::new();
        let stopped = Arc::new(AtomicUsize::new(0));
        let stop = Arc::clone(&stopped);
        let memory = Arc::new(machine.memory.clone());
        let stop = move || _ = stop.fetch_add(1, Ordering::SeqCst);
        let iotlb = VhostIotlb::new(&machine.groups[0], DISK, backend, memory, stop).unwrap();
        Self { machine, iotlb, kernel, stopped }
    }

    fn ask(&mut self, iova: u64, access: VhostAccess) -> Vec<Entry> {
        self.kernel.write_all(&question(iova, access)).unwrap();
        assert!(!self.iotlb.on_readable(16).unwrap(), "there was one question");
        self.entries()
    }

    fn entries(&self) -> Vec<Entry> {
        self.iotlb.device().entries()
    }

    fn host(&self, physical: u64) -> u64 {
        self.machine.memory.get_host_address(GuestAddress(physical)).unwrap() as u64
    }

    /// Attached, with one page that can be read and written.
    fn attached() -> Self {
        let mut device = Self::new();
        assert_eq!(device.machine.attach(1, DISK), OK);
        assert_eq!(device.machine.map(1, 0x5000, PAGE, 0x2000, READ | WRITE), OK);
        device
    }
}

fn question(iova: u64, access: VhostAccess) -> [u8; 72] {
    let mut bytes = [0; 72];
    bytes[..4].copy_from_slice(&1u32.to_ne_bytes());
    bytes[8..16].copy_from_slice(&iova.to_ne_bytes());
    bytes[32] = access as u8;
    bytes[33] = VhostIotlbType::Miss as u8;
    bytes
}

#[test]
fn a_question_is_answered_with_what_is_mapped() {
    let mut device = Device::attached();
    let expected = Entry { iova: 0x5000, size: PAGE, host_address: device.host(0x2000), access: 3 };
    assert_eq!(device.ask(0x5123, VhostAccess::ReadOnly), [expected]);
    assert_eq!(device.machine.device.take_fault(), None);
}

#[test]
fn no_answer_allows_more_than_the_guest() {
    let mut device = Device::attached();
    assert_eq!(device.machine.map(1, 0x6000, PAGE, 0x3000, READ), OK);
    let read_only = Entry { iova: 0x6000, size: PAGE, host_address: device.host(0x3000), access: 1 };
    assert_eq!(device.ask(0x6000, VhostAccess::ReadOnly), [read_only]);
    assert_eq!(device.ask(0x6008, VhostAccess::WriteOnly), [read_only], "no answer to what is not allowed");
    let fault = device.machine.device.take_fault().unwrap();
    assert_eq!((fault.reason, fault.endpoint, fault.address), (FaultReason::Mapping, DISK, Some(0x6008)));
}

#[test]
fn no_access_is_told_as_none() {
    let mut device = Device::attached();
    assert_eq!(device.machine.map(1, 0x6000, PAGE, 0x3000, WRITE), OK);
    device.iotlb.tell(0x6000, Access::NONE).unwrap();
    assert_eq!(device.entries(), []);
}

#[test]
fn a_file_that_blocks_is_refused() {
    let machine = Machine::new(Limits::default(), false);
    let (backend, _kernel) = Kernel::blocking();
    let memory = Arc::new(machine.memory.clone());
    let error = VhostIotlb::new(&machine.groups[0], DISK, backend, memory, || ()).unwrap_err();
    assert!(matches!(error, NewVhostIotlbError::Blocking), "{error}");
}

#[test]
fn an_answer_goes_as_far_as_memory_belongs_together() {
    let mut device = Device::attached();
    // Two mappings to consecutive memory, across the border of two regions, and one that leads elsewhere.
    assert_eq!(device.machine.map(1, 0x10_0000, 4 * PAGE, 0xf_e000, READ), OK);
    assert_eq!(device.machine.map(1, 0x10_4000, PAGE, 0x10_2000, READ), OK);
    assert_eq!(device.machine.map(1, 0x10_5000, PAGE, 0x1000, READ), OK);
    let first = Entry { iova: 0x10_0000, size: 2 * PAGE, host_address: device.host(0xf_e000), access: 1 };
    assert_eq!(device.ask(0x10_0000, VhostAccess::ReadOnly), [first], "as far as the region");
    let second = Entry { iova: 0x10_2000, size: 3 * PAGE, host_address: device.host(0x10_0000), access: 1 };
    assert_eq!(device.ask(0x10_2010, VhostAccess::ReadOnly), [first, second], "as far as memory is consecutive");

    // However large the first one is.
    let mut device = Device::attached();
    assert_eq!(device.machine.map(1, 0x10_0000, 0x8_0000, 0, READ), OK);
    assert_eq!(device.machine.map(1, 0x18_0000, 2 * PAGE, 0x8_0000, READ), OK);
    let both = Entry { iova: 0x10_0000, size: 0x8_2000, host_address: device.host(0), access: 1 };
    assert_eq!(device.ask(0x10_0000, VhostAccess::ReadOnly), [both]);
}

#[test]
fn what_is_not_mapped_is_not_answered_but_a_fault() {
    let mut device = Device::new();
    assert_eq!(device.ask(0x5000, VhostAccess::ReadOnly), []);
    let fault = device.machine.device.take_fault().unwrap();
    assert_eq!((fault.reason, fault.endpoint), (FaultReason::Domain, DISK));
    assert_eq!(device.machine.attach(1, DISK), OK);
    assert_eq!(device.ask(u64::MAX, VhostAccess::WriteOnly), []);
    let fault = device.machine.device.take_fault().unwrap();
    assert_eq!((fault.reason, fault.address), (FaultReason::Mapping, Some(u64::MAX)));
}

#[test]
fn what_was_asked_for_is_answered_when_it_is_mapped() {
    let mut device = Device::new();
    assert_eq!(device.ask(0x5008, VhostAccess::WriteOnly), []);
    assert_eq!(device.machine.attach(1, DISK), OK);
    assert_eq!(device.machine.map(1, 0x4000, PAGE, 0x2000, WRITE), OK);
    assert_eq!(device.entries(), [], "another page");
    assert_eq!(device.machine.map(1, 0x5000, PAGE, 0x3000, READ), OK);
    assert_eq!(device.entries(), [], "not for writing");
    assert_eq!(device.machine.unmap(1, 0x5000, PAGE), OK);
    assert_eq!(device.machine.map(1, 0x5000, PAGE, 0x3000, WRITE), OK);
    let answer = Entry { iova: 0x5000, size: PAGE, host_address: device.host(0x3000), access: 2 };
    assert_eq!(device.entries(), [answer]);
    assert_eq!(device.machine.unmap(1, 0x5000, PAGE), OK);
    assert_eq!(device.machine.map(1, 0x5000, PAGE, 0x3000, WRITE), OK);
    assert_eq!(device.entries(), [], "nobody has asked again");
}

#[test]
fn what_was_asked_for_is_answered_when_a_domain_with_it_is_attached() {
    let mut device = Device::attached();
    assert_eq!(device.machine.attach(2, NET), OK);
    assert_eq!(device.machine.map(2, 0x9000, PAGE, 0x3000, READ), OK);
    assert_eq!(device.ask(0x9000, VhostAccess::ReadOnly), []);
    assert_eq!(device.machine.attach(2, DISK), OK);
    assert_eq!(device.entries().iter().map(|entry| entry.iova).collect::<Vec<_>>(), [0x9000]);
}

#[test]
fn nothing_is_kept_of_what_was_taken_away() {
    let attached = || {
        let mut device = Device::attached();
        assert_eq!(device.machine.map(1, 0x9000, PAGE, 0x3000, READ), OK);
        assert_eq!(device.ask(0x5000, VhostAccess::ReadOnly).len(), 1);
        assert_eq!(device.ask(0x9000, VhostAccess::ReadOnly).len(), 2);
        device
    };
    let mut device = attached();
    assert_eq!(device.machine.unmap(1, 0x5000, PAGE), OK);
    assert_eq!(device.entries().iter().map(|entry| entry.iova).collect::<Vec<_>>(), [0x9000], "UNMAP");
    assert_eq!(device.machine.unmap(1, 0, 1 << 48), OK);
    assert_eq!(device.entries(), [], "UNMAP of everything");

    let mut device = attached();
    assert_eq!(device.machine.detach(1, DISK), OK);
    assert_eq!(device.entries(), [], "DETACH");

    let mut device = attached();
    assert_eq!(device.machine.attach(2, DISK), OK);
    assert_eq!(device.entries(), [], "ATTACH to another domain");

    let mut device = attached();
    device.machine.device.reset();
    assert_eq!(device.entries(), [], "reset");

    let mut device = attached();
    device.machine.device.set_memory(GuestRam::in_software(&[(GuestAddress(0x3000), PAGE)]).unwrap());
    assert_eq!(device.entries().iter().map(|entry| entry.iova).collect::<Vec<_>>(), [0x9000], "memory that left");
    assert_eq!(device.stopped.load(Ordering::SeqCst), 0);
}

#[test]
fn the_translations_of_another_domain_are_kept() {
    let mut device = Device::attached();
    assert_eq!(device.ask(0x5000, VhostAccess::ReadOnly).len(), 1);
    assert_eq!(device.machine.attach(2, NET), OK);
    assert_eq!(device.machine.map(2, 0x5000, PAGE, 0x2000, READ), OK);
    assert_eq!(device.machine.unmap(2, 0x5000, PAGE), OK);
    assert_eq!(device.entries().len(), 1);
}

#[test]
fn no_answer_comes_after_the_unmap_of_what_it_tells() {
    let mut device = Device::new();
    assert_eq!(device.machine.attach(1, DISK), OK);
    let iotlb = Arc::clone(&device.iotlb);
    let mut kernel = device.kernel;
    let asked = AtomicUsize::new(0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                kernel.write_all(&question(0x5000, VhostAccess::ReadOnly)).unwrap();
                iotlb.on_readable(1).unwrap();
                asked.fetch_add(1, Ordering::SeqCst);
            }
        });
        let (mut answered, mut late) = (0, 0);
        while answered < 200 && late == 0 {
            device.machine.map(1, 0x5000, PAGE, 0x2000, READ);
            let before = asked.load(Ordering::SeqCst);
            while asked.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
            answered += usize::from(!iotlb.device().entries().is_empty());
            device.machine.unmap(1, 0x5000, PAGE);
            late = iotlb.device().entries().len();
        }
        // Before anything can panic: the thread is waited for.
        done.store(true, Ordering::SeqCst);
        assert_eq!((answered, late), (200, 0));
    });
}

#[test]
fn a_kernel_that_does_not_forget_has_its_device_stopped() {
    let mut device = Device::attached();
    assert_eq!(device.ask(0x5000, VhostAccess::ReadOnly).len(), 1);
    device.iotlb.device().fail(Errno::IO);
    // The host's failure is told as such; the guest's driver reads no more of it than that.
    assert_eq!(device.machine.unmap(1, 0x5000, PAGE), 3, "DEVERR");
    assert!(device.stopped.load(Ordering::SeqCst) > 0);
    assert_eq!(physical(&device.machine.disk, 0x5000, Access::READ), Err(RefusalReason::NoTable), "blocked");
}

#[test]
fn a_device_that_was_not_started_has_nothing_to_forget() {
    let mut device = Device::attached();
    device.iotlb.device().fail(Errno::FAULT);
    assert_eq!(device.machine.unmap(1, 0x5000, PAGE), OK);
    assert_eq!(device.machine.detach(1, DISK), OK);
    assert_eq!(device.stopped.load(Ordering::SeqCst), 0);
}

#[test]
fn a_device_that_nobody_answers_for_forgets_everything() {
    let mut device = Device::attached();
    device.ask(0x5000, VhostAccess::ReadOnly);
    let kernel = device.iotlb.device().clone();
    assert_eq!(kernel.entries().len(), 1);
    drop(device.iotlb);
    assert_eq!(kernel.entries(), []);
    assert_eq!(device.machine.unmap(1, 0x5000, PAGE), OK, "nobody is told any more");
}

#[test]
fn a_message_that_is_no_question_is_an_error() {
    let mut device = Device::attached();
    device.kernel.write_all(&[0x11; 72]).unwrap();
    assert!(matches!(device.iotlb.on_readable(16), Err(VhostIotlbError::NotAMiss(bytes)) if bytes == [0x11; 72]));
    assert_eq!(device.ask(0x5000, VhostAccess::ReadOnly).len(), 1, "the next is answered");
}

#[test]
fn an_endpoint_of_another_group_is_refused() {
    let machine = Machine::new(Limits::default(), false);
    let (backend, _kernel) = Kernel::new();
    let memory = Arc::new(machine.memory.clone());
    let result = VhostIotlb::new(&machine.groups[0], NET, backend, memory, || ());
    assert!(matches!(result, Err(NewVhostIotlbError::NotAMember(NET))));
}
