// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Endpoints that are added and removed under a guest.

use super::common::{attach, map, probe};
use super::*;
use virtio_iommu::access::Access;
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::{Attachment, Failure};

fn remove(endpoints: &[&str]) -> Value {
    json!({ "remove": { "endpoints": endpoints } })
}

/// Two devices of host IOMMU group 9.
fn two() -> Value {
    json!({ "group": 9, "vfio_members": ["0000:06:00.0", "0000:06:00.1"], "devices": [
        device(NEW_TEXT, "0000:06:00.0", "vfio2"), device(OTHER_TEXT, "0000:06:00.1", "vfio3") ] })
}

#[test]
fn an_endpoint_that_is_added_is_the_guests_until_it_is_removed() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    assert_eq!(guest.send(&attach(1, NEW.0, 0)), NOENT);
    let (reply, closed) = bench.add(&addition());
    let planned = &reply["added"]["endpoints"][0];
    assert_eq!(planned["id"], NEW_TEXT);
    assert_eq!(planned["resv"], json!([{ "start": "0xfee00000", "end": "0xfeefffff", "subtype": "msi" }]));
    assert_eq!(bench.ask(&json!("plan"))["plan"]["endpoints"][1], *planned);
    assert_eq!(bench.ask(&json!("list"))["endpoints"][1]["host"], "0000:05:00.0");
    assert_eq!(bench.keeper.count(), 1, "the watcher has its file");
    assert!(closed[0].is_open());

    assert_eq!(guest.ask(&probe(NEW.0), 100).status, OK);
    assert_eq!(guest.send(&attach(1, NEW.0, 0)), OK);
    assert_eq!(guest.send(&map(1, 0x5000, 0x1000, 0x2000, 3)), OK);
    assert_eq!(bench.host.dma(NEW, 0x5000, Access::READ), Some(0x2000));

    let reply = bench.ask(&remove(&[NEW_TEXT]));
    // When the answer is there, so is all that it says.
    assert!(closed[0].is_closed(), "no copy of the file is open");
    assert_eq!(bench.host.attachment(NEW), Attachment::Blocked);
    assert_eq!(bench.host.table_count(), 0);
    assert_eq!(bench.keeper.count(), 0);
    assert_eq!(reply, json!({ "removed": { "endpoints": [NEW_TEXT], "siblings": [], "held": [] } }));
    for request in [attach(1, NEW.0, 0), map(1, 0x6000, 0x1000, 0x2000, 3)] {
        assert_eq!(guest.send(&request), NOENT);
    }
    assert_eq!(bench.ask(&json!("list"))["endpoints"].as_array().unwrap().len(), 1);
    assert_eq!(guest.send(&attach(3, FIRST.0, 0)), OK, "the others go on");
}

#[test]
fn an_id_that_is_used_again_inherits_nothing() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    bench.add(&addition());
    assert_eq!(guest.send(&attach(1, NEW.0, 0)), OK);
    bench.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    assert_ne!(guest.send(&map(1, 0x9000, 0x1000, 0x2000, 3)), OK);
    assert_eq!(guest.send(&attach(1, FIRST.0, 0)), OK);
    assert_eq!(guest.send(&map(1, 0x5000, 0x1000, 0x2000, 3)), OK);
    let faults = |bench: &Bench| {
        let reply = bench.ask(&json!({ "faults": {} }));
        let faults = reply["faults"]["faults"].as_array().unwrap();
        faults.iter().filter(|fault| fault["endpoint"] == NEW_TEXT).count()
    };
    assert_eq!(faults(&bench), 1);
    bench.ask(&remove(&[NEW_TEXT]));
    assert_eq!(faults(&bench), 0);

    // Another device at the same place, of another group, with less to use.
    let mut another =
        json!({ "group": 8, "vfio_members": ["0000:07:00.0"], "devices": [device(NEW_TEXT, "0000:07:00.0", "vfio4")] });
    another["devices"][0]["facts"] = json!({ "usable": [["0x0", "0x3fffffffff"]] });
    let (reply, _closed) = bench.add(&another);
    assert_eq!(reply["added"]["endpoints"][0]["resv"][1]["start"], "0x4000000000", "its own regions count");
    assert_eq!(faults(&bench), 0);
    assert_eq!(bench.host.attachment(NEW), Attachment::AsFound);
    let listed = bench.ask(&json!("list"));
    assert_eq!(
        (&listed["endpoints"][1]["domain"], &listed["endpoints"][1]["translation"]),
        (&Value::Null, &json!("as-found"))
    );
    assert_eq!(guest.send(&attach(2, NEW.0, 0)), OK);
    assert_eq!(bench.host.dma(NEW, 0x5000, Access::READ), None, "the domain before is not its own");
    assert_eq!(bench.host.dma(FIRST, 0x5000, Access::READ), Some(0x2000));
}

#[test]
fn one_that_is_added_while_bypass_is_off_is_blocked() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    let config = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    vhost::vhost_user::VhostUserFrontend::set_config(&mut guest.frontend, 36, config, &[0]).unwrap();
    // That has no answer of its own; this has.
    guest.config();
    assert_eq!(guest.send(&attach(1, FIRST.0, 0)), OK);
    bench.add(&addition());
    assert_eq!(bench.host.attachment(NEW), Attachment::Blocked);
}

#[test]
fn the_daemon_is_told_when_devices_are_bound() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    bench.add(&addition());
    assert_eq!(bench.ask(&json!("bound")), json!("settled"));
    assert_eq!(bench.host.attachment(NEW), Attachment::AsFound, "bypass is on");
    assert_eq!(guest.send(&attach(1, NEW.0, 0)), OK);
    assert_eq!(guest.send(&map(1, 0x5000, 0x1000, 0x2000, 3)), OK);
    assert_eq!(bench.ask(&json!("bound")), json!("settled"));
    assert_eq!(bench.host.dma(NEW, 0x5000, Access::READ), Some(0x2000), "whoever is in a domain stays there");
    let config = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    vhost::vhost_user::VhostUserFrontend::set_config(&mut guest.frontend, 36, config, &[0]).unwrap();
    guest.config();
    assert_eq!(bench.ask(&remove(&[NEW_TEXT]))["removed"]["siblings"], json!([]));
    bench.add(&addition());
    bench.host.attach_elsewhere(NEW);
    assert_eq!(bench.ask(&json!("bound")), json!("settled"));
    assert_eq!(bench.host.attachment(NEW), Attachment::Blocked, "bypass is off");
}

#[test]
fn devices_of_a_group_come_together_and_may_go_one_by_one() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    let (reply, closed) = bench.add(&two());
    assert_eq!(reply["added"]["endpoints"].as_array().unwrap().len(), 2);
    let listed = bench.ask(&json!("list"));
    assert_eq!(listed["endpoints"][1]["siblings"], json!([OTHER_TEXT]));
    for id in [NEW, OTHER] {
        assert_eq!(guest.send(&attach(1, id.0, 0)), OK);
    }
    assert_eq!(guest.send(&map(1, 0x5000, 0x1000, 0x2000, 3)), OK);
    let reply = bench.ask(&remove(&[NEW_TEXT]));
    assert_eq!(reply["removed"]["siblings"], json!([OTHER_TEXT]), "what it still reaches is said");
    assert!(closed[0].is_closed() && closed[1].is_open());
    assert_eq!(bench.host.dma(OTHER, 0x5000, Access::READ), Some(0x2000));
    // It cannot come back to a group that it is out of.
    let (reply, late) = bench.add(&two());
    assert_eq!(refusal(&reply).0, "taken");
    assert!(late.iter().all(Closed::is_closed), "files that were refused are closed");
    let alone =
        json!({ "group": 9, "vfio_members": ["0000:06:00.0"], "devices": [device(NEW_TEXT, "0000:06:00.0", "vfio2")] });
    let (reply, _) = bench.add(&alone);
    let (kind, message) = refusal(&reply);
    assert!(kind == "taken" && message.contains("remove it first"), "{message}");
    assert_eq!(bench.ask(&remove(&[OTHER_TEXT]))["removed"]["siblings"], json!([]));
    assert!(closed[1].is_closed());
    assert_eq!(bench.host.attachment(OTHER), Attachment::Blocked);
    assert!(bench.add(&two()).0["added"].is_object());
    let both = bench.ask(&remove(&[OTHER_TEXT, NEW_TEXT]));
    assert_eq!(both["removed"]["siblings"], json!([]), "both at once");
}

#[test]
fn what_cannot_be_removed_is_named_and_nothing_changes() {
    let bench = Bench::new();
    bench.add(&addition());
    for (endpoints, kind, text) in [
        (&[NEW_TEXT, OTHER_TEXT][..], "not-found", "there is no endpoint 0000:02:00.0"),
        (&[NEW_TEXT, NEW_TEXT][..], "malformed", "once"),
        (&[][..], "malformed", "at least one"),
        (&[OTHER_TEXT; 33][..], "malformed", "at most 32"),
    ] {
        let reply = bench.ask(&remove(endpoints));
        let (found, message) = refusal(&reply);
        assert!(found == kind && message.contains(text), "{message}");
        assert_eq!(bench.ask(&json!("list"))["endpoints"].as_array().unwrap().len(), 2);
    }
}

#[test]
fn what_a_watcher_does_not_let_go_is_removed_and_told_of() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    let mut three = two();
    three["vfio_members"].as_array_mut().unwrap().push(json!("0000:06:00.2"));
    three["devices"].as_array_mut().unwrap().push(device("0000:03:00.0", "0000:06:00.2", "vfio4"));
    let (reply, closed) = bench.add(&three);
    assert!(reply["added"].is_object(), "{reply}");
    assert_eq!(guest.send(&attach(1, NEW.0, 0)), OK);
    bench.keeper.refuse_from(0);
    let reply = bench.ask(&remove(&[NEW_TEXT, OTHER_TEXT]));
    let removed = &reply["removed"];
    assert_eq!(removed["endpoints"], json!([NEW_TEXT, OTHER_TEXT]), "{reply}");
    assert_eq!(removed["siblings"], json!(["0000:03:00.0"]));
    let held = removed["held"].as_array().unwrap();
    assert_eq!(held.iter().map(|held| &held["endpoint"]).collect::<Vec<_>>(), [NEW_TEXT, OTHER_TEXT]);
    assert!(held.iter().all(|held| held["reason"].as_str().unwrap().starts_with("it has not answered yet")), "{reply}");
    assert!(closed[0].is_open());
    assert_eq!(guest.send(&attach(1, NEW.0, 0)), NOENT);
    assert_eq!(bench.ask(&json!("list"))["endpoints"].as_array().unwrap().len(), 2);
}

#[test]
fn a_device_that_the_host_wants_back_is_let_go() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    let (_, closed) = bench.add(&addition());
    assert_eq!(guest.send(&attach(1, NEW.0, 0)), OK);
    bench.registry.remove_those_gone();
    assert!(closed[0].is_open(), "its node is there");
    // At once another device has the name.
    std::fs::write(bench.node("another"), "").unwrap();
    std::fs::rename(bench.node("another"), bench.node("vfio1")).unwrap();
    bench.registry.remove_those_gone();
    assert!(closed[0].is_closed());
    assert_eq!(guest.send(&attach(1, NEW.0, 0)), NOENT);
    assert_eq!(bench.keeper.count(), 0);
    let (reply, _closed) = bench.add(&addition());
    assert!(reply["added"].is_object(), "{reply}");
    bench.registry.remove_those_gone();
    assert_eq!(bench.ask(&json!("list"))["endpoints"].as_array().unwrap().len(), 2, "the new one stays");
}

#[test]
fn endpoints_that_come_and_go_hundreds_of_times_leave_nothing() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    let mut client = bench.client();
    for turn in 0..300 {
        let (file, closed) = files::pipe();
        let reply = client.ask_with(&json!({ "add": addition() }), &[file]);
        assert!(reply["added"].is_object(), "turn {turn}: {reply}");
        assert_eq!(guest.send(&attach(1, NEW.0, 0)), OK);
        assert_eq!(guest.send(&map(1, 0x5000, 0x1000, 0x2000, 3)), OK);
        client.ask(&remove(&[NEW_TEXT]));
        assert!(closed.is_closed());
        assert_eq!((bench.host.table_count(), bench.keeper.count()), (0, 0));
    }
}
