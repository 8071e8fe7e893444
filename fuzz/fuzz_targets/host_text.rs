// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Device trees and `/proc/iomem`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| virtio_iommu_fuzz_inputs::host_text::check(bytes));
