// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest of `make quick` runs: a program with a device of its own, by VFIO. The guest's IOMMU, and so what this
//! drives through its kernel, is the one that the host's process serves.

#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

#[allow(dead_code, reason = "a part of what the host VM's tests do with devices")]
#[path = "../hostvm/pci.rs"]
mod pci;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use virtio_iommu::access::Access;
use virtio_iommu::host::HostGroup;
use virtio_iommu::host::type1::{Container, VfioGroup};
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::IovaRange;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use pci::{EDU, Edu, bind_to_vfio, find, open};

const PAGE: u64 = 0x1000;
const SIZE: usize = PAGE as usize;
/// Pages of this program's memory.
const SOURCE: GuestAddress = GuestAddress(0);
const TARGET: GuestAddress = GuestAddress(PAGE);
/// Where the device sees them.
const SOURCE_IOVA: u64 = 0x400_0000;
const TARGET_IOVA: u64 = 0x400_1000;

/// Waits for the line in the kernel's log that reports a fault at an address.
fn fault_at(address: u64) -> String {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let output = Command::new("dmesg").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let is_it = |line: &&str| line.contains("fault from EP") && line.contains(&format!("{address:#x} "));
        if let Some(line) = text.lines().find(is_it) {
            return line.to_owned();
        }
        assert!(Instant::now() < deadline, "the guest's kernel reports no fault at {address:#x}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
#[ignore = "runs in the guest of make quick"]
fn dma_goes_where_it_is_mapped_and_nowhere_else() {
    let address = find(EDU);
    bind_to_vfio(address);
    let container = Container::new(open("/dev/vfio/vfio").into()).unwrap();
    let number = std::fs::read_link(format!("/sys/bus/pci/devices/{address}/iommu_group")).unwrap();
    let node = Path::new("/dev/vfio").join(number.file_name().unwrap());
    let vfio_group = VfioGroup::new(open(node).into()).unwrap();
    vfio_group.join(&container).unwrap();
    container.set_iommu().unwrap();
    let file = File::from(vfio_group.device(&address.to_string()).unwrap());
    let usable = container.info().unwrap().usable.unwrap();
    println!("\nquick| VFIO: usable {}", usable.ranges().iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
    let group = container.into_group(vec![address.into()]).unwrap();
    let table = group.new_table().unwrap();
    group.attach(&table).unwrap();

    let memory = GuestMemoryMmap::<()>::from_ranges(&[(SOURCE, 2 * SIZE)]).unwrap();
    let page = |at| -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        memory.read_slice(&mut bytes, at).unwrap();
        bytes
    };
    let mut bytes = vec![0; SIZE];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    memory.write_slice(&bytes, SOURCE).unwrap();
    let ram = GuestRam::from_mmap(&memory).unwrap();
    let range = |iova| IovaRange::from_length(iova, PAGE).unwrap();
    let map = |iova, at, access| table.map(range(iova), &ram.segments(at, PAGE).unwrap(), access).unwrap();

    let edu = Edu::new(&file);
    map(SOURCE_IOVA, SOURCE, Access::READ);
    map(TARGET_IOVA, TARGET, Access::WRITE);
    edu.read(SOURCE_IOVA, PAGE);
    edu.write(TARGET_IOVA, PAGE);
    assert!(page(TARGET) == bytes, "the bytes that the device read and wrote are not those that were there");
    println!(
        "quick| MAP {SOURCE_IOVA:#x} (read), {TARGET_IOVA:#x} (write): {SIZE} random bytes by DMA, all as they were"
    );

    let expect_blocked = |iova, at, why: &str| {
        memory.write_slice(&[0x11; SIZE], at).unwrap();
        edu.write(iova, PAGE);
        assert!(page(at).iter().all(|byte| *byte == 0x11), "the device wrote to {iova:#x}: {why}");
        println!("quick| {why}: a write to {iova:#x} changes nothing; the kernel: {}", fault_at(iova));
    };
    expect_blocked(SOURCE_IOVA, SOURCE, "only mapped to be read");
    assert_eq!(table.unmap(range(TARGET_IOVA)).unwrap(), PAGE);
    expect_blocked(TARGET_IOVA, TARGET, "after UNMAP");
    group.block();
}
