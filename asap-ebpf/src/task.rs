//! Reading a `struct task_struct`: ids as the agent's pid namespace knows them, and single fields.

use asap_common::Layout;
use aya_ebpf::{
    helpers::{bpf_get_current_pid_tgid, bpf_get_current_task, bpf_probe_read_kernel},
    macros::map,
    maps::Array,
};

/// Where this kernel keeps what is read here; filled by the agent before any program runs.
#[map]
pub static LAYOUT: Array<Layout> = Array::with_max_entries(1, 0);

/// A pointer to a `struct task_struct`.
#[derive(Clone, Copy)]
pub struct Task(pub *const u8);

impl Task {
    /// The task that runs this program.
    #[inline(always)]
    pub fn current() -> Self {
        // SAFETY: the helper has no preconditions.
        Self(unsafe { bpf_get_current_task() } as *const u8)
    }

    /// Reads a field; 0 if the kernel can't.
    #[inline(always)]
    pub fn field<T: Copy + Default>(self, offset: u32) -> T {
        read(self.0, offset)
    }

    /// The leader of its thread group.
    #[inline(always)]
    pub fn leader(self, layout: &Layout) -> Self {
        Self(self.field::<u64>(layout.group_leader) as *const u8)
    }

    /// Its id in the agent's pid namespace, 0 if it has none there.
    #[inline(always)]
    pub fn id(self, layout: &Layout) -> i32 {
        let pid = self.field::<u64>(layout.thread_pid) as *const u8;
        let level: u32 = read(pid, layout.pid_level);
        if pid.is_null() || level < layout.agent_level {
            return 0;
        }
        // include/linux/pid.h: numbers[level].nr is the id in the namespace of that depth. A task that is visible to the
        // agent lives in the agent's namespace or below it.
        read(pid, layout.pid_numbers + layout.agent_level * layout.pid_number_size)
    }

    /// How deep its own pid namespace is.
    #[inline(always)]
    pub fn level(self, layout: &Layout) -> u32 {
        read(self.field::<u64>(layout.thread_pid) as *const u8, layout.pid_level)
    }
}

/// Thread id of the current task in the agent's pid namespace.
#[inline(always)]
pub fn current_tid(layout: &Layout) -> i32 {
    if layout.agent_level == 0 { bpf_get_current_pid_tgid() as i32 } else { Task::current().id(layout) }
}

#[inline(always)]
pub fn read<T: Copy + Default>(base: *const u8, offset: u32) -> T {
    // SAFETY: the helper checks the address and fails on a bad one.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset as usize).cast::<T>()) }.unwrap_or_default()
}
