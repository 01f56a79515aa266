//! See `asap-user/src/fuzz/patch_object.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("patch_object", bytes));
