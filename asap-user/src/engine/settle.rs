//! All processes or none (P2), also when the agent dies between two of them. Each process's ledger says which patches are on
//! their way into, or out of, all processes of the target. Who finds such a mark after the agent's death, and not every process
//! has the patch, takes it out of those that have: the request was never answered.

use super::{
    check::Observers, exchange::record, modules::ImageCache, process::TargetProcess, revert, target::Target,
    transaction::Terms,
};
use crate::report::{Consistency, Failure, PatchId};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// Time for taking a half-finished patch out of one process. The administrator waits for the attach meanwhile.
const LIMIT: Duration = Duration::from_secs(10);

/// Notes that `patch` is about to change in this process, and may not have in others.
///
/// # Errors
/// The process is gone, or the ledger is full.
pub fn begin(process: &mut TargetProcess, patch: PatchId) -> Result<(), Failure> {
    if process.book.ledger.unsettled.contains(&patch) {
        return Ok(());
    }
    record(process, |ledger| ledger.unsettled.push(patch))
}

/// What was begun has come to an end, told to the user whichever way it went.
pub fn done(target: &mut Target) {
    for process in target.processes.values_mut() {
        clear(process);
    }
}

fn clear(process: &mut TargetProcess) {
    // A process that is gone needs no mark; in one that lives an agent that comes later settles it again.
    if !process.book.ledger.unsettled.is_empty()
        && let Err(failure) = record(process, |ledger| ledger.unsettled.clear())
    {
        tracing::debug!(pid = process.pid, %failure, "a mark could not be removed");
    }
}

/// Patches that some process is marked with, that none has for certain, and that some don't have at all.
fn half_done(target: &Target) -> BTreeSet<PatchId> {
    let ledgers = || target.processes.values().map(|process| &process.book.ledger);
    let marked: BTreeSet<PatchId> = ledgers().flat_map(|ledger| ledger.unsettled.iter().copied()).collect();
    let carries = |ledger: &super::ledger::Ledger, id: PatchId| ledger.patches.iter().any(|patch| patch.id == id);
    let is_half = |id: &PatchId| {
        let for_certain = ledgers().any(|ledger| carries(ledger, *id) && !ledger.unsettled.contains(id));
        !for_certain && ledgers().any(|ledger| carries(ledger, *id)) && ledgers().any(|ledger| !carries(ledger, *id))
    };
    marked.into_iter().filter(is_half).collect()
}

/// Finishes what an earlier agent left half done in `target`, and notes it for the administrator.
pub fn after_adoption(target: &mut Target, images: &mut ImageCache, observers: &mut Observers) {
    for id in half_done(target) {
        let patch = target.patches().into_iter().find(|patch| patch.id == id);
        let name = patch.map(|patch| patch.name).unwrap_or_default();
        let terms = Terms { deadline: Instant::now() + LIMIT, limit: LIMIT, consistency: Consistency::Quiescent };
        let mut kept = Vec::new();
        for process in target.processes.values_mut().filter(|process| process.patches().contains(&id)) {
            if let Err(failure) = revert::from_process(process, images, observers, id, terms)
                && process.is_alive()
            {
                tracing::warn!(pid = process.pid, %failure, "a half-finished patch stays");
                kept.push(process.pid.to_string());
            }
        }
        let note = if kept.is_empty() {
            format!("patch {} ({name}) was in some processes only, since an agent died: it was taken out of all", id.0)
        } else {
            format!(
                "patch {} ({name}) is in some processes only, since an agent died, and could not be taken out of process(es) {}: \
                 revert it, then apply it again",
                id.0,
                kept.join(", ")
            )
        };
        target.notes.push(note);
    }
    done(target);
}
