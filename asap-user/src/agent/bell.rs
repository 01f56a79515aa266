//! A bell that wakes the engine thread, which at the same time waits for what happens to targets. Not a queue.

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    thread,
    time::{Duration, Instant},
};

/// Should waiting be impossible: how long to sleep instead.
const NAP: Duration = Duration::from_millis(100);

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waited {
    /// The bell was rung.
    ForBell,
    /// One of the other descriptors is readable, or the time has come.
    ForOthers,
}

/// The bell.
#[derive(Debug)]
pub(super) struct Bell(EventFd);

impl Bell {
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    pub fn ring(&self) {
        // Full: it has been rung.
        let _ = self.0.write(1);
    }

    /// Waits until it is rung, one of `others` is readable, or it is time.
    pub fn wait(&self, others: Vec<BorrowedFd<'_>>, until: Option<Instant>) -> Waited {
        let all = std::iter::once(self.0.as_fd()).chain(others);
        let mut all: Vec<PollFd<'_>> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let limit = until.map_or(PollTimeout::NONE, |until| {
            // Rounded up, so as not to come too early, and again.
            let rest = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(rest.as_millis()).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut all, limit) {
            Ok(0) => Waited::ForOthers,
            Ok(_) => {
                let rung = all[0].any().unwrap_or(false);
                if rung {
                    let _ = self.0.read();
                }
                if all[1..].iter().any(|fd| fd.any().unwrap_or(false)) { Waited::ForOthers } else { Waited::ForBell }
            }
            Err(nix::errno::Errno::EINTR) => Waited::ForBell,
            Err(error) => {
                tracing::warn!(%error, "can't wait for what happens to targets");
                thread::sleep(NAP);
                Waited::ForOthers
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixStream, sync::Arc};

    #[test]
    fn a_ring_is_heard_once_also_by_who_waits_later() {
        let bell = Arc::new(Bell::new().expect("a descriptor"));
        bell.ring();
        bell.ring();
        assert_eq!(bell.wait(Vec::new(), None), Waited::ForBell);
        assert_eq!(bell.wait(Vec::new(), Some(Instant::now())), Waited::ForOthers);
        let ringer = Arc::clone(&bell);
        let thread = thread::spawn(move || ringer.ring());
        assert_eq!(bell.wait(Vec::new(), None), Waited::ForBell);
        thread.join().expect("it rang");
    }

    #[test]
    fn others_are_heard_too_and_again_until_they_are_looked_after() {
        let bell = Bell::new().expect("a descriptor");
        let (one, other) = UnixStream::pair().expect("sockets");
        drop(other);
        bell.ring();
        for _ in 0..2 {
            assert_eq!(bell.wait(vec![one.as_fd()], None), Waited::ForOthers);
        }
    }
}
