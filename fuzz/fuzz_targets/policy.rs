//! See `asap-user/src/fuzz/policy.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("policy", bytes));
