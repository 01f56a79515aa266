//! The target as Linux shows it: mappings, memory, threads under ptrace, and the two ways to make it do something for
//! us: crash-safe injection into one thread, and the puppet. Not for deciding what to patch or when.

pub mod curtain;
pub mod files;
pub mod gate;
mod held;
pub mod info;
pub mod inject;
pub mod locked;
pub mod maps;
pub mod memory;
pub mod pages;
pub mod ptrace;
pub mod puppet;
mod sigframe;
pub mod userfault;
