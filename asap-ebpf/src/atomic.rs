//! Counters that programs on several CPUs write at once. The standard library offers the BPF machine no read-modify-write
//! operations, though it has them (BPF_ATOMIC with BPF_FETCH, Linux 5.12).

use core::intrinsics::{AtomicOrdering, atomic_xadd};

/// A 64-bit value in a map.
#[derive(Clone, Copy)]
pub struct Counter(*mut i64);

impl Counter {
    /// The counter at a map value's address.
    #[inline(always)]
    pub fn at(value: *mut i64) -> Self {
        Self(value)
    }

    /// Adds, and tells the value before.
    #[inline(always)]
    pub fn add(self, change: i64) -> i64 {
        // SAFETY: a map value: aligned to 8 bytes, and valid as long as the program runs.
        unsafe { atomic_xadd::<i64, i64, { AtomicOrdering::SeqCst }>(self.0, change) }
    }
}
