//! See `asap-user/src/fuzz/ledger.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("ledger", bytes));
