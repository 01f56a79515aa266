//! See `asap-user/src/fuzz/manifest.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("manifest", bytes));
