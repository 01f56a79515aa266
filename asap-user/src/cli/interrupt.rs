//! Ctrl-C while the agent works: ends the client, not the request. Somebody who presses it must know that.

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use std::io::stderr;

const WORDS: &[u8] =
    b"\nasap: interrupted; the agent goes on with the request. `asap status` and `asap log` tell what comes of it.\n";

/// From here on, an interrupt says so before it ends this process.
pub fn explain() {
    // With SA_RESETHAND the second interrupt is an ordinary one.
    let action = SigAction::new(SigHandler::Handler(say_and_end), SaFlags::SA_RESETHAND, SigSet::empty());
    // SAFETY: the handler does what signal-safety(7) allows.
    let _ = unsafe { sigaction(Signal::SIGINT, &action) };
}

extern "C" fn say_and_end(_: i32) {
    let _ = nix::unistd::write(stderr(), WORDS);
    // Delivered when this handler returns: whoever started this process sees that it was interrupted.
    let _ = raise(Signal::SIGINT);
}
