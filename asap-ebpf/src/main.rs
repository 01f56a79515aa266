//! The eBPF programs of asap. They only look and count, except `redirect`, which the agent loads by itself: a kernel that
//! refuses it must not lose the others.
//!
//! Kernel structures are read at offsets that the agent found in the kernel's BTF (`LAYOUT`), so that one object serves
//! every kernel.
#![no_std]
#![no_main]
// For atomic additions; the tool chain is pinned.
#![allow(internal_features)]
#![feature(core_intrinsics)]

mod atomic;
mod lifecycle;
mod redirect;
mod snapshot;
mod task;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Helpers for GPL-compatible programs are used; the programs may be taken under either licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
