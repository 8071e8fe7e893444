// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes of requests.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| virtio_iommu_fuzz_inputs::requests::check(bytes));
