//! A target: a process that was attached to, and those of its descendants that run the same executable, also those forked
//! later. A child of a patched process is born patched, since fork(2) copies its memory; here it is found and taken into care.

use super::{check::Observers, ended, exchange, process::TargetProcess, sandbox, unloaded};
use crate::{
    process::info::{self, ProcessInfo},
    report::{Failure, Fate, InstalledPatch, News, PatchId, SandboxFamily, TargetReport},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    time::Duration,
};

/// Identity of an executable: device and inode.
type FileId = (u64, u64);

/// An attached target.
#[derive(Debug)]
pub struct Target {
    /// The process that was attached to.
    pub root: i32,
    only: bool,
    executable: FileId,
    path: String,
    build_id: Option<String>,
    /// Its processes; the root is there as long as it lives.
    pub processes: BTreeMap<i32, TargetProcess>,
    /// What the administrator should know.
    pub notes: Vec<String>,
    /// What guards met in processes that are no more.
    pub past: Vec<SandboxFamily>,
    /// What became of its processes, until somebody asks.
    pub news: Vec<News>,
}

/// Makes true what the ledger of a process says, whoever wrote it.
fn recover(process: &mut TargetProcess, observers: &Observers) -> Result<(), Failure> {
    sandbox::recover(process, observers)?;
    exchange::recover(process)
}

fn executable_of(pid: i32) -> Option<FileId> {
    let tid = info::living_thread(pid)?;
    fs::metadata(format!("/proc/{tid}/exe")).ok().map(|data| (data.dev(), data.ino()))
}

impl Target {
    /// Attaches to `root` and, unless `only`, to its descendants.
    ///
    /// # Errors
    /// One of the processes can't be attached; none is then.
    pub fn attach(root: i32, only: bool, observers: &Observers) -> Result<Self, Failure> {
        let process = TargetProcess::attach(root, &observers.children(root), observers.shared())?;
        let executable =
            executable_of(root).ok_or_else(|| super::process::gone(root, "its executable is not there"))?;
        let tid = info::living_thread(root).unwrap_or(root);
        let path = fs::read_link(format!("/proc/{tid}/exe")).unwrap_or_default().to_string_lossy().into_owned();
        let mut target = Self {
            root,
            only,
            executable,
            path,
            build_id: None,
            processes: BTreeMap::from([(root, process)]),
            notes: Vec::new(),
            past: Vec::new(),
            news: Vec::new(),
        };
        if let Err(failure) = target.recover_all(observers).and_then(|()| target.discover(observers).map(drop)) {
            target.leave_all();
            return Err(failure);
        }
        Ok(target)
    }

    fn recover_all(&mut self, observers: &Observers) -> Result<(), Failure> {
        self.processes.values_mut().try_for_each(|process| recover(process, observers))
    }

    /// Notes the build-id of the executable, for reports.
    pub fn set_build_id(&mut self, build_id: Option<String>) {
        self.build_id = build_id;
    }

    /// Takes descendants into care that are not yet; gives their ids. Those that have ended are let go.
    ///
    /// # Errors
    /// A descendant can't be attached although it lives.
    pub fn discover(&mut self, observers: &Observers) -> Result<Vec<i32>, Failure> {
        self.bury_dead();
        self.forget_unloaded();
        let mut found = Vec::new();
        if self.only {
            return Ok(found);
        }
        loop {
            let new = self.unknown_descendants(observers);
            if new.is_empty() {
                return Ok(found);
            }
            let mut attached = false;
            for pid in new {
                match TargetProcess::attach(pid, &observers.children(pid), observers.shared()) {
                    Ok(mut process) => {
                        recover(&mut process, observers)?;
                        self.processes.insert(pid, process);
                        found.push(pid);
                        attached = true;
                    }
                    // It ended while we looked, or is about to run another program.
                    Err(_) if !self.is_descendant(pid) => {}
                    Err(failure) => return Err(failure),
                }
            }
            if !attached {
                return Ok(found);
            }
        }
    }

    /// What went away with modules that a process has unloaded is no longer there to be reverted.
    fn forget_unloaded(&mut self) {
        for process in self.processes.values_mut() {
            match unloaded::forget(process) {
                Ok(unloaded) => self.notes.extend(unloaded.iter().map(|unloaded| unloaded.note(process.pid))),
                Err(failure) => tracing::info!(pid = process.pid, %failure, "not looked at for unloaded modules"),
            }
        }
    }

    /// Lets go of processes that have ended or run another program.
    pub fn bury_dead(&mut self) {
        let dead: Vec<i32> = self.processes.values().filter(|process| !process.is_alive()).map(|p| p.pid).collect();
        for family in sandbox::last_words(&self.processes, &dead) {
            ended::add(&mut self.past, family);
        }
        for process in dead.iter().filter_map(|pid| self.processes.remove(pid)).collect::<Vec<_>>() {
            let pid = process.pid;
            let patches = process.book.ledger.patches.iter().map(|patch| patch.name.clone()).collect();
            let fate = process.bury();
            // Servers have children that come and go; only the end of the whole is news.
            let is_last = self.processes.is_empty() && !dead.contains(&self.root);
            if fate != Fate::Ended || pid == self.root || is_last {
                self.news.push(News { target: self.root, pid, fate, patches });
            }
        }
    }

    /// Whether children of `pid` belong to it.
    #[must_use]
    pub fn wants_children_of(&self, pid: i32) -> bool {
        !self.only && self.processes.contains_key(&pid)
    }

    /// Whether `pid` is a helper of ours in one of its processes.
    #[must_use]
    pub fn has_helper(&self, pid: i32) -> bool {
        self.processes.values().any(|process| process.puppet.pid() == pid)
    }

    /// Whether `pid` still lives and runs the target's executable.
    fn is_descendant(&self, pid: i32) -> bool {
        executable_of(pid) == Some(self.executable)
    }

    fn unknown_descendants(&self, observers: &Observers) -> Vec<i32> {
        let agent = std::process::id() as i32;
        let puppets: BTreeSet<i32> = self.processes.values().map(|process| process.puppet.pid()).collect();
        let mut seen = BTreeSet::new();
        let mut new = Vec::new();
        // Children whose parent ended belong to init now: those in care already are starting points, too.
        let mut queue: Vec<i32> = self.processes.keys().copied().chain([self.root]).collect();
        while let Some(pid) = queue.pop() {
            if !seen.insert(pid) {
                continue;
            }
            for child in observers.children(pid) {
                // Helpers of ours are children of the target, too.
                let ours = puppets.contains(&child) || ProcessInfo::of(child).is_ok_and(|info| info.tracer == agent);
                // One that still uses its parent's memory (vfork(2)) is about to run another program.
                if ours || !self.is_descendant(child) || info::share_memory(pid, child) == Some(true) {
                    continue;
                }
                if !self.processes.contains_key(&child) {
                    new.push(child);
                }
                queue.push(child);
            }
        }
        new
    }

    /// Longest stop of one thread that attaching took.
    #[must_use]
    pub fn longest_stop(&self) -> Duration {
        self.processes.values().map(|process| process.longest_stop).max().unwrap_or_default()
    }

    /// Whether an earlier agent's patches were found.
    #[must_use]
    pub fn was_adopted(&self) -> bool {
        self.processes.get(&self.root).is_some_and(|process| process.adopted)
    }

    /// All patches that are in any of its processes, oldest first.
    #[must_use]
    pub fn patches(&self) -> Vec<InstalledPatch> {
        let mut patches: BTreeMap<PatchId, InstalledPatch> = BTreeMap::new();
        for patch in self.processes.values().flat_map(|process| &process.book.ledger.patches) {
            patches.entry(patch.id).or_insert_with(|| patch.report());
        }
        patches.into_values().collect()
    }

    /// A number that no patch in any of its processes has had.
    #[must_use]
    pub fn next_patch(&self) -> PatchId {
        let ledgers = || self.processes.values().map(|process| &process.book.ledger);
        let recorded = ledgers().map(|ledger| ledger.next_patch).max().unwrap_or(1);
        // An agent that died right after its commit had no time to count on.
        let newest = ledgers().flat_map(|ledger| &ledger.patches).map(|patch| patch.id.0).max().unwrap_or(0);
        PatchId(recorded.max(newest.saturating_add(1)))
    }

    /// For reports.
    #[must_use]
    pub fn report(&self) -> TargetReport {
        let mut notes = self.notes.clone();
        for process in self.processes.values() {
            match &process.gates {
                Err(reason) => notes.push(format!("process {}: no gates ({reason}): patching stops all its threads for the check", process.pid)),
                Ok(gates) if !gates.covers_kernel_faults => notes.push(format!(
                    "process {}: userfaultfd for user mode only; a system call that reads code while it is being patched fails with EFAULT",
                    process.pid
                )),
                Ok(_) => {}
            }
        }
        TargetReport {
            pid: self.root,
            executable: self.path.clone(),
            build_id: self.build_id.clone(),
            processes: self.processes.values().map(TargetProcess::report).collect(),
            patches: self.patches(),
            notes,
        }
    }

    /// Leaves all processes; says whether all of them are what they were before attach (`None`: patches stay, or not known).
    pub fn leave_all(&mut self) -> Option<bool> {
        let mut clean = Some(true);
        for (pid, process) in std::mem::take(&mut self.processes) {
            if !process.is_alive() {
                continue;
            }
            clean = match (process.leave(), clean) {
                (Ok(Some(same)), Some(clean)) => Some(clean && same),
                (Ok(_), _) => None,
                (Err(failure), _) => {
                    tracing::warn!(pid, %failure, "leaving a process");
                    None
                }
            };
        }
        clean
    }
}
