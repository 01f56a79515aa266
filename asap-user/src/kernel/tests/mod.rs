//! Tests of the eBPF programs against real processes: a small program with threads, built here, does what its input says.

mod fixture;
mod lifecycle;
mod snapshot;
mod system;

use super::Ebpf;
use std::{
    ops::Deref,
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

/// Held by all tests that use eBPF; exclusively by one that counts what this process holds.
static USE: RwLock<()> = RwLock::new(());

/// The loaded programs, beside other tests.
struct Loaded {
    ebpf: Ebpf,
    _shared: RwLockReadGuard<'static, ()>,
}

impl Deref for Loaded {
    type Target = Ebpf;

    fn deref(&self) -> &Ebpf {
        &self.ebpf
    }
}

fn shared() -> RwLockReadGuard<'static, ()> {
    USE.read().unwrap_or_else(PoisonError::into_inner)
}

fn alone() -> RwLockWriteGuard<'static, ()> {
    USE.write().unwrap_or_else(PoisonError::into_inner)
}

fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED (needs root): {test}");
    }
    root
}

/// Loads the programs; none, and says so, without root.
fn loaded(test: &str) -> Option<Loaded> {
    is_root(test).then(|| Loaded { _shared: shared(), ebpf: Ebpf::load().expect("the kernel takes the programs") })
}
