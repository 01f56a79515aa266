//! That threads of a target are being held, said to the watchdog: from the first stop to the last release one critical
//! section is open, however many threads there are. Nested holds extend no deadline.

use crate::watchdog::{self, Guard};
use std::{
    cell::{Cell, RefCell},
    marker::PhantomData,
    time::Duration,
};

/// How long threads may be held before the agent is taken for hung. Hooks of patches and slow machines included.
const LIMIT: Duration = Duration::from_secs(10);

thread_local! {
    static HOLDS: Cell<usize> = const { Cell::new(0) };
    static SECTION: RefCell<Option<Guard>> = const { RefCell::new(None) };
}

/// A thread of a target is held as long as this lives. ptrace(2) belongs to a thread of the agent, and so does this.
#[derive(Debug)]
pub(super) struct Held {
    _this_thread: PhantomData<*const ()>,
}

impl Held {
    /// One more thread is held.
    pub(super) fn begin() -> Self {
        if HOLDS.replace(HOLDS.get() + 1) == 0 {
            SECTION.replace(watchdog::section("stopped threads", LIMIT));
        }
        Self { _this_thread: PhantomData }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if HOLDS.replace(HOLDS.get() - 1) == 1 {
            SECTION.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_section_is_open_from_the_first_hold_to_the_last_release() {
        let watchdog = watchdog::Watchdog::start().expect("a watchdog");
        let is_open = || SECTION.with_borrow(Option::is_some);
        let first = Held::begin();
        let second = Held::begin();
        drop(first);
        assert!(is_open());
        drop(second);
        assert!(!is_open());
        drop(Held::begin());
        assert!(!is_open());
        drop(watchdog);
    }
}
