// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Seeds of the target `vhost_user`, whole, cut off and changed a little: what a fuzzer does, on any toolchain.

use virtio_iommu_fuzz_inputs::vhost_user::{check, seeds};

#[test]
fn seeds_hold() {
    for (name, bytes) in seeds() {
        println!("{name}");
        check(&bytes);
        (0..bytes.len()).step_by(4).for_each(|length| check(&bytes[..length]));
    }
}

/// `SOAK_SECONDS` says for how long.
#[test]
fn seeds_with_any_byte_changed_hold() {
    let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    let seeds = seeds();
    // A generator of Lehmer's: what it gives is the same in each run.
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state * 48271 % 0x7fff_ffff;
        state as usize % below
    };
    let mut inputs = 0;
    while std::time::Instant::now() < end || inputs < 100 {
        let mut bytes = seeds[next(seeds.len())].1.clone();
        for _ in 0..=next(4) {
            let at = next(bytes.len());
            bytes[at] = next(256) as u8;
        }
        println!("{bytes:?}");
        check(&bytes);
        inputs += 1;
    }
    println!("{inputs} inputs");
}
