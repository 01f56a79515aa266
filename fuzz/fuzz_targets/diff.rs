//! See `asap-user/src/fuzz/diff.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("diff", bytes));
