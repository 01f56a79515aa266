//! System calls run by a thread of the target on our behalf. Used only to make the puppet and to reap it; everything else
//! is the puppet's work.
//!
//! Crash-safe: before the thread's registers become ours, a signal frame with its own state lies below its stack, and the
//! borrowed instructions (`syscall; ret`) return into it. Whenever the agent dies, the thread finishes the call and
//! restores itself (P1).

use super::{
    info,
    maps::Maps,
    memory::Memory,
    ptrace::{Registers, StopReason, Stopped, TraceError, restarted},
    sigframe,
};
use crate::address::TargetAddr;
use std::time::Duration;

/// Why an injection did not happen.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// ptrace refused.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The target holds no instructions to borrow.
    #[error("the target has no `{0}` instructions that could be borrowed")]
    NoGadget(&'static str),
    /// The frame can't be written.
    #[error("the stack of thread {tid} has no room for a signal frame: {error}")]
    NoStack {
        /// The thread.
        tid: i32,
        /// The kernel's reason.
        error: std::io::Error,
    },
    /// Something else than the call happened to the thread.
    #[error("thread {tid} stopped for another reason than the injected call: {reason:?}")]
    Diverted {
        /// The thread.
        tid: i32,
        /// What happened.
        reason: StopReason,
    },
}

/// Instructions of the target that an injection borrows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gadgets {
    /// `syscall; ret`.
    pub syscall: TargetAddr,
    /// `mov $15, %eax` or `%rax`; `syscall`: rt_sigreturn(2).
    pub restorer: TargetAddr,
}

const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
const RESTORERS: [&[u8]; 2] = [&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]];

impl Gadgets {
    /// Looks through the target's executable mappings, libc first.
    ///
    /// # Errors
    /// There are none, which no real program has been seen to do.
    pub fn find(maps: &Maps, memory: &Memory) -> Result<Self, InjectError> {
        let mut executable: Vec<_> =
            maps.0.iter().filter(|m| m.executable && m.readable && m.len() < 1 << 30).collect();
        let is_libc =
            |name: &str| name.rsplit('/').next().is_some_and(|f| f.starts_with("libc.") || f.starts_with("ld-musl"));
        executable.sort_by_key(|m| (!is_libc(&m.name), m.len()));
        let (mut syscall, mut restorer) = (None, None);
        for mapping in executable {
            let Ok(bytes) = memory.bytes(mapping.range.start, mapping.len() as usize) else { continue };
            let find = |pattern: &[u8]| {
                bytes
                    .windows(pattern.len())
                    .position(|window| window == pattern)
                    .map(|at| mapping.range.start.offset(at as i64))
            };
            syscall = syscall.or_else(|| find(SYSCALL_RET));
            restorer = restorer.or_else(|| RESTORERS.iter().find_map(|pattern| find(pattern)));
            if let (Some(syscall), Some(restorer)) = (syscall, restorer) {
                return Ok(Self { syscall, restorer });
            }
        }
        Err(InjectError::NoGadget(if syscall.is_none() { "syscall; ret" } else { "rt_sigreturn" }))
    }
}

/// How long an injected call may take before the target counts as stuck.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// Results of system calls from -4095 on are errors (psABI A.2.1).
pub(super) fn outcome(rax: u64) -> Result<u64, std::io::Error> {
    let value = rax as i64;
    if (-4095..0).contains(&value) { Err(std::io::Error::from_raw_os_error(-value as i32)) } else { Ok(rax) }
}

/// `registers` about to run system call `number` at `syscall`.
pub(super) fn calling(mut registers: Registers, syscall: TargetAddr, number: i64, arguments: [u64; 6]) -> Registers {
    registers.rip = syscall.0;
    registers.rax = number as u64;
    // Not inside a system call: nothing for the kernel to restart.
    registers.orig_rax = u64::MAX;
    [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = arguments;
    registers
}

/// A stopped thread whose registers are ours until [`Injection::end`].
#[derive(Debug)]
pub struct Injection {
    thread: Stopped,
    original: Registers,
    mask: u64,
    hijacked: Registers,
    syscall: TargetAddr,
    signal_is_due: bool,
}

impl Injection {
    /// Puts the frame below the stack of `thread` and takes its registers.
    ///
    /// # Errors
    /// The thread is gone or its stack has no room; it then runs on untouched.
    pub fn begin(thread: Stopped, memory: &Memory, gadgets: Gadgets) -> Result<Self, InjectError> {
        let tid = thread.tid();
        let original = thread.registers()?;
        let mask = thread.signal_mask()?;
        let signal_is_due = info::Signals::of(tid).handler_is_due();
        let state = sigframe::ThreadState {
            registers: original,
            extended: thread.extended_state()?,
            signal_mask: mask,
            signal_is_due,
        };
        let no_stack = || InjectError::NoStack { tid, error: std::io::ErrorKind::OutOfMemory.into() };
        let frame =
            sigframe::build(&state, sigframe::below_red_zone(&original), gadgets.restorer).ok_or_else(no_stack)?;
        memory.write(frame.address, &frame.bytes).map_err(|error| InjectError::NoStack { tid, error })?;
        let mut hijacked = original;
        hijacked.rsp = frame.stack_pointer.0;
        crate::fault::point("inject.frame-written");
        // From the next line on the thread restores itself if we die: the registers lead through a call that has no effect.
        thread.set_registers(&calling(hijacked, gadgets.syscall, libc::SYS_getpid, [0; 6]))?;
        crate::fault::point("inject.registers-taken");
        thread.set_signal_mask(u64::MAX)?;
        Ok(Self { thread, original, mask, hijacked, syscall: gadgets.syscall, signal_is_due })
    }

    /// The thread, for ptrace options and event messages.
    #[must_use]
    pub fn thread(&self) -> &Stopped {
        &self.thread
    }

    /// Runs a system call in the thread. `event` sees ptrace events (a clone) on the way.
    ///
    /// # Errors
    /// The thread is gone or was diverted. The inner result is the call's own.
    pub fn syscall(
        &mut self,
        number: i64,
        arguments: [u64; 6],
        mut event: impl FnMut(&Stopped, i32),
    ) -> Result<Result<u64, std::io::Error>, InjectError> {
        self.thread.set_registers(&calling(self.hijacked, self.syscall, number, arguments))?;
        let mut entered = false;
        loop {
            match self.thread.run_to_syscall(CALL_LIMIT)? {
                StopReason::Syscall => {
                    if entered && self.thread.is_at_syscall_exit()? {
                        break;
                    }
                    entered = true;
                    crate::fault::point("inject.in-call");
                }
                StopReason::Event(number) => event(&self.thread, number),
                // SIGSTOP and SIGCONT can't be blocked; the thread goes on and stops again when we let go.
                StopReason::Group | StopReason::Interrupt => {}
                reason @ StopReason::Signal(_) => {
                    return Err(InjectError::Diverted { tid: self.thread.tid(), reason });
                }
            }
        }
        crate::fault::point("inject.after-call");
        Ok(outcome(self.thread.registers()?.rax))
    }

    /// Gives the thread its registers and signal mask back and lets it run.
    ///
    /// # Errors
    /// It was killed meanwhile.
    pub fn end(self) -> Result<(), InjectError> {
        self.thread.set_signal_mask(self.mask)?;
        crate::fault::point("inject.mask-returned");
        // We are at a system-call stop now, where the kernel no longer restarts the call that was interrupted: done here.
        self.thread.set_registers(&restarted(self.original, self.signal_is_due))?;
        crate::fault::point("inject.registers-returned");
        self.thread.release()?;
        Ok(())
    }
}
