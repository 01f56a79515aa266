//! See `asap-user/src/fuzz/image.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("image", bytes));
