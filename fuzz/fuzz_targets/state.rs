// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Saved states from anywhere.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| virtio_iommu_fuzz_inputs::state::check(bytes));
