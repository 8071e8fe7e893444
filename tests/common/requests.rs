// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests as a driver writes them: the device-readable part of each.

/// ATTACH
pub fn attach(domain: u32, endpoint: u32, flags: u32) -> Vec<u8> {
    words(&[1, domain, endpoint, flags, 0])
}

/// DETACH
pub fn detach(domain: u32, endpoint: u32) -> Vec<u8> {
    words(&[2, domain, endpoint, 0, 0])
}

/// MAP
pub fn map(domain: u32, iova: u64, length: u64, physical: u64, flags: u32) -> Vec<u8> {
    let mut bytes = words(&[3, domain]);
    for field in [iova, iova + length - 1, physical] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// UNMAP
pub fn unmap(domain: u32, iova: u64, length: u64) -> Vec<u8> {
    let mut bytes = words(&[4, domain]);
    for field in [iova, iova + length - 1] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend([0; 4]);
    bytes
}

/// PROBE
pub fn probe(endpoint: u32) -> Vec<u8> {
    let mut bytes = words(&[5, endpoint]);
    bytes.resize(72, 0);
    bytes
}

fn words(fields: &[u32]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}
