// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes the seeds of the target `vhost_user` anew.

use std::path::Path;
use std::{fs, io};

fn main() -> io::Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../seeds/vhost_user");
    fs::create_dir_all(&directory)?;
    for (name, bytes) in virtio_iommu_fuzz_inputs::vhost_user::seeds() {
        fs::write(directory.join(name), bytes)?;
    }
    Ok(())
}
