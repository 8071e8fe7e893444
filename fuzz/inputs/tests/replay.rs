// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every seed, every input that once showed a mistake, and what campaigns found to be worth keeping is checked again.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_iommu_fuzz_inputs::{TARGETS, Target};

/// Some targets count what the process has open, and its threads: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Inputs that are kept, by name.
fn inputs(kind: &str, target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(kind).join(target);
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn seeds_and_regressions_hold() {
    let _alone = alone();
    for Target { name, check, .. } in TARGETS {
        for (path, bytes) in inputs("seeds", name).into_iter().chain(inputs("regressions", name)) {
            println!("{}", path.display());
            check(&bytes);
            // Inputs that end early are inputs too.
            (0..bytes.len().min(64)).for_each(|length| check(&bytes[..length]));
        }
    }
}

/// As they are: there are thousands.
#[test]
fn what_campaigns_kept_holds() {
    let _alone = alone();
    let mut count = 0;
    for Target { name, check, .. } in TARGETS {
        for (path, bytes) in inputs("corpus", name) {
            println!("{}", path.display());
            check(&bytes);
            count += 1;
        }
    }
    assert!(count > 1000, "only {count} inputs are there");
}

#[test]
fn seeds_are_those_that_the_program_writes() {
    let _alone = alone();
    for Target { name, seeds, .. } in TARGETS {
        let mut written = seeds();
        written.sort();
        let kept: Vec<_> = inputs("seeds", name)
            .into_iter()
            .map(|(path, bytes)| (path.file_name().unwrap().to_str().unwrap().to_owned(), bytes))
            .collect();
        let written: Vec<_> = written.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
        assert!(kept == written, "seeds of {name}: cargo run --manifest-path fuzz/inputs/Cargo.toml --example seeds");
    }
}

#[test]
fn every_target_is_built_and_has_a_check() {
    let _alone = alone();
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml")).unwrap();
    let built: Vec<&str> = manifest
        .lines()
        .filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")?.strip_suffix(".rs\""))
        .collect();
    assert_eq!(built, TARGETS.iter().map(|target| target.name).collect::<Vec<_>>());
}
