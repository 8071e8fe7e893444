// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio-iommu and a PCI device behind it, both in this process, beside an unmodified QEMU (11.1 or later).
//!
//! ```sh
//! vfio-user-device DIRECTORY qemu-system-x86_64 -machine q35,memory-backend=ram -m 256M \
//!     -object memory-backend-memfd,id=ram,size=256M,share=on ...
//! ```
//!
//! The IOMMU is served by vhost-user, the device by vfio-user; sockets and the guest's ACPI table are put into the directory, and
//! what QEMU needs to know of them is added to its command line. The device is like QEMU's `edu`. It does its DMA in this
//! process, by the translations that the guest's driver asked the IOMMU for: no host IOMMU and no KVM are needed. From the start,
//! after a reset of the IOMMU and when QEMU is gone, it reaches nothing.
//!
//! QEMU is trusted further than the guest: the `vfio_user` crate takes its word for the lengths of messages. There are no
//! interrupts.

mod bus;
mod edu;
mod function;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::thread;

use vfio_user::Server;
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::Error as ConnectionError;
use virtio_iommu::causes::with_causes;
use virtio_iommu::device::{Settings, VirtioIommu};
use virtio_iommu::id::{EndpointId, PciAddress};
use virtio_iommu::queue::Polling;
use virtio_iommu::reserved::plan::X86_MSI;
use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};
use virtio_iommu::topology::viot::{self, PciFunctions};
use virtio_iommu::translate::{EmulatedGroup, Limits, Translation};
use virtio_iommu::vhost_user::{BackendOptions, IommuBackend, OnStop};

use crate::bus::Bus;
use crate::edu::Edu;
use crate::function::Function;

/// Where the guest has the IOMMU, and the device.
const IOMMU: &str = "00:01.0";
const DEVICE: &str = "00:03.0";
/// How far I/O virtual addresses go, and what a mapping is a multiple of.
const INPUT_RANGE: &str = "0-ffffffffffff";
const GRANULE: u64 = 0x1000;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(directory), Some(qemu)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: vfio-user-device DIRECTORY QEMU [ARGUMENT...]");
        return ExitCode::from(2);
    };
    match run(&PathBuf::from(directory), &qemu, arguments.collect()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vfio-user-device: {}", with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Serves both until QEMU ends, which decides on the exit code.
fn run(directory: &Path, qemu: &OsString, mut arguments: Vec<OsString>) -> Result<ExitCode, Box<dyn Error>> {
    let table = viot::table(IOMMU.parse::<PciAddress>()?, [DEVICE.parse::<PciFunctions>()?])?;
    let endpoint = EndpointId::from(DEVICE.parse::<PciAddress>()?);
    let (device, group) = device(endpoint)?;
    let translator = group.translator(endpoint).ok_or("the endpoint is not in its group")?;
    let backend =
        Arc::new(IommuBackend::new(device, BackendOptions { on_stop: OnStop::Keep, polling: Polling::Auto })?);
    // A fault is delivered when it happens, not with the next request.
    group.on_refused(backend.waker());
    let function = Function::new(Edu::new(Bus::new(translator, backend.memory().clone())));

    let path = |name| directory.join(name);
    let (table_path, iommu_path, device_path) = (path("viot.bin"), path("iommu.sock"), path("device.sock"));
    fs::write(&table_path, table).map_err(|error| format!("cannot write {}: {error}", table_path.display()))?;
    let listener = UnixListener::bind(&iommu_path)
        .map_err(|error| format!("cannot listen on {}: {error}", iommu_path.display()))?;
    let server = Server::new(&device_path, true, Function::interrupts(), Function::regions())
        .map_err(|error| format!("cannot listen on {}: {error}", device_path.display()))?;

    thread::spawn({
        let backend = Arc::clone(&backend);
        move || serve_iommu(&backend, listener)
    });
    thread::spawn(move || serve_device(&server, function));

    arguments.extend(qemu_arguments(&table_path, &iommu_path, &device_path).map(OsString::from));
    let status = Command::new(qemu).args(arguments).status();
    // The threads end with the process: they may still wait for a QEMU that never connected.
    println!("iommu: {}", backend.shut_down());
    for path in [&iommu_path, &device_path] {
        // The server removes its own, if it had the time.
        let _ = fs::remove_file(path);
    }
    let status = status.map_err(|error| format!("cannot start {}: {error}", qemu.display()))?;
    // As a shell has it.
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// An IOMMU with an endpoint behind it, whose device is emulated.
fn device(endpoint: EndpointId) -> Result<(VirtioIommu, Arc<EmulatedGroup>), Box<dyn Error>> {
    let group = Arc::new(Translation::new(Limits::default()).group(vec![endpoint]));
    let doorbell = ReservedRegion { range: X86_MSI, kind: ReservedKind::Msi };
    let view = EndpointView::new(vec![doorbell])?;
    let settings = Settings { boot_bypass: false, ..Settings::new(INPUT_RANGE.parse()?, GRANULE) };
    let device = VirtioIommu::new(settings, vec![(endpoint, view)], vec![group.clone()])?;
    Ok((device, group))
}

fn serve_iommu(backend: &Arc<IommuBackend>, listener: UnixListener) {
    let served = backend.daemon("iommu").and_then(|mut daemon| {
        daemon.start(&mut Listener::from(listener))?;
        let ended = daemon.wait();
        // Nobody speaks for the guest any more.
        backend.shut_down();
        ended
    });
    match served {
        Ok(()) | Err(ConnectionError::HandleRequest(ProtocolError::Disconnected | ProtocolError::PartialMessage)) => {
            println!("iommu: QEMU is gone, the device is blocked");
        }
        Err(error) => println!("iommu: the device is blocked: {error}"),
    }
}

fn serve_device(server: &Server, mut function: Function) {
    match server.run(&mut function) {
        Ok(()) => println!("device: QEMU is gone"),
        Err(error) => println!("device: the connection ended: {error}"),
    }
}

/// What QEMU needs to know.
fn qemu_arguments(table: &Path, iommu: &Path, device: &Path) -> [String; 8] {
    // In option values QEMU wants a comma twice, in JSON not.
    let quoted = |path: &Path| path.display().to_string().replace(',', ",,");
    let socket = serde_json::json!({ "type": "unix", "path": device.display().to_string() });
    [
        "-acpitable".to_owned(),
        format!("file={}", quoted(table)),
        "-chardev".to_owned(),
        format!("socket,id=iommu,path={}", quoted(iommu)),
        "-device".to_owned(),
        "vhost-user-test-device-pci,addr=1.0,chardev=iommu,virtio-id=23,num_vqs=2,vq_size=256,config_size=40"
            .to_owned(),
        "-device".to_owned(),
        serde_json::json!({ "driver": "vfio-user-pci", "addr": "3.0", "socket": socket }).to_string(),
    ]
}
