// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `make install` puts where, and that `make uninstall` takes it away.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use serde_json::{Value, json};

use super::common::left_out::left_out;
use super::*;

const SOURCE: &str = env!("CARGO_MANIFEST_DIR");

/// What is installed beside `docs`.
const DOCUMENTS: [&str; 6] =
    ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE-APACHE", "LICENSE-BSD"];

/// Has make do something with the programs of a directory, for a root.
fn make(build: &Path, root: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new("make");
    command.args(["--no-print-directory", "-C", SOURCE]).args(arguments);
    command.arg(format!("DESTDIR={}", root.display())).arg(format!("BUILD={}", build.display()));
    // Of the make that runs the tests.
    command.env_remove("MAKEFLAGS").env_remove("MAKEOVERRIDES").output().unwrap()
}

fn make_well(root: &Path, arguments: &[&str]) {
    let output = make(Path::new(DAEMON).parent().unwrap(), root, arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The files below a directory with their modes, by their paths below it.
fn files(root: &Path) -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            if metadata.is_dir() {
                left.push(path);
            } else {
                let name = path.strip_prefix(root).unwrap().display().to_string();
                found.insert(name, metadata.permissions().mode() & 0o7777);
            }
        }
    }
    found
}

/// What is to be there, with units in `units`.
fn expected(prefix: &str, units: &str) -> BTreeMap<String, u32> {
    let documents = format!("{prefix}/share/doc/virtio-iommu");
    let mut files = BTreeMap::from([
        (format!("{prefix}/bin/vhost-device-iommu"), 0o755),
        (format!("{prefix}/bin/viommuctl"), 0o755),
        (format!("{prefix}/share/qemu/vhost-user/50-vhost-device-iommu.json"), 0o644),
        (format!("{units}/vhost-device-iommu@.service"), 0o644),
        (format!("{units}/vhost-device-iommu@.socket"), 0o644),
        (format!("{units}/vhost-device-iommu-control@.socket"), 0o644),
    ]);
    for page in ["vhost-device-iommu.8", "viommuctl.8"] {
        files.insert(format!("{prefix}/share/man/man8/{page}"), 0o644);
    }
    for document in DOCUMENTS {
        files.insert(format!("{documents}/{document}"), 0o644);
    }
    for entry in fs::read_dir(Path::new(SOURCE).join("docs")).unwrap() {
        files.insert(format!("{documents}/docs/{}", entry.unwrap().file_name().display()), 0o644);
    }
    files
}

#[test]
fn what_is_installed_is_exactly_that_and_uninstalled_it_is_gone() {
    for (arguments, prefix, units) in [
        (&[][..], "usr/local", "usr/local/share/doc/virtio-iommu/systemd"),
        (&["prefix=/usr", "unitdir=/usr/lib/systemd/system"], "usr", "usr/lib/systemd/system"),
    ] {
        let root = tempfile::tempdir().unwrap();
        // Somebody else's.
        let other = root.path().join(prefix).join("share/qemu/vhost-user/50-other.json");
        fs::create_dir_all(other.parent().unwrap()).unwrap();
        fs::write(&other, "{}").unwrap();
        make_well(root.path(), &[&["install"], arguments].concat());
        let mut found = files(root.path());
        found.remove(other.strip_prefix(root.path()).unwrap().to_str().unwrap());
        assert_eq!(found, expected(prefix, units));

        let text = |name: &str| fs::read_to_string(root.path().join(name)).unwrap();
        let daemon = format!("/{prefix}/bin/vhost-device-iommu");
        let description = text(&format!("{prefix}/share/qemu/vhost-user/50-vhost-device-iommu.json"));
        let description: Value = serde_json::from_str(&description).unwrap();
        assert_eq!((&description["binary"], &description["type"]), (&json!(daemon), &json!("iommu")));
        let service = text(&format!("{units}/vhost-device-iommu@.service"));
        assert!(service.contains(&format!("\nExecStart={daemon} ")) && !service.contains("@bindir@"), "{service}");
        assert!(service.contains(&format!("file:/{prefix}/share/doc/virtio-iommu/docs/operators.md")), "{service}");
        let program = Command::new(root.path().join(&daemon[1..])).arg("--print-capabilities").output().unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&program.stdout).unwrap()["type"], description["type"]);

        make_well(root.path(), &[&["uninstall"], arguments].concat());
        assert_eq!(files(root.path()).len(), 1, "the other one is left");
        assert!(!root.path().join(prefix).join("share/doc/virtio-iommu").exists());
        fs::remove_file(other).unwrap();
        // There is nothing left to do.
        make_well(root.path(), &[&["uninstall"], arguments].concat());
        assert!(!root.path().join(prefix).join("share/qemu").exists());
        assert!(files(root.path()).is_empty());
    }
}

#[test]
fn nothing_is_installed_that_was_not_built() {
    let root = tempfile::tempdir().unwrap();
    let output = make(Path::new("/nowhere"), root.path(), &["install"]);
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("there is no /nowhere/vhost-device-iommu: run make first"), "{said}");
    assert!(files(root.path()).is_empty());
}

#[test]
fn what_cannot_be_read_is_not_installed_empty() {
    let place = tempfile::tempdir().unwrap();
    let (copy, root) = (place.path().join("copy"), place.path().join("root"));
    fs::create_dir(&copy).unwrap();
    let sources = [&["dist", "docs"][..], &DOCUMENTS].concat();
    let copied = Command::new("cp").arg("-a").args(&sources).arg(&copy).current_dir(SOURCE).status().unwrap();
    assert!(copied.success());
    let unit = "vhost-device-iommu@.service";
    fs::remove_file(copy.join("dist").join(format!("{unit}.in"))).unwrap();
    let mut command = Command::new("sh");
    command.arg(copy.join("dist/install")).arg("install").env("DESTDIR", &root);
    command.env("BUILD", Path::new(DAEMON).parent().unwrap());
    for directory in ["bindir", "datadir", "docdir", "mandir", "unitdir"] {
        command.env(directory, format!("/{directory}"));
    }
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(unit), "{said}");
    assert!(!root.join("unitdir").join(unit).exists());
}

/// What systemd has to say of units about which it should say nothing.
fn systemds_objections(units: &[PathBuf], name: &str) -> Vec<String> {
    let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(units).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    said.lines().filter(|line| line.contains(name)).map(ToOwned::to_owned).collect()
}

/// systemd's own opinion of the units, where it is installed.
#[test]
fn the_units_are_what_systemd_understands() {
    if !Command::new("systemd-analyze").arg("--version").output().is_ok_and(|output| output.status.success()) {
        left_out("systemd-analyze");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    make_well(root.path(), &["install", "prefix=/usr", "unitdir=/usr/lib/systemd/system"]);
    let units = root.path().join("usr/lib/systemd/system");
    // The units as they are, but for where the program and the documents are.
    let service = units.join("vhost-device-iommu@.service");
    let text = fs::read_to_string(&service).unwrap().replace("/usr/", &format!("{}/usr/", root.path().display()));
    fs::write(&service, text).unwrap();
    let instances = ["socket", "service"].map(|kind| {
        let instance = units.join(format!("vhost-device-iommu@guest.{kind}"));
        fs::copy(units.join(format!("vhost-device-iommu@.{kind}")), &instance).unwrap();
        instance
    });
    assert_eq!(systemds_objections(&instances, "vhost-device-iommu"), [""; 0]);
    // The unit that operators are shown.
    let document = include_str!("../../docs/operators.md");
    let shown = document.split("```ini\n").nth(1).unwrap().split("```").next().unwrap();
    let guest = root.path().join("my-guest.service");
    fs::write(&guest, shown.replace("/usr/local/bin/viommuctl", "/bin/true")).unwrap();
    assert_eq!(systemds_objections(&[guest], "my-guest"), [""; 0]);
    let output =
        Command::new("systemd-analyze").args(["security", "--offline=yes", "--threshold=25"]).arg(&service).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
