//! See `asap-user/src/fuzz/translator.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("translator", bytes));
