//! The sandbox for all processes of a target: in or out together, children included, whenever they were forked.

use super::{
    Engine,
    check::Observers,
    dump,
    process::{TargetProcess, explain, gone},
    target::Target,
};
use crate::{
    cancel,
    process::maps::Mapping,
    report::{
        AttachRequest, Failure, Operations, Progress, SandboxAction, SandboxProcess, SandboxReport, SandboxRequest,
        TargetState,
    },
    sandbox::{self, Host, Record, SandboxError, Session},
};
use std::time::{Duration, Instant};

/// Runs `work` with what the sandbox needs of a process.
fn with_host<R>(process: &mut TargetProcess, work: impl FnOnce(&mut Host<'_>, &mut Option<Session>) -> R) -> R {
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
    let memory = &*memory;
    let mut write = |record: Option<&Record>| {
        book.update(memory, |ledger| ledger.sandbox = record.cloned()).map_err(|error| error.to_string())
    };
    work(&mut Host { pid: *pid, puppet, memory, is_ours: &is_ours, write: &mut write }, sandbox)
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

/// Takes a process in, if it is not in yet.
fn enter(process: &mut TargetProcess) -> Result<(), Failure> {
    if process.sandbox.is_some() {
        return Ok(());
    }
    recover(process)?;
    if process.sandbox.is_some() {
        return Ok(());
    }
    let entered = with_host(process, |host, session| {
        Session::enter(host).map(|(entered, _)| {
            *session = Some(entered);
        })
    });
    entered.map_err(|error| failure(process, error))?;
    follow(process)
}

/// Takes a process out, if it is in.
fn leave(process: &mut TargetProcess) -> Result<(), Failure> {
    let Some(mut found) = process.book.ledger.sandbox.clone() else {
        process.sandbox = None;
        return Ok(());
    };
    let left = with_host(process, |host, session| match session.take() {
        Some(session) => session.leave(host, &mut found),
        None => sandbox::leave(host, &mut found),
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
pub fn recover(process: &mut TargetProcess) -> Result<(), Failure> {
    let Some(found) = process.book.ledger.sandbox.clone() else { return Ok(()) };
    if process.sandbox.is_some() {
        return Ok(());
    }
    let settled = with_host(process, |host, _| sandbox::settle(host, found));
    let settled = settled.map_err(|error| failure(process, error))?;
    look_behind(process)?;
    process.refresh_gadgets()?;
    let Some(record) = settled else { return Ok(()) };
    with_host(process, |host, session| match Session::resume(host, &record) {
        Ok(resumed) => *session = Some(resumed),
        Err(error) => tracing::warn!(pid = host.pid, %error, "its pages stay open"),
    });
    crate::fault::point("sandbox.recovered");
    follow(process)
}

/// Follows what the process maps and unmaps.
fn follow(process: &mut TargetProcess) -> Result<(), Failure> {
    let Some(mut record) = process.book.ledger.sandbox.clone() else { return Ok(()) };
    let followed = with_host(process, |host, session| match session {
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
pub fn look_after(target: &mut Target) -> Option<Duration> {
    let mut inside = false;
    for process in target.processes.values_mut().filter(|process| process.sandbox.is_some()) {
        inside = true;
        if let Err(failure) = follow(process)
            && process.is_alive()
        {
            tracing::warn!(pid = process.pid, %failure, "new code stays native");
        }
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
            match leave(process) {
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

fn enter_all(target: &mut Target, observers: &Observers, progress: &mut dyn FnMut(Progress)) -> Result<(), Failure> {
    loop {
        target.discover(observers)?;
        let outside: Vec<i32> =
            target.processes.values().filter(|process| process.sandbox.is_none()).map(|process| process.pid).collect();
        if outside.is_empty() {
            return Ok(());
        }
        for pid in outside {
            if let Some(reason) = cancel::reason() {
                return Err(Failure::cancelled(reason));
            }
            progress(Progress { step: format!("process {pid} enters the sandbox"), fraction: None });
            let Some(process) = target.processes.get_mut(&pid) else { continue };
            match enter(process) {
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
        families: Vec::new(),
        dump: None,
        total_us: super::micros_since(begin),
        notes,
    }
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
        if request.action == SandboxAction::Enter && (!request.policy.guards.is_empty() || request.learns) {
            return Err(Failure::refused(
                "the sandbox of this version has no guards yet, and learns nothing",
                "enter it without --guards, --policy and --learn",
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
                if let Err(failure) = enter_all(target, observers, progress) {
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
