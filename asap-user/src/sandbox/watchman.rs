//! Looks after threads that a guard has stopped: each waits in a trap slot until it is known whether it may do what it was about
//! to. A thread of the agent of its own, since whoever waits here must not wait for a patch.
//!
//! Only the thread that waits is touched, by ptrace(2). An agent that dies lets all of them go on: their slots lead on (P1).

use super::{
    code::TextCode,
    family::Shared,
    judge::{self, Case, Judgement},
    policy::{Action, Decision, Guard},
    violation::Violation,
};
use crate::{
    address::TargetAddr,
    dbt::{self, Found, Trap, TrapReason},
    process::{
        curtain::{Caught, lock},
        info,
        maps::{Mapping, Maps},
        memory::Memory,
        ptrace::{Registers, StopReason, Stopped, TraceError, release_latecomers},
        puppet,
    },
    quiesce::unwind::{Unwinder, WalkRegisters},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How soon to try again where a thread could not be stopped.
const AGAIN: Duration = Duration::from_millis(2);
/// How often to look for threads that nobody told of.
const ROUND: u16 = 1000;
/// Length of `syscall`, bytes.
const SYSCALL_LENGTH: i64 = 2;
/// How long a system call that maps code may take, and a look at what was mapped.
const CALL_LIMIT: Duration = Duration::from_secs(2);
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// Deepest stack that is told.
const FRAMES_MOST: usize = 64;

/// The thread.
pub struct Watchman {
    stop: Arc<(AtomicBool, EventFd)>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watchman {
    fn drop(&mut self) {
        self.stop.0.store(true, Ordering::SeqCst);
        let _ = self.stop.1.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Starts it.
///
/// # Errors
/// There are no threads or descriptors left.
pub fn start(pid: i32, caught: Caught, shared: Arc<Shared>) -> io::Result<Watchman> {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let stop = Arc::new((AtomicBool::new(false), event));
    let ours = Arc::clone(&stop);
    let thread = std::thread::Builder::new().name(format!("watchman-{pid}")).stack_size(1 << 20).spawn(move || {
        // Threads of the target wait for it.
        // SAFETY: no memory is involved. Without the right to raise it the priority stays.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::gettid() as libc::id_t, -20) };
        let mut rounds = Rounds { shared, memories: HashMap::new(), held: HashSet::new(), late: Vec::new() };
        while !ours.0.load(Ordering::SeqCst) {
            let mut ready =
                [PollFd::new(caught.alarm(), PollFlags::POLLIN), PollFd::new(ours.1.as_fd(), PollFlags::POLLIN)];
            let limit = if rounds.late.is_empty() { ROUND } else { AGAIN.as_millis() as u16 };
            let _ = poll(&mut ready, PollTimeout::from(limit));
            let tids = caught.take();
            rounds.go(tids);
        }
        rounds.free_all();
    })?;
    Ok(Watchman { stop, thread: Some(thread) })
}

/// What it knows.
struct Rounds {
    shared: Arc<Shared>,
    /// By process.
    memories: HashMap<i32, Memory>,
    /// Threads that are to stay where they are, and where.
    held: HashSet<(i32, u64)>,
    /// Threads that could not be stopped yet.
    late: Vec<i32>,
}

impl Rounds {
    fn go(&mut self, tids: Vec<i32>) {
        release_latecomers();
        let late = std::mem::take(&mut self.late);
        for tid in late.into_iter().chain(tids) {
            match self.attend(tid) {
                Ok(()) | Err(TraceError::Gone(_)) => {}
                Err(error) => {
                    tracing::debug!(tid, %error, "a thread that a guard has stopped is tried again");
                    self.late.push(tid);
                }
            }
        }
    }

    /// The slots of threads that were held lead on from now on.
    fn free_all(&mut self) {
        for (tid, _) in std::mem::take(&mut self.held) {
            let _ = self.let_pass(tid);
        }
    }

    fn let_pass(&mut self, tid: i32) -> Result<(), TraceError> {
        let thread = Stopped::stop(tid)?;
        let mut registers = thread.registers()?;
        if let Some((resume, ..)) = self.slot(&registers) {
            registers.rip = resume.0;
            thread.set_registers(&registers)?;
        }
        thread.release()
    }

    /// Where a thread goes on that stands in a slot, and what it was about to do.
    fn slot(&self, registers: &Registers) -> Option<(TargetAddr, Trap)> {
        let code = lock(&self.shared.code);
        let at = TargetAddr(registers.rip);
        let text = code.cache_at(at)?;
        let trap = text.trap_at(at).filter(|_| text.layout.traps_at(text.region).contains(&at))?;
        Some((trap.resume.in_target(text.bias), trap))
    }

    fn attend(&mut self, tid: i32) -> Result<(), TraceError> {
        let thread = Stopped::stop(tid)?;
        let mut registers = thread.registers()?;
        // It may have gone elsewhere meanwhile, into a signal handler for example, and come back later.
        let Some((resume, trap)) = self.slot(&registers) else { return thread.release() };
        if self.held.contains(&(tid, registers.rip)) {
            return thread.release();
        }
        let Some(pid) = info::process_of(tid) else { return thread.release() };
        if !self.has_memory(pid) {
            // It is ending.
            return thread.release();
        }
        self.memories.get(&pid).into_iter().for_each(|memory| memory.write_as_tracer_of(tid));
        let outcome = self.judge(pid, tid, &registers, trap);
        match outcome {
            Outcome::Pass => registers.rip = resume.0,
            Outcome::Map => {
                registers.rip = resume.0;
                thread.set_registers(&registers)?;
                return self.let_map(thread);
            }
            Outcome::Fail(error) => {
                let code = lock(&self.shared.code);
                let text = code.cache_at(TargetAddr(registers.rip));
                let Some(text) = text else { return thread.release() };
                let next = trap.native.in_target(text.bias).offset(SYSCALL_LENGTH);
                // As the instruction leaves them (Intel SDM, SYSCALL).
                (registers.rcx, registers.r11) = (next.0, registers.eflags);
                registers.rax = u64::from(error).wrapping_neg();
                registers.rip = text.entry_for(next).0;
            }
            Outcome::Kill => {
                // It can't be another process, as one of its threads is held. Who is traced when it is killed ends for its parent
                // only when its tracer has heard of it; and back in its slot it waits.
                let process = puppet::pidfd_open(pid);
                thread.release()?;
                if let Err(error) = process.and_then(|process| puppet::kill_process(&process)) {
                    tracing::warn!(pid, %error, "a process could not be ended");
                }
                return Ok(());
            }
            Outcome::Hold => {
                self.held.insert((tid, registers.rip));
                return thread.release();
            }
        }
        thread.set_registers(&registers)?;
        thread.release()
    }

    /// Lets a thread make its system call, and holds it until the code that it has mapped is in the sandbox: it is the first that could
    /// run it.
    fn let_map(&self, mut thread: Stopped) -> Result<(), TraceError> {
        for _ in ["entry", "exit"] {
            if thread.run_to_syscall(CALL_LIMIT)? != StopReason::Syscall {
                // A signal: it is delivered, and the call made or made again.
                return thread.release();
            }
        }
        if !self.shared.news.wait(LOOK_LIMIT) {
            tracing::warn!(tid = thread.tid(), "new code runs natively for now: the agent is busy");
        }
        thread.release()
    }

    fn has_memory(&mut self, pid: i32) -> bool {
        // One of a process that ran another program meanwhile leads to what it was.
        let is_stale = self.memories.get(&pid).is_some_and(|memory| memory.word(self.probe()).is_err());
        if is_stale {
            self.memories.remove(&pid);
        }
        if !self.memories.contains_key(&pid)
            && let Ok(memory) = Memory::open(pid)
        {
            self.memories.insert(pid, memory);
        }
        self.memories.contains_key(&pid)
    }

    /// An address that is mapped as long as the process is in the sandbox.
    fn probe(&self) -> TargetAddr {
        lock(&self.shared.code).texts.first().map_or(TargetAddr(0), |text| text.region)
    }

    fn judge(&self, pid: i32, tid: i32, registers: &Registers, trap: Trap) -> Outcome {
        let shared = &self.shared;
        let count = |what| *lock(&shared.record).stops.entry(what).or_default() += 1;
        let Some(memory) = self.memories.get(&pid) else { return Outcome::Pass };
        let code = lock(&shared.code);
        let Some(text) = code.cache_at(TargetAddr(registers.rip)) else { return Outcome::Pass };
        let case = Case {
            code: &code,
            text,
            trap,
            registers,
            memory,
            area: &shared.area,
            maps: &|| Maps::of(pid).unwrap_or_default(),
            guards: &shared.policy.guards,
            is_doubtful: lock(&shared.doubtful).contains(&tid),
            is_ours: &|mapping: &Mapping| lock(&shared.ours).contains(&mapping.range.start),
        };
        let judgement = match trap.reason {
            TrapReason::Return => {
                count("return");
                case.of_return()
            }
            TrapReason::Target => {
                count("target");
                match destination(&trap, registers, memory, text) {
                    Some(to) => case.of_target(to, judge::is_jump(&trap, text)),
                    None => Judgement::Pass,
                }
            }
            TrapReason::Syscall => {
                count("system call");
                match self.judge_call(&case) {
                    Ok(Judgement::Pass) if case.makes_code() => return Outcome::Map,
                    Ok(judgement) => judgement,
                    Err((outcome, attempted, action)) => {
                        self.report(&case, pid, tid, Guard::Syscalls, attempted, action);
                        return outcome;
                    }
                }
            }
        };
        match judgement {
            Judgement::Pass => Outcome::Pass,
            Judgement::Accept(to) => {
                if let Err(error) = shared.area.accept(memory, to) {
                    tracing::debug!(pid, %error, "a destination can't be noted");
                }
                Outcome::Pass
            }
            Judgement::Against { guard, attempted } => {
                let action = shared.policy.action(guard);
                self.report(&case, pid, tid, guard, attempted, word(action).to_owned());
                Outcome::of(action)
            }
        }
    }

    /// A system call. Where a policy forbids it: what to do, what was attempted, and the word for what is done.
    fn judge_call(&self, case: &Case<'_>) -> Result<Judgement, (Outcome, String, String)> {
        let (number, arguments) = (case.registers.rax, judge::arguments(case.registers));
        if let Some(learned) = &mut lock(&self.shared.record).learned
            && !learned.observe(number, &arguments)
            && self.shared.lets_pass(number)
            && let Some(table) = self.shared.area.syscalls
            && let Ok(number) = u16::try_from(number)
        {
            // Nothing more is to be learned of it. What can't be written is asked about again.
            let _ = case.memory.write(table.offset(i64::from(number)), &[0]);
        }
        if let Some(calls) = &self.shared.calls {
            let name = || {
                let numbers: Vec<String> = arguments.iter().map(|argument| format!("{argument:#x}")).collect();
                format!("{}({})", super::policy::call_name(number), numbers.join(", "))
            };
            match calls.judge(number, &arguments) {
                Decision::Allow => {}
                Decision::Errno(error) => {
                    let word = format!("failed with {}", super::policy::errno_name(error));
                    return Err((Outcome::Fail(error), name(), word));
                }
                Decision::Do(action) => return Err((Outcome::of(action), name(), word(action).to_owned())),
            }
        }
        let is_nx = self.shared.policy.has(Guard::Nx);
        Ok(if is_nx && case.makes_code() { case.of_new_code() } else { Judgement::Pass })
    }

    fn report(&self, case: &Case<'_>, pid: i32, tid: i32, guard: Guard, attempted: String, action: String) {
        let at = case.name(case.trap.native.in_target(case.text.bias));
        let mut unwinder = Unwinder::new();
        for text in &case.code.texts {
            unwinder.add_image(&text.known.image, text.range.clone(), text.bias);
        }
        let mut registers = *case.registers;
        registers.rip = case.trap.native.in_target(case.text.bias).0;
        let mut read = |at: u64| case.memory.word(TargetAddr(at)).ok();
        let walk = unwinder.walk(&WalkRegisters::of(&registers), &mut read);
        let stack = walk.frames.iter().take(FRAMES_MOST).map(|&frame| case.name(frame)).collect();
        let time_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        tracing::warn!(pid, tid, %guard, at, attempted, action, "a guard has stopped a thread");
        let violation = Violation { time_ms, pid, tid, guard, at, attempted, action, stack };
        lock(&self.shared.record).add(violation);
    }
}

/// What becomes of the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Pass,
    /// It maps code.
    Map,
    /// The system call is not made, and fails with this error number.
    Fail(u16),
    Kill,
    Hold,
}

impl Outcome {
    fn of(action: Action) -> Self {
        match action {
            Action::Log => Self::Pass,
            Action::Kill => Self::Kill,
            Action::Stop => Self::Hold,
        }
    }
}

fn word(action: Action) -> &'static str {
    match action {
        Action::Log => "logged",
        Action::Kill => "killed",
        Action::Stop => "stopped",
    }
}

/// Where an indirect call or jump was to lead.
fn destination(trap: &Trap, r: &Registers, memory: &Memory, text: &TextCode) -> Option<TargetAddr> {
    // In the order of their numbers in instructions.
    let general =
        [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15];
    let registers = dbt::Registers { general, fs_base: r.fs_base, gs_base: r.gs_base };
    let found = match trap.destination?.find(&registers, text.bias) {
        Found::Value(value) => value,
        Found::At(at) => memory.word(TargetAddr(at)).ok()?,
    };
    Some(TargetAddr(found))
}
