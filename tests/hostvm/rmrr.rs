// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host whose firmware keeps memory mapped to itself for two devices: an `edu` (a `direct` region, for which VFIO refuses the
//! device), and a USB controller (`direct-relaxable`, which is the operator's to report).

use std::process::{Command, Output};

use serde_json::Value;

use crate::daemon::Daemon;
use crate::pci::{bind_to_vfio, open, open_vfio};

const DIRECT: &str = "0000:00:08.0";
const RELAXABLE: &str = "0000:00:09.0";

fn inspect(arguments: &[&str]) -> Output {
    Command::new("/bin/viommuctl").arg("inspect").args(arguments).output().unwrap()
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_device_with_a_direct_region_is_refused_with_its_reason() {
    let address = DIRECT.parse().unwrap();
    bind_to_vfio(address);
    let shown = String::from_utf8(inspect(&[DIRECT]).stdout).unwrap();
    println!("{shown}");
    let reason = "VFIO refuses the device: 0xbdffd000-0xbdffffff must stay mapped to itself (`direct`)";
    assert!(shown.contains(reason) && shown.contains("usable addresses: not known"), "{shown}");
    let answer: Value = serde_json::from_slice(&inspect(&[DIRECT, "--json"]).stdout).unwrap();
    let refused = &answer["endpoints"][0]["attachable"];
    assert_eq!((&refused["refused"], &refused["start"]), (&"direct".into(), &"0xbdffd000".into()), "{answer:#}");

    let (iommufd, device) = (open("/dev/iommu"), open_vfio(address));
    let options = ["--input-range=0-ffffffffffff"];
    let mut daemon = Daemon::start("direct", &iommufd, &device, "id=0000:00:03.0", &options);
    assert_eq!(daemon.wait().code(), Some(3));
    daemon.expect_log("the host must keep 0xbdffd000-0xbdffffff mapped to itself for this device");
}

#[test]
#[ignore = "runs in the host VM: make test"]
fn a_relaxable_region_is_reported_if_the_operator_says_so() {
    bind_to_vfio(RELAXABLE.parse().unwrap());
    let shown = String::from_utf8(inspect(&[RELAXABLE]).stdout).unwrap();
    println!("{shown}");
    assert!(shown.contains("it can be mapped (--relaxable)"), "{shown}");
    let told = |options: &[&str]| -> Value {
        let output = inspect(&[&[RELAXABLE, "--json"], options].concat());
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        answer["endpoints"][0].clone()
    };
    let ignored = told(&[]);
    assert_eq!(ignored["resv"].as_array().unwrap().len(), 1, "the doorbell: {ignored:#}");
    assert_eq!(ignored["advisories"][0]["kind"], "relaxable");
    assert_eq!(ignored["attachable"], true);
    // The host lets it be mapped.
    assert_eq!(ignored["facts"]["usable"][0][1], "0xfedfffff");
    let reported = told(&["--relaxable=report"]);
    let region = serde_json::json!({ "start": "0x8b800000", "end": "0x8b8fffff", "subtype": "reserved" });
    assert_eq!(reported["resv"][0], region, "{reported:#}");
}
