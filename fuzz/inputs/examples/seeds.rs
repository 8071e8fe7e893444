// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes the seeds of all targets anew, to `fuzz/seeds/TARGET/NAME`.

use std::{fs, io, path::Path};

use virtio_iommu_fuzz_inputs::TARGETS;

fn main() -> io::Result<()> {
    for target in TARGETS {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../seeds").join(target.name);
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        let seeds = (target.seeds)();
        if !seeds.is_empty() {
            fs::create_dir_all(&directory)?;
        }
        for (name, bytes) in seeds {
            fs::write(directory.join(name), bytes)?;
        }
    }
    Ok(())
}
