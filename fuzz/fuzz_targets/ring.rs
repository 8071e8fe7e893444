// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Request queues of any driver.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| virtio_iommu_fuzz_inputs::ring::check(bytes));
