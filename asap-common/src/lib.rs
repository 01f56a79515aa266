//! What asap's eBPF programs and its agent share: map keys, map values and events, as plain `#[repr(C)]` data without
//! padding. Not for anything that only one of the two sides knows.
#![no_std]

/// Most bytes of a stack that one record can bring.
pub const STACK_MAX: usize = 16 * 1024;
/// A stack is copied page by page, since a copy that meets an unmapped page fails as a whole.
pub const STACK_CHUNK: usize = 4096;

/// Where the running kernel keeps what the programs read: byte offsets, found in its BTF when the agent starts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// `task_struct.on_cpu`
    pub on_cpu: u32,
    /// `task_struct.__state`
    pub state: u32,
    /// `task_struct.exit_state`
    pub exit_state: u32,
    /// `task_struct.nvcsw`
    pub voluntary_switches: u32,
    /// `task_struct.nivcsw`
    pub involuntary_switches: u32,
    /// `task_struct.start_time`
    pub start_time: u32,
    /// `task_struct.thread_pid`
    pub thread_pid: u32,
    /// `task_struct.group_leader`
    pub group_leader: u32,
    /// `task_struct.signal`
    pub signal: u32,
    /// `task_struct.children`, a `struct list_head`
    pub children: u32,
    /// `signal_struct.live`
    pub live: u32,
    /// `task_struct.self_exec_id`
    pub exec_id: u32,
    /// `pid.level`
    pub pid_level: u32,
    /// `pid.numbers`
    pub pid_numbers: u32,
    /// `sizeof(struct upid)`, of which `nr` is the first member
    pub pid_number_size: u32,
    /// Depth of the agent's pid namespace, 0 for the first: ids are told as the agent sees them.
    pub agent_level: u32,
}

/// Kinds of what the task iterator tells; each record begins with one.
pub mod task_kind {
    /// A [`crate::TaskRecord`].
    pub const FULL: u32 = 1;
    /// A [`crate::TaskBrief`]: it has not run since it was told of in full.
    pub const SAME: u32 = 2;
    /// A [`crate::TaskBrief`]: it has children.
    pub const PARENT: u32 = 3;
    /// A [`crate::TaskBrief`]: it has none.
    pub const CHILDLESS: u32 = 4;
}

/// What the task iterator tells of a thread of which one thing is asked, or that has not run since it was told of in full.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskBrief {
    /// See [`task_kind`].
    pub kind: u32,
    /// Thread id in the agent's pid namespace; 0 for the childless.
    pub tid: i32,
    /// As in its full record, else 0.
    pub epoch: u64,
}

/// Most threads that the task iterator remembers; the oldest make room for more.
pub const KNOWN_TASKS: u32 = 32 * 1024;

/// What the task iterator remembers of a thread that it has told of.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownTask {
    /// Of the request.
    pub series: u64,
    /// How often it had left a CPU.
    pub epoch: u64,
    /// Tells it from another that is given its place in memory.
    pub start_time: u64,
    /// Thread id in the agent's pid namespace.
    pub tid: i32,
    /// Keeps the value free of padding.
    pub reserved: u32,
}

/// What the task iterator tells of one thread; `stack_length` bytes of its stack follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskRecord {
    /// [`task_kind::FULL`].
    pub kind: u32,
    /// Thread id in the agent's pid namespace; 0: not visible there.
    pub tid: i32,
    /// Process id, likewise.
    pub tgid: i32,
    /// Depth of the thread's pid namespace.
    pub level: u32,
    /// Scheduler state (`TASK_RUNNING` is 0).
    pub state: u32,
    /// Not 0 while a CPU runs it.
    pub on_cpu: u32,
    /// Not 0 once it is dying.
    pub exit_state: u32,
    /// 1: it did not run while this was read, so that all of it belongs together.
    pub settled: u32,
    /// How often it has left a CPU.
    pub epoch: u64,
    /// When it was started, nanoseconds on the monotonic clock.
    pub start_time: u64,
    /// Grows with every program that its process executes.
    pub exec_id: u64,
    /// `struct pt_regs` as it left user mode: r15 r14 r13 r12 bp bx r11 r10 r9 r8 ax cx dx si di orig_ax ip cs flags sp ss.
    pub regs: [u64; 21],
    /// Bytes of stack that follow, from `sp` upwards.
    pub stack_length: u64,
}

/// What the agent asks of the task iterator.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// Bytes of stack wanted, at most [`STACK_MAX`].
    pub stack_bytes: u64,
    /// 0: tell of all threads in full. Else: those that have not run since an earlier request with the same number told of
    /// them are told as [`TaskBrief`].
    pub series: u64,
    /// Not 0: tell of each thread only whether it has children, as [`TaskBrief`].
    pub only_children: u64,
}

/// Kinds of life-cycle records.
pub mod life {
    /// `pid` made the process `other`.
    pub const FORK: u32 = 1;
    /// `pid` runs another program.
    pub const EXEC: u32 = 2;
    /// The last thread of `pid` has ended.
    pub const EXIT: u32 = 3;
}

/// A watched process forked, executed a program, or ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LifeRecord {
    /// See [`life`].
    pub kind: u32,
    /// The process, in the agent's pid namespace.
    pub pid: i32,
    /// The child of a fork, else 0.
    pub other: i32,
    /// Keeps the record free of padding.
    pub reserved: u32,
}

/// Most functions of one process that can be redirected at a time.
pub const REDIRECTS: usize = 512;
/// Bit of [`Redirects::word`]: which of the two tables is in force.
pub const SECOND_TABLE: u64 = 1 << 63;

/// Where the calls of redirected functions of one process go. Shared with the agent by mmap(2).
///
/// One word says which table is in force, and how many calls have come by so far: it can be replaced on the condition that
/// none has come meanwhile.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Redirects {
    /// Calls that have come by, and [`SECOND_TABLE`].
    pub word: u64,
    /// `task_struct.self_exec_id` of the program that the addresses belong to: the kernel puts probes into a program that the
    /// process executes later, too.
    pub exec_id: u64,
    /// Address of the new function by slot, in two tables one behind the other; 0: calls go to the old one.
    pub tables: [u64; 2 * REDIRECTS],
}
