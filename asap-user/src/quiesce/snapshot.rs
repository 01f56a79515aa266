//! Registers and stacks of all threads of a process in one go, as an eBPF task iterator gives them: the fastest source, and the
//! only one that knows rbp of a thread that sleeps. The source itself is elsewhere; here is when it can be believed.
//!
//! The rule: what is told of a thread counts if it was off its processor and did not run while it was told. What lies above
//! the copied part of the stack is read later, and then only a later snapshot, which finds that the thread has not run
//! since, makes it count.

use super::unwind::WalkRegisters;
use std::io;

/// One thread, as it was at some moment.
#[derive(Clone, Debug)]
pub struct TaskSnapshot {
    /// The thread.
    pub tid: i32,
    /// Its registers when it entered the kernel.
    pub registers: WalkRegisters,
    /// It was off its processor and did not run while this was read; if not, nothing else here means anything.
    pub settled: bool,
    /// It waits for a processor only: it was preempted, or is about to go on.
    pub runnable: bool,
    /// Changes whenever the thread has run.
    pub epoch: u64,
    /// Its stack from the stack pointer upwards; may be short.
    pub stack: Vec<u8>,
}

/// All threads of a process.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Those that have run since the last snapshot by the same source, and new ones.
    pub tasks: Vec<TaskSnapshot>,
    /// Those that have not, and were settled then: id and epoch.
    pub same: Vec<(i32, u64)>,
    /// How many the source came by, the dying included: if there were more before, some are missing.
    pub visited: usize,
}

/// Somebody who can look at all threads of a process at once.
pub trait SnapshotSource {
    /// All threads of `pid`, with at most `stack_bytes` of each one's stack.
    ///
    /// # Errors
    /// The kernel refuses, or the process is gone.
    fn snapshot(&mut self, pid: i32, stack_bytes: usize) -> io::Result<Snapshot>;
}

/// Stack that is copied with a snapshot, bytes: most walks end within.
pub(super) const STACK_BYTES: usize = 2048;
