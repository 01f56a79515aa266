//! Bytes as lower-case hex digits: hashes and build-ids, as people and files write them.

use std::fmt::Write;

/// The digits of `bytes`, two each.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
