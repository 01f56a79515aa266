//! The sandbox for all processes of a target: in or out together, children included, whenever they were forked.

use super::{
    Engine,
    check::Observers,
    dump,
    modules::ImageCache,
    process::{TargetProcess, explain, gone},
    target::Target,
};
use crate::{
    cancel,
    dbt::{Outcome, SiteKind},
    process::{curtain, maps::Mapping},
    quiesce::unwind::Unwinder,
    report::{
        AttachRequest, Failure, Mechanism, Operations, Progress, SandboxAction, SandboxFamily, SandboxProcess,
        SandboxReport, SandboxRequest, SiteCount, TargetState,
    },
    sandbox::{
        self, Family, Host, Record, SandboxError, Session,
        policy::{OnExec, Policy},
    },
};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// Runs `work` with what the sandbox needs of a process.
fn with_host<R>(
    process: &mut TargetProcess,
    observers: &Observers,
    work: impl FnOnce(&mut Host<'_>, &mut Option<Session>) -> R,
) -> R {
    let ledger = process.book.ledger.clone();
    let home = process.book.home();
    let is_ours = move |mapping: &Mapping| {
        let holds = |span: &super::ledger::Span| span.contains(mapping.range.start);
        let own = mapping.range.contains(&home);
        let spares = ledger.pages.iter().any(|page| page.spare == mapping.range.start);
        let patches = ledger.patches.iter().chain(&ledger.replaced).any(|patch| holds(&patch.code));
        own || spares || patches || ledger.staging.iter().chain(&ledger.leftover).chain(&ledger.lingering).any(holds)
    };
    let TargetProcess { pid, puppet, memory, book, sandbox, .. } = process;
    let (pid, memory) = (*pid, &*memory);
    let mut write = |record: Option<&Record>| {
        book.update(memory, |ledger| ledger.sandbox = record.cloned()).map_err(|error| error.to_string())
    };
    let mut images = ImageCache::default();
    let mut image = |mapping: &Mapping| {
        let image = images.image(pid, mapping, memory)?;
        let bias = image.load_bias(mapping.range.start, mapping.file_offset)?;
        Some((image, bias))
    };
    let mut frames = |unwinder: &mut Unwinder| observers.frames(pid, memory, unwinder);
    let host =
        &mut Host { pid, puppet, memory, is_ours: &is_ours, write: &mut write, image: &mut image, frames: &mut frames };
    work(host, sandbox)
}

fn failure(process: &TargetProcess, error: SandboxError) -> Failure {
    let pid = process.pid;
    if !process.is_alive() {
        return gone(pid, error);
    }
    match error {
        SandboxError::Puppet(error) => explain(pid, error),
        error => Failure::refused(
            format!("the sandbox can't be used in process {pid}: {error}"),
            "see `asap doctor` for what is missing on this system",
        ),
    }
}

/// What guards a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Guarded {
    policy: Policy,
    learns: bool,
}

impl Guarded {
    fn of(record: &Record) -> Self {
        Self { policy: record.policy.clone(), learns: record.learns }
    }
}

/// Takes a process in, if it is not in yet, or is guarded otherwise.
fn enter(process: &mut TargetProcess, observers: &Observers, guarded: &Guarded) -> Result<(), Failure> {
    recover(process, observers)?;
    match &process.book.ledger.sandbox {
        Some(record) if Guarded::of(record) == *guarded => return Ok(()),
        Some(_) => leave(process, observers)?,
        None => {}
    }
    if let Some(patch) = process.book.ledger.patches.iter().find(|patch| patch.mechanism == Mechanism::Redirect) {
        return Err(Failure::refused(
            format!("patch {} ({}) is redirected: its pages can't go into the sandbox", patch.id.0, patch.name),
            "revert it, enter, and apply it again without --mechanism redirect",
        ));
    }
    let entered = with_host(process, observers, |host, session| {
        Session::enter(host, &guarded.policy, guarded.learns).map(|(entered, _)| {
            *session = Some(entered);
        })
    });
    entered.map_err(|error| failure(process, error))?;
    follow(process, observers)
}

/// Takes a process out, if it is in.
fn leave(process: &mut TargetProcess, observers: &Observers) -> Result<(), Failure> {
    let Some(mut found) = process.book.ledger.sandbox.clone() else {
        process.sandbox = None;
        return Ok(());
    };
    let left = with_host(process, observers, |host, session| match session.take() {
        Some(session) => session.leave(host, &mut found),
        None => sandbox::leave(host, &mut found, &[]),
    });
    left.map_err(|error| Failure { state: TargetState::PartlyDone, ..failure(process, error) })?;
    look_behind(process)?;
    match process.book.ledger.sandbox.as_ref().and_then(|record| record.texts.first()) {
        None => Ok(()),
        Some(text) => Err(Failure {
            state: TargetState::PartlyDone,
            ..Failure::refused(
                format!(
                    "process {} can't leave the sandbox: somebody has changed its code at {}",
                    process.pid, text.start
                ),
                "remove the foreign breakpoint, probe or patch, then leave again",
            )
        }),
    }
}

/// Makes true what the record in a process says, and cares for it again if it is in the sandbox.
///
/// # Errors
/// The process is gone.
pub fn recover(process: &mut TargetProcess, observers: &Observers) -> Result<(), Failure> {
    let Some(found) = process.book.ledger.sandbox.clone() else { return Ok(()) };
    if process.sandbox.is_some() {
        return Ok(());
    }
    let guarded = Guarded::of(&found);
    let settled = match with_host(process, observers, |host, _| sandbox::settle(host, found)) {
        // They wait in the kernel, where the agent that has died could have moved them. Its native code is back; what is left is tried
        // again when it leaves.
        Err(SandboxError::Busy(tids)) => {
            tracing::warn!(pid = process.pid, ?tids, "threads are still in code that a dead agent has translated");
            return look_behind(process);
        }
        settled => settled.map_err(|error| failure(process, error))?,
    };
    look_behind(process)?;
    process.refresh_gadgets()?;
    let Some(record) = settled else { return Ok(()) };
    let is_kept = with_host(process, observers, |host, session| match Session::resume(host, &record) {
        Ok(resumed) => {
            *session = resumed;
            session.is_some()
        }
        Err(error) => {
            tracing::warn!(pid = host.pid, %error, "its pages stay open");
            true
        }
    });
    crate::fault::point("sandbox.recovered");
    if !is_kept {
        // Its agent has died, and its guards let everybody pass since then.
        if let Err(failure) = leave(process, observers) {
            tracing::warn!(pid = process.pid, %failure, "it can't be guarded again yet");
            return Ok(());
        }
        return enter(process, observers, &guarded);
    }
    follow(process, observers)
}

/// Follows what the process maps and unmaps.
fn follow(process: &mut TargetProcess, observers: &Observers) -> Result<(), Failure> {
    let Some(mut record) = process.book.ledger.sandbox.clone() else { return Ok(()) };
    let followed = with_host(process, observers, |host, session| match session {
        Some(session) => session.follow(host, &mut record).map(drop),
        None => Ok(()),
    });
    followed.map_err(|error| failure(process, error))?;
    look_behind(process)
}

/// From now on the text of files is read where it lies, as long as the curtains stay where they are. To be called before text is
/// read.
///
/// # Errors
/// The process is gone.
pub fn look_behind(process: &TargetProcess) -> Result<(), Failure> {
    let elsewhere = match &process.book.ledger.sandbox {
        Some(record) => sandbox::elsewhere(&process.listed_maps()?, record),
        None => Vec::new(),
    };
    process.memory.read_elsewhere(elsewhere);
    Ok(())
}

/// How soon to look again for code that a process in the sandbox has mapped or unmapped. Until then such code runs natively; no
/// event of the kernel tells of it without making each mmap(2) of the target dearer.
const LOOK: Duration = Duration::from_millis(50);

/// Looks after what processes map and unmap, between requests. Gives when to do so again.
pub fn look_after(target: &mut Target, observers: &Observers) -> Option<Duration> {
    let mut inside = false;
    for process in target.processes.values_mut().filter(|process| process.sandbox.is_some()) {
        inside = true;
        let families: Vec<_> = process.sandbox.iter().flat_map(Session::families).cloned().collect();
        families.iter().for_each(|family| family.shared.news.hear());
        if let Err(failure) = follow(process, observers)
            && process.is_alive()
        {
            tracing::warn!(pid = process.pid, %failure, "new code stays native");
        }
        families.iter().for_each(|family| family.shared.news.was_looked_at());
    }
    inside.then_some(LOOK)
}

/// Takes all processes of a target out.
///
/// # Errors
/// One can't leave; it stays inside.
pub fn leave_all(target: &mut Target, observers: &Observers) -> Result<(), Failure> {
    // A child that is forked meanwhile carries what its parent was.
    loop {
        target.discover(observers)?;
        let inside = target.processes.values_mut().filter(|process| process.book.ledger.sandbox.is_some());
        let mut any = false;
        for process in inside {
            any = true;
            match leave(process, observers) {
                Err(_) if !process.is_alive() => {}
                left => left?,
            }
        }
        if !any {
            return Ok(());
        }
        target.bury_dead();
    }
}

fn enter_all(
    target: &mut Target,
    observers: &Observers,
    guarded: &Guarded,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Failure> {
    let is_in = |process: &TargetProcess| {
        let record = process.book.ledger.sandbox.as_ref();
        process.sandbox.is_some() && record.is_some_and(|record| Guarded::of(record) == *guarded)
    };
    loop {
        target.discover(observers)?;
        let outside: Vec<i32> =
            target.processes.values().filter(|process| !is_in(process)).map(|process| process.pid).collect();
        if outside.is_empty() {
            return Ok(());
        }
        for pid in outside {
            if let Some(reason) = cancel::reason() {
                return Err(Failure::cancelled(reason));
            }
            progress(Progress { step: format!("process {pid} enters the sandbox"), fraction: None });
            let Some(process) = target.processes.get_mut(&pid) else { continue };
            match enter(process, observers, guarded) {
                Err(_) if !process.is_alive() => {}
                entered => entered?,
            }
        }
        target.bury_dead();
    }
}

fn report(target: &Target, begin: Instant) -> SandboxReport {
    let of_process = |process: &TargetProcess| {
        let record = process.book.ledger.sandbox.as_ref();
        let texts = record.map_or(&[][..], |record| &record.texts);
        SandboxProcess {
            pid: process.pid,
            inside: record.is_some(),
            since: record.map(|record| record.since),
            texts: texts.len(),
            pages: texts.iter().map(|text| text.len() / crate::address::PAGE_SIZE).sum(),
            traps: process.sandbox.as_ref().map_or(0, Session::traps),
            native: process.sandbox.as_ref().map(|session| session.native.clone()).unwrap_or_default(),
        }
    };
    let mut notes = Vec::new();
    for process in target.processes.values() {
        let pid = process.pid;
        match (&process.sandbox, &process.book.ledger.sandbox) {
            (None, Some(_)) => notes.push(format!("process {pid}: no userfaultfd: its pages are all open")),
            (Some(session), _) if !session.covers_kernel_faults() => notes.push(format!(
                "process {pid}: userfaultfd for user mode only; a system call that reads code that never ran fails with EFAULT"
            )),
            _ => {}
        }
    }
    SandboxReport {
        pid: target.root,
        processes: target.processes.values().map(of_process).collect(),
        families: families(target),
        dump: None,
        total_us: super::micros_since(begin),
        notes,
    }
}

/// What is told of translated code, by the processes that share it, and of what was before.
fn families(target: &Target) -> Vec<SandboxFamily> {
    let living = by_family(target.processes.values());
    let living = living.into_values().map(|(family, pids)| told(&family, pids));
    living.chain(target.past.iter().cloned()).collect()
}

/// Processes by the translated code that they share.
fn by_family<'a>(processes: impl Iterator<Item = &'a TargetProcess>) -> BTreeMap<u64, (Arc<Family>, Vec<i32>)> {
    let mut found: BTreeMap<u64, (Arc<Family>, Vec<i32>)> = BTreeMap::new();
    for process in processes {
        for family in process.sandbox.iter().flat_map(Session::families) {
            found.entry(family.id).or_insert_with(|| (Arc::clone(family), Vec::new())).1.push(process.pid);
        }
    }
    found
}

/// What is to be remembered of the processes `dead`, which are about to be buried: families of which nobody lives on.
pub fn last_words(processes: &BTreeMap<i32, TargetProcess>, dead: &[i32]) -> Vec<SandboxFamily> {
    let (gone, living): (Vec<_>, Vec<_>) = processes.values().partition(|process| dead.contains(&process.pid));
    let living = by_family(living.into_iter());
    let gone = by_family(gone.into_iter()).into_iter().filter(|(id, _)| !living.contains_key(id));
    gone.map(|(_, (family, pids))| told(&family, pids)).collect()
}

fn told(family: &Family, pids: Vec<i32>) -> SandboxFamily {
    let figures = family.figures();
    let site = |((kind, outcome), &count): (&(SiteKind, Outcome), &u64)| {
        let (is_guarded, reason) = match outcome {
            Outcome::Done(form) => (true, words(form)),
            Outcome::Needless(why) => (true, words(why)),
            Outcome::Native(why) => (false, words(why)),
        };
        SiteCount { kind: words(kind), is_guarded, reason, count }
    };
    let record = curtain::lock(&family.shared.record);
    SandboxFamily {
        pids,
        policy: family.shared.policy.clone(),
        pages: figures.pages,
        fragments: figures.fragments,
        sites: figures.counts.0.iter().map(site).collect(),
        stops: record.stops.iter().map(|(what, count)| ((*what).to_owned(), *count)).collect(),
        violations: record.violations.iter().cloned().collect(),
        violation_count: record.violation_count,
        refused: figures.refused,
        learned: record.learned.clone(),
    }
}

/// The name of a variant as words.
fn words(of: impl std::fmt::Debug) -> String {
    let mut words = String::new();
    for letter in format!("{of:?}").chars() {
        match letter {
            'A'..='Z' if words.chars().last().is_some_and(char::is_lowercase) => {
                words.push(' ');
                words.extend(letter.to_lowercase());
            }
            '(' => words.push_str(": "),
            ')' => {}
            letter => words.extend(letter.to_lowercase()),
        }
    }
    words
}

impl Engine {
    pub(super) fn sandbox_request(
        &mut self,
        request: &SandboxRequest,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<SandboxReport, Failure> {
        let begin = Instant::now();
        self.watch.was_disturbed();
        self.bury_dead();
        if let (SandboxAction::Status, Some(pid)) = (request.action, request.pid)
            && !self.targets.contains_key(&pid)
            && let Some(known) = self.ended.of(pid)
        {
            return Ok(known.clone());
        }
        if request.action == SandboxAction::Enter && request.policy.on_exec == OnExec::Stay {
            return Err(Failure::refused(
                "on-exec = \"stay\" is not available yet: a program that the process starts runs natively",
                "write on-exec = \"leave\", or start such programs with `asap run`",
            ));
        }
        if let (SandboxAction::Enter, Some(pid)) = (request.action, request.pid)
            && !self.targets.contains_key(&pid)
            && !self.targets.values().any(|target| target.processes.contains_key(&pid))
        {
            self.attach(&AttachRequest { pid, only: false, require_signature: false }, progress)?;
        }
        let pid = self.meant(request.pid)?;
        let observers = &self.observers;
        let target = self.targets.get_mut(&pid).ok_or_else(|| gone(pid, "it is not there"))?;
        let mut dump = None;
        match request.action {
            SandboxAction::Enter => {
                let guarded = Guarded { policy: request.policy.clone(), learns: request.learns };
                if let Err(failure) = enter_all(target, observers, &guarded, progress) {
                    let _to_the_end = cancel::hold_off();
                    leave_all(target, observers)?;
                    return Err(Failure { state: TargetState::RolledBack, ..failure });
                }
            }
            SandboxAction::Leave => {
                let _to_the_end = cancel::hold_off();
                leave_all(target, observers)?;
            }
            SandboxAction::Status => {
                target.discover(observers)?;
            }
            SandboxAction::Dump => {
                target.discover(observers)?;
                dump = Some(dump::function(target, &mut self.images, request.function.as_deref().unwrap_or_default())?);
            }
        }
        let target = self.targets.get(&pid).ok_or_else(|| gone(pid, "it is not there"))?;
        Ok(SandboxReport { dump, ..report(target, begin) })
    }
}
