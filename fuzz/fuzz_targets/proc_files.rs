//! See `asap-user/src/fuzz/proc_files.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| asap::fuzz::run("proc_files", bytes));
