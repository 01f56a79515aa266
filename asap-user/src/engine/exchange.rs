//! The text pages of one transaction: clean spares, the pages as they are and as they will be, the gates. Each step is
//! recorded in the target before it is taken, so that whoever comes later can finish it.

use super::{
    call_stack, hooks,
    ledger::{AppliedPatch, ChangedPage, Pending, Span},
    process::{TargetProcess, explain, gone},
    redirect, sandbox,
    text::{self, Jumps, Probes},
    unloaded,
};
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    process::{
        info,
        locked::Lock,
        maps::Maps,
        pages,
        puppet::{Puppet, PuppetError},
    },
    report::Failure,
    watchdog,
};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// How long gates may be closed before the agent is taken for hung. Many times what is normal, hooks and slow machines included.
const GATE_LIMIT: Duration = Duration::from_secs(10);

/// One text page of a transaction.
#[derive(Debug)]
struct PageChange {
    page: TargetAddr,
    spare: TargetAddr,
    /// Its bytes now, and after.
    before: Vec<u8>,
    after: Vec<u8>,
    /// The file's bytes.
    clean: Vec<u8>,
    /// How the page is locked in memory.
    lock: Option<Lock>,
    /// The page as it will be, ready to be moved into place.
    next: Option<TargetAddr>,
}

/// A transaction whose pages are ready.
#[derive(Debug)]
pub struct Exchange {
    goal: Vec<AppliedPatch>,
    /// What leads calls away now.
    before: Jumps,
    changes: Vec<PageChange>,
    /// What becomes of the memory of patches that are taken out.
    memory: OldMemory,
}

/// What becomes of the memory of patches that are taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldMemory {
    /// Nobody is inside: it can be unmapped.
    Free,
    /// Old activations may run on in it: it stays until the process is left.
    Linger,
    /// As `Linger`, and the target's unwinder keeps pointing to it: it stays for ever.
    Keep,
}

/// Gates that are ready to be closed; they end with [`Exchange::close_gates`] or [`Exchange::remove_gates`].
#[derive(Debug, Default)]
pub struct Laid {
    /// The pages as they were, to be moved back.
    back: Vec<TargetAddr>,
    gates: Vec<TargetAddr>,
}

/// Closed gates; they end with [`Exchange::commit`] or [`Exchange::reopen`].
#[derive(Debug)]
pub struct Closed {
    since: Instant,
    /// The pages as they were, to be moved back.
    back: Vec<TargetAddr>,
    /// A hung agent is ended, and then threads that wait go on (P1).
    _watched: Option<watchdog::Guard>,
}

/// What closing the gates cost.
#[derive(Clone, Debug, Default)]
pub struct GateTime {
    /// How long they were closed.
    pub closed: Duration,
    /// Threads that waited.
    pub waited: usize,
}

impl Exchange {
    /// Lays the pages ready that make `goal` the active patches of `process`.
    ///
    /// # Errors
    /// The text is not what it should be (somebody else changed it), or the kernel refuses. Nothing is left then.
    pub fn prepare(process: &mut TargetProcess, goal: Vec<AppliedPatch>, memory: OldMemory) -> Result<Self, Failure> {
        let pid = process.pid;
        let unreachable = || {
            Failure::refused(format!("a replacement in process {pid} is out of reach of its function"), "report this")
        };
        let before = text::jumps(&process.book.ledger.patches).ok_or_else(unreachable)?;
        let after = text::jumps(&goal).ok_or_else(unreachable)?;
        let pages: BTreeSet<TargetAddr> = text::differing_pages(&before, &after);
        let pending = Pending { goal: goal.clone(), pages: pages.iter().copied().collect() };
        record(process, |ledger| {
            ledger.pending = Some(pending);
            // From here on the goal says what memory it needs.
            ledger.staging.clear();
        })?;
        crate::fault::point("exchange.recorded");
        let mut exchange = Self { goal, before, changes: Vec::new(), memory };
        for page in pages {
            match prepare_page(process, page, &exchange.before, &after) {
                Ok(change) => exchange.changes.push(change),
                Err(failure) => {
                    exchange.abandon(process);
                    return Err(failure);
                }
            }
        }
        crate::fault::point("exchange.prepared");
        Ok(exchange)
    }

    /// Nothing of the text changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Makes the gates of all pages, and copies of the pages to put back. Nobody notices them yet.
    ///
    /// # Errors
    /// There are no gates on this system, or the kernel refuses; nothing is left.
    pub fn lay_gates(&self, process: &mut TargetProcess) -> Result<Laid, Failure> {
        let pid = process.pid;
        let mut laid = Laid::default();
        let all: Result<(), Failure> = (|| {
            for change in &self.changes {
                laid.back.push(change.copy_with(process, &self.before)?);
                // It holds no probe: none would be set there.
                let content = text::render(change.page, &change.clean, &self.before, Probes::AsJumps);
                let keeper = process.gates.as_mut().map_err(|reason| no_gates(pid, reason))?;
                let gate = keeper.prepare(&mut process.puppet, &content);
                laid.gates.push(gate.map_err(|error| no_gates(pid, error))?);
            }
            Ok(())
        })();
        crate::fault::point("gate.prepared");
        match all {
            Ok(()) => Ok(laid),
            Err(failure) => {
                self.remove_gates(process, laid);
                Err(failure)
            }
        }
    }

    /// Takes gates away that were not closed.
    pub fn remove_gates(&self, process: &mut TargetProcess, laid: Laid) {
        self.discard(process, &laid.back, &laid.gates);
    }

    /// Closes the gates of all pages: from now on nobody enters.
    ///
    /// # Errors
    /// The text is not what it was, or the kernel refuses; the pages are as they were, and the gates are gone.
    pub fn close_gates(&self, process: &mut TargetProcess, laid: Laid) -> Result<Closed, Failure> {
        if let Err(failure) = self.check_in_place(process) {
            self.remove_gates(process, laid);
            return Err(failure);
        }
        let Laid { back, gates } = laid;
        let since = Instant::now();
        let watched = watchdog::section("closed gates", GATE_LIMIT);
        let moves: Vec<_> = gates.iter().copied().zip(self.changes.iter().map(|change| change.page)).collect();
        let closed = process.puppet.exchange(&process.memory, &moves);
        crate::fault::point("gate.closed");
        if let Err(error) = closed {
            self.put_back(process, &back, error.done);
            self.discard(process, &back[error.done..], &gates[error.done..]);
            return Err(no_gates(process.pid, error));
        }
        Ok(Closed { since, back, _watched: watched })
    }

    /// The target may have unloaded the module meanwhile, and may have put something else there (dlclose(3)): then nothing of ours
    /// belongs there. By their bytes, since this comes right before the pages are moved.
    fn check_in_place(&self, process: &TargetProcess) -> Result<(), Failure> {
        sandbox::look_behind(process)?;
        let is_there =
            |change: &PageChange| pages::content(&process.memory, change.page).is_ok_and(|now| now == change.before);
        match self.changes.iter().find(|change| !is_there(change)) {
            None => Ok(()),
            Some(_) if !process.is_alive() => Err(gone(process.pid, "it has exited or runs another program now")),
            Some(change) => Err(Failure::refused(
                format!(
                    "process {} has unloaded or changed the code at {} while it was being patched",
                    process.pid, change.page
                ),
                "look at it with `asap status`; try again when the module is loaded again",
            )),
        }
    }

    /// Puts the pages back as they were and lets everybody go on.
    pub fn reopen(&self, process: &mut TargetProcess, closed: Closed) -> GateTime {
        self.put_back(process, &closed.back, self.changes.len());
        self.time(process, closed.since)
    }

    /// Moves the new pages into place; from now on they are what is executed.
    ///
    /// # Errors
    /// The kernel refused; the pages are as they were.
    pub fn commit(mut self, process: &mut TargetProcess, closed: Option<Closed>) -> Result<GateTime, Failure> {
        let pid = process.pid;
        if closed.is_none()
            && let Err(failure) = self.check_in_place(process)
        {
            self.abandon(process);
            return Err(failure);
        }
        let moves: Vec<_> =
            self.changes.iter().filter_map(|change| change.next.map(|next| (next, change.page))).collect();
        let moved = process.puppet.exchange(&process.memory, &moves);
        crate::fault::point("commit.exchanged");
        if let Err(error) = moved {
            let back = match closed {
                Some(closed) => closed.back,
                None => Vec::new(),
            };
            for change in &mut self.changes[..error.done] {
                change.next = None;
            }
            // Without gates the pages that were moved are put back from fresh copies.
            let mut fresh = back;
            for index in fresh.len()..error.done {
                let change = &self.changes[index];
                if let Ok(copy) = change.copy_with(process, &self.before) {
                    fresh.push(copy);
                }
            }
            let count = fresh.len();
            self.put_back(process, &fresh, count);
            self.wake(process);
            self.abandon(process);
            return Err(Failure::rolled_back(
                format!("the new text pages could not be moved into place in process {pid}: {error}"),
                "try again; if it happens again, the process may be short of mappings (vm.max_map_count)",
            ));
        }
        let time = match &closed {
            Some(closed) => {
                let time = self.time(process, closed.since);
                for &copy in &closed.back {
                    let _ = pages::unmap(&mut process.puppet, copy, PAGE_SIZE);
                }
                time
            }
            None => GateTime::default(),
        };
        let clean: Vec<ChangedPage> = self
            .changes
            .iter()
            .filter(|change| change.after == change.clean)
            .map(|change| ChangedPage { page: change.page, spare: change.spare })
            .collect();
        let goal = std::mem::take(&mut self.goal);
        let old = process.book.ledger.patches.iter().filter(|patch| goal.iter().all(|kept| kept.id != patch.id));
        let old: Vec<_> =
            old.flat_map(|patch| [patch.code, patch.rodata, patch.data]).filter(|span| !span.is_empty()).collect();
        let memory = self.memory;
        record(process, |ledger| {
            ledger.patches = goal;
            ledger.pending = None;
            ledger.pages.retain(|page| !clean.contains(page));
            ledger.leftover.extend(clean.iter().map(|page| page.spare_span()));
            match memory {
                OldMemory::Free => ledger.leftover.extend(old),
                OldMemory::Linger => ledger.lingering.extend(old),
                OldMemory::Keep => {}
            }
        })?;
        crate::fault::point("commit.recorded");
        for page in clean {
            let _ = pages::unmap(&mut process.puppet, page.spare, PAGE_SIZE);
        }
        Ok(time)
    }

    /// Gives up: removes what was prepared.
    pub fn abandon(self, process: &mut TargetProcess) {
        for change in &self.changes {
            if let Some(next) = change.next {
                let _ = pages::unmap(&mut process.puppet, next, PAGE_SIZE);
            }
        }
        let patches = process.book.ledger.patches.clone();
        let jumps = text::jumps(&patches).unwrap_or_default();
        // A spare is kept as long as its page carries a jump.
        let unused: Vec<ChangedPage> = process
            .book
            .ledger
            .pages
            .iter()
            .copied()
            .filter(|page| !text::differing_pages(&Jumps::new(), &jumps).contains(&page.page))
            .collect();
        for page in &unused {
            let _ = pages::unmap(&mut process.puppet, page.spare, PAGE_SIZE);
        }
        let _ = record(process, |ledger| {
            ledger.pending = None;
            ledger.pages.retain(|page| !unused.contains(page));
        });
    }

    fn put_back(&self, process: &mut TargetProcess, back: &[TargetAddr], count: usize) {
        let moves: Vec<_> =
            back.iter().copied().zip(self.changes.iter().map(|change| change.page)).take(count).collect();
        if let Err(error) = process.puppet.exchange(&process.memory, &moves) {
            tracing::error!(pid = process.pid, %error, "text pages could not be put back; their gates hold the same bytes");
        }
        self.wake(process);
    }

    fn wake(&self, process: &TargetProcess) {
        if let Ok(keeper) = &process.gates {
            for change in &self.changes {
                if let Err(error) = keeper.wake(change.page) {
                    tracing::warn!(pid = process.pid, %error, "waking at a gate");
                }
            }
        }
    }

    fn discard(&self, process: &mut TargetProcess, back: &[TargetAddr], gates: &[TargetAddr]) {
        for &copy in back.iter().chain(gates) {
            let _ = pages::unmap(&mut process.puppet, copy, PAGE_SIZE);
        }
        if let Ok(keeper) = &mut process.gates {
            keeper.finish(&mut process.puppet);
        }
    }

    /// Wakes all who wait, and says what the gates cost.
    fn time(&self, process: &mut TargetProcess, since: Instant) -> GateTime {
        self.wake(process);
        let closed = since.elapsed();
        let waited = match &mut process.gates {
            Ok(keeper) => keeper.finish(&mut process.puppet).len(),
            Err(_) => 0,
        };
        GateTime { closed, waited }
    }
}

fn no_gates(pid: i32, reason: impl std::fmt::Display) -> Failure {
    Failure::refused(
        format!("gates can't be closed in process {pid}: {reason}"),
        "see `asap doctor`; without gates all threads are stopped for the check",
    )
}

/// Writes the ledger.
///
/// # Errors
/// The process is gone, or the ledger is full.
pub fn record(process: &mut TargetProcess, change: impl FnOnce(&mut super::ledger::Ledger)) -> Result<(), Failure> {
    let pid = process.pid;
    process.book.update(&process.memory, change).map_err(|error| {
        if process.is_alive() {
            Failure::refused(format!("process {pid}: {error}"), "revert patches that are no longer needed")
        } else {
            gone(pid, error)
        }
    })
}

fn lock_of(pid: i32, page: TargetAddr) -> Option<Lock> {
    Lock::of(info::living_thread(pid)?, page)
}

/// A second mapping of the page at `page`, unlocked; the first is locked as it was.
fn second_mapping(puppet: &mut Puppet, page: TargetAddr, lock: Option<Lock>) -> Result<TargetAddr, PuppetError> {
    let Some(lock) = lock else { return pages::duplicate(puppet, page) };
    lock.unlock(puppet, page)?;
    let spare = pages::duplicate(puppet, page);
    lock.lock(puppet, page)?;
    spare
}

impl PageChange {
    /// A page for the place of this one, with these detours.
    fn copy_with(&self, process: &mut TargetProcess, jumps: &Jumps) -> Result<TargetAddr, Failure> {
        page_with(process, ChangedPage { page: self.page, spare: self.spare }, &self.clean, jumps, self.lock)
    }
}

/// A page for the place of `at`, whose file has `clean` there, with these detours.
fn page_with(
    process: &mut TargetProcess,
    at: ChangedPage,
    clean: &[u8],
    jumps: &Jumps,
    lock: Option<Lock>,
) -> Result<TargetAddr, Failure> {
    let content = text::render(at.page, clean, jumps, Probes::Unset);
    let probes = text::probes(at.page, jumps);
    if probes.is_empty() {
        return copy_of(process, at.spare, clean, &content, lock);
    }
    let shown = text::render(at.page, clean, jumps, Probes::Set);
    redirect::lay(process, at.page, &redirect::Content { bytes: &content, shown: &shown, probes: &probes }, lock)
}

/// A copy of the page behind `spare` with `bytes` in it, locked like the page in whose place it will be.
fn copy_of(
    process: &mut TargetProcess,
    spare: TargetAddr,
    clean: &[u8],
    bytes: &[u8],
    lock: Option<Lock>,
) -> Result<TargetAddr, Failure> {
    let pid = process.pid;
    let copy = pages::duplicate(&mut process.puppet, spare).map_err(|error| explain(pid, error))?;
    let filled = fill(process, copy, clean, bytes).and_then(|()| {
        lock.map_or(Ok(()), |lock| lock.lock(&mut process.puppet, copy).map_err(|error| explain(pid, error)))
    });
    if let Err(failure) = filled {
        let _ = pages::unmap(&mut process.puppet, copy, PAGE_SIZE);
        return Err(failure);
    }
    Ok(copy)
}

/// Writes into a copy of a page what is other than in the file.
fn fill(process: &mut TargetProcess, copy: TargetAddr, clean: &[u8], bytes: &[u8]) -> Result<(), Failure> {
    let pid = process.pid;
    if bytes == clean {
        return Ok(());
    }
    pages::keep_apart(&mut process.puppet, copy).map_err(|error| explain(pid, error))?;
    write_differences(process, copy, clean, bytes).map_err(|error| {
        Failure::refused(
            format!("the copy of a text page in process {pid} can't be written: {error}"),
            "see `asap doctor`; a security module may forbid it",
        )
    })
}

fn write_differences(process: &TargetProcess, at: TargetAddr, clean: &[u8], bytes: &[u8]) -> std::io::Result<()> {
    let first = clean.iter().zip(bytes).position(|(a, b)| a != b).unwrap_or(0);
    let last = clean.iter().zip(bytes).rposition(|(a, b)| a != b).map_or(first, |last| last + 1);
    process.memory.write(at.offset(first as i64), &bytes[first..last])
}

fn prepare_page(
    process: &mut TargetProcess,
    page: TargetAddr,
    before: &Jumps,
    after: &Jumps,
) -> Result<PageChange, Failure> {
    let pid = process.pid;
    let known = process.book.ledger.pages.iter().find(|known| known.page == page).copied();
    sandbox::look_behind(process)?;
    let now = pages::content(&process.memory, page).map_err(|error| gone(pid, error))?;
    // Code in the sandbox is not locked; it will be when it has left.
    let lock = if process.book.ledger.sandbox.is_some() { None } else { lock_of(pid, page) };
    let (spare, clean) = match known {
        Some(known) => {
            let clean = pages::content(&process.memory, known.spare).map_err(|error| gone(pid, error))?;
            (known.spare, clean)
        }
        None => {
            // The caller has compared the page with its file: it is clean, and nothing is lost by mapping it anew.
            let file = process.file_page(page)?;
            let spare = second_mapping(&mut process.puppet, file, lock).map_err(|error| explain(pid, error))?;
            crate::fault::point("exchange.spare-made");
            record(process, |ledger| ledger.pages.push(ChangedPage { page, spare }))?;
            (spare, now.clone())
        }
    };
    process.note_clean_page(page, &clean);
    let expected = text::render(page, &clean, before, Probes::Set);
    if now != expected {
        let at = now.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(0);
        return Err(Failure::refused(
            format!(
                "the code of process {pid} was changed by someone else at {}: it holds {:#04x}, where {:#04x} belongs",
                page.offset(at as i64),
                now[at],
                expected[at]
            ),
            "remove the foreign breakpoint, probe or patch first (debuggers, bpftrace, perf probe), then try again",
        ));
    }
    let rendered = text::render(page, &clean, after, Probes::Set);
    let next = page_with(process, ChangedPage { page, spare }, &clean, after, lock)?;
    Ok(PageChange { page, spare, before: now, after: rendered, clean, lock, next: Some(next) })
}

/// Unmaps what the ledger says is no longer used.
///
/// # Errors
/// The process is gone.
pub fn free_leftover(process: &mut TargetProcess) -> Result<(), Failure> {
    if process.book.ledger.leftover.is_empty() {
        return Ok(());
    }
    for span in process.book.ledger.leftover.clone() {
        process.release(span);
    }
    record(process, |ledger| ledger.leftover.clear())
}

/// Removes memory that an agent had mapped or was about to unmap when it died: what is still there as it was recorded.
fn remove_remains(process: &mut TargetProcess) -> Result<(), Failure> {
    let maps = process.maps()?;
    let is_there = |span: &Span| maps.at(span.start).is_some_and(|m| m.range == span.range() && !m.shared);
    let (staging, leftover) = (process.book.ledger.staging.clone(), process.book.ledger.leftover.clone());
    // Mapped one after the other: without the first part none is ours.
    let ours = |span: &Span| maps.at(span.start).is_some_and(|m| m.inode == 0 && m.executable && !m.writable);
    let staged = staging.first().is_some_and(|first| is_there(first) && ours(first));
    let remains: Vec<Span> = staging.into_iter().filter(|_| staged).chain(leftover).filter(is_there).collect();
    for span in remains {
        process.release(span);
    }
    if !process.book.ledger.staging.is_empty() || !process.book.ledger.leftover.is_empty() {
        record(process, |ledger| {
            ledger.staging.clear();
            ledger.leftover.clear();
        })?;
    }
    Ok(())
}

/// Finishes a transaction that an agent left when it died, or that a child was forked out of: forward if every page carries
/// its new content, else back. Then removes what lies about.
///
/// # Errors
/// The process is gone, or the kernel refuses.
pub fn recover(process: &mut TargetProcess) -> Result<(), Failure> {
    let TargetProcess { pid, puppet, book, memory, .. } = &mut *process;
    call_stack::remove_remains(puppet, book, memory).map_err(|error| explain(*pid, error))?;
    if process.book.ledger.pending.is_none() {
        hooks::settle_registration(process)?;
    }
    remove_remains(process)?;
    sandbox::look_behind(process)?;
    unloaded::forget(process)?;
    let Some(pending) = process.book.ledger.pending.clone() else { return Ok(()) };
    let pid = process.pid;
    let before = text::jumps(&process.book.ledger.patches).unwrap_or_default();
    let after = text::jumps(&pending.goal).unwrap_or_default();
    let mut forward = true;
    for &page in &pending.pages {
        let now = pages::content(&process.memory, page).map_err(|error| gone(pid, error))?;
        let spare = process.book.ledger.pages.iter().find(|known| known.page == page).map(|known| known.spare);
        let clean = match spare {
            Some(spare) => pages::content(&process.memory, spare).map_err(|error| gone(pid, error))?,
            None => now.clone(),
        };
        forward &= spare.is_some() && now == text::render(page, &clean, &after, Probes::Set);
    }
    // Pages whose jumps don't differ between the two are not in the transaction: an empty one goes back, harmlessly.
    forward &= !pending.pages.is_empty();
    let jumps = if forward { &after } else { &before };
    let maps = process.maps()?;
    for &page in &pending.pages {
        let is_gate = maps.at(page).is_some_and(|mapping| mapping.name.starts_with("/memfd:asap-gate"));
        let known = process.book.ledger.pages.iter().find(|known| known.page == page).copied();
        if let (true, Some(known)) = (is_gate, known) {
            let clean = pages::content(&process.memory, known.spare).map_err(|error| gone(pid, error))?;
            let copy = page_with(process, known, &clean, jumps, lock_of(pid, page))?;
            process.puppet.exchange(&process.memory, &[(copy, page)]).map_err(|error| gone(pid, error))?;
        }
    }
    remove_orphans(process, &pending.pages)?;
    let unwanted: Vec<AppliedPatch> = {
        let (keep, other) = if forward {
            (&pending.goal, &process.book.ledger.patches)
        } else {
            (&process.book.ledger.patches, &pending.goal)
        };
        other.iter().filter(|patch| !keep.contains(patch)).cloned().collect()
    };
    let changed = text::differing_pages(&Jumps::new(), jumps);
    let unused: Vec<ChangedPage> =
        process.book.ledger.pages.iter().copied().filter(|page| !changed.contains(&page.page)).collect();
    record(process, |ledger| {
        if forward {
            ledger.patches = pending.goal.clone();
        }
        ledger.pages.retain(|page| !unused.contains(page));
        ledger.pending = None;
        // Threads may still be inside code that was never or is no longer reachable: it stays until the process is left.
        for patch in &unwanted {
            ledger.lingering.extend([patch.code, patch.rodata, patch.data].into_iter().filter(|span| !span.is_empty()));
        }
    })?;
    for page in unused {
        let _ = pages::unmap(&mut process.puppet, page.spare, PAGE_SIZE);
    }
    hooks::settle_registration(process)
}

/// Unmaps copies of text pages and gates that the ledger does not know: made, and not yet recorded or used, when an agent
/// died.
fn remove_orphans(process: &mut TargetProcess, touched: &[TargetAddr]) -> Result<(), Failure> {
    let maps: Maps = process.maps()?;
    let origins: BTreeSet<(String, u64, u64)> = touched
        .iter()
        .filter_map(|&page| {
            let mapping = maps.at(page)?;
            let offset = mapping.file_offset + (page.0 - mapping.range.start.0);
            Some((mapping.device.clone(), mapping.inode, offset))
        })
        .collect();
    for (index, mapping) in maps.0.iter().enumerate() {
        let gate = ["/memfd:asap-gate", redirect::NAME].iter().any(|name| mapping.name.starts_with(name));
        // A module's own text lies beside other parts of its file; a copy of ours lies alone.
        let neighbours = [index.checked_sub(1).and_then(|before| maps.0.get(before)), maps.0.get(index + 1)];
        let alone = !neighbours.into_iter().flatten().any(|other| {
            let touches = other.range.end == mapping.range.start || other.range.start == mapping.range.end;
            touches && other.inode == mapping.inode && other.device == mapping.device && !other.executable
        });
        let copies = alone && mapping.executable && mapping.is_file() && mapping.len() <= 16 * PAGE_SIZE;
        if !gate && !copies {
            continue;
        }
        for at in (mapping.range.start.0..mapping.range.end.0).step_by(PAGE_SIZE as usize).map(TargetAddr) {
            let offset = mapping.file_offset + (at.0 - mapping.range.start.0);
            let copy = origins.contains(&(mapping.device.clone(), mapping.inode, offset));
            if (gate || copy) && !touched.contains(&at) && !process.is_ours(at) {
                let _ = pages::unmap(&mut process.puppet, at, PAGE_SIZE);
            }
        }
    }
    Ok(())
}
