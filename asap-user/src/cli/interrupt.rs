//! Ctrl-C, or a SIGTERM, while the agent works: the first asks the agent to give the request up, the second leaves at once.
//!
//! The handler closes this side's half of the connection, which is how an agent learns that nobody waits; its answer still
//! comes in through the other half.

use nix::sys::{
    signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction},
    socket::{Shutdown, shutdown},
};
use std::{
    io::stderr,
    os::fd::{AsRawFd, BorrowedFd},
    sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst},
};

const WORDS: &[u8] = b"\nasap: interrupted; the agent gives the request up where that is still possible. \
    Again: leave without its answer (`asap status` and `asap log` tell what came of it).\n";

/// How long an interrupted client waits for the agent's answer.
const PATIENCE_SECONDS: u32 = 20;

/// The connection that a handler may close its half of; -1: none.
static CONNECTION: AtomicI32 = AtomicI32::new(-1);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// As long as this lives, interrupts cancel the request.
pub struct Armed<'a>(BorrowedFd<'a>);

/// From here on, an interrupt cancels the request that was sent over `connection`.
pub fn cancels(connection: BorrowedFd<'_>) -> Armed<'_> {
    CONNECTION.store(connection.as_raw_fd(), SeqCst);
    // With SA_RESETHAND the second of a kind is an ordinary one.
    let flags = SaFlags::SA_RESETHAND | SaFlags::SA_RESTART;
    let action = SigAction::new(SigHandler::Handler(cancel), flags, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler does what signal-safety(7) allows.
        let before = unsafe { sigaction(signal, &action) };
        // Whoever started this process with the signal ignored meant it (nohup, the background of a shell).
        if let Ok(before) = before
            && matches!(before.handler(), SigHandler::SigIgn)
        {
            // SAFETY: the action that was there before.
            let _ = unsafe { sigaction(signal, &before) };
        }
    }
    Armed(connection)
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        let _ = CONNECTION.compare_exchange(self.0.as_raw_fd(), -1, SeqCst, SeqCst);
    }
}

extern "C" fn cancel(signal: i32) {
    let connection = CONNECTION.swap(-1, SeqCst);
    if INTERRUPTED.swap(true, SeqCst) || connection < 0 {
        // Delivered when this handler returns, and then not handled: whoever started this process sees what ended it.
        let _ = Signal::try_from(signal).map(raise);
        return;
    }
    let _ = nix::unistd::write(stderr(), WORDS);
    let _ = shutdown(connection, Shutdown::Write);
    // An agent that hangs has no answer; SIGALRM ends this process then.
    nix::unistd::alarm::set(PATIENCE_SECONDS);
}
