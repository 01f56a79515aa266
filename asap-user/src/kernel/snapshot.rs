//! Where the threads of a process are, told by an eBPF task iterator without stopping any of them.
//!
//! What a snapshot says of a thread is what it was when it last left user mode. That is the truth as long as the thread does
//! not run: blocked in a system call, parked in a page fault, preempted, or stopped. Nothing holds it there while it is looked
//! at; whether it stayed there for that long is told by [`TaskSnapshot::settled`], and whether it has stayed there since, by the
//! next snapshot of a [`Series`].

use super::{
    KernelError, object,
    syscall::{self, ATTACH_ITERATOR, FLAG_SLEEPABLE, PROGRAM_TRACING, ProgramType},
};
use asap_common::{STACK_MAX, SnapshotRequest, TaskBrief, TaskRecord, task_kind};
use aya::maps::MapData;
use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Registers of a thread as it left user mode; those that callers of functions rely on, and what tells the system call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserRegs {
    /// Instruction pointer.
    pub ip: u64,
    /// Stack pointer.
    pub sp: u64,
    /// `rbp`
    pub bp: u64,
    /// `rbx`
    pub bx: u64,
    /// `r12`
    pub r12: u64,
    /// `r13`
    pub r13: u64,
    /// `r14`
    pub r14: u64,
    /// `r15`
    pub r15: u64,
    /// Number of the system call it is in; -1 (as unsigned) if it was interrupted or faulted.
    pub orig_ax: u64,
    /// `rax`
    pub ax: u64,
}

/// One thread at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TaskSnapshot {
    /// Thread id, in the agent's pid namespace.
    pub tid: i32,
    /// Its registers; worth nothing while `on_cpu`.
    pub regs: UserRegs,
    /// A CPU ran it.
    pub on_cpu: bool,
    /// It was off the CPU and did not run while it was read: registers and stack belong together.
    pub settled: bool,
    /// How often it has left a CPU. A settled thread that has the same epoch later, and is off the CPU, has not run in between.
    pub epoch: u64,
    /// When it was started: another thread that got the same id differs in it.
    pub start_time: u64,
    /// Grows with every program that the process executes.
    pub exec_id: u64,
    /// Scheduler state; 0: would run if a CPU were free.
    pub state: u32,
    /// Its stack from `regs.sp` upwards; shorter than asked for where the mapping ends, empty while `on_cpu`.
    pub stack: Vec<u8>,
}

/// Snapshots of one process that build on one another: a thread that has not run since it was told of is not told of again
/// in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Series(u64);

/// All threads of a process, as an iterator came by them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Those that are told of in full; without the dying.
    pub tasks: Vec<TaskSnapshot>,
    /// Those that have not run since an earlier snapshot of the series told that they were settled: id, and epoch, as it
    /// was and is.
    pub same: Vec<(i32, u64)>,
    /// How many the iterator came by, the dying included. It ends early when the thread that it is at vanishes.
    pub visited: usize,
}

/// The loaded iterator and its maps.
#[derive(Debug)]
pub struct Snapshots {
    program: OwnedFd,
    /// Guards the maps: the iterator has one buffer.
    state: Mutex<State>,
    /// Referenced by the program; kept to name them in the agent's list of descriptors.
    _maps: [MapData; 2],
}

#[derive(Debug)]
struct State {
    request: MapData,
    /// The newest series.
    series: u64,
}

/// The kernel hands out its iterators' output in pieces of this size (kernel/bpf/bpf_iter.c, bpf_seq_read).
const PIECE: usize = 32 * 1024;

impl Snapshots {
    /// Loads the iterator. `target` is the BTF id of what it attaches to.
    pub fn load(layout: &MapData, target: u32) -> Result<Self, KernelError> {
        let request = object::create_map("REQUEST")?;
        let buffer = object::create_map("BUFFER")?;
        let known = object::create_map("KNOWN")?;
        let program = object::load_program(
            "snapshot",
            &[("LAYOUT", layout), ("REQUEST", &request), ("BUFFER", &buffer), ("KNOWN", &known)],
            ProgramType { kind: PROGRAM_TRACING, attach: ATTACH_ITERATOR, flags: FLAG_SLEEPABLE, target },
        )?;
        Ok(Self { program, state: Mutex::new(State { request, series: 0 }), _maps: [buffer, known] })
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a series.
    pub fn series(&self) -> Series {
        let mut state = self.locked();
        state.series += 1;
        Series(state.series)
    }

    fn iterate(&self, pid: i32, request: SnapshotRequest) -> Result<Vec<u8>, KernelError> {
        let failed = |source| KernelError::Iterator { pid, source };
        let id = u32::try_from(pid).map_err(|_| failed(io::Error::from_raw_os_error(libc::EINVAL)))?;
        let state = self.locked();
        object::store(state.request.fd().as_fd(), "REQUEST", 0, &request)?;
        let mut iterator = match syscall::iterate_threads(self.program.as_fd(), id) {
            Ok(iterator) => File::from(iterator),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = vec![0; PIECE];
        let mut length = 0;
        loop {
            match iterator.read(&mut bytes[length..]) {
                Ok(0) => break,
                Ok(more) => length += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
            bytes.resize(length + PIECE, 0);
        }
        bytes.truncate(length);
        Ok(bytes)
    }

    /// How deep the agent's own pid namespace is.
    pub fn own_level(&self) -> Result<u32, KernelError> {
        let pid = std::process::id() as i32;
        let bytes = self.iterate(pid, SnapshotRequest::default())?;
        let (record, _) = split::<TaskRecord>(&bytes).ok_or_else(|| KernelError::Iterator {
            pid,
            source: io::Error::other("it does not see the agent itself"),
        })?;
        Ok(record.level)
    }

    /// Reads all threads of a process.
    pub fn read(&self, pid: i32, stack_bytes: usize, series: Option<Series>) -> Result<Snapshot, KernelError> {
        let stack_bytes = stack_bytes.min(STACK_MAX) as u64;
        let number = series.map_or(0, |series| series.0);
        let bytes = self.iterate(pid, SnapshotRequest { stack_bytes, series: number, only_children: 0 })?;
        parse(&bytes, pid).ok_or_else(|| half_a_record(pid))
    }

    /// Threads of `pid` that have children, and how many threads the iterator came by.
    pub fn parents(&self, pid: i32) -> Result<(Vec<i32>, usize), KernelError> {
        let bytes = self.iterate(pid, SnapshotRequest { only_children: 1, ..SnapshotRequest::default() })?;
        let mut parents = Vec::new();
        let (mut rest, mut visited) = (bytes.as_slice(), 0);
        while !rest.is_empty() {
            let (brief, next) = split::<TaskBrief>(rest).ok_or_else(|| half_a_record(pid))?;
            rest = next;
            visited += 1;
            if brief.kind == task_kind::PARENT {
                parents.push(brief.tid);
            }
        }
        Ok((parents, visited))
    }
}

fn half_a_record(pid: i32) -> KernelError {
    KernelError::Iterator { pid, source: io::Error::other("the kernel returned half a record") }
}

/// The first record, and what follows it.
fn split<T: object::Plain>(bytes: &[u8]) -> Option<(T, &[u8])> {
    let (record, rest) = bytes.split_at_checked(size_of::<T>())?;
    Some((object::plain(record)?, rest))
}

/// Takes the iterator's output apart; none if it ends in the middle of a record.
fn parse(mut bytes: &[u8], pid: i32) -> Option<Snapshot> {
    let mut snapshot = Snapshot::default();
    while !bytes.is_empty() {
        snapshot.visited += 1;
        if bytes.get(..4)? == task_kind::SAME.to_ne_bytes() {
            let (same, rest) = split::<TaskBrief>(bytes)?;
            bytes = rest;
            snapshot.same.push((same.tid, same.epoch));
            continue;
        }
        let (record, rest) = split::<TaskRecord>(bytes)?;
        let (stack, rest) = rest.split_at_checked(usize::try_from(record.stack_length).ok()?)?;
        bytes = rest;
        if record.tgid != pid || record.tid == 0 || record.exit_state != 0 {
            continue;
        }
        // struct pt_regs (arch/x86/include/asm/ptrace.h).
        let [r15, r14, r13, r12, bp, bx, _, _, _, _, ax, _, _, _, _, orig_ax, ip, _, _, sp, _] = record.regs;
        snapshot.tasks.push(TaskSnapshot {
            tid: record.tid,
            regs: UserRegs { ip, sp, bp, bx, r12, r13, r14, r15, orig_ax, ax },
            on_cpu: record.on_cpu != 0,
            settled: record.settled != 0,
            epoch: record.epoch,
            start_time: record.start_time,
            exec_id: record.exec_id,
            state: record.state,
            stack: stack.to_vec(),
        });
    }
    Some(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<T: object::Plain>(record: &T, stack: &[u8]) -> Vec<u8> {
        // SAFETY: plain data without padding.
        let header = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(record).cast::<u8>(), size_of::<T>()) };
        [header, stack].concat()
    }

    fn full(tid: i32) -> TaskRecord {
        TaskRecord { kind: task_kind::FULL, tid, tgid: 7, ..TaskRecord::default() }
    }

    #[test]
    fn records_are_taken_apart_and_the_dying_left_out() {
        let mut alive = TaskRecord { epoch: 5, settled: 1, stack_length: 3, ..full(8) };
        alive.regs[16] = 0x1000;
        alive.regs[19] = 0x2000;
        let dying = TaskRecord { exit_state: 16, ..full(9) };
        let same = TaskBrief { kind: task_kind::SAME, tid: 10, epoch: 6 };
        let data = [bytes(&dying, &[]), bytes(&alive, &[1, 2, 3]), bytes(&same, &[])].concat();
        let Snapshot { tasks, same, visited } = parse(&data, 7).expect("whole records");
        assert_eq!((tasks.len(), visited), (1, 3));
        assert_eq!((tasks[0].tid, tasks[0].regs.ip, tasks[0].regs.sp, tasks[0].settled), (8, 0x1000, 0x2000, true));
        assert_eq!(tasks[0].stack, [1, 2, 3]);
        assert_eq!(same, [(10, 6)]);
    }

    #[test]
    fn half_a_record_is_an_error() {
        let record = bytes(&TaskRecord { stack_length: 3, ..full(8) }, &[1, 2, 3]);
        let same = bytes(&TaskBrief { kind: task_kind::SAME, tid: 10, epoch: 6 }, &[]);
        for data in [record, same] {
            for length in 1..data.len() {
                assert!(parse(&data[..length], 7).is_none(), "{length} bytes");
            }
        }
    }
}
