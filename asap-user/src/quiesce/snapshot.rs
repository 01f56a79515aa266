//! Registers and stacks of all threads of a process in one go, as an eBPF task iterator gives them: the fastest source, and the
//! only one that knows rbp of a thread that sleeps. The source itself is elsewhere; here is when it can be believed.
//!
//! The rule: a thread that is off its processor in a full snapshot and has the same epoch in a later one has not run in
//! between, and then neither its registers nor its stack have changed; what lies above the copied part of the stack may be
//! read meanwhile too.

use super::unwind::WalkRegisters;
use std::{collections::HashMap, io};

/// One thread, as it was at some moment.
#[derive(Clone, Debug)]
pub struct TaskSnapshot {
    /// The thread.
    pub tid: i32,
    /// Its registers when it entered the kernel.
    pub registers: WalkRegisters,
    /// It was on a processor: nothing else here means anything.
    pub on_cpu: bool,
    /// Changes whenever the thread has run.
    pub epoch: u64,
    /// Its stack from the stack pointer upwards; may be short.
    pub stack: Vec<u8>,
}

/// Somebody who can look at all threads of a process at once.
pub trait SnapshotSource {
    /// All threads of `pid`, with at most `stack_bytes` of each one's stack.
    ///
    /// # Errors
    /// The kernel refuses, or the process is gone.
    fn snapshot(&mut self, pid: i32, stack_bytes: usize) -> io::Result<Vec<TaskSnapshot>>;
}

/// Stack that is copied with a snapshot, bytes: most walks end within.
pub(super) const STACK_BYTES: usize = 2048;

/// Those of `earlier` that have not run until `later` was taken.
pub(super) fn have_not_run<'s>(
    earlier: &'s [TaskSnapshot],
    later: &[TaskSnapshot],
) -> impl Iterator<Item = &'s TaskSnapshot> {
    let still: HashMap<i32, u64> =
        later.iter().filter(|task| !task.on_cpu).map(|task| (task.tid, task.epoch)).collect();
    earlier.iter().filter(move |task| !task.on_cpu && still.get(&task.tid) == Some(&task.epoch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_did_not_run_is_believed() {
        let task = |tid, on_cpu, epoch| TaskSnapshot {
            tid,
            registers: WalkRegisters::bare(1, 2),
            on_cpu,
            epoch,
            stack: Vec::new(),
        };
        let earlier = [task(1, false, 5), task(2, true, 5), task(3, false, 5), task(4, false, 5), task(5, false, 5)];
        let later = [task(1, false, 5), task(2, false, 5), task(3, true, 5), task(4, false, 6)];
        let tids: Vec<i32> = have_not_run(&earlier, &later).map(|task| task.tid).collect();
        assert_eq!(tids, [1]);
    }
}
