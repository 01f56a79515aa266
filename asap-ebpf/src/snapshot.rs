//! Task iterator: registers and stacks of the threads of one process, without stopping any of them.

use crate::task::{LAYOUT, Task};
use asap_common::{STACK_CHUNK, STACK_MAX, SnapshotRequest, TaskRecord};
use aya_ebpf::{
    bindings::{seq_file, task_struct},
    helpers::{bpf_copy_from_user_task, bpf_probe_read_kernel, bpf_seq_write, bpf_task_pt_regs},
    macros::map,
    maps::Array,
};
use core::ffi::c_void;

#[map]
static REQUEST: Array<SnapshotRequest> = Array::with_max_entries(1, 0);

/// Room for one record. A chunk more than is ever used: the verifier knows the bounds of place and length of a copy, but
/// not that a high place goes with a short length.
#[repr(C)]
pub struct Buffer {
    record: TaskRecord,
    stack: [u8; STACK_MAX + STACK_CHUNK],
}

/// Used by one read of an iterator at a time; the agent sees to that.
#[map]
static BUFFER: Array<Buffer> = Array::with_max_entries(1, 0);

/// `struct bpf_iter__task` (kernel/bpf/task_iter.c).
#[repr(C)]
pub struct IteratorContext {
    meta: *const *mut seq_file,
    task: *mut task_struct,
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
    // SAFETY: a map value of this type, used by one iterator at a time.
    let buffer = unsafe { &mut *buffer };
    let fields = Task(task.cast::<u8>());
    let record = &mut buffer.record;
    record.tid = fields.id(layout);
    record.tgid = fields.leader(layout).id(layout);
    record.level = fields.level(layout);
    record.exit_state = fields.field(layout.exit_state);
    record.start_time = fields.field(layout.start_time);
    record.exec_id = fields.field(layout.exec_id);
    // The epoch first, everything that it vouches for after it: a switch in between makes it look older, never newer.
    let voluntary: u64 = fields.field(layout.voluntary_switches);
    let involuntary: u64 = fields.field(layout.involuntary_switches);
    record.epoch = voluntary.wrapping_add(involuntary);
    // An int up to Linux 6.x, one byte of several from 7.x on: 0 or 1 either way, and the low byte comes first.
    record.on_cpu = u32::from(fields.field::<u8>(layout.on_cpu));
    record.state = fields.field(layout.state);
    record.stack_length = 0;
    // SAFETY: the task was checked above; the result is read by a helper that checks it.
    record.regs = unsafe { bpf_probe_read_kernel(bpf_task_pt_regs(task) as *const [u64; 21]) }.unwrap_or([0; 21]);
    let sp = record.regs[19];

    let mut length: u64 = 0;
    if record.on_cpu == 0 && record.exit_state == 0 {
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
            // SAFETY: `length` is below STACK_MAX and `chunk` at most STACK_CHUNK: inside the buffer.
            let failed = unsafe {
                let to = buffer.stack.as_mut_ptr().add(length as usize);
                bpf_copy_from_user_task(to.cast::<c_void>(), chunk as u32, from as *const c_void, task, 0)
            };
            if failed != 0 {
                break;
            }
            length += chunk;
        }
    }
    if length > STACK_MAX as u64 {
        return 0;
    }
    buffer.record.stack_length = length;
    // SAFETY: header and `length` bytes lie inside the buffer.
    unsafe {
        bpf_seq_write(seq, (&raw mut *buffer).cast::<c_void>(), size_of::<TaskRecord>() as u32 + length as u32);
    }
    0
}
