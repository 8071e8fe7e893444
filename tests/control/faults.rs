// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Faults that are asked for and followed.

use super::common::{attach, map};
use super::*;
use virtio_iommu::host::HostErrorKind;
use virtio_iommu::host::fake::Failure;

/// Has the host refuse a MAP of the guest's, which is a fault for the guest and the operator.
fn fail(bench: &Bench, guest: &mut Machine, iova: u64) {
    bench.host.fail_after(0, Failure::Error(HostErrorKind::NoMemory));
    assert_eq!(guest.send(&map(1, iova, 0x1000, 0x2000, 3)), 8);
}

#[test]
fn faults_are_remembered_and_followed() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    let mut follower = bench.client();
    let none = follower.ask(&json!({ "faults": { "follow": true } }));
    assert_eq!(none, json!({ "faults": { "recorded": 0, "faults": [] } }));
    assert_eq!(guest.send(&attach(1, FIRST.0, 0)), OK);
    fail(&bench, &mut guest, 0x1000);
    let fault = follower.next().unwrap();
    let fault = &fault["fault"];
    assert_eq!((&fault["number"], &fault["endpoint"]), (&json!(1), &json!(FIRST_TEXT)));
    assert_eq!((&fault["reason"], &fault["address"]), (&json!("mapping"), &json!("0x1000")));
    assert!(fault["time"].as_u64().unwrap() > 1_600_000_000_000);
    fail(&bench, &mut guest, 0x5000);
    assert_eq!(follower.next().unwrap()["fault"]["address"], "0x5000");

    let told = bench.ask(&json!({ "faults": {} }));
    assert_eq!(told["faults"]["recorded"], 2);
    assert_eq!(told["faults"]["faults"][0], *fault);
    let later = bench.ask(&json!({ "faults": { "after": 1 } }));
    assert_eq!(later["faults"]["faults"].as_array().unwrap().len(), 1);
    // A client that asks for something else follows no longer.
    assert!(follower.ask(&json!("list"))["endpoints"].is_array());
    fail(&bench, &mut guest, 0x9000);
    assert!(follower.ask(&json!("list"))["endpoints"].is_array());
}

#[test]
fn a_flood_of_faults_is_bounded_and_numbered() {
    let bench = Bench::with(Limits { patience: Duration::from_secs(60), ..Limits::default() }, &[]);
    let mut guest = bench.guest();
    let mut follower = bench.client();
    follower.ask(&json!({ "faults": { "follow": true } }));
    assert_eq!(guest.send(&attach(1, FIRST.0, 0)), OK);
    for at in 1..=2000 {
        fail(&bench, &mut guest, at * 0x1000);
    }
    let told = bench.ask(&json!({ "faults": {} }));
    assert_eq!(told["faults"]["recorded"], 2000);
    assert_eq!(told["faults"]["faults"].as_array().unwrap().len(), 256, "the latest are remembered");
    let mut last = 0;
    while last < 2000 {
        let number = follower.next().unwrap()["fault"]["number"].as_u64().unwrap();
        assert!(number > last, "in order, and none twice");
        last = number;
    }
}
