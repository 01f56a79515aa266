//! All processes or none (P2), also when the agent dies between two of them. Each process's ledger says which patches are on
//! their way into, or out of, all processes of the target. Who finds such a mark after the agent's death, and not every process
//! has the patch, takes it out of those that have: the request was never answered.

use super::{
    check::Observers,
    exchange::{free_leftover, record},
    hooks,
    ledger::{AppliedPatch, Span},
    modules::ImageCache,
    process::TargetProcess,
    revert,
    target::Target,
};
use crate::report::{Consistency, Failure, PatchId};
use std::collections::BTreeSet;

/// Notes that `patch` is about to change in this process, and may not have in others; `replaced` go out for it.
///
/// # Errors
/// The process is gone, or the ledger is full.
pub fn begin(process: &mut TargetProcess, patch: PatchId, replaced: &[AppliedPatch]) -> Result<(), Failure> {
    if process.book.ledger.unsettled.contains(&patch) && replaced.is_empty() {
        return Ok(());
    }
    record(process, |ledger| {
        if !ledger.unsettled.contains(&patch) {
            ledger.unsettled.push(patch);
        }
        ledger.replaced = replaced.to_vec();
    })
}

/// The memory of a patch.
fn spans(patch: &AppliedPatch) -> impl Iterator<Item = Span> {
    [patch.code, patch.rodata, patch.data].into_iter().filter(|span| !span.is_empty())
}

/// Patches that went out for one that is unsettled. From now on their memory is in use again, whatever was planned for it.
///
/// # Errors
/// The process is gone.
pub fn take_back(process: &mut TargetProcess) -> Result<Vec<AppliedPatch>, Failure> {
    let back = gone_out(process);
    if !back.is_empty() {
        let used: Vec<Span> = back.iter().flat_map(spans).collect();
        record(process, |ledger| ledger.lingering.retain(|span| !used.contains(span)))?;
    }
    Ok(back)
}

/// What is noted as replaced and really out.
fn gone_out(process: &TargetProcess) -> Vec<AppliedPatch> {
    let ledger = &process.book.ledger;
    let is_out = |patch: &&AppliedPatch| ledger.patches.iter().all(|other| other.id != patch.id);
    ledger.replaced.iter().filter(is_out).cloned().collect()
}

/// A patch is in all processes: what went out for it is no longer needed. It is freed where nobody can be inside it.
pub fn clear_away(target: &mut Target, images: &mut ImageCache, consistency: Consistency) {
    for process in target.processes.values_mut().filter(|process| !process.book.ledger.replaced.is_empty()) {
        if consistency == Consistency::Quiescent
            && let Err(failure) = free_replaced(process, images)
        {
            tracing::warn!(pid = process.pid, %failure, "the memory of replaced patches stays");
        }
    }
}

fn free_replaced(process: &mut TargetProcess, images: &mut ImageCache) -> Result<(), Failure> {
    let mut unused = Vec::new();
    for patch in gone_out(process) {
        if let (Some(table), Some(object)) = (patch.eh_frame, patch.registered) {
            let modules = images.modules(process.pid, &process.maps()?, &process.memory, |at| process.is_ours(at));
            hooks::announce(process, &modules, table, object)?;
            let forgotten = hooks::deregister_unwind_table(process);
            hooks::end_registration(process)?;
            // The unwinder would follow the table into memory that is gone: then it stays, for ever.
            if forgotten.is_err() {
                continue;
            }
        }
        unused.extend(spans(&patch));
    }
    record(process, |ledger| {
        ledger.replaced.clear();
        ledger.lingering.retain(|span| !unused.contains(span));
        ledger.leftover.extend(unused);
    })?;
    free_leftover(process)
}

/// What was begun has come to an end, told to the user whichever way it went.
pub fn done(target: &mut Target) {
    for process in target.processes.values_mut() {
        clear(process);
    }
}

fn clear(process: &mut TargetProcess) {
    // A process that is gone needs no mark; in one that lives an agent that comes later settles it again.
    // Of what went out nobody knows whether somebody is inside: it stays until the process is left, and for ever where the
    // target's unwinder knows of it.
    let out: Vec<Span> = gone_out(process).iter().filter(|patch| patch.registered.is_none()).flat_map(spans).collect();
    let ledger = &process.book.ledger;
    if (!ledger.unsettled.is_empty() || !ledger.replaced.is_empty())
        && let Err(failure) = record(process, |ledger| {
            ledger.unsettled.clear();
            ledger.replaced.clear();
            ledger.lingering.retain(|span| !out.contains(span));
            ledger.lingering.extend(out);
        })
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
pub fn after_adoption(target: &mut Target, images: &mut ImageCache, observers: &Observers) {
    for id in half_done(target) {
        let patch = target.patches().into_iter().find(|patch| patch.id == id);
        let name = patch.map(|patch| patch.name).unwrap_or_default();
        let carriers = target.processes.values().filter(|process| process.patches().contains(&id));
        let pids: Vec<i32> = carriers.map(|process| process.pid).collect();
        let kept = revert::take_back(target, &pids, images, observers, id);
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
