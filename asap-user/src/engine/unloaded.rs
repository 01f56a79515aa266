//! A module of the target may go away while a patch is in it (dlclose(3)), and come back without it. Its pages went with it; the
//! patch's memory, the spare pages and the ledger's entries are left, and are of no more use. What has another file's code at its
//! place now must never get a page of ours.

use super::{
    exchange::{free_leftover, record},
    ledger::{AppliedFunction, AppliedPatch, ChangedPage},
    process::TargetProcess,
    text::{self, JUMP_LENGTH, Jumps},
};
use crate::{
    address::TargetAddr,
    process::{maps::Maps, pages},
    report::{Failure, PatchId},
};
use std::collections::BTreeSet;

/// What went away with a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unloaded {
    /// The patch.
    pub id: PatchId,
    /// Its name.
    pub patch: String,
    /// Path of the module.
    pub module: String,
    /// The patch replaces nothing any more.
    pub is_empty: bool,
}

impl Unloaded {
    /// For the administrator.
    #[must_use]
    pub fn note(&self, pid: i32) -> String {
        let what = if self.is_empty { "replaces nothing any more" } else { "replaces less than it did" };
        format!(
            "process {pid} has unloaded {}: patch {} ({}) {what} there; revert it to free its memory, and apply it again when the \
             module is loaded again",
            self.module, self.id.0, self.patch
        )
    }
}

/// Takes out of the ledger what went away with modules, and frees the spare pages.
///
/// # Errors
/// The process is gone.
pub fn forget(process: &mut TargetProcess) -> Result<Vec<Unloaded>, Failure> {
    let ledger = &process.book.ledger;
    if ledger.pages.is_empty() && ledger.pending.is_none() {
        return Ok(Vec::new());
    }
    super::sandbox::look_behind(process)?;
    let lost = lost_pages(process, &process.maps()?);
    if lost.is_empty() {
        return Ok(Vec::new());
    }
    let is_lost = |function: &AppliedFunction| pages_of(function).iter().any(|page| lost.contains(page));
    let ledger = &process.book.ledger;
    let unloaded = ledger.patches.iter().filter_map(|patch| {
        let module = patch.functions.iter().find(|function| is_lost(function))?.module.clone();
        let is_empty = patch.functions.iter().all(is_lost);
        Some(Unloaded { id: patch.id, patch: patch.name.clone(), module, is_empty })
    });
    let unloaded = unloaded.collect();
    let without = |patches: &mut Vec<AppliedPatch>| {
        for patch in patches {
            patch.functions.retain(|function| !is_lost(function));
        }
    };
    record(process, |ledger| {
        without(&mut ledger.patches);
        without(&mut ledger.replaced);
        if let Some(pending) = &mut ledger.pending {
            without(&mut pending.goal);
            pending.pages.retain(|page| !lost.contains(page));
        }
        let spares = ledger.pages.iter().filter(|known| lost.contains(&known.page)).map(ChangedPage::spare_span);
        ledger.leftover.extend(spares);
        ledger.pages.retain(|known| !lost.contains(&known.page));
    })?;
    lost.iter().for_each(|&page| process.forget_page(page));
    free_leftover(process)?;
    Ok(unloaded)
}

/// The pages that the entry jump of a function touches.
fn pages_of(function: &AppliedFunction) -> [TargetAddr; 2] {
    [function.entry.page(), function.entry.offset(JUMP_LENGTH as i64 - 1).page()]
}

/// Pages of ours whose module is not there any more, or is another one, or was mapped anew.
fn lost_pages(process: &TargetProcess, maps: &Maps) -> BTreeSet<TargetAddr> {
    let ledger = &process.book.ledger;
    let jumps = text::jumps(&ledger.patches).unwrap_or_default();
    let patched = text::differing_pages(&Jumps::new(), &jumps);
    let is_lost = |known: &ChangedPage| {
        let Some(spare) = maps.at(known.spare) else { return false };
        let Some(here) = maps.at(known.page) else { return true };
        // Left by an agent that died with its gates closed.
        if here.name.starts_with("/memfd:asap-gate") {
            return false;
        }
        let place = |at: TargetAddr, mapping: &crate::process::maps::Mapping| {
            (mapping.device.clone(), mapping.inode, mapping.file_offset + (at.0 - mapping.range.start.0))
        };
        if place(known.page, here) != place(known.spare, spare) {
            return true;
        }
        // The same file at the same place, and nothing of ours in it: it went and came back. In the middle of a transaction the
        // page may be clean for another reason.
        ledger.pending.is_none()
            && patched.contains(&known.page)
            && pages::content(&process.memory, known.page)
                .is_ok_and(|now| pages::content(&process.memory, known.spare).is_ok_and(|clean| clean == now))
    };
    let mut lost: BTreeSet<_> = ledger.pages.iter().filter(|known| is_lost(known)).map(|known| known.page).collect();
    let pending = ledger.pending.iter().flat_map(|pending| &pending.pages);
    lost.extend(pending.filter(|&&page| maps.at(page).is_none()));
    lost
}
