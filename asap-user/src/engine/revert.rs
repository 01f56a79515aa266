//! `asap revert`: the opposite transaction. The old code is where it always was; what must be waited for is that nobody is
//! inside the new.

use super::{
    check::{Checker, Observers},
    deadline,
    exchange::{Exchange, OldMemory, free_leftover, record},
    hooks,
    ledger::AppliedPatch,
    micros_since,
    modules::ImageCache,
    process::TargetProcess,
    settle,
    target::Target,
    transaction::{self, Terms},
    unloaded,
};
use crate::cancel;
use crate::quiesce::observe::Region;
use crate::report::{
    Consistency, Failure, InstalledPatch, PatchId, PatchReport, ProcessPatchReport, Progress, RevertRequest,
};
use std::time::{Duration, Instant};

/// Time for taking a patch back, for all processes together: the administrator waits meanwhile.
const TAKE_BACK_LIMIT: Duration = Duration::from_secs(10);

/// Takes a patch out of all processes of `target`.
///
/// # Errors
/// There is no such patch, another depends on it, or some thread stays inside: the patch stays where it is.
pub fn revert(
    target: &mut Target,
    images: &mut ImageCache,
    observers: &Observers,
    request: &RevertRequest,
    progress: &mut dyn FnMut(Progress),
) -> Result<PatchReport, Failure> {
    let begin = Instant::now();
    target.discover(observers)?;
    let patch = choose(target, request.patch.as_deref())?;
    let (deadline, limit) = deadline(request.timeout_ms);
    let terms = Terms { deadline, limit, consistency: request.consistency };
    let done = from_all(target, images, observers, patch.id, terms, progress);
    settle::done(target);
    Ok(PatchReport {
        patch,
        processes: done?,
        dry_run: false,
        already: false,
        total_us: micros_since(begin),
        notes: Vec::new(),
    })
}

fn from_all(
    target: &mut Target,
    images: &mut ImageCache,
    observers: &Observers,
    id: PatchId,
    terms: Terms,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<ProcessPatchReport>, Failure> {
    let mut reports: Vec<ProcessPatchReport> = Vec::new();
    loop {
        let root = target.root;
        let carriers = target.processes.values().filter(|process| process.patches().contains(&id));
        let mut pids: Vec<i32> = carriers.map(|process| process.pid).collect();
        pids.sort_by_key(|&pid| pid != root);
        if pids.is_empty() {
            return Ok(reports);
        }
        let count = pids.len();
        // All of them before the first: an agent that dies between two of them leaves work that the next one can finish.
        for process in &pids {
            if let Some(process) = target.processes.get_mut(process) {
                settle::begin(process, id, &[])?;
            }
        }
        crate::fault::point("revert.announced");
        for (index, pid) in pids.into_iter().enumerate() {
            let Some(process) = target.processes.get_mut(&pid) else { continue };
            progress(Progress { step: format!("process {pid}"), fraction: Some(index as f64 / count as f64) });
            // Once one process is rid of it the others follow: there is no way back to all of them.
            let _to_the_end = (!reports.is_empty()).then(cancel::hold_off);
            let mut done = from_process(process, images, observers, id, terms);
            // If it has unloaded the module meanwhile, there is nothing left to be changed back.
            if done.is_err() && process.is_alive() && !unloaded::forget(process)?.is_empty() {
                done = from_process(process, images, observers, id, terms);
            }
            match done {
                Ok(report) => reports.push(report),
                Err(failure) if !process.is_alive() => {
                    tracing::info!(pid, %failure, "a process ended while a patch was taken out");
                }
                Err(failure) if reports.is_empty() => return Err(failure),
                Err(failure) => {
                    let message = format!("{}; {} process(es) are rid of it already", failure.message, reports.len());
                    let state = crate::report::TargetState::PartlyDone;
                    return Err(Failure { message, state, ..failure });
                }
            }
        }
        // Children forked meanwhile from a process that still had it.
        target.discover(observers)?;
    }
}

/// Takes the patch `id` back out of processes that were not to have it after all; gives those in which it stays.
pub fn take_back(
    target: &mut Target,
    pids: &[i32],
    images: &mut ImageCache,
    observers: &Observers,
    id: PatchId,
) -> Vec<String> {
    let terms = Terms {
        deadline: Instant::now() + TAKE_BACK_LIMIT,
        limit: TAKE_BACK_LIMIT,
        consistency: Consistency::Quiescent,
    };
    let mut kept = Vec::new();
    for pid in pids {
        let Some(process) = target.processes.get_mut(pid) else { continue };
        if let Err(failure) = from_process(process, images, observers, id, terms)
            && process.is_alive()
        {
            tracing::error!(pid, %failure, "a patch that was to be taken back stays");
            kept.push(pid.to_string());
        }
    }
    kept
}

fn choose(target: &Target, wanted: Option<&str>) -> Result<InstalledPatch, Failure> {
    let patches = target.patches();
    let Some(newest) = patches.last() else {
        return Err(Failure::refused(format!("no patch is in process {}", target.root), "see asap list"));
    };
    let Some(wanted) = wanted else { return Ok(newest.clone()) };
    let by_number = wanted.parse().ok().and_then(|id| patches.iter().find(|patch| patch.id == PatchId(id)));
    let found = by_number.or_else(|| patches.iter().rev().find(|patch| patch.name == wanted));
    found.cloned().ok_or_else(|| {
        let known: Vec<_> = patches.iter().map(|patch| format!("{} ({})", patch.id.0, patch.name)).collect();
        Failure::refused(format!("there is no patch {wanted}; there are {}", known.join(", ")), "see asap list")
    })
}

/// A newer patch whose code leads into `patch`.
pub fn dependent<'a>(patches: &'a [AppliedPatch], patch: &AppliedPatch) -> Option<&'a AppliedPatch> {
    let newer = patches.iter().filter(|other| other.id > patch.id);
    newer.into_iter().find(|other| {
        other.functions.iter().filter_map(|function| function.original).any(|original| patch.code.contains(original))
    })
}

/// All code of a patch. The byte before it belongs to nobody: with it, the code's first byte is no entry at which to wait
/// outside.
pub fn whole_code(patch: &AppliedPatch) -> Region {
    let ranges = vec![patch.code.start.offset(-1)..patch.code.end];
    Region { ranges, label: format!("patch {}", patch.name) }
}

/// Takes the patch `id` out of one process, and puts back those that went out for it, while it is unsettled.
///
/// # Errors
/// Another patch depends on it, a hook refuses, or some thread stays inside.
pub fn from_process(
    process: &mut TargetProcess,
    images: &mut ImageCache,
    observers: &Observers,
    id: PatchId,
    terms: Terms,
) -> Result<ProcessPatchReport, Failure> {
    let patches = process.book.ledger.patches.clone();
    let Some(patch) = patches.iter().find(|patch| patch.id == id).cloned() else {
        return Ok(ProcessPatchReport {
            pid: process.pid,
            quiescence: "it was not there".into(),
            ..Default::default()
        });
    };
    if let Some(other) = dependent(&patches, &patch) {
        return Err(Failure::refused(
            format!("patch {} ({}) calls code of patch {} ({})", other.id.0, other.name, patch.id.0, patch.name),
            format!("revert patch {} first", other.id.0),
        ));
    }
    super::sandbox::look_behind(process)?;
    let modules = images.modules(process.pid, &process.maps()?, &process.memory, |at| process.is_ours(at));
    let mut goal: Vec<AppliedPatch> = patches.into_iter().filter(|other| other.id != id).collect();
    goal.extend(settle::take_back(process)?);
    goal.sort_by_key(|patch| patch.id);
    let lazy = terms.consistency == Consistency::Lazy;
    let registered = patch.eh_frame.filter(|_| patch.registered.is_some());
    let memory = match (lazy, registered) {
        (false, _) => OldMemory::Free,
        (true, None) => OldMemory::Linger,
        (true, Some(_)) => OldMemory::Keep,
    };
    let forget = match (registered, patch.registered) {
        (Some(table), Some(object)) if !lazy => hooks::announce(process, &modules, table, object)?,
        _ => false,
    };
    let done = Exchange::prepare(process, goal, memory).and_then(|exchange| {
        let mut checker = Checker::new(process, &modules, observers, vec![whole_code(&patch)]);
        transaction::run(process, exchange, &mut checker, terms, &patch.hooks.pre_revert)
    });
    if done.is_err() {
        let _ = hooks::end_registration(process);
    }
    let report = done?;
    if forget {
        // Not before: as long as the patch can be entered, exceptions must find their way through it (P1).
        if let Err(error) = hooks::deregister_unwind_table(process) {
            tracing::warn!(pid = process.pid, %error, "libgcc keeps the unwind table of a reverted patch: so its memory stays");
            let own = [patch.code, patch.rodata, patch.data];
            record(process, |ledger| ledger.leftover.retain(|span| !own.contains(span)))?;
        }
        hooks::end_registration(process)?;
    }
    hooks::run_after(process, &patch.hooks.post_revert);
    crate::fault::point("revert.release");
    free_leftover(process)?;
    crate::fault::point("revert.released");
    Ok(report)
}
