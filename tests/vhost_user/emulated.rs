// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device that is emulated in this process.

use super::*;

#[test]
fn an_emulated_device_uses_the_guests_memory_and_its_faults_reach_the_guest_without_a_kick() {
    use virtio_iommu::translate::{Limits, Translation};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    let group = Arc::new(Translation::new(Limits::default()).group(vec![ID]));
    let translator = group.translator(ID).unwrap();
    let settings = Settings { boot_bypass: false, ..Settings::new("0-7fffffffff".parse().unwrap(), 0x1000) };
    let views = vec![(ID, EndpointView::new(Vec::new()).unwrap())];
    let device = VirtioIommu::new(settings, views, vec![Arc::clone(&group) as _]).unwrap();
    let backend =
        Arc::new(IommuBackend::new(device, BackendOptions { on_stop: OnStop::Keep, polling: Polling::Off }).unwrap());
    group.on_refused(backend.waker());

    let (daemon, stream) = serve(&backend);
    let mut machine = Machine::over(stream, guest_memory(MEMORY_SIZE));
    machine.start();
    machine.start_event_ring();
    assert_eq!(machine.send(&attach(1, ENDPOINT, 0)), OK);
    assert_eq!(machine.send(&map(1, 0x5000, 0x1000, 0x2000, 1)), OK);

    let write = |iova| {
        let pinned = translator.pin();
        let memory = backend.memory().memory();
        let found = pinned.segments(iova, 4, Access::WRITE).next().unwrap();
        found.map(|segment| memory.write_slice(b"data", segment.start).unwrap()).is_ok()
    };
    assert!(!write(0x5000), "it may only be read");
    let event = machine.wait_for_event();
    assert_eq!((event[0], u64::from_le_bytes(event[16..].try_into().unwrap())), (2, 0x5000));
    assert_eq!(machine.send(&map(1, 0x6000, 0x1000, 0x3000, 2)), OK);
    assert!(write(0x6000));
    assert_eq!(machine.memory.read_obj::<[u8; 4]>(GuestAddress(0x3000)).unwrap(), *b"data");

    drop(machine);
    // However the connection ended.
    let _ = daemon.join().unwrap();
    backend.shut_down();
    assert!(!write(0x6000), "the frontend is gone");
}
