// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that follows a script: a list of what to write where, what to read, and what to wait for.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{DMA, IOMMU, IRQ};

pub const MEMORY_SIZE: usize = 4 << 20;
/// The port that the guest writes to when its script has ended.
pub const END: u16 = 0x99;
/// The port that it writes to while it waits.
pub const WAITING: u16 = 0x98;
/// Where the guest counts its interrupts.
const INTERRUPTS: u32 = 0x3ff0;

const CODE: u64 = 0x1000;
const HANDLER: u32 = 0x1100;
const DESCRIPTORS: u64 = 0x2000;
const INTERRUPT_TABLE: u64 = 0x2800;
const STACK: u64 = 0x8000;
/// Queues: descriptors, available and used ring, a page each, request queue first.
const QUEUES: u32 = 0x1_0000;
const QUEUE_SIZE: u32 = 16;
/// Requests, their replies, results of reading, buffers of events.
const REQUESTS: u32 = 0x2_0000;
const REPLIES: u32 = 0x2_8000;
const RESULTS: u32 = 0x3_0000;
const EVENTS: u32 = 0x3_8000;
const SCRIPT: u64 = 0x10_0000;

/// For each step of 12 bytes at esi: operation, address, value.
const INTERPRETER: [u8; 0x3a] = [
    0xad, // 00: lodsd
    0x8b, 0x1e, // mov ebx, [esi]
    0x8b, 0x4e, 0x04, // mov ecx, [esi + 4]
    0x83, 0xc6, 0x08, // add esi, 8
    0x48, 0x74, 0x10, // dec eax; je 1c
    0x48, 0x74, 0x11, // dec eax; je 20
    0x48, 0x74, 0x14, // dec eax; je 26
    0x48, 0x74, 0x1b, // dec eax; je 30
    0x48, 0x74, 0x1f, // dec eax; je 37
    0xe6, 0x99, 0xeb, 0xfe, // out END, al; jmp $
    0x89, 0x0b, 0xeb, 0xe0, // 1c: mov [ebx], ecx; jmp 00
    0x8b, 0x03, 0x89, 0x01, 0xeb, 0xda, // 20: mov eax, [ebx]; mov [ecx], eax; jmp 00
    0x39, 0x0b, 0x74, 0x04, // 26: cmp [ebx], ecx; je 2e
    0xe6, 0x98, 0xeb, 0xf8, // out WAITING, al; jmp 26
    0xeb, 0xd0, // 2e: jmp 00
    0x89, 0xda, 0x88, 0xc8, 0xee, 0xeb, 0xc9, // 30: mov edx, ebx; mov al, cl; out dx, al; jmp 00
    0xfb, 0xeb, 0xc6, // 37: sti; jmp 00
];
const WRITE: u32 = 1;
const READ: u32 = 2;
const WAIT: u32 = 3;
const OUT: u32 = 4;
const STI: u32 = 5;
const STOP: u32 = 6;

/// Counts, and tells the interrupt controller. Returns piece by piece: where KVM emulates this mode, it has no iretd.
const INTERRUPT_HANDLER: [u8; 20] = [
    0x50, // push eax
    0xff, 0x05, 0xf0, 0x3f, 0x00, 0x00, // inc dword [INTERRUPTS]
    0xb0, 0x20, 0xe6, 0x20, // mov al, 0x20; out 0x20, al
    0x58, // pop eax
    0xff, 0x74, 0x24, 0x08, 0x9d, // push dword [esp + 8]; popfd
    0xca, 0x04, 0x00, // retf 4
];

/// What the guest does, one thing after the other.
pub struct Script {
    steps: Vec<u32>,
    requests: u32,
    used: u32,
    results: u32,
    interrupts: u32,
}

impl Script {
    pub const fn new() -> Self {
        Self { steps: Vec::new(), requests: 0, used: 0, results: 0, interrupts: 0 }
    }

    fn step(&mut self, operation: u32, address: u32, value: u32) {
        self.steps.extend([operation, address, value]);
    }

    fn write(&mut self, address: u32, value: u32) {
        self.step(WRITE, address, value);
    }

    /// Reads a register; where its value will be.
    pub fn read(&mut self, address: u32) -> u32 {
        let result = RESULTS + self.results * 4;
        self.results += 1;
        self.step(READ, address, result);
        result
    }

    /// Waits until a register has a value.
    pub fn wait_for_register(&mut self, address: u32, value: u32) {
        self.step(WAIT, address, value);
    }

    /// Waits for one more interrupt.
    pub fn wait_for_interrupt(&mut self) {
        self.interrupts += 1;
        self.step(WAIT, INTERRUPTS, self.interrupts);
    }

    /// Has the interrupt controller deliver the device's interrupts from vector 0x20 on.
    pub fn enable_interrupts(&mut self) {
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0xff & !(1 << IRQ))] {
            self.step(OUT, port, value);
        }
        self.step(STI, 0, 0);
    }

    /// Negotiates without `VIRTIO_F_EVENT_IDX`, sets both queues up and gives buffers for events.
    pub fn start_device(&mut self) {
        self.write(IOMMU + 0x70, 1);
        self.write(IOMMU + 0x70, 3);
        for (page, features) in [(0, 0x57), (1, 1)] {
            self.write(IOMMU + 0x24, page);
            self.write(IOMMU + 0x20, features);
        }
        self.write(IOMMU + 0x70, 0xb);
        for queue in 0..2 {
            let base = QUEUES + queue * 0x3000;
            for ring in [0, 0x1000, 0x1004, 0x2000] {
                self.write(base + ring, 0);
            }
            self.write(IOMMU + 0x30, queue);
            self.write(IOMMU + 0x38, QUEUE_SIZE);
            for (register, ring) in [(0x80, 0), (0x90, 0x1000), (0xa0, 0x2000)] {
                self.write(IOMMU + register, base + ring);
            }
            self.write(IOMMU + 0x44, 1);
        }
        // Two buffers for events: descriptors 0 and 1.
        let base = QUEUES + 0x3000;
        for index in 0..2 {
            for (field, value) in [(0, EVENTS + index * 0x20), (4, 0), (8, 24), (12, 2)] {
                self.write(base + index * 16 + field, value);
            }
        }
        self.write(base + 0x1004, 1 << 16);
        self.write(base + 0x1000, 2 << 16);
        self.write(IOMMU + 0x70, 0xf);
        (self.requests, self.used) = (self.requests.next_multiple_of(QUEUE_SIZE), 0);
    }

    pub fn reset_device(&mut self) {
        self.write(IOMMU + 0x70, 0);
        self.wait_for_register(IOMMU + 0x70, 0);
    }

    /// Sends a request with a reply of four bytes, and waits for it and its interrupt; where the reply will be.
    pub fn request(&mut self, words: &[u32]) -> u32 {
        let (request, reply) = (REQUESTS + self.requests * 0x80, REPLIES + self.requests * 4);
        for (index, word) in (0..).zip(words) {
            self.write(request + index * 4, *word);
        }
        self.write(reply, 0xaaaa_aaaa);
        let length = words.len() as u32 * 4;
        for (field, value) in
            [(0, request), (4, 0), (8, length), (12, 1 << 16 | 1), (16, reply), (20, 0), (24, 4), (28, 2)]
        {
            self.write(QUEUES + field, value);
        }
        self.requests += 1;
        self.used += 1;
        assert!(self.used < QUEUE_SIZE, "every entry of the ring is 0: its first chain");
        self.write(QUEUES + 0x1000, self.used << 16);
        self.write(IOMMU + super::mmio::QUEUE_NOTIFY as u32, 0);
        self.step(WAIT, QUEUES + 0x2000, self.used << 16);
        self.wait_for_interrupt();
        reply
    }

    pub fn break_request_queue(&mut self) {
        self.write(QUEUES + 0x1000, 1000 << 16);
        self.write(IOMMU + super::mmio::QUEUE_NOTIFY as u32, 0);
    }

    /// Has the emulated device access an address; where the result will be.
    pub fn dma(&mut self, iova: u32, value: u32, command: u32) -> u32 {
        for (register, value) in [(0, iova), (4, value), (8, command)] {
            self.write(DMA + register, value);
        }
        self.read(DMA + 12)
    }

    /// Waits for the first event and its interrupt; where it is.
    pub fn wait_for_event(&mut self) -> u32 {
        self.step(WAIT, QUEUES + 0x3000 + 0x2000, 1 << 16);
        self.wait_for_interrupt();
        EVENTS
    }

    pub fn end(&mut self) {
        self.step(STOP, 0, 0);
    }
}

/// A machine with one processor in protected mode.
pub struct Vm {
    pub fd: VmFd,
    pub vcpu: VcpuFd,
    pub memory: GuestMemoryMmap,
}

impl Vm {
    pub fn new(kvm: &Kvm, script: &Script) -> Self {
        let fd = kvm.create_vm().unwrap();
        fd.set_tss_address(0xfffb_d000).unwrap();
        fd.create_irq_chip().unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY_SIZE as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
            ..kvm_userspace_memory_region::default()
        };
        // SAFETY: the region is a mapping of that size, which this value keeps as long as the machine.
        #[allow(unsafe_code)]
        unsafe { fd.set_user_memory_region(region) }.unwrap();

        memory.write_slice(&INTERPRETER, GuestAddress(CODE)).unwrap();
        memory.write_slice(&INTERRUPT_HANDLER, GuestAddress(u64::from(HANDLER))).unwrap();
        let steps: Vec<u8> = script.steps.iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write_slice(&steps, GuestAddress(SCRIPT)).unwrap();
        // Flat segments for code and data, and a gate for the interrupt.
        for (index, descriptor) in [0, 0x00cf_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
            memory.write_obj(descriptor, GuestAddress(DESCRIPTORS + 8 * index as u64)).unwrap();
        }
        let gate = u64::from(HANDLER) | 8 << 16 | 0x8e00 << 32;
        memory.write_obj(gate, GuestAddress(INTERRUPT_TABLE + 8 * u64::from(0x20 + IRQ))).unwrap();

        let vcpu = fd.create_vcpu(0).unwrap();
        let cpuid: CpuId = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        let flat = |selector, type_| kvm_segment {
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..kvm_segment::default()
        };
        let mut special = vcpu.get_sregs().unwrap();
        special.cs = flat(8, 11);
        for segment in [&mut special.ds, &mut special.es, &mut special.ss] {
            *segment = flat(16, 3);
        }
        (special.gdt.base, special.gdt.limit) = (DESCRIPTORS, 23);
        (special.idt.base, special.idt.limit) = (INTERRUPT_TABLE, 8 * 0x30 - 1);
        special.cr0 |= 1;
        vcpu.set_sregs(&special).unwrap();
        let mut registers = vcpu.get_regs().unwrap();
        (registers.rip, registers.rsp, registers.rsi, registers.rflags) = (CODE, STACK, SCRIPT, 2);
        vcpu.set_regs(&registers).unwrap();
        Self { fd, vcpu, memory }
    }
}
