// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file with metrics.

#![allow(clippy::float_cmp, reason = "counts are whole numbers, and small")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;

/// What a file in Prometheus' text format says: types by name, samples by name and labels. Everything in it must be read.
struct Metrics {
    types: BTreeMap<String, String>,
    samples: BTreeMap<String, f64>,
}

impl Metrics {
    fn parse(text: &str) -> Self {
        let (mut types, mut samples) = (BTreeMap::new(), BTreeMap::new());
        assert!(text.ends_with('\n'), "it is cut off: {text}");
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "{line}");
            } else if let Some(rest) = line.strip_prefix("# HELP ") {
                assert!(rest.starts_with("virtio_iommu_"), "{line}");
            } else {
                let (name, value) = line.rsplit_once(' ').unwrap();
                let plain = name.split('{').next().unwrap();
                assert!(plain.chars().all(|char| char.is_ascii_lowercase() || char == '_'), "{line}");
                assert!(name == plain || name.ends_with('}'), "{line}");
                assert!(samples.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{line}");
            }
        }
        let metrics = Self { types, samples };
        metrics.check();
        metrics
    }

    fn get(&self, name: &str) -> f64 {
        *self.samples.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", self.samples.keys()))
    }

    /// Every sample has a type, and the buckets of a histogram grow up to its count, which is the count of the requests.
    fn check(&self) {
        for name in self.samples.keys() {
            let plain = name.split('{').next().unwrap();
            let stems = ["_bucket", "_sum", "_count", ""].map(|end| plain.strip_suffix(end));
            assert!(stems.iter().flatten().any(|stem| self.types.contains_key(*stem)), "{name} has no type");
        }
        for phase in ["waiting", "own", "host"] {
            let name = format!("virtio_iommu_request_{phase}_seconds");
            assert_eq!(self.types[&name], "histogram");
            for kind in ["attach", "detach", "map", "unmap", "probe"] {
                let of_kind = format!("{name}_bucket{{kind=\"{kind}\",le=\"");
                let buckets = self.samples.iter().filter(|(sample, _)| sample.starts_with(&of_kind));
                let end = |sample: &str| sample[of_kind.len()..].trim_end_matches("\"}").parse::<f64>().unwrap();
                let mut buckets: Vec<_> = buckets.map(|(sample, value)| (end(sample), *value)).collect();
                buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
                assert_eq!(buckets.len(), 28);
                assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{buckets:?}");
                let count = self.get(&format!("{name}_count{{kind=\"{kind}\"}}"));
                assert_eq!(*buckets.last().unwrap(), (f64::INFINITY, count));
                let of_kind = format!("virtio_iommu_requests_total{{kind=\"{kind}\"");
                let requests = self.samples.iter().filter(|(sample, _)| sample.starts_with(&of_kind));
                assert_eq!(requests.map(|(_, value)| value).sum::<f64>(), count, "{phase} {kind}");
            }
        }
    }
}

#[test]
fn metrics_are_written_whole_again_and_again_and_removed_at_the_end() {
    let place = Place::new();
    let path = place.path("iommu.prom");
    // One of before is replaced.
    fs::write(&path, "old").unwrap();
    let start = Start::with(&["--metrics-interval=1"]).option("metrics-file", &path);
    let daemon = place.start(start);
    let read = || Metrics::parse(&fs::read_to_string(&path).unwrap());
    let attached = "virtio_iommu_requests_total{kind=\"attach\",status=\"NOENT\"}";
    assert_eq!(read().get(attached), 0.0);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
    let file = fs::metadata(&path).unwrap().ino();
    let (machine, _) = use_device(UnixStream::connect(&place.socket).unwrap());
    let deadline = Instant::now() + PATIENCE;
    let metrics = loop {
        // At any moment.
        let metrics = read();
        if metrics.get(attached) == 1.0 {
            break metrics;
        }
        assert!(Instant::now() < deadline, "it is not written again");
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_ne!(fs::metadata(&path).unwrap().ino(), file, "another file is in its place");
    assert_eq!(metrics.get("virtio_iommu_request_own_seconds_count{kind=\"attach\"}"), 1.0);
    assert!(metrics.get("virtio_iommu_request_own_seconds_sum{kind=\"attach\"}") > 0.0);
    assert_eq!(metrics.get("virtio_iommu_bypass"), 1.0);
    assert_eq!(metrics.types["virtio_iommu_requests_total"], "counter");
    daemon.end_well();
    drop(machine);
    let left: Vec<_> = fs::read_dir(place.directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn metrics_that_cannot_be_written_are_2_with_the_reason() {
    let place = Place::new();
    fs::create_dir(place.path("directory")).unwrap();
    for (path, says) in [
        (place.path("nowhere/file"), "cannot use the directory"),
        (place.path("directory"), "is there already and no regular file"),
        (PathBuf::from("/proc/metrics"), "cannot write /proc/metrics"),
        (PathBuf::from("/"), "does not end in the name of a file"),
    ] {
        let start = Start::with(&[]).option("metrics-file", &path).option("socket-path", &place.socket);
        let Ended { code, err, .. } = start.run();
        assert_eq!(code, Some(2), "{err}");
        assert!(err.contains(says), "{err}");
        assert!(!place.socket.exists());
    }
    let Ended { code, err, .. } = Start::with(&["--metrics-interval=5"]).option("socket-path", &place.socket).run();
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("--metrics-file"), "{err}");
}

#[test]
fn a_file_that_cannot_be_written_for_a_while_is_said_once_and_written_again() {
    let place = Place::new();
    let directory = place.path("metrics");
    fs::create_dir(&directory).unwrap();
    let path = directory.join("iommu.prom");
    let daemon = place.start(Start::with(&["--metrics-interval=1"]).option("metrics-file", &path));
    // Nothing can be made in its place.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    // Tried twice at least: each time there is another file that cannot take its place.
    let unfinished = directory.join(".iommu.prom.new");
    let mut tries = BTreeSet::new();
    wait_until("it is not tried again", || {
        tries.extend(fs::metadata(&unfinished).and_then(|file| file.modified()));
        tries.len() == 3
    });
    fs::remove_dir(&path).unwrap();
    wait_until("it is not written again", || path.is_file());
    let said = daemon.end_well();
    assert_eq!(said.matches("cannot be written, and is as it was").count(), 1, "{said}");
    assert_eq!(said.matches("is written again").count(), 1, "{said}");
}

#[test]
fn a_daemon_that_is_started_twice_leaves_the_first_ones_file_alone() {
    let place = Place::new();
    let path = place.path("iommu.prom");
    let same = || Start::with(&["--metrics-interval=3600"]).option("metrics-file", &path);
    let first = place.start(same());
    let file = fs::metadata(&path).unwrap().ino();
    let Ended { code, err, .. } = same().option("socket-path", &place.socket).run();
    assert!(code == Some(2) && err.contains("is in use by another process"), "{err}");
    assert_eq!(fs::metadata(&path).unwrap().ino(), file);
    first.end_well();
    assert!(!path.exists());
}

#[test]
fn a_start_that_fails_leaves_no_file() {
    let place = Place::new();
    let path = place.path("iommu.prom");
    let mut late = 0;
    // One more open file each time, until there are enough.
    for files in 8..100 {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let start = Start::with(&[]).option("metrics-file", &path).option("socket-path", &place.socket);
        let start = start.script("ulimit -n $FILES;").environment("FILES", files.to_string());
        let daemon = start.fourth(writer).option("ready-fd", Path::new("4")).start();
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        if said == "\n" {
            daemon.end_well();
            assert!(late > 0, "none failed after its socket was open");
            return;
        }
        let Ended { code, err, .. } = daemon.end();
        assert!(code.is_some_and(|code| code != 0), "{err}");
        late += u32::from(err.contains("listening on"));
        let left: Vec<_> = fs::read_dir(place.directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "with {files} files: {left:?}: {err}");
    }
    panic!("it does not start");
}
