//! See `asap-user/src/fuzz/protocol.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("protocol", bytes));
