//! The puppet: a helper process per target that shares the target's address space and nothing else, and that stays
//! ptrace-stopped unless it runs a system call for us. With it, no thread of the target is stopped for housekeeping.
//!
//! It dies with the agent (PTRACE_O_EXITKILL). Dead, it is a zombie child of the target, invisible to waitpid(2) without
//! `__WALL`, until an injected wait4(2) reaps it.

use super::{
    info::{self, ProcessInfo},
    inject::{Gadgets, InjectError, Injection, calling, outcome},
    memory::Memory,
    ptrace::{Registers, StopReason, Stopped, TraceError},
    sigframe,
};
use crate::{address::TargetAddr, watchdog};
use std::{
    fs,
    io::{self, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

/// Why there is no puppet, or why it does not obey.
#[derive(Debug, thiserror::Error)]
pub enum PuppetError {
    /// The injection failed.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// ptrace refused.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// A system call in the target failed.
    #[error("{call} in process {pid}: {error}")]
    Call {
        /// The process.
        pid: i32,
        /// The call.
        call: &'static str,
        /// The kernel's reason.
        error: io::Error,
    },
    /// No thread of the target can be borrowed for the moment that making the puppet takes.
    #[error("no thread of process {0} comes to a stop")]
    NoThread(i32),
    /// It hit something.
    #[error("the helper of process {pid} stopped unexpectedly: {reason:?} at {at}")]
    Astray {
        /// The process.
        pid: i32,
        /// Why.
        reason: StopReason,
        /// Where.
        at: TargetAddr,
    },
}

/// An exchange of pages that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("mremap of a text page in process {pid} (after {done} pages): {error}")]
pub struct ExchangeError {
    /// The process.
    pub pid: i32,
    /// Pages that had been moved.
    pub done: usize,
    /// The kernel's reason.
    pub error: io::Error,
}

/// Code at the start of the home, for the puppet: `syscall; ret`, and further on `mov [rbx], r12; int3` as the place to which
/// a called function returns.
const HOME_CODE: [u8; 16] =
    [0x0f, 0x05, 0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0x4c, 0x89, 0x23, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc];
const RETURN_STUB: i64 = 8;
/// Where `rip` is behind its int3.
const RETURNED: u64 = 4;
/// Where the code for [`Puppet::exchange`] and its table lie in the home.
const EXCHANGE_AT: i64 = 64;
const EXCHANGE_TABLE: i64 = 256;
/// Pairs that fit between the table's start and the scratch area, less the end mark.
const EXCHANGE_MOST: usize = (SCRATCH_AT - EXCHANGE_TABLE) as usize / 16 - 1;
/// Where callers may put a short string for a system call.
const SCRATCH_AT: i64 = 3072;
/// Moves pages until the table ends or the kernel refuses one:
/// ```text
/// next: mov rdi, [r12]; test rdi, rdi; jz end
///       mov r8, [r12+8]; mov esi, 4096; mov edx, 4096; mov r10d, MREMAP_MAYMOVE|MREMAP_FIXED; mov eax, SYS_mremap
///       syscall; cmp rax, -4095; jae end; add r12, 16; jmp next
/// end:  int3
/// ```
const EXCHANGE_CODE: [u8; 52] = [
    0x49, 0x8b, 0x3c, 0x24, 0x48, 0x85, 0xff, 0x74, 0x2a, 0x4d, 0x8b, 0x44, 0x24, 0x08, 0xbe, 0x00, 0x10, 0x00, 0x00,
    0xba, 0x00, 0x10, 0x00, 0x00, 0x41, 0xba, 0x03, 0x00, 0x00, 0x00, 0xb8, 0x19, 0x00, 0x00, 0x00, 0x0f, 0x05, 0x48,
    0x3d, 0x01, 0xf0, 0xff, 0xff, 0x73, 0x06, 0x49, 0x83, 0xc4, 0x10, 0xeb, 0xcd, 0xcc,
];
/// Time beyond its limit that a call has before the agent is taken for hung.
const CALL_MARGIN: Duration = Duration::from_secs(10);
/// The frame that ends a puppet that nobody takes in hand lies below this offset of the home.
const EXIT_FRAME_TOP: i64 = 4096;

/// A helper process inside a target's address space.
#[derive(Debug)]
pub struct Puppet {
    pid: i32,
    target: i32,
    process: Stopped,
    registers: Registers,
    home: TargetAddr,
    pidfd: OwnedFd,
    confined: bool,
}

/// What making a puppet cost the one thread that was borrowed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Borrowed {
    /// Time it was stopped.
    pub stop: Duration,
}

/// A descriptor that names process `pid` for ever (pidfd_open(2)).
///
/// # Errors
/// There is no such process.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a non-negative result is a new descriptor that nobody else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as i32)) }
    }
}

/// Ends the process that `pidfd` names (SIGKILL).
///
/// # Errors
/// It has ended.
pub fn kill_process(pidfd: &OwnedFd) -> io::Result<()> {
    // SAFETY: no pointer but the null one, which stands for ordinary information about the signal.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A thread of the target that is easily borrowed: the main thread, else any that stops.
fn borrow_thread(pid: i32) -> Result<Stopped, PuppetError> {
    let mut last = None;
    for tid in std::iter::once(pid).chain(info::threads(pid).unwrap_or_default().into_iter().filter(|&tid| tid != pid))
    {
        match Stopped::stop(tid) {
            Ok(thread) => return Ok(thread),
            Err(error @ TraceError::TracedByOther { .. }) => return Err(error.into()),
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or(PuppetError::NoThread(pid), PuppetError::Trace))
}

/// Whether the thread runs under a seccomp filter, which then must be suspended for the calls that we inject.
fn is_confined(tid: i32) -> bool {
    ProcessInfo::of(tid).is_ok_and(|info| info.seccomp != 0)
}

impl Puppet {
    /// Makes the puppet of `target` with one short stop of one of its threads. `home` says where to put the page-aligned
    /// region of `home_length` bytes that holds the puppet's code and is otherwise the caller's (private anonymous, R-X);
    /// if `existing_home`, it is there already.
    ///
    /// # Errors
    /// The target can't be traced, or the kernel refuses a call in it. The target then runs on as before.
    pub fn make(
        target: i32,
        memory: &Memory,
        gadgets: Gadgets,
        home: TargetAddr,
        home_length: u64,
        existing_home: bool,
    ) -> Result<(Self, Borrowed), PuppetError> {
        let begin = Instant::now();
        let thread = borrow_thread(target)?;
        let confined = is_confined(thread.tid());
        if confined {
            thread.set_options(libc::PTRACE_O_SUSPEND_SECCOMP)?;
        }
        memory.write_as_tracer_of(thread.tid());
        let mut injection = Injection::begin(thread, memory, gadgets)?;
        let made =
            Self::make_within(&mut injection, target, memory, gadgets, home, home_length, existing_home, confined);
        let ended = injection.end();
        let stop = begin.elapsed();
        let mut puppet = made?;
        ended?;
        memory.write_as_tracer_of(puppet.pid);
        puppet.settle_in()?;
        Ok((puppet, Borrowed { stop }))
    }

    #[allow(clippy::too_many_arguments)]
    fn make_within(
        injection: &mut Injection,
        target: i32,
        memory: &Memory,
        gadgets: Gadgets,
        home: TargetAddr,
        home_length: u64,
        existing_home: bool,
        confined: bool,
    ) -> Result<Self, PuppetError> {
        let failed = |call| move |error| PuppetError::Call { pid: target, call, error };
        if !existing_home {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let protection = libc::PROT_READ | libc::PROT_EXEC;
            let arguments = [home.0, home_length, protection as u64, flags as u64, u64::MAX, 0];
            injection.syscall(libc::SYS_mmap, arguments, |_, _| ())?.map_err(failed("mmap"))?;
            crate::fault::point("puppet.home-mapped");
        }
        let prepared: Result<_, PuppetError> = (|| {
            memory.write(home, &HOME_CODE).map_err(failed("writing the helper's code"))?;
            memory.write(home.offset(EXCHANGE_AT), &EXCHANGE_CODE).map_err(failed("writing the helper's code"))?;
            let registers = injection.thread().registers()?;
            let frame = sigframe::build_exit(&registers, home.offset(EXIT_FRAME_TOP), gadgets.restorer, home);
            memory.write(frame.address, &frame.bytes).map_err(failed("writing the helper's stack"))?;
            let suspend = if confined { libc::PTRACE_O_SUSPEND_SECCOMP } else { 0 };
            injection.thread().set_options(libc::PTRACE_O_TRACECLONE | suspend)?;
            let mut child = None;
            // Descriptors are shared only until the puppet has emptied its own table; handlers and directories never.
            let flags = (libc::CLONE_VM | libc::CLONE_FILES) as u64;
            let arguments = [flags, frame.stack_pointer.0, 0, 0, 0, 0];
            let cloned = injection.syscall(libc::SYS_clone, arguments, |thread, event| {
                if event == libc::PTRACE_EVENT_CLONE {
                    child = thread.event_message().ok().and_then(|pid| i32::try_from(pid).ok());
                }
            })?;
            injection.thread().set_options(suspend)?;
            cloned.map_err(failed("clone"))?;
            child.ok_or(PuppetError::NoThread(target))
        })();
        let pid = match prepared {
            Ok(pid) => pid,
            Err(error) => {
                if !existing_home {
                    let _ = injection.syscall(libc::SYS_munmap, [home.0, home_length, 0, 0, 0, 0], |_, _| ());
                }
                return Err(error);
            }
        };
        let mut process = Stopped::auto_attached(pid)?;
        process.keep();
        // Until here the puppet would have ended itself; from here it dies with us.
        let suspend = if confined { libc::PTRACE_O_SUSPEND_SECCOMP } else { 0 };
        process.set_options(libc::PTRACE_O_EXITKILL | suspend)?;
        process.set_signal_mask(u64::MAX)?;
        crate::fault::point("puppet.cloned");
        let registers = process.registers()?;
        let pidfd = pidfd_open(pid).map_err(failed("pidfd_open"))?;
        Ok(Self { pid, target, process, registers, home, pidfd, confined })
    }

    /// What can be done while no thread of the target waits any more: own empty descriptor table, the agent's cgroup.
    fn settle_in(&mut self) -> Result<(), PuppetError> {
        const CLOSE_RANGE_UNSHARE: u64 = 2;
        self.syscall("close_range", libc::SYS_close_range, [0, u64::from(u32::MAX), CLOSE_RANGE_UNSHARE, 0, 0, 0])?;
        // Should it ever end by a signal: no core dump of the target. 1 also keeps pipe handlers from running (core(5)).
        let limit = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
        // SAFETY: `limit` is a live local; no old limit is asked for.
        unsafe { libc::prlimit(self.pid, libc::RLIMIT_CORE, &raw const limit, std::ptr::null_mut()) };
        // Threads wait for it while it works: it goes first.
        // SAFETY: no memory is involved. Without the right to raise it the priority stays.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, self.pid as libc::id_t, -20) };
        // Service managers count processes by cgroup: ours is where it belongs. Where cgroup 2 is missing it stays.
        if let Ok(text) = fs::read_to_string("/proc/self/cgroup")
            && let Some(path) = text.lines().find_map(|line| line.strip_prefix("0::"))
        {
            // Where the second version is mounted elsewhere there is no such file, and none is made.
            let place = fs::OpenOptions::new().write(true).open(format!("/sys/fs/cgroup{path}/cgroup.procs"));
            let _ = place.and_then(|mut file| file.write_all(self.pid.to_string().as_bytes()));
        }
        Ok(())
    }

    /// Process id of the puppet.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Start of the region with its code.
    #[must_use]
    pub fn home(&self) -> TargetAddr {
        self.home
    }

    /// Bytes at the start of the home that are the puppet's own.
    pub const OWN_LENGTH: u64 = EXIT_FRAME_TOP as u64;

    /// Whether `page` begins with the puppet's code.
    #[must_use]
    pub fn is_home_code(page: &[u8]) -> bool {
        page.starts_with(&HOME_CODE)
    }

    /// Runs a system call in the target's address space.
    ///
    /// # Errors
    /// The call failed, or the puppet is gone.
    pub fn syscall(&mut self, call: &'static str, number: i64, arguments: [u64; 6]) -> Result<u64, PuppetError> {
        let refused = |error| PuppetError::Call { pid: self.target, call, error };
        // Memory, above all: a target may have no room for more.
        crate::fault::touch(if number == libc::SYS_mmap { "touch.map" } else { "touch.call" }).map_err(refused)?;
        self.process.set_registers(&calling(self.registers, self.home, number, arguments))?;
        let mut entered = false;
        loop {
            match self.process.run_to_syscall(Duration::from_secs(5))? {
                StopReason::Syscall => {
                    // The first stop of a new process may be its exit from clone(2).
                    if self.process.is_at_syscall_exit()? {
                        if entered {
                            break;
                        }
                    } else {
                        entered = true;
                    }
                }
                StopReason::Group | StopReason::Interrupt | StopReason::Event(_) => {}
                reason @ StopReason::Signal(_) => return Err(self.astray(reason)),
            }
        }
        let rax = self.process.registers()?.rax;
        outcome(rax).map_err(|error| PuppetError::Call { pid: self.target, call, error })
    }

    /// The thread pointer (`fs_base`) of the thread that it was made by.
    #[must_use]
    pub fn thread_pointer(&self) -> u64 {
        self.registers.fs_base
    }

    /// Where callers may put a string of at most 256 bytes for a system call.
    #[must_use]
    pub fn scratch(&self) -> TargetAddr {
        self.home.offset(SCRATCH_AT)
    }

    /// Moves each page `.0` over the page `.1`, all of them without us in between: once begun, the puppet finishes even if
    /// the agent dies, so that a change of several pages is never left half done (P1, P2).
    ///
    /// # Errors
    /// More pages than fit (176), or the kernel refused one; the index of the first page that was not moved is in the error.
    pub fn exchange(&mut self, memory: &Memory, moves: &[(TargetAddr, TargetAddr)]) -> Result<(), ExchangeError> {
        let pid = self.target;
        let failed = |done| move |error| ExchangeError { pid, done, error };
        if moves.len() > EXCHANGE_MOST {
            return Err(failed(0)(io::Error::other("too many text pages in one transaction")));
        }
        let mut table = Vec::with_capacity((moves.len() + 1) * 16);
        for (from, to) in moves.iter().copied().chain([(TargetAddr(0), TargetAddr(0))]) {
            table.extend_from_slice(&from.0.to_le_bytes());
            table.extend_from_slice(&to.0.to_le_bytes());
        }
        crate::fault::touch("touch.exchange").map_err(failed(0))?;
        let at = self.home.offset(EXCHANGE_TABLE);
        memory.write(at, &table).map_err(failed(0))?;
        let gone = |error: TraceError| ExchangeError { pid, done: 0, error: io::Error::other(error) };
        let mut registers = calling(self.registers, self.home.offset(EXCHANGE_AT), 0, [0; 6]);
        registers.r12 = at.0;
        let points = ["exchange.begin", "exchange.done"];
        let stopped = self.run_to_int3(&registers, Duration::from_secs(5), points).map_err(gone)?;
        if stopped != StopReason::Signal(libc::SIGTRAP) {
            return Err(gone(TraceError::Gone(self.pid)));
        }
        let registers = self.process.registers().map_err(gone)?;
        let done = (registers.r12.wrapping_sub(at.0) / 16) as usize;
        if done < moves.len() {
            let error = outcome(registers.rax).err().unwrap_or_else(|| io::Error::other("stopped half-way"));
            return Err(failed(done)(error));
        }
        Ok(())
    }

    /// Calls a function of the target with up to six integer arguments on `stack` (its top, 16-byte aligned, with 16 writable
    /// bytes above), with the thread pointer `fs_base`, and returns its rax. Once begun, it runs to its end even if the agent
    /// dies: it may hold locks of the target. After it, `mark` is written: where, and what. The caller sees to it that the
    /// function may run here: no locks that a stopped thread holds, no thread-local state that another thread is using.
    ///
    /// # Errors
    /// It hit a fault, or did not return within `limit`.
    #[allow(clippy::too_many_arguments)]
    pub fn call(
        &mut self,
        memory: &Memory,
        function: TargetAddr,
        arguments: [u64; 6],
        stack: TargetAddr,
        fs_base: u64,
        mark: Option<(TargetAddr, u64)>,
        limit: Duration,
    ) -> Result<u64, PuppetError> {
        let pid = self.target;
        let return_to = self.home.offset(RETURN_STUB);
        let top = stack.offset(-8);
        memory.write(top, &return_to.0.to_le_bytes()).map_err(|error| PuppetError::Call {
            pid,
            call: "writing the call's stack",
            error,
        })?;
        let mut registers = calling(self.registers, function, 0, arguments);
        registers.rsp = top.0;
        registers.rbp = 0;
        // Preserved by the function (psABI 3.2.1). Without a mark the word above the stack takes it.
        let (place, value) = mark.unwrap_or((stack, 0));
        (registers.rbx, registers.r12) = (place.0, value);
        registers.fs_base = fs_base;
        // What it calls may take locks of the target.
        let _watched = watchdog::section("a call in the target", limit + CALL_MARGIN);
        let stopped = self.run_to_int3(&registers, limit, ["call.begin", "call.done"])?;
        let registers = self.process.registers()?;
        if registers.rip != return_to.0 + RETURNED {
            return Err(self.astray(stopped));
        }
        Ok(registers.rax)
    }

    /// Runs on from `registers` until a signal stops it, as the int3 does behind what it is to do. That it does to the end
    /// whatever becomes of us: untraced, the int3 ends it. `points` are the fault points before and after.
    fn run_to_int3(
        &mut self,
        registers: &Registers,
        limit: Duration,
        points: [&'static str; 2],
    ) -> Result<StopReason, TraceError> {
        self.process.set_registers(registers)?;
        self.set_options(0)?;
        crate::fault::point(points[0]);
        let deadline = Instant::now() + limit;
        let reason = loop {
            match self.process.run(deadline.saturating_duration_since(Instant::now()))? {
                reason @ StopReason::Signal(_) => break reason,
                StopReason::Group | StopReason::Interrupt | StopReason::Event(_) | StopReason::Syscall => {}
            }
        };
        crate::fault::point(points[1]);
        self.set_options(libc::PTRACE_O_EXITKILL)?;
        Ok(reason)
    }

    /// `options`, and what a confined target's helper needs besides.
    fn set_options(&self, options: i32) -> Result<(), TraceError> {
        let suspend = if self.confined { libc::PTRACE_O_SUSPEND_SECCOMP } else { 0 };
        self.process.set_options(options | suspend)
    }

    fn astray(&self, reason: StopReason) -> PuppetError {
        let at = self.process.registers().map_or(TargetAddr(0), |registers| TargetAddr(registers.rip));
        PuppetError::Astray { pid: self.target, reason, at }
    }

    /// A duplicate of a descriptor that is open in the puppet.
    ///
    /// # Errors
    /// The descriptor is not open, or the puppet is gone.
    pub fn fd_of(&self, descriptor: u64) -> io::Result<OwnedFd> {
        // SAFETY: no pointers; a non-negative result is a new descriptor that nobody else owns.
        unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), descriptor as i32, 0);
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as i32)) }
        }
    }

    /// Takes over a descriptor that the puppet opened, and closes it there.
    ///
    /// # Errors
    /// The descriptor is not open, or the puppet is gone.
    pub fn take_fd(&mut self, descriptor: u64) -> Result<OwnedFd, PuppetError> {
        let taken =
            self.fd_of(descriptor).map_err(|error| PuppetError::Call { pid: self.target, call: "pidfd_getfd", error });
        self.syscall("close", libc::SYS_close, [descriptor, 0, 0, 0, 0, 0])?;
        taken
    }

    /// Ends the puppet and has one thread of the target reap it, so that nothing of it is left.
    ///
    /// # Errors
    /// The target is gone (and the puppet with it), or no thread can be borrowed: the puppet is dead then all the same, and
    /// a zombie stays until the target ends or a later agent reaps it.
    pub fn dismiss(self, memory: &Memory, gadgets: Gadgets) -> Result<Borrowed, PuppetError> {
        let (pid, target) = (self.pid, self.target);
        drop(self);
        reap(target, pid, memory, gadgets)
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // By pidfd: the number can't have been given to another process.
        // SAFETY: no pointers but a null siginfo.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), libc::SIGKILL, 0, 0) };
        let mut status = 0;
        // SAFETY: `status` is a live local. The tracer is told of the end before the parent is.
        unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) };
    }
}

/// Waits until those `children` of `target` that are puppets of dead agents have finished what they were at (see
/// [`Puppet::exchange`], [`Puppet::call`]): a moment, as a rule. Gives those that wait to be reaped then. They are known by
/// sending no signal when they end, as nothing but clone(2) makes children.
#[must_use]
pub fn await_orphans(target: i32, children: &[i32], limit: Duration) -> Vec<i32> {
    let deadline = Instant::now() + limit;
    let tid = info::living_thread(target).unwrap_or(target);
    let mut orphans: Vec<(i32, ProcessInfo)> = Vec::new();
    for &child in children {
        orphans.extend(ProcessInfo::of(child).ok().filter(|info| info.exit_signal == 0).map(|info| (child, info)));
    }
    let works = |child: i32, info: &ProcessInfo| {
        info.state != 'Z' && info.tracer == 0 && info::share_memory(tid, child) == Some(true)
    };
    while orphans.iter().any(|(child, info)| works(*child, info)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
        for (child, info) in &mut orphans {
            *info = ProcessInfo::of(*child).unwrap_or_default();
        }
    }
    orphans.into_iter().filter(|(_, info)| info.state == 'Z').map(|(child, _)| child).collect()
}

/// The agent that has a living puppet among `children` of `target`, if it is not this one.
#[must_use]
pub fn other_agent(target: i32, children: &[i32]) -> Option<i32> {
    let own = std::process::id() as i32;
    let tid = info::living_thread(target).unwrap_or(target);
    let master = |&child: &i32| {
        let info = ProcessInfo::of(child).ok().filter(|info| info.exit_signal == 0 && info.state != 'Z')?;
        (info.tracer != 0 && info.tracer != own && info::share_memory(tid, child) == Some(true)).then_some(info.tracer)
    };
    children.iter().find_map(master)
}

/// Has a thread of `target` reap its dead child `puppet`.
///
/// # Errors
/// As [`Puppet::dismiss`].
pub fn reap(target: i32, puppet: i32, memory: &Memory, gadgets: Gadgets) -> Result<Borrowed, PuppetError> {
    let begin = Instant::now();
    let thread = borrow_thread(target)?;
    if is_confined(thread.tid()) {
        thread.set_options(libc::PTRACE_O_SUSPEND_SECCOMP)?;
    }
    let mut injection = Injection::begin(thread, memory, gadgets)?;
    let options = (libc::__WALL | libc::WNOHANG) as u64;
    // The target may live in a namespace of its own: there the puppet has another number.
    let number = info::number_in_its_namespace(puppet).unwrap_or(puppet);
    let reaped = injection.syscall(libc::SYS_wait4, [number as u64, 0, options, 0, 0, 0], |_, _| ());
    injection.end()?;
    let failed = |error| PuppetError::Call { pid: target, call: "wait4", error };
    reaped?.map_err(failed)?;
    Ok(Borrowed { stop: begin.elapsed() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::maps::Maps;
    use std::process::{Child, Command};

    struct Sleeper(Child);
    impl Sleeper {
        fn start() -> Self {
            let child = Command::new("/bin/sleep").arg("1000").spawn().expect("sleep starts");
            // Wait until it sleeps in its own code rather than in the dynamic linker.
            let pid = child.id();
            while !fs::read_to_string(format!("/proc/{pid}/syscall")).is_ok_and(|text| text.starts_with("230 ")) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Self(child)
        }
        fn pid(&self) -> i32 {
            i32::try_from(self.0.id()).expect("pids fit i32")
        }
    }
    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn is_root() -> bool {
        // SAFETY: no memory is involved.
        unsafe { libc::geteuid() == 0 }
    }

    #[test]
    fn a_puppet_works_in_the_target_and_leaves_nothing_behind() {
        if !is_root() {
            eprintln!("SKIPPED (needs root): a_puppet_works_in_the_target_and_leaves_nothing_behind");
            return;
        }
        let mut sleeper = Sleeper::start();
        let pid = sleeper.pid();
        let before = Maps::of(pid).expect("the target");
        let memory = Memory::open(pid).expect("the target");
        let gadgets = Gadgets::find(&before, &memory).expect("libc has them");
        let text = before.0.iter().find(|m| m.executable && m.is_file()).expect("text").range.clone();
        let home = before.gap(&text, 1 << 16, 1 << 30).expect("room");
        let (mut puppet, borrowed) = Puppet::make(pid, &memory, gadgets, home, 1 << 16, false).expect("a puppet");
        assert!(borrowed.stop > Duration::ZERO);
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let got = puppet.syscall("mmap", libc::SYS_mmap, [0, 4096, 3, flags, u64::MAX, 0]).expect("mmap");
        memory.write(TargetAddr(got), b"here").expect("the new page");
        assert!(puppet.syscall("close", libc::SYS_close, [0; 6]).is_err(), "the puppet has no descriptors");
        assert_eq!(info::threads(pid).expect("alive"), [pid], "no thread more in the target's list");
        puppet.syscall("munmap", libc::SYS_munmap, [got, 4096, 0, 0, 0, 0]).expect("munmap");
        puppet.syscall("munmap", libc::SYS_munmap, [home.0, 1 << 16, 0, 0, 0, 0]).err();
        let id = puppet.pid();
        puppet.dismiss(&memory, gadgets).expect("reaped");
        assert!(!std::path::Path::new(&format!("/proc/{id}")).exists());
        assert_eq!(Maps::of(pid).expect("alive"), before);
        assert!(sleeper.0.try_wait().expect("own child").is_none(), "the target lives");
        // It may first have to fetch the page of the instruction (then: -1).
        let begin = Instant::now();
        loop {
            let syscall = fs::read_to_string(format!("/proc/{pid}/syscall")).expect("alive");
            if syscall.starts_with("230 ") || syscall.starts_with("219 ") {
                break;
            }
            assert!(begin.elapsed() < Duration::from_secs(10), "it does not sleep on: {syscall}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
