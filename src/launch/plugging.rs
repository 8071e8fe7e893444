// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that a guest is given and gives back, with the daemon and QEMU kept in step: while the guest may have a device, the daemon has
//! its endpoint. Otherwise the guest would have a device whose DMA is refused, and the daemon would not know it.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use super::operate::OperateError;
use super::output::say;
use super::qmp::{Plug, Qmp, QmpError, Unplugged};
use crate::causes::with_causes;
use crate::control::protocol::{Held, RefusalKind, Reply, Request};
use crate::control::{Client, ClientError};
use crate::id::{EndpointId, PciAddress};
use crate::reserved::facts::Text;

/// Devices that were not plugged or not removed, and what has become of them.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// QEMU refused a device. Neither the guest nor the daemon has kept any.
    #[error("the guest cannot have {device}: all was taken back")]
    Refused {
        /// Where the guest was to have it.
        device: PciAddress,
        /// Why.
        source: QmpError,
    },
    /// QEMU refused a device, and not all could be taken back.
    #[error(
        "the guest cannot have {device}, and the daemon keeps {list}, which could not be taken back: repeat that with `viommuctl remove \
         {list} --qmp PATH`", list = list(.left)
    )]
    Left {
        /// Where the guest was to have it.
        device: PciAddress,
        /// The endpoints that the daemon still has.
        left: Vec<EndpointId>,
        /// Why QEMU refused.
        source: QmpError,
    },
    /// Whether the guest has a device, or will have it, is not known.
    #[error(
        "it is not known whether the guest has, or will have, {device}; the daemon keeps {list}: when QEMU answers again, see there \
         (query-pci), and take them back with `viommuctl remove {list} --qmp PATH`, whether the guest has them or not",
        list = list(.endpoints)
    )]
    Unknown {
        /// Where the guest has it, if it does.
        device: PciAddress,
        /// All that were added.
        endpoints: Vec<EndpointId>,
        /// What went wrong with the monitor.
        source: QmpError,
    },
    /// The guest has a device, and the daemon did not block it where it should have.
    #[error(
        "the guest has {device}, which reaches all of its memory until its driver attaches it: the daemon could not be told that it is \
         there (viommuctl bound)"
    )]
    Unsettled {
        /// Where the guest has it.
        device: PciAddress,
        /// Why.
        source: Box<OperateError>,
    },
    /// Not all endpoints were removed. Why was said of each.
    #[error("{} not removed, but left to the daemon; removed: {}", list(.left), list(.done))]
    NotRemoved {
        /// Those that the daemon still has, if it had them.
        left: Vec<EndpointId>,
        /// Those that are gone.
        done: Vec<EndpointId>,
    },
}

fn list(endpoints: &[EndpointId]) -> String {
    if endpoints.is_empty() {
        return "none".to_owned();
    }
    endpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// Whether two functions are of one slot.
pub(super) fn share_slot(one: PciAddress, other: PciAddress) -> bool {
    (one.segment(), one.bus(), one.device()) == (other.segment(), other.bus(), other.device())
}

/// One of the places that a guest would not see. It looks at a slot when function 0 comes, and QEMU lets no other function come later.
pub(super) fn without_function_0(places: &[PciAddress]) -> Option<PciAddress> {
    let is_seen = |place: &PciAddress| places.iter().any(|other| other.function() == 0 && share_slot(*place, *other));
    places.iter().find(|place| !is_seen(place)).copied()
}

impl<'a> Plug<'a> {
    /// A device that is plugged together with those at other places.
    pub fn new(guest: PciAddress, bus: &'a str, file: BorrowedFd<'a>, places: &[PciAddress]) -> Self {
        let is_one_of_several = places.iter().any(|other| *other != guest && share_slot(guest, *other));
        Self { guest, bus, file, is_one_of_several }
    }
}

/// Plugs devices whose endpoints the daemon has. If QEMU refuses one, all are taken from the guest and the daemon again.
pub(super) fn plug_all(client: &mut Client, monitor: &mut Qmp, plugs: &[Plug<'_>]) -> Result<(), PlugError> {
    let mut order: Vec<&Plug<'_>> = plugs.iter().collect();
    // The guest sees a slot's functions when function 0 comes.
    order.sort_by_key(|plug| plug.guest.function() == 0);
    for (at, plug) in order.iter().enumerate() {
        let device = plug.guest;
        let Err(source) = monitor.plug(plug) else {
            // QEMU has bound it, and attached it to the guest's memory.
            settle(client).map_err(|source| PlugError::Unsettled { device, source: Box::new(source) })?;
            continue;
        };
        if !matches!(source, QmpError::Refused { .. }) {
            let endpoints = plugs.iter().map(|plug| plug.guest.into()).collect();
            return Err(PlugError::Unknown { device, endpoints, source });
        }
        let (plugged, others) = order.split_at(at);
        let left = take_back(client, monitor, plugged, others);
        return Err(if left.is_empty() {
            PlugError::Refused { device, source }
        } else {
            PlugError::Left { device, left, source }
        });
    }
    Ok(())
}

/// Takes devices that are plugged from the guest, then these and the others from the daemon. Those that it still has are returned.
fn take_back(client: &mut Client, monitor: &mut Qmp, plugged: &[&Plug<'_>], others: &[&Plug<'_>]) -> Vec<EndpointId> {
    let mut removed: Vec<EndpointId> = others.iter().map(|plug| plug.guest.into()).collect();
    let mut left = Vec::new();
    // The last one first: with function 0 the guest lets all functions of the slot go.
    let mut waiting = plugged.iter().rev().map(|plug| plug.guest);
    for guest in waiting.by_ref() {
        match monitor.unplug(guest) {
            Ok(_) => removed.push(guest.into()),
            Err(error) => {
                left.push(guest.into());
                let is_lost = is_lost(&error);
                say(format_args!("viommuctl: {guest} was not taken from the guest: {}", with_causes(&error)));
                if is_lost {
                    break;
                }
            }
        }
    }
    left.extend(waiting.map(EndpointId::from));
    if let Err(error) = forget(client, &removed) {
        say(format_args!("viommuctl: {} not taken from the daemon: {}", list(&removed), with_causes(&error)));
        left.extend(removed);
    }
    left
}

/// Has the daemon block devices that could not be blocked before they were bound.
pub(super) fn settle(client: &mut Client) -> Result<(), OperateError> {
    match client.ask(Request::Bound)? {
        Reply::Settled => Ok(()),
        _ => Err(OperateError::Unexpected),
    }
}

/// Whether there is no use in asking the monitor for anything else.
const fn is_lost(error: &QmpError) -> bool {
    matches!(error, QmpError::Broken(_) | QmpError::Format(_))
}

/// Takes endpoints from the daemon; with a monitor, each after the guest has let its device go, for which it has so much time.
pub(super) fn remove(
    client: &mut Client,
    endpoints: &[EndpointId],
    qmp: Option<&Path>,
    wait: Duration,
) -> Result<(), OperateError> {
    if let Some(path) = qmp {
        return Ok(unplug_all(client, &mut Qmp::connect_and_wait_for_guest(path, wait)?, endpoints)?);
    }
    tell_siblings(&forget(client, endpoints)?);
    Ok(())
}

fn unplug_all(client: &mut Client, monitor: &mut Qmp, endpoints: &[EndpointId]) -> Result<(), PlugError> {
    let (mut done, mut left, mut siblings) = (Vec::new(), Vec::new(), Vec::new());
    let mut waiting = endpoints.iter().copied();
    for endpoint in waiting.by_ref() {
        match unplug(client, monitor, endpoint) {
            Ok(found) => {
                done.push(endpoint);
                siblings.extend(found);
            }
            Err(error) => {
                left.push(endpoint);
                say(format_args!("viommuctl: {endpoint} was not removed: {}", with_causes(&error)));
                match error {
                    OperateError::Daemon(ClientError::Refused(_)) => (),
                    OperateError::Qmp(error) if !is_lost(&error) => (),
                    _ => break,
                }
            }
        }
    }
    left.extend(waiting);
    // Each of several that are removed was a sibling of those before it.
    siblings.retain(|sibling| !done.contains(sibling));
    siblings.sort_unstable();
    siblings.dedup();
    tell_siblings(&siblings);
    if left.is_empty() { Ok(()) } else { Err(PlugError::NotRemoved { left, done }) }
}

/// Takes a device from the guest, then its endpoint from the daemon. Its siblings that stay are returned.
fn unplug(client: &mut Client, monitor: &mut Qmp, endpoint: EndpointId) -> Result<Vec<EndpointId>, OperateError> {
    let unplugged = monitor.unplug(endpoint.into())?;
    match forget(client, &[endpoint]) {
        // The host took the device back, and the daemon has let it go before.
        Err(OperateError::Daemon(ClientError::Refused(refusal)))
            if refusal.kind == RefusalKind::NotFound && unplugged == Unplugged::LetGo =>
        {
            Ok(Vec::new())
        }
        result => result,
    }
}

/// Takes endpoints from the daemon, all or none. Their siblings that stay are returned. That files may be held still is said.
fn forget(client: &mut Client, endpoints: &[EndpointId]) -> Result<Vec<EndpointId>, OperateError> {
    match client.ask(Request::Remove { endpoints: endpoints.iter().copied().map(Text).collect() })? {
        Reply::Removed(removal) => {
            for Held { endpoint, reason } in &removal.held {
                say(format_args!(
                    "viommuctl: {} was removed and reaches nothing, but the host cannot have its device back yet: the watcher did not \
                     say that it closed its file: {reason}",
                    endpoint.0
                ));
            }
            Ok(removal.siblings.into_iter().map(|sibling| sibling.0).collect())
        }
        _ => Err(OperateError::Unexpected),
    }
}

fn tell_siblings(siblings: &[EndpointId]) {
    for sibling in siblings {
        say(format_args!(
            "viommuctl: {sibling} of the same host group stays: until the host has the devices back, they reach what it reaches"
        ));
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use serde_json::{Value, json};

    use super::super::fake_monitor::{DONE, FakeMonitor, deleted, refused};
    use super::*;

    /// What a daemon was asked to remove, request by request, until the client left; `"bound"` where it was told that a device is.
    type Removed = JoinHandle<Vec<Value>>;

    /// A daemon that removes what it is told to, or refuses that.
    fn daemon(is_willing: bool) -> (Client, Removed, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let serving = std::thread::spawn(move || {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            let (mut removed, mut line) = (Vec::new(), String::new());
            while stream.read_line(&mut line).unwrap_or(0) > 0 {
                let message: Value = serde_json::from_str(&std::mem::take(&mut line)).unwrap();
                let endpoints = match &message["request"] {
                    bound @ Value::String(_) => bound.clone(),
                    request => request["remove"]["endpoints"].clone(),
                };
                let reply = match is_willing {
                    true if endpoints == "bound" => json!("settled"),
                    true => json!({ "removed": { "endpoints": endpoints, "siblings": [] } }),
                    false => json!({ "refused": { "kind": "host", "message": "not now" } }),
                };
                removed.push(endpoints);
                writeln!(stream.get_mut(), "{}", json!({ "version": 1, "reply": reply })).unwrap();
            }
            removed
        });
        (Client::connect(&path).unwrap(), serving, directory)
    }

    /// Plugs devices at these places; what came of it, and what the daemon was asked to remove.
    fn plug(monitor: &FakeMonitor, places: &[&str], is_willing: bool) -> (Result<(), PlugError>, Vec<Value>) {
        let (mut client, removed, _directory) = daemon(is_willing);
        let file = File::open("/dev/null").unwrap();
        let places: Vec<PciAddress> = places.iter().map(|place| place.parse().unwrap()).collect();
        let plugs: Vec<Plug<'_>> = places.iter().map(|guest| Plug::new(*guest, "bus", file.as_fd(), &places)).collect();
        let result = plug_all(&mut client, &mut Qmp::connect(&monitor.path()).unwrap(), &plugs);
        drop(client);
        (result, removed.join().unwrap())
    }

    fn id(arguments: &Value) -> String {
        arguments["id"].as_str().unwrap().to_owned()
    }

    /// A monitor that refuses the device by this name, and whose guest lets all others go, or none.
    fn refusing(name: &'static str, is_guest_willing: bool) -> FakeMonitor {
        FakeMonitor::new(move |command, arguments, _| match command {
            "device_add" if arguments["id"] == name => vec![refused("GenericError", "no room")],
            "device_del" if is_guest_willing => vec![DONE.to_owned(), deleted(&id(arguments))],
            "device_del" => {
                let event = json!({ "event": "DEVICE_UNPLUG_GUEST_ERROR", "data": { "device": id(arguments) } });
                vec![DONE.to_owned(), event.to_string()]
            }
            _ => vec![DONE.to_owned()],
        })
    }

    #[test]
    fn function_0_is_plugged_last_as_one_of_several() {
        let monitor = FakeMonitor::new(|_, _, _| vec![DONE.to_owned()]);
        let (result, removed) = plug(&monitor, &["01:00.0", "01:00.1", "02:00.0"], true);
        result.unwrap();
        assert_eq!(removed, ["bound"; 3], "as soon as each is there");
        let asked = monitor.asked();
        let plugged = asked.iter().filter(|(command, ..)| command == "device_add");
        let plugged: Vec<_> = plugged.map(|(_, device, _)| (id(device), device["multifunction"] == true)).collect();
        let expected = [("viommu-01-00.1", true), ("viommu-01-00.0", true), ("viommu-02-00.0", false)];
        assert_eq!(plugged, expected.map(|(id, several)| (id.to_owned(), several)));
    }

    #[test]
    fn functions_that_the_guest_would_not_see_are_found() {
        let places = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<PciAddress>>();
        assert_eq!(without_function_0(&places(&["01:00.1", "01:00.0", "02:00.0"])), None);
        let alone = without_function_0(&places(&["01:00.0", "02:00.1", "01:01.0"]));
        assert_eq!(alone, Some("02:00.1".parse().unwrap()));
    }

    #[test]
    fn what_was_plugged_before_a_refusal_is_taken_back_from_the_guest_then_from_the_daemon() {
        let monitor = refusing("viommu-03-00.0", true);
        let (result, removed) = plug(&monitor, &["01:00.0", "02:00.0", "03:00.0", "04:00.0"], true);
        let error = result.unwrap_err();
        assert!(matches!(error, PlugError::Refused { .. }), "{error:?}");
        assert!(with_causes(&error).contains("0000:03:00.0: all was taken back: QEMU refuses device_add: no room"));
        let expected = [["getfd", "device_add"].repeat(3), vec!["closefd", "device_del", "device_del"]].concat();
        assert_eq!(monitor.commands(), expected);
        let gone: Vec<String> = monitor.asked().iter().skip(7).map(|(_, arguments, _)| id(arguments)).collect();
        assert_eq!(gone, ["viommu-02-00.0", "viommu-01-00.0"]);
        let last = json!(["0000:03:00.0", "0000:04:00.0", "0000:02:00.0", "0000:01:00.0"]);
        assert_eq!(removed, [json!("bound"), json!("bound"), last]);
    }

    #[test]
    fn the_daemon_keeps_what_the_guest_keeps() {
        let monitor = refusing("viommu-02-00.0", false);
        let (result, removed) = plug(&monitor, &["01:00.0", "02:00.0"], true);
        let error = result.unwrap_err();
        assert!(matches!(&error, PlugError::Left { left, .. } if *left == [EndpointId(0x100)]), "{error:?}");
        assert!(with_causes(&error).contains("viommuctl remove 0000:01:00.0 --qmp"), "{error}");
        assert_eq!(removed, [json!("bound"), json!(["0000:02:00.0"])]);
    }

    #[test]
    fn what_qemu_said_is_told_if_the_daemon_refuses_too() {
        let (result, removed) = plug(&refusing("viommu-01-00.0", true), &["01:00.0"], false);
        let error = result.unwrap_err();
        assert!(matches!(&error, PlugError::Left { left, .. } if *left == [EndpointId(0x100)]), "{error:?}");
        assert!(with_causes(&error).ends_with("QEMU refuses device_add: no room"), "{error}");
        assert_eq!(removed.len(), 1);
    }

    #[test]
    fn a_device_that_the_daemon_was_not_told_of_is_said_to_reach_memory() {
        let monitor = FakeMonitor::new(|_, _, _| vec![DONE.to_owned()]);
        let (result, asked) = plug(&monitor, &["01:00.0", "02:00.0"], false);
        let error = result.unwrap_err();
        assert!(matches!(error, PlugError::Unsettled { .. }), "{error:?}");
        assert!(with_causes(&error).contains("viommuctl bound"), "{error}");
        assert_eq!(asked, ["bound"]);
        assert_eq!(monitor.commands(), ["getfd", "device_add"], "no more is plugged");
    }

    #[test]
    fn a_guest_that_is_still_taking_a_device_in_is_asked_again() {
        let tries = std::sync::atomic::AtomicU32::new(0);
        let monitor = FakeMonitor::new(move |command, arguments, _| match command {
            "device_add" if arguments["id"] == "viommu-02-00.0" => vec![refused("GenericError", "no room")],
            "device_del" if tries.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0 => {
                vec![refused("GenericError", "guest is busy")]
            }
            "device_del" => vec![DONE.to_owned(), deleted(&id(arguments))],
            _ => vec![DONE.to_owned()],
        });
        let (result, _) = plug(&monitor, &["01:00.0", "02:00.0"], true);
        assert!(matches!(result, Err(PlugError::Refused { .. })), "{result:?}");
    }

    #[test]
    fn what_may_be_plugged_still_is_left_to_the_daemon() {
        let monitor = FakeMonitor::new(|command, _, _| match command {
            "device_add" => Vec::new(),
            _ => vec![DONE.to_owned()],
        });
        let (result, removed) = plug(&monitor, &["01:00.0", "02:00.0"], true);
        let error = result.unwrap_err();
        assert!(matches!(error, PlugError::Unknown { .. }), "{error:?}");
        let said = with_causes(&error);
        assert!(
            said.contains("viommuctl remove 0000:01:00.0 0000:02:00.0 --qmp") && said.contains("not known"),
            "{said}"
        );
        assert_eq!(removed, [] as [Value; 0]);
        assert_eq!(monitor.commands(), ["getfd", "device_add"]);
    }
}
