// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a host says of itself, and the plan that follows.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| virtio_iommu_fuzz_inputs::facts::check(bytes));
