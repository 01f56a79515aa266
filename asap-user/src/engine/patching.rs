//! A patch for one target or several: read, checked, and put into each whole or not at all (P2). What becomes of the others when one
//! refuses is said by [`Keep`]. Not for the processes of one target: that is `apply`.

use super::{Engine, apply, patch_file, plan, process, redirect, settle, target::Target, undo::Undo};
use crate::{
    cancel,
    patch::{PatchObject, manifest::Manifest},
    report::{Failure, FailureKind, Mechanism, PatchId, PatchReport, PatchRequest, Progress},
};

/// What becomes of the other targets when one refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// The patch goes out of all again.
    AllOrNone,
    /// They have it all the same.
    EachByItself,
}

/// A patch that has been read and makes sense.
pub(super) struct Prepared {
    object: PatchObject,
    manifest: Option<Manifest>,
    /// What is replaced by what.
    pairs: Vec<(String, String)>,
}

/// What became of a target: its first process, and the answer.
type Patched = (i32, Result<PatchReport, Failure>);

impl Engine {
    /// Reads the patch of a request.
    ///
    /// # Errors
    /// It is none, or would repair no running program.
    pub(super) fn prepare(&self, request: &PatchRequest) -> Result<Prepared, Failure> {
        if request.mechanism == Mechanism::Redirect {
            self.observers.redirect_available()?;
            redirect::check_pins()?;
        }
        let files: Vec<(String, Vec<u8>)> = request.files.iter().map(|f| (f.name.clone(), f.bytes.clone())).collect();
        let manifest = patch_file::manifest_of(request)?;
        let object = PatchObject::read(&files).map_err(|error| {
            Failure::refused(
                error.to_string(),
                "compile the patch again for x86-64, with -c, as a relocatable object file",
            )
        })?;
        let pairs = match &manifest {
            Some(manifest) => {
                patch_file::check_class(manifest, request.consistency)?;
                patch_file::pairs(manifest)
            }
            None => plan::pairs(request, &object)?,
        };
        Ok(Prepared { object, manifest, pairs })
    }

    /// Patches the target that is meant; with a patch file and no word about which, all targets that it fits, or none.
    pub(super) fn patch_all(
        &mut self,
        request: &PatchRequest,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PatchReport, Failure> {
        let prepared = self.prepare(request)?;
        let pids = match &prepared.manifest {
            Some(manifest) if request.pid.is_none() => self.fitting(manifest)?,
            _ => vec![self.meant(request.pid)?],
        };
        let mut all: Option<PatchReport> = None;
        for (_, report) in self.patch_targets(request, &prepared, &pids, Keep::AllOrNone, progress)? {
            let report = report?;
            match &mut all {
                None => all = Some(report),
                Some(all) => {
                    all.already &= report.already;
                    all.total_us += report.total_us;
                    all.processes.extend(report.processes);
                    all.notes.extend(report.notes);
                }
            }
        }
        all.ok_or_else(|| Failure::refused("nothing is attached", "attach first: asap attach --pid PID"))
    }

    /// Patches these targets.
    ///
    /// # Errors
    /// One refused, and the others are not to keep the patch; or it was given up.
    pub(super) fn patch_targets(
        &mut self,
        request: &PatchRequest,
        prepared: &Prepared,
        pids: &[i32],
        keep: Keep,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Patched>, Failure> {
        // One number for all of them.
        let numbers = pids.iter().filter_map(|pid| self.targets.get(pid)).map(Target::next_patch);
        let id = numbers.max().unwrap_or(PatchId(1));
        let Prepared { object, manifest, pairs } = prepared;
        let wanted = apply::Wanted { request, manifest: manifest.as_ref(), object, pairs, id };
        let (images, observers) = (&mut self.images, &self.observers);
        let mut all: Vec<Patched> = Vec::new();
        let mut undos: Vec<(i32, Undo)> = Vec::new();
        for &pid in pids {
            let target = self.targets.get_mut(&pid).ok_or_else(|| process::gone(pid, "it is not there"))?;
            let mut undo = Undo::new(id);
            match apply::patch(target, images, observers, &wanted, &mut undo, progress) {
                Ok(report) => {
                    undos.push((pid, undo));
                    all.push((pid, Ok(report)));
                }
                Err(failure) if keep == Keep::EachByItself && failure.kind != FailureKind::Cancelled => {
                    all.push((pid, Err(undo.roll_back(target, images, observers, failure))));
                }
                Err(failure) => {
                    undos.push((pid, undo));
                    let take_back = |failure, (pid, undo): (i32, Undo)| match self.targets.get_mut(&pid) {
                        Some(target) => undo.roll_back(target, images, observers, failure),
                        None => failure,
                    };
                    return Err(undos.into_iter().fold(failure, take_back));
                }
            }
        }
        // The patch is in; what is left is clearing up.
        let _to_the_end = cancel::hold_off();
        for (pid, _) in undos {
            if let Some(target) = self.targets.get_mut(&pid) {
                settle::clear_away(target, images, request.consistency);
                settle::done(target);
            }
        }
        Ok(all)
    }

    /// The targets that run a build which `manifest` is for.
    fn fitting(&mut self, manifest: &Manifest) -> Result<Vec<i32>, Failure> {
        let mut fitting = Vec::new();
        let mut refusals = Vec::new();
        for (&pid, target) in &self.targets {
            let Some(process) = target.processes.get(&pid).or_else(|| target.processes.values().next()) else {
                continue;
            };
            let modules = self.images.modules(process.pid, &process.maps()?, &process.memory, |at| process.is_ours(at));
            match patch_file::home(&modules, manifest) {
                Some(_) => fitting.push(pid),
                None => refusals.push(patch_file::other_build(process.pid, &modules, manifest)),
            }
        }
        match (fitting.is_empty(), refusals.len()) {
            (false, _) => Ok(fitting),
            (true, 0) => self.meant(None).map(|pid| vec![pid]),
            (true, 1) => Err(refusals.remove(0)),
            (true, count) => {
                let wanted: Vec<_> = manifest.builds.iter().map(|build| build.build_id.as_str()).collect();
                Err(Failure::refused(
                    format!(
                        "{} is for {} with build-id {}, which none of the {count} attached targets runs",
                        manifest.name,
                        manifest.target,
                        wanted.join(" or ")
                    ),
                    "see `asap status` for what they run; attach the right process, or build the patch for what runs",
                ))
            }
        }
    }
}
