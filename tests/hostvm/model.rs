// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The model of the kernel that other tests rely on, against the kernel: the same calls in the same order have the same results,
//! error for error.

use std::fs::File;
use std::os::fd::OwnedFd;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use rustix::io::Errno;
use virtio_iommu::access::Access;
use virtio_iommu::host::fake::kernel::FakeKernel;
use virtio_iommu::host::iommufd::{Iommufd, VfioDevice};
use virtio_iommu::host::type1::{Container, ContainerApi, VfioGroup};
use virtio_iommu::id::EndpointId;
use virtio_iommu::memory::GuestRam;
use virtio_iommu::range::{IovaRange, RangeSet};
use virtio_iommu::reserved::sysfs::Sysfs;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::common::guest_memory;
use crate::pci::{EDU, bind_to_vfio, find, open, open_vfio};

const PAGE: u64 = 0x1000;
const DEVICE: EndpointId = EndpointId(1);

/// A call, with places in the lists of objects that were made instead of their numbers.
#[derive(Clone, Copy, Debug)]
enum Call {
    Alloc,
    Destroy { object: usize },
    Map { object: usize, iova: u64, length: u64, page: u64, flags: u8, by_file: bool },
    Copy { object: usize, iova: u64, length: u64, from: usize, source: u64 },
    Unmap { object: usize, iova: u64, length: u64 },
    UnmapAll { object: usize },
    HardwareTable { object: usize },
    Attach { object: usize },
    Detach,
}

/// Addresses in a few pages, most of them aligned; some at the doorbell.
fn iova() -> impl Strategy<Value = u64> {
    prop_oneof![20 => (0..12u64).prop_map(|page| page * PAGE), 1 => Just(0x1001), 1 => Just(0xfee0_0000)]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![16 => (1..5u64).prop_map(|pages| pages * PAGE), 1 => Just(0x800)]
}

fn call() -> impl Strategy<Value = Call> {
    let object = 0..4usize;
    prop_oneof![
        2 => Just(Call::Alloc),
        1 => object.clone().prop_map(|object| Call::Destroy { object }),
        8 => (object.clone(), iova(), length(), 0..8u64, 0..4u8, any::<bool>())
            .prop_map(|(object, iova, length, page, flags, by_file)| Call::Map { object, iova, length, page, flags, by_file }),
        3 => (object.clone(), iova(), length(), object.clone(), iova())
            .prop_map(|(object, iova, length, from, source)| Call::Copy { object, iova, length, from, source }),
        5 => (object.clone(), iova(), length()).prop_map(|(object, iova, length)| Call::Unmap { object, iova, length }),
        1 => object.clone().prop_map(|object| Call::UnmapAll { object }),
        1 => object.clone().prop_map(|object| Call::HardwareTable { object }),
        3 => object.prop_map(|object| Call::Attach { object }),
        2 => Just(Call::Detach),
    ]
}

/// A kernel, and the numbers of what was made in it.
struct Side {
    iommufd: std::sync::Arc<Iommufd>,
    device: VfioDevice,
    number: u32,
    objects: Vec<u32>,
}

impl Side {
    fn new(iommufd: std::sync::Arc<Iommufd>, device: VfioDevice) -> Self {
        let number = device.bind(&iommufd).unwrap();
        Self { iommufd, device, number, objects: Vec::new() }
    }

    fn object(&self, index: usize) -> u32 {
        self.objects.get(index).copied().unwrap_or(0x00ff_ffff)
    }

    fn take(&mut self, call: Call, ram: &GuestRam) -> Result<u64, Errno> {
        let api = self.iommufd.api();
        let range = |start, length| IovaRange::from_length(start, length).unwrap();
        match call {
            Call::Alloc => api.ioas_alloc().map(|id| self.objects.push(id)).map(|()| 0),
            Call::Destroy { object } => {
                let result = api.destroy(self.object(object));
                if result.is_ok() {
                    self.objects.remove(object);
                }
                result.map(|()| 0)
            }
            Call::Map { object, iova, length, page, flags, by_file } => {
                let segment = ram.segments(GuestAddress(page * PAGE), length).unwrap().remove(0);
                let access = Access { read: flags & 1 != 0, write: flags & 2 != 0 };
                let (object, iova, host) = (self.object(object), range(iova, length), segment.host().unwrap());
                if by_file {
                    api.ioas_map_file(object, iova, host.pinnable_file().unwrap(), access).map(|()| 0)
                } else {
                    api.ioas_map(object, iova, host, access).map(|()| 0)
                }
            }
            Call::Copy { object, iova, length, from, source } => {
                let (to, from) = (self.object(object), self.object(from));
                api.ioas_copy(to, range(iova, length), from, source, Access::READ).map(|()| 0)
            }
            Call::Unmap { object, iova, length } => api.ioas_unmap(self.object(object), range(iova, length)),
            Call::UnmapAll { object } => api.ioas_unmap(self.object(object), IovaRange::ALL),
            Call::HardwareTable { object } => {
                api.hwpt_alloc(self.number, self.object(object)).map(|id| self.objects.push(id)).map(|()| 0)
            }
            Call::Attach { object } => self.device.api().attach(self.object(object)).map(|()| 0),
            Call::Detach => self.device.api().detach().map(|()| 0),
        }
    }

    /// Lets go of everything, in an order that is possible.
    fn clear(&mut self) {
        let _ = self.device.api().detach();
        for _ in 0..2 {
            let api = self.iommufd.api();
            self.objects.retain(|object| api.destroy(*object).is_err());
        }
        assert!(self.objects.is_empty());
    }

    fn constraints(&self) -> Vec<Option<(RangeSet, u64)>> {
        let ranges = |object: &u32| self.iommufd.api().ioas_iova_ranges(*object).ok();
        self.objects.iter().map(|object| ranges(object).map(|known| (known.usable, known.granule))).collect()
    }
}

/// The same sequences each time.
fn runner(cases: u32) -> TestRunner {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn iommufd_does_what_its_model_does() {
    let address = find(EDU);
    bind_to_vfio(address);
    let memory = guest_memory(0x10_0000);
    let ram = GuestRam::from_mmap(&memory).unwrap();
    let real = std::sync::Arc::new(Iommufd::new(open("/dev/iommu").into()).unwrap());
    let device = VfioDevice::new(open_vfio(address).into(), address.to_string()).unwrap();
    let real = std::sync::Mutex::new(Side::new(real, device));
    let fresh = real.lock().unwrap().iommufd.new_ioas().unwrap();
    real.lock().unwrap().device.attach(&fresh).unwrap();
    let usable = real.lock().unwrap().iommufd.api().ioas_iova_ranges(fresh.id()).unwrap().usable;
    real.lock().unwrap().device.detach();
    drop(fresh);
    let result = runner(1500).run(&proptest::collection::vec(call(), 1..40), |calls| {
        let kernel = FakeKernel::new();
        let mut model = Side::new(kernel.iommufd(), kernel.devices(&[DEVICE], &usable).remove(0).1);
        let mut real = real.lock().unwrap();
        for (index, call) in calls.iter().enumerate() {
            let (found, expected) = (real.take(*call, &ram), model.take(*call, &ram));
            if found != expected || real.constraints() != model.constraints() {
                let message = format!("{:?}: {found:?}, not {expected:?}", &calls[..=index]);
                let constraints = format!("{:?} {:?}", real.constraints(), model.constraints());
                real.clear();
                return Err(TestCaseError::fail(format!("{message} {constraints}")));
            }
        }
        real.clear();
        model.clear();
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn type1_does_what_its_model_does() {
    // Set before the container is opened.
    const LIMIT: u32 = 12;
    let parameter = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    std::fs::write(parameter, LIMIT.to_string()).unwrap();
    let address = find(EDU);
    bind_to_vfio(address);
    let container = Container::new(open("/dev/vfio/vfio").into()).unwrap();
    let group = Sysfs::new("/sys").group(address).unwrap().number;
    let group = VfioGroup::new(OwnedFd::from(open_group(group))).unwrap();
    group.join(&container).unwrap();
    container.set_iommu().unwrap();
    std::fs::write(parameter, "65535").unwrap();
    assert!(container.set_iommu().is_err(), "it has a type");
    let info = container.info().unwrap();
    assert_eq!(info.mappings_left, Some(LIMIT));
    let usable = info.usable.unwrap();
    let memory: GuestMemoryMmap = guest_memory(0x10_0000);
    let ram = GuestRam::from_mmap(&memory).unwrap();
    let step = (iova(), length(), 0..8u64, 0..4u8, 0..3u8);
    let result = runner(1000).run(&proptest::collection::vec(step, 1..60), |steps| {
        let kernel = FakeKernel::new();
        let model = kernel.container(&[DEVICE], usable.clone(), LIMIT);
        for (iova, length, page, flags, what) in steps {
            let range = IovaRange::from_length(iova, length).unwrap();
            let segment = ram.segments(GuestAddress(page * PAGE), length).unwrap().remove(0);
            let access = Access { read: flags & 1 != 0, write: flags & 2 != 0 };
            let take = |api: &dyn ContainerApi| match what {
                0 => api.unmap_dma(range),
                _ => api.map_dma(range, segment.host().unwrap(), access).map(|()| 0),
            };
            prop_assert_eq!(take(container.api()), take(model.api()), "{} {:?} {}", range, access, what);
            let left = |container: &Container| container.info().unwrap().mappings_left;
            prop_assert_eq!(left(&container), left(&model));
        }
        let all = IovaRange::ALL;
        prop_assert_eq!(container.api().unmap_dma(all), model.api().unmap_dma(all));
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

fn open_group(number: u32) -> File {
    open(format!("/dev/vfio/{number}"))
}
