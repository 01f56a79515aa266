//! See `asap-user/src/fuzz/unwind.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("unwind", bytes));
