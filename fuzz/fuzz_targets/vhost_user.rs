// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection on which a frontend says what it likes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_iommu_fuzz_inputs::vhost_user::check;

fuzz_target!(|input: &[u8]| check(input));
