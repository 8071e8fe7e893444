// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A control socket whose clients say what they like.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_iommu_fuzz_inputs::control::check;

fuzz_target!(|input: &[u8]| check(input));
