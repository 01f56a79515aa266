//! Threads under ptrace(2): a [`Stopped`] thread is a value; letting it go is dropping the value. Only PTRACE_SEIZE is
//! used: it sends no signal, and a tracer's death lets the thread run on (P1).
//!
//! ptrace belongs to the thread that seized; the types here can't be sent to another.
//!
//! As long as any thread is held the watchdog is on guard: an agent that hangs then is ended, and the threads run on (P1).

use super::{held::Held, info};
use std::{
    cell::RefCell,
    io,
    marker::PhantomData,
    time::{Duration, Instant},
};

/// Registers of a thread, as ptrace(2) gives them.
pub type Registers = libc::user_regs_struct;

/// Why a thread could not be stopped, read or written.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It ended.
    #[error("thread {0} ended")]
    Gone(i32),
    /// Another tracer has it.
    #[error("thread {tid} is traced by process {tracer}")]
    TracedByOther {
        /// The thread.
        tid: i32,
        /// Its tracer.
        tracer: i32,
    },
    /// It does not come to a stop: uninterruptible sleep.
    #[error("thread {0} does not stop (uninterruptible sleep in the kernel)")]
    DoesNotStop(i32),
    /// The kernel said no.
    #[error("{request} of thread {tid}: {error}")]
    System {
        /// The thread.
        tid: i32,
        /// The request.
        request: &'static str,
        /// The kernel's reason.
        error: io::Error,
    },
}

/// What stopped a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// PTRACE_INTERRUPT, or the first stop of a new thread.
    Interrupt,
    /// The process is stopped by a signal (SIGSTOP and the like).
    Group,
    /// A signal is about to be delivered.
    Signal(i32),
    /// Entry into or exit from a system call.
    Syscall,
    /// A PTRACE_EVENT_*.
    Event(i32),
}

/// A thread that is seized by this thread of the agent and stopped.
#[derive(Debug)]
pub struct Stopped {
    tid: i32,
    reason: StopReason,
    /// Dropping does not let go.
    kept: bool,
    _held: Option<Held>,
    _this_thread: PhantomData<*const ()>,
}

/// Longest wait for a thread to come to a stop.
pub const STOP_LIMIT: Duration = Duration::from_millis(2000);

fn request(
    tid: i32,
    name: &'static str,
    request: libc::c_uint,
    address: usize,
    data: usize,
) -> Result<i64, TraceError> {
    // SAFETY: every caller passes the address and data that its request asks for; pointers among them refer to live,
    // exclusively borrowed buffers of the size the request writes.
    let result = unsafe { libc::ptrace(request, tid, address, data) };
    if result == -1 {
        let error = io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            Some(libc::ESRCH) => TraceError::Gone(tid),
            _ => TraceError::System { tid, request: name, error },
        });
    }
    Ok(result)
}

/// What stopped `tid`; none: it has not stopped.
fn wait_once(tid: i32) -> Result<Option<StopReason>, TraceError> {
    let mut status = 0;
    // SAFETY: `status` is a live local.
    let waited = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
    if waited == 0 {
        return Ok(None);
    }
    if waited != tid || !libc::WIFSTOPPED(status) {
        return Err(TraceError::Gone(tid));
    }
    let signal = libc::WSTOPSIG(status);
    Ok(Some(match (status >> 16, signal) {
        (libc::PTRACE_EVENT_STOP, libc::SIGTRAP) => StopReason::Interrupt,
        (libc::PTRACE_EVENT_STOP, _) => StopReason::Group,
        (0, signal) if signal == libc::SIGTRAP | 0x80 => StopReason::Syscall,
        (0, signal) => StopReason::Signal(signal),
        (event, _) => StopReason::Event(event),
    }))
}

/// Waits for the next stop of `tid`; at most until `deadline`.
fn wait(tid: i32, deadline: Instant) -> Result<StopReason, TraceError> {
    let begin = Instant::now();
    loop {
        if let Some(reason) = wait_once(tid)? {
            return Ok(reason);
        }
        let now = Instant::now();
        if now > deadline {
            return Err(TraceError::DoesNotStop(tid));
        }
        // Most stops come within microseconds; a sleep then costs more than it saves.
        if now - begin < Duration::from_micros(500) {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

thread_local! {
    /// Threads that were told to stop and did not in time. They will, and nobody waits for them any more.
    static LATECOMERS: RefCell<Vec<i32>> = const { RefCell::new(Vec::new()) };
}

/// Hears that a thread that we trace has ended, now or when it does.
fn forget_dead(tid: i32) {
    if matches!(wait_once(tid), Ok(None)) {
        LATECOMERS.with_borrow_mut(|tids| tids.push(tid));
    }
}

/// Lets threads go that did not stop when they were told to (uninterruptible sleep, vfork(2)) and have done so since; gives
/// how many are still to come. ptrace(2) can't let go of a thread that runs, so whoever stops threads has to call this
/// from time to time until there are none.
pub fn release_latecomers() -> usize {
    LATECOMERS.with_borrow_mut(|tids| {
        tids.retain(|&tid| match wait_once(tid) {
            Ok(Some(reason)) => {
                drop(Stopped::held(tid, reason, Held::begin()));
                false
            }
            Ok(None) => true,
            Err(_) => false,
        });
        tids.len()
    })
}

/// A thread that has been seized and told to stop, and may not have stopped yet.
#[derive(Debug)]
pub struct Stopping {
    tid: i32,
    held: Option<Held>,
    _this_thread: PhantomData<*const ()>,
}

impl Stopping {
    /// Seizes `tid` and interrupts it.
    ///
    /// # Errors
    /// It is gone, or somebody else traces it.
    pub fn begin(tid: i32) -> Result<Self, TraceError> {
        release_latecomers();
        let held = Held::begin();
        crate::fault::touch("touch.stop").map_err(|error| TraceError::System {
            tid,
            request: "PTRACE_SEIZE",
            error,
        })?;
        request(tid, "PTRACE_SEIZE", libc::PTRACE_SEIZE, 0, libc::PTRACE_O_TRACESYSGOOD as usize).map_err(|error| {
            match info::ProcessInfo::of(tid) {
                Ok(info) if info.tracer != 0 => TraceError::TracedByOther { tid, tracer: info.tracer },
                Ok(info) if matches!(info.state, 'Z' | 'X') => TraceError::Gone(tid),
                Ok(_) => error,
                Err(_) => TraceError::Gone(tid),
            }
        })?;
        request(tid, "PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, 0, 0)?;
        crate::fault::point("stop.interrupted");
        Ok(Self { tid, held: Some(held), _this_thread: PhantomData })
    }

    /// Waits until it has stopped.
    ///
    /// # Errors
    /// It ended, or sleeps uninterruptibly for longer than [`STOP_LIMIT`]: then see [`release_latecomers`].
    pub fn stopped(mut self) -> Result<Stopped, TraceError> {
        let reason = wait(self.tid, Instant::now() + STOP_LIMIT);
        if !matches!(reason, Err(TraceError::DoesNotStop(_)))
            && let Some(held) = self.held.take()
        {
            return Ok(Stopped::held(self.tid, reason?, held));
        }
        Err(TraceError::DoesNotStop(self.tid))
    }
}

impl Drop for Stopping {
    fn drop(&mut self) {
        // It will come to its stop when nobody looks any more, and has to be let go then.
        if self.held.is_some() {
            LATECOMERS.with_borrow_mut(|tids| tids.push(self.tid));
        }
    }
}

/// Kernel-internal results of an interrupted system call (include/linux/errno.h), and EINTR.
const EINTR: i64 = -4;
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
/// Length of the `syscall` instruction, bytes.
const SYSCALL_LENGTH: u64 = 2;

/// `registers` as they must be for the thread to run its interrupted system call again, where it was in one: what the kernel
/// does in arch/x86/kernel/signal.c, plus calls that would return EINTR although no signal handler ran (P5).
#[must_use]
pub fn restarted(mut registers: Registers, signal_is_due: bool) -> Registers {
    if (registers.orig_rax as i64) < 0 {
        return registers;
    }
    match registers.rax as i64 {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => registers.rax = registers.orig_rax,
        ERESTART_RESTARTBLOCK => registers.rax = libc::SYS_restart_syscall as u64,
        EINTR if !signal_is_due => registers.rax = registers.orig_rax,
        _ => return registers,
    }
    registers.rip -= SYSCALL_LENGTH;
    registers.orig_rax = u64::MAX;
    registers
}

impl Stopped {
    /// Seizes and stops `tid`.
    ///
    /// # Errors
    /// As [`Stopping::begin`] and [`Stopping::stopped`].
    pub fn stop(tid: i32) -> Result<Self, TraceError> {
        Stopping::begin(tid)?.stopped()
    }

    /// A thread that ptrace attached by itself (PTRACE_O_TRACECLONE): waits for its first stop.
    ///
    /// # Errors
    /// It ended.
    pub fn auto_attached(tid: i32) -> Result<Self, TraceError> {
        let held = Held::begin();
        let reason = wait(tid, Instant::now() + STOP_LIMIT)?;
        Ok(Self::held(tid, reason, held))
    }

    fn held(tid: i32, reason: StopReason, held: Held) -> Self {
        Self { tid, reason, kept: false, _held: Some(held), _this_thread: PhantomData }
    }

    /// Thread id.
    #[must_use]
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// What stopped it.
    #[must_use]
    pub fn reason(&self) -> StopReason {
        self.reason
    }

    /// Its registers.
    ///
    /// # Errors
    /// It was killed.
    pub fn registers(&self) -> Result<Registers, TraceError> {
        // SAFETY: all-zero bytes are a valid value of this plain C struct.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        request(self.tid, "PTRACE_GETREGS", libc::PTRACE_GETREGS, 0, &raw mut registers as usize)?;
        Ok(registers)
    }

    /// Sets its registers.
    ///
    /// # Errors
    /// It was killed.
    pub fn set_registers(&self, registers: &Registers) -> Result<(), TraceError> {
        request(self.tid, "PTRACE_SETREGS", libc::PTRACE_SETREGS, 0, std::ptr::from_ref(registers) as usize)?;
        Ok(())
    }

    /// The extended processor state in XSAVE standard format (NT_X86_XSTATE).
    ///
    /// # Errors
    /// It was killed.
    pub fn extended_state(&self) -> Result<Vec<u8>, TraceError> {
        const NT_X86_XSTATE: usize = 0x202;
        let mut buffer = vec![0_u8; 16 * 1024];
        let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let name = "PTRACE_GETREGSET";
        request(self.tid, name, libc::PTRACE_GETREGSET, NT_X86_XSTATE, &raw mut vector as usize)?;
        buffer.truncate(vector.iov_len);
        Ok(buffer)
    }

    /// Its mask of blocked signals.
    ///
    /// # Errors
    /// It was killed.
    pub fn signal_mask(&self) -> Result<u64, TraceError> {
        let mut mask = 0_u64;
        request(self.tid, "PTRACE_GETSIGMASK", libc::PTRACE_GETSIGMASK, 8, &raw mut mask as usize)?;
        Ok(mask)
    }

    /// Sets its mask of blocked signals.
    ///
    /// # Errors
    /// It was killed.
    pub fn set_signal_mask(&self, mask: u64) -> Result<(), TraceError> {
        request(self.tid, "PTRACE_SETSIGMASK", libc::PTRACE_SETSIGMASK, 8, std::ptr::from_ref(&mask) as usize)?;
        Ok(())
    }

    /// Sets PTRACE_O_* options; system calls are always marked (PTRACE_O_TRACESYSGOOD).
    ///
    /// # Errors
    /// The kernel refuses an option.
    pub fn set_options(&self, options: i32) -> Result<(), TraceError> {
        let options = (options | libc::PTRACE_O_TRACESYSGOOD) as usize;
        request(self.tid, "PTRACE_SETOPTIONS", libc::PTRACE_SETOPTIONS, 0, options)?;
        Ok(())
    }

    /// The message of the last event: the new thread's id after a clone.
    ///
    /// # Errors
    /// It was killed.
    pub fn event_message(&self) -> Result<u64, TraceError> {
        let mut message = 0_u64;
        request(self.tid, "PTRACE_GETEVENTMSG", libc::PTRACE_GETEVENTMSG, 0, &raw mut message as usize)?;
        Ok(message)
    }

    /// Whether a syscall stop is the exit from the call (rather than the entry to it).
    ///
    /// # Errors
    /// It was killed.
    pub fn is_at_syscall_exit(&self) -> Result<bool, TraceError> {
        const PTRACE_SYSCALL_INFO_EXIT: u8 = 2;
        // struct ptrace_syscall_info: the operation is its first byte.
        let mut buffer = [0_u8; 88];
        let (name, number) = ("PTRACE_GET_SYSCALL_INFO", libc::PTRACE_GET_SYSCALL_INFO);
        request(self.tid, name, number, buffer.len(), buffer.as_mut_ptr() as usize)?;
        Ok(buffer[0] == PTRACE_SYSCALL_INFO_EXIT)
    }

    /// Runs it to its next stop, at the latest at the next entry to or exit from a system call. Signals are not delivered;
    /// callers have them blocked.
    ///
    /// # Errors
    /// It ended, or `limit` passed.
    pub fn run_to_syscall(&mut self, limit: Duration) -> Result<StopReason, TraceError> {
        self.start_to_syscall()?;
        self.wait_for_stop(limit)
    }

    /// Runs it until something stops it. Signals are not delivered.
    ///
    /// # Errors
    /// It ended, or `limit` passed.
    pub fn run(&mut self, limit: Duration) -> Result<StopReason, TraceError> {
        request(self.tid, "PTRACE_CONT", libc::PTRACE_CONT, 0, 0)?;
        self.wait_for_stop(limit)
    }

    /// The first half of [`Self::run_to_syscall`].
    ///
    /// # Errors
    /// It ended.
    pub fn start_to_syscall(&mut self) -> Result<(), TraceError> {
        request(self.tid, "PTRACE_SYSCALL", libc::PTRACE_SYSCALL, 0, 0)?;
        Ok(())
    }

    /// The second half of [`Self::run_to_syscall`].
    ///
    /// # Errors
    /// It ended, or `limit` passed.
    pub fn wait_for_stop(&mut self, limit: Duration) -> Result<StopReason, TraceError> {
        self.reason = wait(self.tid, Instant::now() + limit)?;
        Ok(self.reason)
    }

    /// Lets the thread run on, as if it had not been stopped: the signal that stopped it is delivered, an interrupted system
    /// call goes on (P5).
    ///
    /// # Errors
    /// It was killed meanwhile, which is no loss.
    pub fn release(mut self) -> Result<(), TraceError> {
        self.kept = true;
        self.let_go()
    }

    fn let_go(&self) -> Result<(), TraceError> {
        let let_go = self.detach();
        if let Err(TraceError::Gone(_)) = let_go {
            // It was killed. Its end is told to us first, and its process ends for nobody before we have heard it (ptrace(2)).
            forget_dead(self.tid);
        }
        let_go
    }

    fn detach(&self) -> Result<(), TraceError> {
        let (signal, mend) = match self.reason {
            StopReason::Interrupt => (0, true),
            StopReason::Signal(signal) => (signal, true),
            _ => (0, false),
        };
        if mend {
            // The kernel restarts calls that may be restarted by itself; those that end with EINTR are ours to mend.
            let registers = self.registers()?;
            if registers.rax as i64 == EINTR && (registers.orig_rax as i64) >= 0 {
                let signals = info::Signals::of(self.tid);
                let due = signals.handler_is_due() || signals.catches(signal);
                self.set_registers(&restarted(registers, due))?;
            }
        }
        request(self.tid, "PTRACE_DETACH", libc::PTRACE_DETACH, 0, signal as usize)?;
        Ok(())
    }

    /// Keeps the thread stopped when this value goes away: it stays so until the agent ends.
    pub(super) fn keep(&mut self) {
        self.kept = true;
        // The helper's stop holds nobody up.
        self._held = None;
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if !self.kept {
            // A thread that was killed meanwhile needs no letting go.
            let _ = self.let_go();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(rax: i64, orig_rax: i64) -> Registers {
        // SAFETY: all-zero bytes are a valid value of this plain C struct.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        registers.rax = rax as u64;
        registers.orig_rax = orig_rax as u64;
        registers.rip = 0x1002;
        registers
    }

    #[test]
    fn an_interrupted_call_runs_again() {
        for result in [ERESTARTSYS, ERESTARTNOHAND, ERESTARTNOINTR, EINTR] {
            let again = restarted(registers(result, libc::SYS_epoll_wait), false);
            assert_eq!((again.rax, again.rip), (libc::SYS_epoll_wait as u64, 0x1000));
            assert_eq!(again.orig_rax as i64, -1, "the kernel must not restart it a second time");
        }
        let again = restarted(registers(ERESTART_RESTARTBLOCK, libc::SYS_clock_nanosleep), false);
        assert_eq!((again.rax, again.rip), (libc::SYS_restart_syscall as u64, 0x1000));
    }

    #[test]
    fn what_was_not_interrupted_stays() {
        assert_eq!(restarted(registers(17, libc::SYS_read), false).rip, 0x1002);
        // Not in a system call at all: the same number in rax means nothing.
        assert_eq!(restarted(registers(EINTR, -1), false).rip, 0x1002);
        // A handler is about to run: the program expects its EINTR.
        assert_eq!(restarted(registers(EINTR, libc::SYS_epoll_wait), true).rip, 0x1002);
    }
}
