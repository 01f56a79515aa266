//! That nobody wants the outcome of a request any more. The agent says so from its own thread; the engine asks at the places
//! where giving up leaves everything as it was. Not for stopping work that is under way.
//!
//! The engine works at one request at a time, on one thread; so the request's [`Cancel`] is that thread's, and what
//! must not be given up half-way holds it off.

use std::{
    cell::{Cell, RefCell},
    marker::PhantomData,
    sync::{Arc, OnceLock},
};

/// A handle by which a request is cancelled; clones are the same handle.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<OnceLock<&'static str>>);

impl Cancel {
    /// Asks to give up; the first reason counts.
    pub fn ask(&self, reason: &'static str) {
        let _ = self.0.set(reason);
    }

    /// Why to give up; none: go on.
    #[must_use]
    pub fn reason(&self) -> Option<&'static str> {
        self.0.get().copied()
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Cancel>> = const { RefCell::new(None) };
    static HELD_OFF: Cell<usize> = const { Cell::new(0) };
}

/// Does `work` for a request that `cancel` can end.
pub fn during<T>(cancel: &Cancel, work: impl FnOnce() -> T) -> T {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            CURRENT.set(None);
        }
    }
    let _reset = Reset;
    CURRENT.set(Some(cancel.clone()));
    work()
}

/// Why the request that this thread works at is to be given up; none: it goes on, or may not be given up now.
#[must_use]
pub fn reason() -> Option<&'static str> {
    if HELD_OFF.get() > 0 {
        return None;
    }
    CURRENT.with_borrow(|current| current.as_ref().and_then(Cancel::reason))
}

/// As long as this lives the work of this thread can't be given up.
#[derive(Debug)]
pub struct HoldOff(PhantomData<*const ()>);

/// From here on giving up would leave things half done.
#[must_use]
pub fn hold_off() -> HoldOff {
    HELD_OFF.set(HELD_OFF.get() + 1);
    HoldOff(PhantomData)
}

impl Drop for HoldOff {
    fn drop(&mut self) {
        HELD_OFF.set(HELD_OFF.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_at_work_hears_it_unless_it_holds_it_off() {
        let cancel = Cancel::default();
        assert_eq!(reason(), None);
        during(&cancel, || {
            assert_eq!(reason(), None);
            let ours = cancel.clone();
            std::thread::spawn(move || ours.ask("the client left")).join().expect("no panic");
            cancel.ask("a later reason");
            assert_eq!(reason(), Some("the client left"));
            let held = hold_off();
            assert_eq!(reason(), None);
            drop(held);
            assert_eq!(reason(), Some("the client left"));
        });
        assert_eq!(reason(), None, "the next request is another");
    }
}
