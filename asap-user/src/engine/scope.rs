//! One request for many processes, which a selector found: each target by itself is patched whole or not at all (P2); whether one
//! that can't be stops the others is said by who asks. What was attached for the request and then got nothing is left again.

use super::{Engine, micros_since, patching::Keep};
use crate::{
    cancel,
    process::info::ProcessInfo,
    report::{
        AttachRequest, Failure, Member, Operations, PatchRequest, Progress, ScopedOutcome, ScopedReport, ScopedRequest,
        ScopedResult, ScopedWork, TargetState,
    },
};
use std::{collections::BTreeSet, time::Instant};

impl Engine {
    pub(super) fn scoped_request(
        &mut self,
        request: &ScopedRequest,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<ScopedReport, Failure> {
        let begin = Instant::now();
        self.watch.was_disturbed();
        self.bury_dead();
        let mut new = BTreeSet::new();
        let done = self.scoped_work(request, &mut new, progress);
        // Whoever got nothing is as it was.
        let kept: BTreeSet<i32> = match (&done, &request.work) {
            (Err(_), _) => BTreeSet::new(),
            (Ok(_), ScopedWork::Patch(patch)) if patch.dry_run => BTreeSet::new(),
            (Ok(results), _) => {
                let is_done = |result: &&ScopedResult| !matches!(result.outcome, ScopedOutcome::Failed(_));
                results.iter().filter(is_done).map(|result| result.pid).collect()
            }
        };
        let _to_the_end = cancel::hold_off();
        for pid in new.difference(&kept) {
            if let Some(mut target) = self.targets.remove(pid) {
                target.leave_all();
            }
        }
        Ok(ScopedReport { targets: done?, total_us: micros_since(begin) })
    }

    /// Does it. What is attached for it comes into `new`.
    fn scoped_work(
        &mut self,
        request: &ScopedRequest,
        new: &mut BTreeSet<i32>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<ScopedResult>, Failure> {
        let only = matches!(request.work, ScopedWork::Attach { only: true, .. });
        let mut results: Vec<ScopedResult> = Vec::new();
        // Parents first: their children come with them.
        let mut members = request.members.clone();
        members.sort_unstable_by_key(|member| (member.start_time, member.pid));
        members.dedup();
        for member in members {
            if let Some(reason) = cancel::reason() {
                return Err(Failure::cancelled(reason));
            }
            match self.root_of(member, only, new, progress) {
                Ok(root) => match results.iter_mut().find(|result| result.pid == root) {
                    Some(result) => result.members.push(member.pid),
                    None => {
                        let target = self.targets.get(&root).map(super::target::Target::report);
                        let target = target.ok_or_else(|| super::process::gone(root, "it is not there"))?;
                        results.push(ScopedResult {
                            pid: root,
                            members: vec![member.pid],
                            outcome: ScopedOutcome::Attached(target),
                        });
                    }
                },
                Err(failure) if request.all_or_none => return Err(because_of(member.pid, failure)),
                Err(failure) => results.push(ScopedResult {
                    pid: member.pid,
                    members: vec![member.pid],
                    outcome: ScopedOutcome::Failed(failure),
                }),
            }
        }
        if let ScopedWork::Patch(patch) = &request.work {
            self.scoped_patch(patch, request.all_or_none, &mut results, progress)?;
        }
        Ok(results)
    }

    fn scoped_patch(
        &mut self,
        patch: &PatchRequest,
        all_or_none: bool,
        results: &mut [ScopedResult],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Failure> {
        let prepared = self.prepare(patch)?;
        let is_attached = |result: &&ScopedResult| matches!(result.outcome, ScopedOutcome::Attached(_));
        let roots: Vec<i32> = results.iter().filter(is_attached).map(|result| result.pid).collect();
        let keep = if all_or_none { Keep::AllOrNone } else { Keep::EachByItself };
        for (root, patched) in self.patch_targets(patch, &prepared, &roots, keep, progress)? {
            let outcome = match patched {
                Ok(report) => ScopedOutcome::Patched(report),
                Err(failure) => ScopedOutcome::Failed(failure),
            };
            if let Some(result) = results.iter_mut().find(|result| result.pid == root) {
                result.outcome = outcome;
            }
        }
        Ok(())
    }

    /// The target that `member` belongs to; attaches to it where it belongs to none.
    fn root_of(
        &mut self,
        member: Member,
        only: bool,
        new: &mut BTreeSet<i32>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<i32, Failure> {
        let pid = member.pid;
        let in_care = self.targets.values().find(|target| target.processes.contains_key(&pid));
        if let Some(target) = in_care {
            return Ok(target.root);
        }
        let is_same = ProcessInfo::of(pid).is_ok_and(|info| info.start_time == member.start_time);
        if !is_same {
            return Err(Failure {
                state: TargetState::Gone,
                ..Failure::refused(format!("process {pid} has ended since it was found"), "look again, and ask again")
            });
        }
        self.attach(&AttachRequest { pid, only, require_signature: false }, progress)?;
        new.insert(pid);
        Ok(pid)
    }
}

/// One refused, and so all were left alone.
fn because_of(pid: i32, failure: Failure) -> Failure {
    Failure { message: format!("process {pid} can't be taken in, so none was: {failure}"), ..failure }
}
