//! A program that is started, but waits before its first instruction until it is let go. Signals and terminal are passed through as
//! if it had been started alone. Knows nothing of asap.

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{
        ptrace,
        signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, signal, sigprocmask},
        signalfd::{SfdFlags, SignalFd},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, User, execvp, fork, getpid, initgroups, pipe2, setgid, setuid},
};
use std::{
    ffi::{CString, OsString},
    io::{self, Read},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
};

/// Signals that are handed on to the program when somebody sends them to us.
const PASSED: [Signal; 11] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGCONT,
    Signal::SIGTSTP,
    Signal::SIGWINCH,
    Signal::SIGPIPE,
];

/// Why a program can't be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is no such program.
    #[error("there is no such program")]
    NotFound,
    /// It is there, but can't be run.
    #[error("it can't be run: {0}")]
    NotExecutable(Errno),
    /// Its name or an argument contains a NUL.
    #[error("an argument contains a NUL byte")]
    Argument,
    /// It was ended before it began.
    #[error("signal {0} ended it before it began")]
    Ended(Signal),
    /// A step of ours failed.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With this status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
}

impl End {
    /// The exit code by which shells tell of it.
    pub const fn code(self) -> u8 {
        match self {
            Self::Exit(status) => status as u8,
            Self::Signal(signal) => 128_u8.wrapping_add(signal as u8),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Program {
    pid: Pid,
    signals: SignalFd,
    /// It has ended, and nothing is left of it.
    is_gone: bool,
}

impl Program {
    /// Starts a program, which then waits before its first instruction. `user`: as whom it runs, if not as we do.
    ///
    /// # Errors
    /// It can't be started; nothing is left of it.
    pub fn start(words: &[OsString], user: Option<&User>) -> Result<Self, StartError> {
        let words: Result<Vec<_>, _> = words.iter().map(|word| CString::new(word.as_bytes())).collect();
        let words = words.map_err(|_| StartError::Argument)?;
        let name = user.map(|user| CString::new(user.name.as_bytes())).transpose().map_err(|_| StartError::Argument)?;
        let failed = |step: &'static str| move |errno: Errno| StartError::System(step, errno.into());
        let (told, teller) = pipe2(OFlag::O_CLOEXEC).map_err(failed("pipe"))?;
        // From here on signals wait until we look at them; what they are about then waits for the program, too.
        let waited: SigSet = PASSED.into_iter().chain([Signal::SIGCHLD]).collect();
        let mut before = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&waited), Some(&mut before)).map_err(failed("sigprocmask"))?;
        let signals = SignalFd::with_flags(&waited, SfdFlags::SFD_CLOEXEC).map_err(failed("signalfd"))?;
        // SAFETY: this process has one thread; the child runs until it is another program, or ends.
        match unsafe { fork() }.map_err(failed("fork"))? {
            ForkResult::Child => {
                let errno = become_program(&words, user.zip(name.as_ref()), &before);
                let _ = nix::unistd::write(&teller, &(errno as i32).to_ne_bytes());
                // SAFETY: ends this process, which is a copy of one that goes on.
                unsafe { libc::_exit(127) }
            }
            ForkResult::Parent { child } => {
                drop(teller);
                let mut program = Self { pid: child, signals, is_gone: false };
                program.await_beginning(told)?;
                Ok(program)
            }
        }
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Waits until it is another program, and hands the stop that this is over to the kernel: others can trace it then.
    fn await_beginning(&mut self, told: OwnedFd) -> Result<(), StartError> {
        let failed = |step: &'static str| move |errno: Errno| StartError::System(step, errno.into());
        loop {
            match waitpid(self.pid, None).map_err(failed("waitpid"))? {
                // What a traced process gets when execve(2) has succeeded (ptrace(2), "execve(2) under ptrace").
                WaitStatus::Stopped(_, Signal::SIGTRAP) => break,
                WaitStatus::Stopped(_, other) => ptrace::cont(self.pid, other).map_err(failed("ptrace"))?,
                status => return Err(self.not_begun(status, Some(told))),
            }
        }
        kill(self.pid, Signal::SIGSTOP).map_err(failed("kill"))?;
        ptrace::detach(self.pid, None).map_err(failed("ptrace"))?;
        match waitpid(self.pid, Some(WaitPidFlag::WUNTRACED)).map_err(failed("waitpid"))? {
            WaitStatus::Stopped(..) => Ok(()),
            status => Err(self.not_begun(status, None)),
        }
    }

    fn not_begun(&mut self, status: WaitStatus, told: Option<OwnedFd>) -> StartError {
        self.is_gone = true;
        let mut number = [0; 4];
        let told = told.is_some_and(|told| std::fs::File::from(told).read_exact(&mut number).is_ok());
        match (status, told) {
            (WaitStatus::Signaled(_, signal, _), _) => StartError::Ended(signal),
            (_, true) => match Errno::from_raw(i32::from_ne_bytes(number)) {
                Errno::ENOENT => StartError::NotFound,
                errno => StartError::NotExecutable(errno),
            },
            _ => StartError::System("execve", io::Error::other("it ended before it began")),
        }
    }

    /// Lets it run.
    pub fn release(&self) -> Result<(), Errno> {
        kill(self.pid, Signal::SIGCONT)
    }

    /// Waits for its end. Until then signals that are sent to us go to it, and when it stops we stop.
    pub fn wait(&mut self) -> io::Result<End> {
        loop {
            if let Some(end) = self.look()? {
                self.is_gone = true;
                return Ok(end);
            }
            let Some(news) = self.signals.read_signal()? else { continue };
            let Some(number) = i32::try_from(news.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok())
            else {
                continue;
            };
            // The terminal's own go to all of the foreground; so the program has them already.
            let is_from_terminal = news.ssi_code > 0;
            let is_its_own = news.ssi_pid == self.pid.as_raw() as u32;
            if number != Signal::SIGCHLD && !is_from_terminal && !is_its_own {
                let _ = kill(self.pid, number);
            }
        }
    }

    /// Its end, if that has come.
    fn look(&self) -> io::Result<Option<End>> {
        loop {
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED;
            match waitpid(self.pid, Some(flags)) {
                Ok(WaitStatus::Exited(_, status)) => return Ok(Some(End::Exit(status))),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Some(End::Signal(signal as i32))),
                // Whoever started us is to see a job that is stopped. When we are continued, it is.
                Ok(WaitStatus::Stopped(..)) => {
                    let _ = kill(getpid(), Signal::SIGSTOP);
                    let _ = kill(self.pid, Signal::SIGCONT);
                }
                Ok(WaitStatus::StillAlive) => return Ok(None),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.is_gone {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// In the child: another user, and another program, with the signal mask from before. Gives why not.
fn become_program(words: &[CString], user: Option<(&User, &CString)>, mask: &SigSet) -> Errno {
    let changed = || -> Result<(), Errno> {
        if let Some((user, name)) = user {
            initgroups(name, user.gid)?;
            setgid(user.gid)?;
            setuid(user.uid)?;
        }
        // Rust's own start ignores SIGPIPE.
        // SAFETY: no handler is involved.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(mask), None)?;
        ptrace::traceme()
    };
    let first = words.first().map(|word| word.as_c_str()).unwrap_or_default();
    match changed().and_then(|()| execvp(first, words)) {
        Err(errno) => errno,
        Ok(never) => match never {},
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_as_shells_tell_them() {
        assert_eq!([End::Exit(0), End::Exit(42), End::Signal(9), End::Signal(11)].map(End::code), [0, 42, 137, 139]);
    }
}
