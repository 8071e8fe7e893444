// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What there is, as a client is told.

use super::common::{attach, map, probe};
use super::*;

#[test]
fn endpoints_domains_and_counters_are_those_of_the_guest() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    let mut client = bench.client();
    let endpoint = |domain: Value, translation: &str| {
        json!({ "endpoints": [{ "id": FIRST_TEXT, "host": "0000:01:00.0", "group": 1, "node": "vfio/devices/vfio0",
            "domain": domain, "translation": translation, "siblings": [] }] })
    };
    assert_eq!(client.ask(&json!("list")), endpoint(Value::Null, "as-found"));
    assert_eq!(guest.send(&attach(5, FIRST.0, 0)), OK);
    assert_eq!(guest.send(&map(5, 0x10_0000, 0x1000, 0x2000, 3)), OK);
    assert_eq!(guest.send(&map(6, 0x10_0000, 0x1000, 0x2000, 3)), NOENT);
    guest.ask(&probe(FIRST.0), 100);
    assert_eq!(client.ask(&json!("list")), endpoint(json!(5), "domain"));
    let domain = json!({ "domain": 5, "endpoints": [FIRST_TEXT], "bypass": false, "mappings": 1, "poisoned": false });
    assert_eq!(client.ask(&json!({ "domain": { "domain": 5 } })), json!({ "domain": domain }));
    let stats = &client.ask(&json!("stats"))["stats"];
    assert_eq!(stats["attach"], json!({ "ok": 1, "failed": 0 }));
    assert_eq!(stats["map"], json!({ "ok": 1, "failed": 1, "statuses": { "NOENT": 1 } }));
    assert_eq!((&stats["groups"], &stats["groups_blocked"], &stats["faults_sent"]), (&json!(1), &json!(0), &json!(0)));
    assert_eq!((&stats["probe"]["ok"], &stats["unreadable"]), (&json!(1), &json!(0)));
    assert_eq!((&stats["endpoints"], &stats["domains"], &stats["mappings"]), (&json!(1), &json!(1), &json!(1)));
    assert_eq!(stats["bypass"], true);
    for request in [json!({ "domain": { "domain": 6 } }), json!({ "mappings": { "domain": 6 } })] {
        let reply = client.ask(&request);
        assert_eq!(refusal(&reply), ("not-found", "there is no domain 6: `viommuctl status` shows which there are"));
    }
}

#[test]
fn mappings_come_page_by_page() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    assert_eq!(guest.send(&attach(1, FIRST.0, 0)), OK);
    // Every other page, and one that may not be written.
    for page in 0..1100u64 {
        assert_eq!(guest.send(&map(1, page * 0x2000, 0x1000, 0x5000, if page == 1 { 1 } else { 3 })), OK);
    }
    let mut client = bench.client();
    let first = client.ask(&json!({ "mappings": { "domain": 1, "limit": 2 } }));
    assert_eq!(
        first,
        json!({ "mappings": { "domain": 1, "next": "0x4000", "mappings": [
            { "start": "0x0", "end": "0xfff", "physical": "0x5000", "read": true, "write": true },
            { "start": "0x2000", "end": "0x2fff", "physical": "0x5000", "read": true, "write": false },
        ] } })
    );
    let (mut from, mut count, mut pages) = (json!("0x0"), 0, 0);
    while !from.is_null() {
        // No page is larger than the largest, whatever is asked for.
        let reply = client.ask(&json!({ "mappings": { "domain": 1, "from": from, "limit": u32::MAX } }));
        let page = &reply["mappings"];
        count += page["mappings"].as_array().unwrap().len();
        from = page["next"].clone();
        pages += 1;
    }
    assert_eq!((count, pages), (1100, 2));
    assert_eq!(
        client.ask(&json!({ "mappings": { "domain": 1, "from": "0xfffffffff" } }))["mappings"]["next"],
        Value::Null
    );
    let none = client.ask(&json!({ "mappings": { "domain": 1, "limit": 0 } }));
    assert_eq!(none["mappings"]["mappings"].as_array().unwrap().len(), 1, "a page that is empty would lead nowhere");
}

#[test]
fn the_plan_is_what_the_guest_is_told() {
    let bench = Bench::new();
    let reply = bench.ask(&json!("plan"));
    let plan = &reply["plan"];
    assert_eq!(plan["input_range"], json!(["0x0", "0x7fffffffff"]));
    let endpoints = plan["endpoints"].as_array().unwrap();
    assert_eq!(endpoints.len(), 1);
    assert_eq!(endpoints[0]["id"], FIRST_TEXT);
    assert_eq!(endpoints[0]["resv"], json!([{ "start": "0xfee00000", "end": "0xfeefffff", "subtype": "msi" }]));
    assert_eq!((&endpoints[0]["attachable"], &endpoints[0]["bypass"]), (&json!(true), &json!(true)));
}

#[test]
fn a_client_that_is_slow_holds_up_nobody_else() {
    let bench = Bench::new();
    let mut guest = bench.guest();
    assert_eq!(guest.send(&attach(1, FIRST.0, 0)), OK);
    // A client in the middle of a line, and one that does not read: the guest is served, and others are.
    let mut half = bench.client();
    half.write(br#"{"version":1,"#);
    let mut lazy = bench.client();
    for _ in 0..100 {
        lazy.write(b"{\"version\":1,\"request\":\"plan\"}\n");
    }
    assert_eq!(guest.send(&map(1, 0x1000, 0x1000, 0x2000, 3)), OK);
    assert!(bench.ask(&json!("list"))["endpoints"].is_array());
    half.write(b"\"request\":\"list\"}\n");
    assert!(half.next().unwrap()["endpoints"].is_array(), "a line may come in pieces");
    for _ in 0..100 {
        assert!(lazy.next().unwrap()["plan"].is_object(), "lines that came together are answered in turn");
    }
}
