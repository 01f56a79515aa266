//! Where the running kernel keeps what the eBPF programs read, from its type information.

use super::{KernelError, btf::Types};
use asap_common::Layout;

/// The kernel's own types.
const TYPES: &str = "/sys/kernel/btf/vmlinux";

/// What was found.
pub struct Found {
    /// For the programs; the agent's own namespace is not known yet.
    pub layout: Layout,
    /// BTF id of what the task iterator attaches to.
    pub iterator: u32,
}

/// Reads the kernel's types.
pub fn find() -> Result<Found, KernelError> {
    let data = std::fs::read(TYPES).map_err(|source| KernelError::NoTypes { path: TYPES, source })?;
    let types = Types::parse(&data)?;
    let [on_cpu, state, exit_state] = types.members("task_struct", ["on_cpu", "__state", "exit_state"])?;
    let [voluntary_switches, involuntary_switches] = types.members("task_struct", ["nvcsw", "nivcsw"])?;
    let [start_time, thread_pid] = types.members("task_struct", ["start_time", "thread_pid"])?;
    let [group_leader, signal] = types.members("task_struct", ["group_leader", "signal"])?;
    let [exec_id, children] = types.members("task_struct", ["self_exec_id", "children"])?;
    let [live] = types.members("signal_struct", ["live"])?;
    let [pid_level, pid_numbers] = types.members("pid", ["level", "numbers"])?;
    Ok(Found {
        layout: Layout {
            on_cpu,
            state,
            exit_state,
            voluntary_switches,
            involuntary_switches,
            start_time,
            thread_pid,
            group_leader,
            signal,
            live,
            exec_id,
            children,
            pid_level,
            pid_numbers,
            pid_number_size: types.size("upid")?,
            agent_level: 0,
        },
        iterator: types.function("bpf_iter_task")?,
    })
}
