// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio-iommu device (virtio device 23) for VMMs, and as a vhost-user process.
//!
//! A guest's DMA goes through it: the guest's driver attaches endpoints to domains and maps I/O virtual addresses to
//! guest-physical ones. The device makes the host's IOMMU do the same for assigned devices. What the guest is told about
//! I/O virtual address space is the host IOMMU group's true reserved regions, typed, per endpoint; and never the host's
//! PCI bridge windows, which are no property of a group.
//!
//! # Embedding
//!
//! [`VirtioIommu`](device::VirtioIommu) has no files, threads or clock. It is made of endpoints and the host groups that
//! they are in, and driven by the bytes of requests:
//!
//! ```
//! use std::sync::Arc;
//!
//! use virtio_iommu::device::{Settings, VirtioIommu};
//! use virtio_iommu::host::{HostGroup, software::SoftwareGroup};
//! use virtio_iommu::id::EndpointId;
//! use virtio_iommu::memory::GuestRam;
//! use virtio_iommu::reserved::{EndpointView, ReservedKind, ReservedRegion};
//! use vm_memory::GuestAddress;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // An emulated device at 00:03.0, in a group of its own, that must keep off the x86 doorbell.
//! let endpoint: EndpointId = "00:03.0".parse()?;
//! let doorbell = ReservedRegion { range: "fee00000-feefffff".parse()?, kind: ReservedKind::Msi };
//! let group: Arc<dyn HostGroup> = Arc::new(SoftwareGroup::new(vec![endpoint], 4096));
//! let settings = Settings::new("0-ffffffffffff".parse()?, 4096);
//! let mut iommu = VirtioIommu::new(settings, vec![(endpoint, EndpointView::new(vec![doorbell])?)], vec![group])?;
//! iommu.set_memory(GuestRam::in_software(&[(GuestAddress(0), 0x1000_0000)])?);
//! iommu.set_driver_features(iommu.features());
//!
//! // A request as it comes out of the request queue: ATTACH 00:03.0 to domain 1. The reply is four bytes.
//! let attach = [1, 0, 0, 0, 1, 0, 0, 0, 0x18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
//! let mut reply = [0xff; 4];
//! assert_eq!(iommu.handle(&attach, &mut reply), 4);
//! assert_eq!(reply, [0; 4]);
//! # Ok(())
//! # }
//! ```
//!
//! With feature `queue`, [`queue::Requests`] does that for a whole virtqueue; with feature `embed`, [`embed`] puts the device behind a
//! transport and a loop, and has an example with an emulated device behind it. With feature `iommufd`,
//! [`host::iommufd::IommufdGroup`] stands for a group of assigned devices. A VMM implements [`host::HostGroup`] and
//! [`host::IoPageTable`] for anything else that translates.
//!
//! # Where things are
//!
//! | | | feature |
//! |---|---|---|
//! | [`spec`] | the wire: constants and layouts | |
//! | [`request`] | bytes to requests, with the rules that need no state (reserved fields, flags); replies to bytes | |
//! | [`device`] | what each request does: `attach.rs` and `map.rs` have the rules of those requests, `mod.rs` PROBE, features, configuration and reset, `group.rs` where the host's groups are in consequence | `serde` for saved states |
//! | [`range`], [`id`], [`access`], [`causes`] | ranges of addresses, names of things, permissions, errors as text | |
//! | [`reserved`] | what a guest must not map, and why | |
//! | [`host`] | the host's page tables: the seam, none at all, iommufd, VFIO type1, vhost-vdpa, and a model for tests | `iommufd`, `type1`, `vhost`, `test-utils` |
//! | [`translate`] | translation in software, for devices that are emulated in this process or are in the host's kernel | `translate`, `vhost` |
//! | [`memory`] | guest memory as the host needs it | |
//! | [`fd`] | files passed in | `iommufd`, `type1`, `vhost` |
//! | [`queue`] | virtqueues | `queue` |
//! | [`embed`] | the device behind a VMM's transport and event loop | `embed`, `event-manager` |
//! | [`topology`] | telling the guest which devices are behind the IOMMU | `acpi`, `fdt` |
//! | [`vhost_user`] | the device behind a vhost-user connection; the daemon | `vhost-user`; `daemon` |
//! | [`control`] | what an operator asks and changes while a guest runs: the daemon's control socket | `daemon` |
//! | [`sandbox`] | what the daemon gives up before it serves | `daemon` |
//! | [`launch`] | looking at a host, starting QEMU and the daemon together | `daemon` |
//!
//! # Threats
//!
//! Guests, vhost-user frontends and files of facts are hostile: no number of theirs is trusted in arithmetic, sizes an
//! allocation or bounds a loop without a limit of ours, and what is wrong is refused without a change. A guest's mapping
//! reaches guest memory only, with the permissions that it asked for, and nothing once its UNMAP has returned. When the
//! host does not follow, DMA stops. The host's kernel, its IOMMU and whoever passes the files are trusted; whoever holds
//! the same iommufd can undo what this device did in it.
//!
//! What this does not cover: a process that is killed leaves its mappings in force as long as somebody else holds the
//! iommufd; the daemon has a watcher that detaches the devices then, unless it is killed too. An endpoint that is detached while a sibling of its host group stays reaches what the sibling reaches. On x86
//! a guest has no interrupt remapping behind this device: an assigned device can send interrupts that its driver did not
//! set up. A vhost-user frontend whose notification file blocks at the moment it is passed can hold up the connection's thread:
//! that it is gone is not seen then, and endpoints stay as they are until the daemon gets SIGTERM. The daemon gives up what it has no use
//! for before it listens to a frontend ([`sandbox`], feature `daemon`); a VMM that embeds the device has a sandbox of its own.

#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

pub mod access;
pub mod causes;
#[cfg(feature = "daemon")]
pub mod control;
pub mod device;
#[cfg(feature = "embed")]
pub mod embed;
#[cfg(any(feature = "iommufd", feature = "type1", feature = "vhost"))]
pub mod fd;
pub mod host;
pub mod id;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod launch;
mod mapping;
pub mod memory;
#[cfg(feature = "daemon")]
mod paths;
#[cfg(feature = "queue")]
pub mod queue;
pub mod range;
pub mod request;
pub mod reserved;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod sandbox;
pub mod spec;
#[cfg(feature = "daemon")]
mod standard_error;
#[cfg(any(feature = "acpi", feature = "fdt"))]
pub mod topology;
#[cfg(feature = "translate")]
pub mod translate;
#[cfg(feature = "vhost-user")]
pub mod vhost_user;

/// The document's code is compiled with the documentation's.
#[cfg(all(doctest, feature = "iommufd", feature = "queue", feature = "translate"))]
#[doc = include_str!("../docs/embedding.md")]
pub struct Embedding;
