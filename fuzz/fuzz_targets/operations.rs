// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests, resets and host failures in any order.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| virtio_iommu_fuzz_inputs::operations::check(bytes));
