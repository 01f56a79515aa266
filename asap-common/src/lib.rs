//! What asap's eBPF programs and its agent share: map keys, map values and events, as plain `#[repr(C)]` data.
#![no_std]
