//! See `asap-user/src/fuzz/signature.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("signature", bytes));
