//! Tests inside virtual machines: Debian's kernels are fetched and booted in QEMU, with the test programs that cargo built for
//! this machine; each test is a process of its own in there, and its result comes back by name.
//!
//! This library is the outer half; `src/guest` is process 1 of the inner half. What they say to each other is in [`protocol`].
//! It starts no process that outlives a call: the caller owns QEMU.

pub mod apt;
pub mod archive;
pub mod compile;
pub mod kernels;
pub mod machine;
pub mod modules;
pub mod protocol;
pub mod root;
pub mod session;
