// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device behind its IOMMU, which is driven by the bytes of requests.

#![allow(clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;

use std::thread::{self, JoinHandle};

use vfio_user::Client;
use virtio_iommu::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};

use super::*;
use crate::edu::{SIZE, Transfer};
use common::{Memory, attach, guest_memory, map, unmap};

const ENDPOINT: u32 = 0x18;
const PAGE: usize = 0x1000;
const IOVA: u64 = 0x400_0000;
const BUFFER: u64 = 0x4_0000;
const READ: u32 = 1;
const WRITE: u32 = 2;
const TO_DEVICE: u64 = 1;
const FROM_DEVICE: u64 = 3;

/// A guest with the IOMMU and the device.
struct Bench {
    iommu: VirtioIommu,
    memory: Memory,
    edu: Edu,
}

impl Bench {
    fn new() -> Self {
        let (mut iommu, group) = device(EndpointId(ENDPOINT)).unwrap();
        let memory = guest_memory(0x10_0000);
        iommu.set_memory(GuestRam::from_mmap(&memory).unwrap());
        iommu.set_driver_features(iommu.features());
        let translator = group.translator(EndpointId(ENDPOINT)).unwrap();
        let edu = Edu::new(Bus::new(translator, GuestMemoryAtomic::new(memory.clone())));
        let mut bench = Self { iommu, memory, edu };
        bench.send(&attach(1, ENDPOINT, 0));
        bench
    }

    fn send(&mut self, request: &[u8]) {
        let mut reply = [0xff; 4];
        assert_eq!((self.iommu.handle(request, &mut reply), reply), (4, [0; 4]));
    }

    fn map(&mut self, iova: u64, physical: u64, flags: u32) {
        self.send(&map(1, iova, PAGE as u64, physical, flags));
    }

    fn read(&self, register: u64) -> u64 {
        let mut data = [0; 8];
        let size = if register < 0x80 { 4 } else { 8 };
        self.edu.read(register, &mut data[..size]);
        u64::from_le_bytes(data)
    }

    fn write(&mut self, register: u64, value: u32) {
        assert!(self.edu.write(register, &value.to_le_bytes(), true).is_none());
    }

    /// Sets the DMA engine up and starts it.
    fn dma(&mut self, source: u64, target: u64, count: u64, command: u64) -> Option<Transfer> {
        for (register, value) in [(0x80, source), (0x88, target), (0x90, count)] {
            assert!(self.edu.write(register, &value.to_le_bytes(), true).is_none());
        }
        self.edu.write(0x98, &command.to_le_bytes(), true)
    }

    /// Fills the device's buffer, by a page of memory that is not looked at otherwise.
    fn load(&mut self, bytes: &[u8; PAGE]) {
        self.memory.write_slice(bytes, GuestAddress(0xf_f000)).unwrap();
        self.map(0x800_0000, 0xf_f000, READ);
        let transfer = self.dma(0x800_0000, BUFFER, PAGE as u64, TO_DEVICE).unwrap();
        assert_eq!(transfer.to_string(), "reads 4096 bytes at 0x8000000: guest memory at 0xff000");
        self.send(&unmap(1, 0x800_0000, PAGE as u64));
    }

    fn page(&self, address: u64) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        self.memory.read_slice(&mut page, GuestAddress(address)).unwrap();
        page
    }

    /// The addresses of the faults that the guest is told of.
    fn faults(&mut self) -> Vec<u64> {
        std::iter::from_fn(|| self.iommu.take_fault()).map(|fault| fault.address.unwrap()).collect()
    }
}

#[test]
fn registers_are_those_of_an_edu() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(0x00), 0x0100_00ed);
    bench.write(0x04, 0x1234_5678);
    assert_eq!(bench.read(0x04), 0xedcb_a987);
    for (of, factorial) in
        [(0, 1), (5, 120), (12, 479_001_600), (13, 1_932_053_504), (33, 1 << 31), (34, 0), (u32::MAX, 0)]
    {
        bench.write(0x08, of);
        assert_eq!(bench.read(0x08), factorial, "{of}!");
    }
    assert_eq!(bench.read(0x24), 0, "no interrupt was asked for");
    bench.write(0x20, u32::MAX);
    assert_eq!(bench.read(0x20), 0x80);
    bench.write(0x08, 5);
    bench.write(0x60, 0x6);
    assert_eq!(bench.read(0x24), 0x7);
    bench.write(0x64, 0x3);
    assert_eq!(bench.read(0x24), 0x4);
    bench.edu.reset();
    assert_eq!((bench.read(0x08), bench.read(0x20), bench.read(0x24)), (0, 0, 0));
}

#[test]
fn accesses_of_other_sizes_or_to_nothing_do_nothing() {
    let mut bench = Bench::new();
    bench.write(0x04, 0);
    for (offset, size) in [(0x04, 1), (0x04, 2), (0x04, 8), (0x80, 2), (0x05, 4), (SIZE, 4), (u64::MAX, 8), (0x04, 0)] {
        assert!(bench.edu.write(offset, &vec![0x55; size], true).is_none());
        let mut data = vec![0; size];
        bench.edu.read(offset, &mut data);
        assert!(data.iter().all(|byte| *byte == 0xff), "{size} bytes at {offset:#x}");
    }
    let mut long = [0; 16];
    bench.edu.read(0x80, &mut long);
    assert!(bench.edu.write(0x80, &[0x55; 16], true).is_none());
    assert_eq!((bench.read(0x04), bench.read(0x80)), (u64::from(u32::MAX), 0));
}

#[test]
fn dma_goes_where_the_guest_mapped_it() {
    let mut bench = Bench::new();
    let bytes = std::array::from_fn(|at| at as u8);
    bench.load(&bytes);
    bench.map(IOVA, 0x2_0000, WRITE);
    bench.map(IOVA + 0x1000, 0x5_0000, WRITE);
    // 28 bits of the address count.
    let transfer = bench.dma(BUFFER + 0x10, (0xf << 28) | (IOVA + 0xffc), 8, FROM_DEVICE).unwrap();
    assert_eq!(transfer.to_string(), "writes 8 bytes at 0x4000ffc: guest memory at 0x20ffc");
    assert_eq!(bench.page(0x2_0000)[0xffc..], bytes[0x10..0x14]);
    assert_eq!(bench.page(0x5_0000)[..4], bytes[0x14..0x18]);
    assert!(bench.page(0x2_0000)[..0xffc].iter().chain(&bench.page(0x5_0000)[4..]).all(|byte| *byte == 0));
    assert_eq!(bench.read(0x98), FROM_DEVICE & !1, "it is done");
    assert!(bench.faults().is_empty());
}

#[test]
fn dma_that_was_not_allowed_changes_nothing_and_is_reported() {
    let mut bench = Bench::new();
    bench.load(&[0x5a; PAGE]);
    bench.map(IOVA, 0x2_0000, READ);
    bench.map(IOVA + 0x2000, 0x2_0000, WRITE);
    bench.send(&unmap(1, IOVA + 0x2000, PAGE as u64));
    for iova in [IOVA, IOVA + 0x2000, 0x2_0000, (1 << 28) - 1] {
        let transfer = bench.dma(BUFFER, iova, PAGE as u64, FROM_DEVICE).unwrap().to_string();
        assert!(transfer.contains("refused"), "{transfer}");
        assert_eq!(bench.faults(), [iova]);
    }
    assert_eq!(bench.page(0x2_0000), [0; PAGE]);
    // Nor is the device's buffer, by what cannot be read.
    assert!(bench.dma(0x700_0000, BUFFER, PAGE as u64, TO_DEVICE).unwrap().to_string().contains("refused"));
    bench.map(0x600_0000, 0x3_0000, WRITE);
    bench.dma(BUFFER, 0x600_0000, PAGE as u64, FROM_DEVICE).unwrap();
    assert_eq!(bench.page(0x3_0000), [0x5a; PAGE]);
}

#[test]
fn dma_that_is_mapped_in_part_ends_where_the_mapping_ends() {
    let mut bench = Bench::new();
    bench.load(&[0x5a; PAGE]);
    bench.map(IOVA, 0x2_0000, WRITE);
    let transfer = bench.dma(BUFFER, IOVA + 0x800, PAGE as u64, FROM_DEVICE).unwrap().to_string();
    assert!(transfer.contains("0x4001000 refused: nothing is mapped there"), "{transfer}");
    assert_eq!(bench.faults(), [IOVA + 0x1000]);
    assert!(bench.page(0x2_0000)[..0x800].iter().all(|byte| *byte == 0));
    assert!(bench.page(0x2_0000)[0x800..].iter().all(|byte| *byte == 0x5a));
    assert_eq!(bench.page(0x2_1000), [0; PAGE]);
}

#[test]
fn what_reaches_out_of_the_devices_buffer_is_not_done() {
    let mut bench = Bench::new();
    bench.map(IOVA, 0x2_0000, READ | WRITE);
    let size = PAGE as u64;
    for (own, count) in [
        (BUFFER, size + 1),
        (BUFFER + 1, size),
        (BUFFER - 1, 1),
        (BUFFER + size, 1),
        (0, size),
        (BUFFER, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
    ] {
        assert!(bench.dma(own, IOVA, count, FROM_DEVICE).is_none(), "{count:#x} bytes from {own:#x}");
        assert!(bench.dma(IOVA, own, count, TO_DEVICE).is_none(), "{count:#x} bytes to {own:#x}");
    }
    assert_eq!(
        bench.dma(BUFFER + size, IOVA, 0, FROM_DEVICE).unwrap().to_string(),
        "writes 0 bytes at 0x4000000: nothing"
    );
    assert!(bench.faults().is_empty());
}

#[test]
fn a_device_that_is_no_bus_master_and_one_whose_iommu_was_reset_or_ended_reach_nothing() {
    let mut bench = Bench::new();
    bench.load(&[0x5a; PAGE]);
    bench.map(IOVA, 0x2_0000, WRITE);
    for (register, value) in [(0x80, BUFFER), (0x88, IOVA), (0x90, 8)] {
        bench.edu.write(register, &value.to_le_bytes(), true);
    }
    assert!(bench.edu.write(0x98, &FROM_DEVICE.to_le_bytes(), false).is_none());
    assert_eq!(bench.page(0x2_0000), [0; PAGE]);
    let refused = |bench: &mut Bench| bench.edu.write(0x98, &FROM_DEVICE.to_le_bytes(), true).unwrap().to_string();
    bench.iommu.reset();
    assert!(refused(&mut bench).contains("in no domain, or blocked"));
    bench.iommu.shut_down();
    assert!(refused(&mut bench).contains("in no domain, or blocked"));
    assert_eq!(bench.page(0x2_0000), [0; PAGE]);
}

/// The device behind a socket.
fn serve(edu: Edu) -> (Client, JoinHandle<()>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let server = Server::new(&path, true, Function::interrupts(), Function::regions()).unwrap();
    let thread = thread::spawn(move || serve_device(&server, Function::new(edu)));
    (Client::new(&path).unwrap(), thread, directory)
}

#[test]
fn the_function_is_driven_over_vfio_user() {
    const CONFIG: u32 = 7;
    let mut bench = Bench::new();
    bench.load(&[0x5a; PAGE]);
    bench.map(IOVA, 0x2_0000, WRITE);
    let Bench { memory, edu, mut iommu } = bench;
    let (mut client, thread, _directory) = serve(edu);
    assert_eq!(client.region(0).unwrap().size, SIZE);
    let mut header = [0; 16];
    client.region_read(CONFIG, 0, &mut header).unwrap();
    assert_eq!(header, [0x34, 0x12, 0xe8, 0x11, 0, 0, 0, 0, 0x10, 0, 0xff, 0, 0, 0, 0, 0]);
    assert_eq!(client.get_irq_info(1).unwrap().count, 0);

    assert_eq!(written(&mut client, &memory), [0; 8], "it is no bus master yet");
    client.region_write(CONFIG, 4, &[0xff, 0xff]).unwrap();
    let mut command = [0; 4];
    client.region_read(CONFIG, 4, &mut command).unwrap();
    assert_eq!(command, [6, 0, 0, 0]);
    assert_eq!(written(&mut client, &memory), [0x5a; 8]);
    client.reset().unwrap();
    client.region_read(CONFIG, 4, &mut command).unwrap();
    assert_eq!(command, [0; 4]);
    assert_eq!(written(&mut client, &memory), [0; 8]);

    // A write to what is not there changes nothing, and the connection lives on.
    client.region_write(CONFIG, u64::MAX, &[6]).unwrap();
    client.region_write(0, u64::MAX, &[6]).unwrap();
    client.region_read(CONFIG, 4, &mut command).unwrap();
    assert_eq!(command, [0; 4]);
    client.shutdown().unwrap();
    thread.join().unwrap();
    iommu.shut_down();
}

/// Has the device write to guest memory; what is there then.
fn written(client: &mut Client, memory: &Memory) -> [u8; 8] {
    memory.write_slice(&[0; 8], GuestAddress(0x2_0000)).unwrap();
    for (register, value) in [(0x80, BUFFER), (0x88, IOVA), (0x90, 8), (0x98, FROM_DEVICE)] {
        client.region_write(0, register, &value.to_le_bytes()).unwrap();
    }
    memory.read_obj(GuestAddress(0x2_0000)).unwrap()
}
