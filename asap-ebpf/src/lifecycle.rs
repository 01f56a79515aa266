//! Fork, exec and exit of watched processes. A child of a watched process is watched from before its first instruction.

use crate::{
    atomic::Counter,
    task::{LAYOUT, Task, read},
};
use asap_common::{Layout, LifeRecord, life};
use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, RingBuf},
};
use core::ffi::c_void;

/// Watched processes, and by which of them each was made (0: the agent asked for it).
#[map]
static WATCHED: HashMap<i32, i32> = HashMap::with_max_entries(16384, 0);
#[map]
static LIVES: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);
/// Events and children that found no room.
#[map]
static LIVES_LOST: Array<i64> = Array::with_max_entries(1, 0);

#[inline(always)]
fn lost() {
    if let Some(counter) = LIVES_LOST.get_ptr_mut(0) {
        Counter::at(counter).add(1);
    }
}

#[inline(always)]
fn tell(kind: u32, pid: i32, other: i32) {
    if let Some(mut entry) = LIVES.reserve::<LifeRecord>(0) {
        entry.write(LifeRecord { kind, pid, other, reserved: 0 });
        entry.submit(0);
    } else {
        lost();
    }
}

#[inline(always)]
fn argument(context: *const c_void, index: usize) -> Task {
    // SAFETY: the context of a raw tracepoint is an array of its arguments; all of ours have the ones that are read.
    Task(unsafe { *context.cast::<u64>().add(index) } as *const u8)
}

#[inline(always)]
fn process(task: Task, layout: &Layout) -> i32 {
    task.leader(layout).id(layout)
}

#[inline(always)]
fn watched(pid: i32) -> bool {
    // SAFETY: only whether it is there is looked at.
    pid != 0 && unsafe { WATCHED.get(&pid) }.is_some()
}

/// `sched_process_fork(parent, child)`: in kernel_clone, before the child is woken.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tracepoint/sched_process_fork")]
pub extern "C" fn on_fork(context: *const c_void) -> i32 {
    let Some(layout) = LAYOUT.get(0) else { return 0 };
    let parent = process(argument(context, 0), layout);
    if !watched(parent) {
        return 0;
    }
    let child = process(argument(context, 1), layout);
    // Not a process of its own, but a thread of its parent.
    if child == parent || child == 0 {
        return 0;
    }
    if WATCHED.insert(&child, &parent, 0).is_err() {
        lost();
    }
    tell(life::FORK, parent, child);
    0
}

/// `sched_process_exec(task, old pid, binprm)`
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tracepoint/sched_process_exec")]
pub extern "C" fn on_exec(context: *const c_void) -> i32 {
    let Some(layout) = LAYOUT.get(0) else { return 0 };
    let pid = process(argument(context, 0), layout);
    if watched(pid) {
        tell(life::EXEC, pid, 0);
    }
    0
}

/// `sched_process_exit(task)`: for every thread; the last one has brought `signal->live` to 0 before (kernel/exit.c).
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tracepoint/sched_process_exit")]
pub extern "C" fn on_exit(context: *const c_void) -> i32 {
    let Some(layout) = LAYOUT.get(0) else { return 0 };
    let task = argument(context, 0);
    let pid = process(task, layout);
    if !watched(pid) {
        return 0;
    }
    let signal = task.field::<u64>(layout.signal) as *const u8;
    let live: i32 = read(signal, layout.live);
    if live == 0 {
        let _ = WATCHED.remove(&pid);
        tell(life::EXIT, pid, 0);
    }
    0
}
