//! The processes of a target that got a patch, so that it can be taken out again while others may still refuse.

use super::{check::Observers, modules::ImageCache, revert, settle, target::Target, transaction::Terms};
use crate::{
    cancel,
    report::{Consistency, Failure, PatchId, TargetState},
};
use std::time::{Duration, Instant};

/// Time for taking a patch out again where a later process refused it.
const ROLL_BACK_LIMIT: Duration = Duration::from_secs(10);

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
        observers: &mut Observers,
        failure: Failure,
    ) -> Failure {
        let _to_the_end = cancel::hold_off();
        let terms = Terms {
            deadline: Instant::now() + ROLL_BACK_LIMIT,
            limit: ROLL_BACK_LIMIT,
            consistency: Consistency::Quiescent,
        };
        let mut kept = Vec::new();
        for pid in &self.done {
            let Some(process) = target.processes.get_mut(pid) else { continue };
            if let Err(error) = revert::from_process(process, images, observers, self.id, terms)
                && process.is_alive()
            {
                tracing::error!(pid, %error, "rolling back");
                kept.push(pid.to_string());
            }
        }
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
