//! Where the threads of a process are, told by an eBPF task iterator without stopping any of them.
//!
//! What a snapshot says of a thread is what it was when it last left user mode. That is the truth as long as the thread does
//! not run: blocked in a system call, parked in a page fault, preempted, or stopped. Nothing holds it there while it is looked at, so the proof comes
//! afterwards: [`TaskSnapshot::still`].

use super::{
    KernelError, object,
    syscall::{self, ATTACH_ITERATOR, FLAG_SLEEPABLE, PROGRAM_TRACING, ProgramType},
};
use asap_common::{STACK_MAX, SnapshotRequest, TaskRecord};
use aya::maps::MapData;
use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, OwnedFd},
    sync::Mutex,
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
    /// How often it has left a CPU. A thread that was off the CPU at two moments, with equal epochs, has not run in between.
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

impl TaskSnapshot {
    /// Whether `later`, a snapshot of the same process taken afterwards, proves this one: the thread was off the CPU both
    /// times and did not run in between, so registers and stack belong together and are what they still were at the second.
    ///
    /// Why that holds: a thread that runs between the two is counted when it leaves the CPU, before the kernel says that it has
    /// left (kernel/sched/core.c: `++*switch_count` in `__schedule`, then `finish_task` stores `on_cpu` with release), and the
    /// iterator reads the count before the registers.
    #[must_use]
    pub fn still(&self, later: &Self) -> bool {
        !self.on_cpu
            && !later.on_cpu
            && (self.tid, self.start_time, self.epoch) == (later.tid, later.start_time, later.epoch)
    }
}

/// The loaded iterator and its maps.
#[derive(Debug)]
pub struct Snapshots {
    program: OwnedFd,
    /// Guards the maps: the iterator has one buffer.
    request: Mutex<MapData>,
    /// Referenced by the program; kept to name it in the agent's list of descriptors.
    _buffer: MapData,
}

impl Snapshots {
    /// Loads the iterator. `target` is the BTF id of what it attaches to.
    pub fn load(layout: &MapData, target: u32) -> Result<Self, KernelError> {
        let request = object::create_map("REQUEST")?;
        let buffer = object::create_map("BUFFER")?;
        let program = object::load_program(
            "snapshot",
            &[("LAYOUT", layout), ("REQUEST", &request), ("BUFFER", &buffer)],
            ProgramType { kind: PROGRAM_TRACING, attach: ATTACH_ITERATOR, flags: FLAG_SLEEPABLE, target },
        )?;
        Ok(Self { program, request: Mutex::new(request), _buffer: buffer })
    }

    fn records(&self, pid: i32, stack_bytes: usize) -> Result<Vec<u8>, KernelError> {
        let failed = |source| KernelError::Iterator { pid, source };
        let id = u32::try_from(pid).map_err(|_| failed(std::io::Error::from_raw_os_error(libc::EINVAL)))?;
        let request = self.request.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let wanted = SnapshotRequest { stack_bytes: stack_bytes.min(STACK_MAX) as u64 };
        object::store(request.fd().as_fd(), "REQUEST", 0, &wanted)?;
        let iterator = match syscall::iterate_threads(self.program.as_fd(), id) {
            Ok(iterator) => iterator,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        File::from(iterator).read_to_end(&mut bytes).map_err(failed)?;
        Ok(bytes)
    }

    /// How deep the agent's own pid namespace is.
    pub fn own_level(&self) -> Result<u32, KernelError> {
        let pid = std::process::id() as i32;
        let bytes = self.records(pid, 0)?;
        let (record, _) = split(&bytes).ok_or_else(|| KernelError::Iterator {
            pid,
            source: std::io::Error::other("it does not see the agent itself"),
        })?;
        Ok(record.level)
    }

    /// Reads all threads of a process.
    pub fn read(&self, pid: i32, stack_bytes: usize) -> Result<Vec<TaskSnapshot>, KernelError> {
        let bytes = self.records(pid, stack_bytes)?;
        parse(&bytes, pid).ok_or_else(|| KernelError::Iterator {
            pid,
            source: std::io::Error::other("the kernel returned half a record"),
        })
    }
}

/// Size of a record before its stack.
const HEADER: usize = size_of::<TaskRecord>();

/// The first record, and what follows its header.
fn split(bytes: &[u8]) -> Option<(TaskRecord, &[u8])> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    Some((object::plain(header)?, rest))
}

/// Takes the iterator's output apart; none if it ends in the middle of a record.
fn parse(mut bytes: &[u8], pid: i32) -> Option<Vec<TaskSnapshot>> {
    let mut threads = Vec::new();
    while !bytes.is_empty() {
        let (record, rest) = split(bytes)?;
        let (stack, rest) = rest.split_at_checked(usize::try_from(record.stack_length).ok()?)?;
        bytes = rest;
        if record.tgid != pid || record.tid == 0 || record.exit_state != 0 {
            continue;
        }
        // struct pt_regs (arch/x86/include/asm/ptrace.h).
        let [r15, r14, r13, r12, bp, bx, _, _, _, _, ax, _, _, _, _, orig_ax, ip, _, _, sp, _] = record.regs;
        threads.push(TaskSnapshot {
            tid: record.tid,
            regs: UserRegs { ip, sp, bp, bx, r12, r13, r14, r15, orig_ax, ax },
            on_cpu: record.on_cpu != 0,
            epoch: record.epoch,
            start_time: record.start_time,
            exec_id: record.exec_id,
            state: record.state,
            stack: stack.to_vec(),
        });
    }
    Some(threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(record: &TaskRecord, stack: &[u8]) -> Vec<u8> {
        // SAFETY: plain data without padding.
        let header = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(record).cast::<u8>(), HEADER) };
        [header, stack].concat()
    }

    #[test]
    fn records_are_taken_apart_and_the_dying_left_out() {
        let mut alive = TaskRecord { tid: 8, tgid: 7, epoch: 5, stack_length: 3, ..TaskRecord::default() };
        alive.regs[16] = 0x1000;
        alive.regs[19] = 0x2000;
        let dying = TaskRecord { tid: 9, tgid: 7, exit_state: 16, ..TaskRecord::default() };
        let data = [bytes(&dying, &[]), bytes(&alive, &[1, 2, 3])].concat();
        let threads = parse(&data, 7).expect("whole records");
        assert_eq!(threads.len(), 1);
        assert_eq!((threads[0].tid, threads[0].regs.ip, threads[0].regs.sp), (8, 0x1000, 0x2000));
        assert_eq!(threads[0].stack, [1, 2, 3]);
    }

    #[test]
    fn half_a_record_is_an_error() {
        let data = bytes(&TaskRecord { tid: 8, tgid: 7, stack_length: 3, ..TaskRecord::default() }, &[1, 2, 3]);
        for length in 1..data.len() {
            assert!(parse(&data[..length], 7).is_none(), "{length} bytes");
        }
    }

    #[test]
    fn a_snapshot_is_proved_only_by_a_thread_that_did_not_run() {
        let first = TaskSnapshot { tid: 8, epoch: 5, start_time: 1, ..TaskSnapshot::default() };
        assert!(first.still(&first.clone()));
        assert!(!first.still(&TaskSnapshot { epoch: 6, ..first.clone() }));
        assert!(!first.still(&TaskSnapshot { on_cpu: true, ..first.clone() }));
        assert!(!first.still(&TaskSnapshot { start_time: 2, ..first.clone() }));
        assert!(!TaskSnapshot { on_cpu: true, ..first.clone() }.still(&first));
    }
}
