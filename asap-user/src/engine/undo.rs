//! The processes of a target that got a patch, so that it can be taken out again while others may still refuse.

use super::{check::Observers, modules::ImageCache, revert, settle, target::Target};
use crate::{
    cancel,
    report::{Failure, PatchId, TargetState},
};

/// What was done.
#[derive(Debug)]
pub struct Undo {
    id: PatchId,
    done: Vec<i32>,
}

impl Undo {
    /// Nothing yet.
    #[must_use]
    pub fn new(id: PatchId) -> Self {
        Self { id, done: Vec::new() }
    }

    /// A process got the patch.
    pub fn note(&mut self, pid: i32) {
        self.done.push(pid);
    }

    /// Takes the patch out of the processes that have it, puts back what went out for it, and explains.
    pub fn roll_back(
        self,
        target: &mut Target,
        images: &mut ImageCache,
        observers: &Observers,
        failure: Failure,
    ) -> Failure {
        let _to_the_end = cancel::hold_off();
        let kept = revert::take_back(target, &self.done, images, observers, self.id);
        settle::done(target);
        if self.done.is_empty() {
            return failure;
        }
        let state = if kept.is_empty() { TargetState::RolledBack } else { TargetState::PartlyDone };
        let message = if kept.is_empty() {
            format!("{}; it was taken out again of {} other process(es)", failure.message, self.done.len())
        } else {
            format!("{}; it could not be taken out again of process(es) {}", failure.message, kept.join(", "))
        };
        Failure { message, state, ..failure }
    }
}
