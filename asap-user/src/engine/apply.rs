//! `asap patch`: one transaction over several functions and all processes of a target.

use super::{
    check::{Checker, Observers},
    deadline,
    exchange::{Exchange, OldMemory, free_leftover, record},
    hooks,
    ledger::AppliedPatch,
    micros_since,
    modules::{ImageCache, Module},
    patch_file,
    plan::{self, PlannedFunction},
    process::{self, TargetProcess},
    revert, settle,
    stage::{self, PatchIdentity, Staged},
    target::Target,
    transaction::{self, Terms},
    undo::Undo,
};
use crate::{
    hex::hex,
    patch::{PatchObject, manifest::Manifest},
    quiesce::observe::Region,
    report::{
        Failure, FunctionReport, InstalledPatch, Mechanism, PatchId, PatchReport, PatchRequest, ProcessPatchReport,
        Progress, TargetState,
    },
};
use sha2::{Digest, Sha256};
use std::time::{Instant, SystemTime};

/// Applies a patch to all processes of `target`. What it did is in `undo`, also when it fails.
///
/// # Errors
/// It does not fit, or some process never comes to rest: `undo` knows in which it is.
pub fn patch(
    target: &mut Target,
    images: &mut ImageCache,
    observers: &Observers,
    wanted: &Wanted<'_>,
    undo: &mut Undo,
    progress: &mut dyn FnMut(Progress),
) -> Result<PatchReport, Failure> {
    let begin = Instant::now();
    let Wanted { request, manifest, .. } = *wanted;
    target.discover(observers)?;
    let identity = identity(target, wanted);
    if manifest.is_some() && target.processes.values().all(|process| process.patches().contains(&identity.id)) {
        let patch = target.patches().into_iter().find(|patch| patch.id == identity.id);
        let patch = patch.ok_or_else(|| process::gone(target.root, "all its processes ended"))?;
        let (dry_run, total_us) = (request.dry_run, micros_since(begin));
        return Ok(PatchReport { patch, processes: Vec::new(), dry_run, already: true, total_us, notes: Vec::new() });
    }
    let (deadline, limit) = deadline(request.timeout_ms);
    let terms = Terms { deadline, limit, consistency: request.consistency };
    let work = Work { wanted, identity: &identity, terms };

    let mut reports: Vec<ProcessPatchReport> = Vec::new();
    let mut installed: Option<InstalledPatch> = None;
    let mut done: Vec<i32> = Vec::new();
    loop {
        // The root first: children that it forks from then on are born patched.
        let root = target.root;
        let mut pids: Vec<i32> = target.processes.keys().copied().filter(|pid| !done.contains(pid)).collect();
        pids.sort_by_key(|&pid| pid != root);
        if pids.is_empty() {
            break;
        }
        let count = pids.len();
        for (index, pid) in pids.into_iter().enumerate() {
            let Some(process) = target.processes.get_mut(&pid) else { continue };
            done.push(pid);
            // Forked after its parent was patched: it has the patch already.
            if process.patches().contains(&identity.id) {
                reports.push(ProcessPatchReport { pid, quiescence: "born patched".into(), ..Default::default() });
                continue;
            }
            progress(Progress { step: format!("process {pid}"), fraction: Some(index as f64 / count as f64) });
            let applied = if request.dry_run {
                work.rehearse(process, images, observers)
            } else {
                work.apply(process, images, observers)
            };
            match applied {
                Ok((report, patch)) => {
                    if !request.dry_run {
                        undo.note(pid);
                    }
                    reports.push(report);
                    installed.get_or_insert(patch);
                }
                // It ended by itself: no reason to refuse the others.
                Err(failure) if !process.is_alive() && (done.len() > 1 || count > 1) => {
                    tracing::info!(pid, %failure, "a process ended while it was being patched");
                }
                Err(failure) if !process.is_alive() => return Err(Failure { state: TargetState::Gone, ..failure }),
                Err(failure) => return Err(failure),
            }
        }
        if request.dry_run {
            break;
        }
        // Children forked from a process before it was patched.
        target.discover(observers)?;
    }
    crate::fault::point("patch.in-all-processes");
    let patch = installed.ok_or_else(|| Failure {
        state: TargetState::Gone,
        ..Failure::refused("all processes of the target ended", "attach to the process that took their place")
    })?;
    Ok(PatchReport {
        patch,
        processes: reports,
        dry_run: request.dry_run,
        already: false,
        total_us: micros_since(begin),
        notes: Vec::new(),
    })
}

fn identity(target: &Target, wanted: &Wanted<'_>) -> PatchIdentity {
    let request = wanted.request;
    let mut hash = Sha256::new();
    for file in &request.files {
        hash.update((file.bytes.len() as u64).to_le_bytes());
        hash.update(&file.bytes);
    }
    let derived = || {
        let first = request.files.first().map_or("patch", |file| file.name.as_str());
        let base = first.rsplit('/').next().unwrap_or(first);
        base.rsplit_once('.').map_or(base, |(stem, _)| stem).to_owned()
    };
    let told = || wanted.manifest.map(|manifest| manifest.name.clone());
    let sha256 = hex(&hash.finalize());
    // The same patch file once more is for those processes only that lack it.
    let known = target.patches().into_iter().find(|patch| wanted.manifest.is_some() && patch.sha256 == sha256);
    PatchIdentity {
        id: known.map_or(wanted.id, |patch| patch.id),
        name: request.name.clone().or_else(told).unwrap_or_else(derived),
        sha256,
        installed_at: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        mechanism: match request.mechanism {
            Mechanism::Redirect => Mechanism::Redirect,
            Mechanism::Auto | Mechanism::Page => Mechanism::Page,
        },
    }
}

/// A patch as it was asked for.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// The request.
    pub request: &'a PatchRequest,
    /// What the patch file says of itself.
    pub manifest: Option<&'a Manifest>,
    /// The objects.
    pub object: &'a PatchObject,
    /// What is replaced by what.
    pub pairs: &'a [(String, String)],
    /// A number that no patch has had.
    pub id: PatchId,
}

/// One patch, to be applied to any number of processes.
struct Work<'a> {
    wanted: &'a Wanted<'a>,
    identity: &'a PatchIdentity,
    terms: Terms,
}

impl Work<'_> {
    fn plan(
        &self,
        process: &TargetProcess,
        images: &mut ImageCache,
    ) -> Result<(Vec<Module>, Vec<PlannedFunction>), Failure> {
        super::sandbox::look_behind(process)?;
        let mut modules = images.modules(process.pid, &process.maps()?, &process.memory, |at| process.is_ours(at));
        let home = match self.wanted.manifest {
            Some(manifest) => {
                patch_file::check_company(process, manifest)?;
                let found = patch_file::home(&modules, manifest);
                Some(found.ok_or_else(|| patch_file::other_build(process.pid, &modules, manifest))?)
            }
            None => None,
        };
        if let Some((home, build)) = home {
            images.tell(&mut modules[home], &patch_file::symbols(build));
        }
        let only = home.map(|(home, _)| home);
        let functions =
            plan::functions(process, &mut modules, images, self.wanted.pairs, self.wanted.request.address, only)?;
        if let Some((home, build)) = home {
            patch_file::check_fingerprints(&modules[home], build, &functions)?;
        }
        let home = &modules[functions[0].module];
        // A variable of the same name in the patch is another variable: the two would part ways unnoticed.
        // The compiler's pointers to personality routines are the same in all objects, and never change.
        let is_personality = |name: &str| name.starts_with("DW.ref.");
        let copies = self.wanted.object.variables().into_iter().filter(|v| v.writable && !is_personality(&v.name));
        let twin = |name: &str| {
            home.image.locals(name, None).iter().any(|symbol| symbol.kind == crate::image::SymbolKind::Data)
        };
        if let Some(copy) = copies.map(|variable| variable.name).find(|name| twin(name)) {
            return Err(Failure::refused(
                format!(
                    "the patch has a variable {copy} of its own, and {} has one, too: they would not be the same",
                    home.path
                ),
                "declare it `extern` in the patch (static ones: ASAP_IMPORT in asap-patch.h), so that the target's is used",
            ));
        }
        // Static functions and data that the patch refers to.
        let known = |name: &str| {
            home.image.export(name).is_some()
                || !home.image.locals(name, None).is_empty()
                || modules.iter().any(|module| module.image.export(name).is_some())
        };
        if self.wanted.object.imports().iter().any(|import| !import.weak && !known(&import.name)) {
            images.add_debug_symbols(process.pid, &mut modules[functions[0].module]);
        }
        Ok((modules, functions))
    }

    /// The patches that go out when this one goes in.
    fn replaced(&self, process: &TargetProcess) -> Result<Vec<AppliedPatch>, Failure> {
        let names = self.wanted.manifest.map_or(&[][..], |manifest| &manifest.replaces);
        let (replaced, kept): (Vec<_>, Vec<_>) =
            process.book.ledger.patches.iter().cloned().partition(|patch| names.contains(&patch.name));
        for patch in &replaced {
            if let Some(other) = revert::dependent(&kept, patch) {
                return Err(Failure::refused(
                    format!(
                        "patch {} ({}) calls code of patch {} ({}), which would go out",
                        other.id.0, other.name, patch.id.0, patch.name
                    ),
                    format!("revert patch {} first", other.id.0),
                ));
            }
        }
        // What an original of this patch would lead to may go out together with the old patch.
        if !self.wanted.object.originals().is_empty() && !replaced.is_empty() {
            let names: Vec<_> = replaced.iter().map(|patch| patch.name.clone()).collect();
            return Err(Failure::refused(
                format!("the patch calls original functions, and {} has replaced functions, too", names.join(", ")),
                format!("take {} out first (asap revert), then apply this one", names.join(", ")),
            ));
        }
        Ok(replaced)
    }

    fn apply(
        &self,
        process: &mut TargetProcess,
        images: &mut ImageCache,
        observers: &Observers,
    ) -> Result<(ProcessPatchReport, InstalledPatch), Failure> {
        if self.identity.mechanism == Mechanism::Redirect && process.book.ledger.sandbox.is_some() {
            return Err(Failure::refused(
                format!("process {} is in the sandbox, where calls can't be redirected", process.pid),
                "use --mechanism auto, or leave first: asap sandbox leave",
            ));
        }
        refuse_guarded(process)?;
        let (modules, functions) = self.plan(process, images)?;
        let replaced = self.replaced(process)?;
        let staged = stage::stage(process, &modules, &functions, self.wanted.object, self.identity)?;
        settle::begin(process, self.identity.id, &replaced)?;
        let spans = [staged.patch.code, staged.patch.rodata, staged.patch.data];
        let installed = self.install(process, &modules, observers, staged, &replaced);
        if installed.is_err() {
            for span in spans {
                process.release(span);
            }
            let _ = record(process, |ledger| {
                ledger.staging.clear();
                ledger.replaced.clear();
            });
        }
        installed
    }

    fn install(
        &self,
        process: &mut TargetProcess,
        modules: &[Module],
        observers: &Observers,
        staged: Staged,
        replaced: &[AppliedPatch],
    ) -> Result<(ProcessPatchReport, InstalledPatch), Failure> {
        let Staged { mut patch, hooks } = staged;
        let regions = regions_of(process, &patch, replaced);
        if let (Some(table), Some(object)) = (patch.eh_frame, patch.registered.take())
            && hooks::announce(process, modules, table, object)?
        {
            if let Err(error) = hooks::register_unwind_table(process) {
                hooks::end_registration(process)?;
                return Err(stage::hook_failed(process.pid, error));
            }
            patch.registered = Some(object);
        }
        let registered = patch.registered.is_some();
        let report = patch.report();
        let mut goal = process.book.ledger.patches.clone();
        goal.retain(|other| !replaced.contains(other));
        goal.push(patch);
        // Other processes may still refuse: what goes out must be able to come back, and is cleared away when all have it.
        let done = Exchange::prepare(process, goal, OldMemory::Keep).and_then(|exchange| {
            let mut checker = Checker::new(process, modules, observers, regions);
            transaction::run(process, exchange, &mut checker, self.terms, &hooks.pre_apply)
        });
        if done.is_err() && registered {
            let _ = hooks::deregister_unwind_table(process);
            let _ = hooks::end_registration(process);
        }
        let done = done?;
        // From here on its code runs. That the ledger can't be tidied must not look as if the patch had failed: its memory
        // would be freed.
        if let Err(failure) = self.tidy(process)
            && process.is_alive()
        {
            tracing::error!(pid = process.pid, %failure, "a patch is in, and the next agent has to tidy up behind it");
        }
        // The patch is in; a hook that fails now is told, and changes nothing.
        hooks::run_after(process, &hooks.post_apply);
        Ok((done, report))
    }

    /// What remains to be noted and freed when the patch is in.
    fn tidy(&self, process: &mut TargetProcess) -> Result<(), Failure> {
        let next = self.identity.id.0 + 1;
        record(process, |ledger| ledger.next_patch = ledger.next_patch.max(next))?;
        hooks::end_registration(process)?;
        free_leftover(process)
    }

    /// Everything up to the first change, and one look at who is inside now.
    fn rehearse(
        &self,
        process: &mut TargetProcess,
        images: &mut ImageCache,
        observers: &Observers,
    ) -> Result<(ProcessPatchReport, InstalledPatch), Failure> {
        refuse_guarded(process)?;
        let (modules, functions) = self.plan(process, images)?;
        let replaced = self.replaced(process)?;
        let staged = stage::stage(process, &modules, &functions, self.wanted.object, self.identity)?;
        stage::unstage(process, &staged.patch);
        let regions = regions_of(process, &staged.patch, &replaced);
        let mut checker = Checker::new(process, &modules, observers, regions);
        let verdict = checker.look_again(process)?;
        let quiescence = if verdict.busy.is_empty() {
            "would go in at once".to_owned()
        } else {
            format!("would wait for {} thread(s) inside", verdict.busy.len())
        };
        let report =
            ProcessPatchReport { pid: process.pid, quiescence, threads: verdict.threads, ..Default::default() };
        let functions = staged.patch.functions.iter().map(|f| FunctionReport {
            name: f.name.clone(),
            module: f.module.clone(),
            old: f.entry,
            new: f.replacement.start,
        });
        Ok((report, InstalledPatch { functions: functions.collect(), ..staged.patch.report() }))
    }
}

/// The code that nobody may be inside: the functions' own, and what replaces them now.
fn regions_of(process: &TargetProcess, patch: &AppliedPatch, replaced: &[AppliedPatch]) -> Vec<Region> {
    let mut regions: Vec<Region> = replaced.iter().map(revert::whole_code).collect();
    for function in &patch.functions {
        regions.push(Region {
            ranges: function.body.iter().map(|span| span.range()).collect(),
            label: function.name.clone(),
        });
        for earlier in
            process.book.ledger.patches.iter().flat_map(|p| &p.functions).filter(|f| f.entry == function.entry)
        {
            regions.push(Region {
                ranges: vec![earlier.replacement.range()],
                label: format!("{} (patched)", function.name),
            });
        }
    }
    regions
}

/// Translated code counts on each of its pages: a page with a jump of ours does not copy the return addresses that others compare.
fn refuse_guarded(process: &TargetProcess) -> Result<(), Failure> {
    match &process.book.ledger.sandbox {
        Some(record) if record.area.is_some() => Err(Failure::refused(
            format!("process {} is checked by guards of the sandbox, which a patch would break", process.pid),
            "leave first (asap sandbox leave), patch, and enter again",
        )),
        _ => Ok(()),
    }
}
