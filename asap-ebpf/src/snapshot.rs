//! Task iterator: registers and stacks of the threads of one process, without stopping any of them. Of threads that have not
//! run since it last told of them it says just that, at a tenth of the cost.
//!
//! What is told of a thread is what it was when it last left user mode: the truth as long as it does not run. How that is
//! known without holding it there: the kernel counts a switch before it says that the thread is off its CPU
//! (kernel/sched/core.c: `++*switch_count` in `__schedule`, then `finish_task` stores `on_cpu` with release), and x86 keeps
//! the order of loads. So a thread that is off the CPU, and then has the count of before, has not run until it was seen off.
//! Read in the other order, it could be seen with the old count while it runs, and off the CPU after.

use crate::task::{LAYOUT, Task};
use asap_common::{
    KNOWN_TASKS, KnownTask, Layout, STACK_CHUNK, STACK_MAX, SnapshotRequest, TaskRecord, TaskBrief, task_kind,
};
use aya_ebpf::{
    bindings::{seq_file, task_struct},
    helpers::{bpf_copy_from_user_task, bpf_probe_read_kernel, bpf_seq_write, bpf_task_pt_regs},
    macros::map,
    maps::{Array, LruHashMap},
};
use core::ffi::c_void;

#[map]
static REQUEST: Array<SnapshotRequest> = Array::with_max_entries(1, 0);

/// Room for one record. More than is ever used: the verifier knows the bounds of place and length of a copy, but not that a
/// high place goes with a short length.
#[repr(C)]
pub struct Buffer {
    record: TaskRecord,
    stack: [u8; 2 * STACK_MAX],
}

/// Used by one read of an iterator at a time; the agent sees to that.
#[map]
static BUFFER: Array<Buffer> = Array::with_max_entries(1, 0);

/// By the address of the `struct task_struct`. What is thrown out to make room is told in full again.
#[map]
static KNOWN: LruHashMap<u64, KnownTask> = LruHashMap::with_max_entries(KNOWN_TASKS, 0);

/// `struct bpf_iter__task` (kernel/bpf/task_iter.c).
#[repr(C)]
pub struct IteratorContext {
    meta: *const *mut seq_file,
    task: *mut task_struct,
}

/// Whether a CPU runs the task, and how often it has left one, read in this order.
#[inline(always)]
fn activity(task: Task, layout: &Layout) -> (u32, u64) {
    // An int up to Linux 6.x, one byte of several from 7.x on: 0 or 1 either way, and the low byte comes first.
    let on_cpu = u32::from(task.field::<u8>(layout.on_cpu));
    let voluntary: u64 = task.field(layout.voluntary_switches);
    let involuntary: u64 = task.field(layout.involuntary_switches);
    (on_cpu, voluntary.wrapping_add(involuntary))
}

/// Hides from the compiler what it knows of a number, so that it leaves a mask in place that the verifier needs to see.
#[inline(always)]
fn masked(number: u64, mask: u64) -> u64 {
    // SAFETY: a live local.
    unsafe { core::ptr::read_volatile(&raw const number) & mask }
}

/// Writes one record per thread.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter.s/task")]
pub extern "C" fn snapshot(context: *const IteratorContext) -> i32 {
    // SAFETY: the kernel passes a valid context; its pointers are checked by the verifier.
    let (meta, task) = unsafe { ((*context).meta, (*context).task) };
    if task.is_null() {
        return 0;
    }
    // SAFETY: `meta` begins with the pointer to the seq_file.
    let seq = unsafe { *meta };
    let (Some(layout), Some(request), Some(buffer)) = (LAYOUT.get(0), REQUEST.get(0), BUFFER.get_ptr_mut(0)) else {
        return 0;
    };
    let fields = Task(task.cast::<u8>());
    let key = task as u64;
    let tell = |kind, tid, epoch| {
        let mut brief = TaskBrief { kind, tid, epoch };
        // SAFETY: a plain local.
        unsafe { bpf_seq_write(seq, (&raw mut brief).cast::<c_void>(), size_of::<TaskBrief>() as u32) };
    };
    if request.only_children != 0 {
        // An empty list points to itself (include/linux/list.h).
        if fields.field::<u64>(layout.children) == key.wrapping_add(u64::from(layout.children)) {
            tell(task_kind::CHILDLESS, 0, 0);
        } else {
            tell(task_kind::PARENT, fields.id(layout), 0);
        }
        return 0;
    }
    let start_time: u64 = fields.field(layout.start_time);
    let (on_cpu, epoch) = activity(fields, layout);
    // SAFETY: entries are never removed while an iterator runs.
    if request.series != 0
        && on_cpu == 0
        && let Some(known) = unsafe { KNOWN.get(&key) }
        && (known.series, known.epoch, known.start_time) == (request.series, epoch, start_time)
    {
        tell(task_kind::SAME, known.tid, epoch);
        return 0;
    }
    // SAFETY: a map value of this type, used by one iterator at a time.
    let buffer = unsafe { &mut *buffer };
    let record = &mut buffer.record;
    record.kind = task_kind::FULL;
    record.tid = fields.id(layout);
    record.tgid = fields.leader(layout).id(layout);
    record.level = fields.level(layout);
    record.exit_state = fields.field(layout.exit_state);
    record.start_time = start_time;
    record.exec_id = fields.field(layout.exec_id);
    record.state = fields.field(layout.state);
    record.on_cpu = on_cpu;
    record.epoch = epoch;
    record.settled = 0;
    // SAFETY: the task was checked above; the result is read by a helper that checks it.
    record.regs = unsafe { bpf_probe_read_kernel(bpf_task_pt_regs(task) as *const [u64; 21]) }.unwrap_or([0; 21]);
    let sp = record.regs[19];

    let mut length: u64 = 0;
    if on_cpu == 0 && record.exit_state == 0 {
        let wanted = request.stack_bytes.min(STACK_MAX as u64);
        for _ in 0..=STACK_MAX / STACK_CHUNK {
            if length >= wanted || length >= STACK_MAX as u64 {
                break;
            }
            let from = sp.wrapping_add(length);
            let chunk = (STACK_CHUNK as u64 - (from & (STACK_CHUNK as u64 - 1))).min(wanted - length);
            if chunk == 0 || chunk > STACK_CHUNK as u64 {
                break;
            }
            // SAFETY: the place is below STACK_MAX and `chunk` at most STACK_CHUNK: inside the buffer.
            let failed = unsafe {
                let to = buffer.stack.as_mut_ptr().add(masked(length, STACK_MAX as u64 - 1) as usize);
                let chunk = masked(chunk, 2 * STACK_CHUNK as u64 - 1) as u32;
                bpf_copy_from_user_task(to.cast::<c_void>(), chunk, from as *const c_void, task, 0)
            };
            if failed != 0 {
                break;
            }
            length += chunk;
        }
        let (now_on_cpu, now) = activity(fields, layout);
        if now_on_cpu == 0 && now == epoch {
            buffer.record.settled = 1;
        }
    }
    if length > STACK_MAX as u64 {
        return 0;
    }
    buffer.record.stack_length = length;
    // SAFETY: header and `length` bytes lie inside the buffer.
    let written = unsafe {
        bpf_seq_write(
            seq,
            (&raw mut *buffer).cast::<c_void>(),
            size_of::<TaskRecord>() as u32 + masked(length, 2 * STACK_MAX as u64 - 1) as u32,
        )
    };
    // What does not fit into the piece that is being read is dropped, and asked for again.
    if written == 0 && request.series != 0 && buffer.record.settled != 0 {
        let known = KnownTask { series: request.series, epoch, start_time, tid: buffer.record.tid, reserved: 0 };
        let _ = KNOWN.insert(&key, &known, 0);
    }
    0
}
