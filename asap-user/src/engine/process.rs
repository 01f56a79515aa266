//! One process in care: its puppet, its gates, its ledger. Taking it into care, adopting what an earlier agent left, and
//! leaving it so that nothing of us remains but its patches, or nothing at all.

use super::{
    ledger::{HOME_LENGTH, LedgerBook, Span},
    redirect, refuse,
};
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    kernel::Ebpf,
    process::{
        gate::Gatekeeper,
        info,
        inject::Gadgets,
        maps::Maps,
        memory::Memory,
        pages,
        puppet::{self, Puppet, PuppetError},
    },
    report::{Failure, Fate, PatchId, ProcessReport},
    sandbox,
};
use std::{
    collections::BTreeMap,
    fs, io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

/// How long the helper of a dead agent has to finish a call in the target.
const ORPHAN_LIMIT: Duration = Duration::from_secs(1);
/// Reach of a 32-bit displacement, less room for what lies behind the addressed byte.
pub const REACH: u64 = (1 << 31) - (1 << 20);

/// A process in care.
#[derive(Debug)]
pub struct TargetProcess {
    /// Process id.
    pub pid: i32,
    /// Names the process for ever.
    pidfd: OwnedFd,
    /// Its memory.
    pub memory: Memory,
    gadgets: Gadgets,
    /// The helper in its address space.
    pub puppet: Puppet,
    /// Its gates, or why there are none.
    pub gates: Result<Gatekeeper, String>,
    /// What is applied.
    pub book: LedgerBook,
    /// It is in the sandbox.
    pub sandbox: Option<sandbox::Session>,
    /// For pages with probes; `None`: no eBPF here.
    pub ebpf: Option<Arc<Ebpf>>,
    /// An earlier agent was here.
    pub adopted: bool,
    /// Longest stop of a thread that taking it into care took.
    pub longest_stop: Duration,
    baseline: Baseline,
}

/// What of a process must be the same after we left (P5): its file-backed executable mappings, and the bytes of every text
/// page that was ever exchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Baseline {
    /// Not known where an earlier agent's traces were found.
    mappings: Option<Vec<FileMapping>>,
    pages: BTreeMap<TargetAddr, Vec<u8>>,
}

/// Range, file offset, inode.
type FileMapping = (Range<TargetAddr>, u64, u64);

fn executable_mappings(maps: &Maps) -> Vec<FileMapping> {
    let files = maps.0.iter().filter(|m| m.executable && m.is_file());
    files.map(|m| (m.range.clone(), m.file_offset, m.inode)).collect()
}

/// A way out that fits most failures to work inside a process.
const TRY_DOCTOR: &str = "see `asap doctor` for what is missing on this system";

fn refused(pid: i32, what: impl std::fmt::Display) -> Failure {
    Failure::refused(format!("process {pid} can't be attached: {what}"), TRY_DOCTOR)
}

impl TargetProcess {
    /// Takes `pid`, which has these `children`, into care. Stops one of its threads, for the time that making the puppet takes.
    ///
    /// # Errors
    /// It can't be a target; it is as it was.
    pub fn attach(pid: i32, children: &[i32], ebpf: Option<Arc<Ebpf>>) -> Result<Self, Failure> {
        refuse::check(pid)?;
        let pidfd = puppet::pidfd_open(pid).map_err(|error| gone(pid, error))?;
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Failure::refused(format!("process {pid} ended"), "look the process up again"),
            _ => refused(pid, error),
        };
        if let Some(agent) = puppet::other_agent(pid, children) {
            return Err(Failure::refused(
                format!("process {pid} is in the care of another agent: process {agent}"),
                "give the commands to that agent (--socket), or end it first: asap stop",
            ));
        }
        let memory = Memory::open(pid).map_err(failed)?;
        // They may be changing what is mapped.
        let dead_helpers = puppet::await_orphans(pid, children, ORPHAN_LIMIT);
        let maps = Maps::of(pid).map_err(failed)?;
        let left = LedgerBook::find_home(&maps, &memory);
        let found = left.and_then(|home| LedgerBook::open(home, &memory).ok()?.ledger.sandbox);
        if let Some(record) = &found {
            memory.read_elsewhere(sandbox::elsewhere(&maps, record));
        }
        // What is used must not go when the sandbox is left.
        let native = found.map_or_else(|| maps.clone(), |record| sandbox::as_native(maps.clone(), &record));
        let gadgets = Gadgets::find(&native, &memory).map_err(|error| refused(pid, error))?;
        let mappings = left.is_none().then(|| executable_mappings(&maps));
        let (puppet, borrowed, book) = match left {
            Some(home) => Self::adopt(pid, &memory, gadgets, home)?,
            None => match LedgerBook::find_abandoned_home(&maps, &memory) {
                Some(home) => {
                    Self::move_into(pid, &memory, gadgets, home, true).map_err(|error| explain(pid, error))?
                }
                None => Self::move_in(pid, &maps, &memory, gadgets)?,
            },
        };
        for dead in dead_helpers {
            if let Err(error) = puppet::reap(pid, dead, &memory, gadgets) {
                tracing::warn!(pid, dead, %error, "a dead helper could not be reaped");
            }
        }
        let adopted = left.is_some();
        let mut process = Self {
            pid,
            pidfd,
            memory,
            gadgets,
            puppet,
            gates: Err("not tried".into()),
            book,
            sandbox: None,
            ebpf,
            adopted,
            longest_stop: borrowed.stop,
            baseline: Baseline { mappings, pages: BTreeMap::new() },
        };
        let scratch = process.puppet.scratch();
        process.gates =
            Gatekeeper::new(&mut process.puppet, &process.memory, pid, scratch).map_err(|error| error.to_string());
        Ok(process)
    }

    fn move_in(
        pid: i32,
        maps: &Maps,
        memory: &Memory,
        gadgets: Gadgets,
    ) -> Result<(Puppet, puppet::Borrowed, LedgerBook), Failure> {
        // The home needs no particular place; near the executable it is out of the way of growing heaps and stacks.
        let anywhere = maps.0.iter().find(|m| m.executable && m.is_file()).map(|m| m.range.clone());
        let near = anywhere.ok_or_else(|| refused(pid, "it maps no executable file"))?;
        let mut last = None;
        let mut maps = maps.clone();
        // The target may map something into the gap while we look: try again with the map as it is then.
        for _ in 0..8 {
            let home =
                maps.gap(&near, HOME_LENGTH, 1 << 46).ok_or_else(|| refused(pid, "its address space has no room"))?;
            match Self::move_into(pid, memory, gadgets, home, false) {
                Ok(made) => return Ok(made),
                Err(PuppetError::Call { error, call, .. })
                    if call == "mmap" && error.raw_os_error() == Some(libc::EEXIST) =>
                {
                    last = Some(error);
                    maps = Maps::of(pid).map_err(|error| refused(pid, error))?;
                }
                Err(error) => return Err(explain(pid, error)),
            }
        }
        Err(refused(pid, last.map_or_else(|| "no room".to_owned(), |error| error.to_string())))
    }

    fn move_into(
        pid: i32,
        memory: &Memory,
        gadgets: Gadgets,
        home: TargetAddr,
        existing: bool,
    ) -> Result<(Puppet, puppet::Borrowed, LedgerBook), PuppetError> {
        let (puppet, borrowed) = Puppet::make(pid, memory, gadgets, home, HOME_LENGTH, existing)?;
        let book = LedgerBook::create(home, memory, puppet.pid()).map_err(|error| PuppetError::Call {
            pid,
            call: "ledger",
            error: io::Error::other(error),
        })?;
        crate::fault::point("attach.ledger-created");
        Ok((puppet, borrowed, book))
    }

    /// Takes over what an earlier agent, or the agent of the process that this one was forked from, left.
    fn adopt(
        pid: i32,
        memory: &Memory,
        gadgets: Gadgets,
        home: TargetAddr,
    ) -> Result<(Puppet, puppet::Borrowed, LedgerBook), Failure> {
        let mut book = LedgerBook::open(home, memory).map_err(|error| refused(pid, error))?;
        let (puppet, borrowed) =
            Puppet::make(pid, memory, gadgets, home, HOME_LENGTH, true).map_err(|error| explain(pid, error))?;
        let id = puppet.pid();
        book.update(memory, |ledger| {
            ledger.puppet = id;
            ledger.process = pid;
        })
        .map_err(|error| refused(pid, error))?;
        crate::fault::point("attach.adopted");
        Ok((puppet, borrowed, book))
    }

    /// The process is the one that was attached, lives, and runs the program that it ran then.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self.has_ended() && self.has_its_memory()
    }

    /// execve(2) gives a process a new address space; the puppet keeps the old one.
    fn has_its_memory(&self) -> bool {
        // Where the kernel can't compare it is taken for the same. A main thread that has ended before the others has no address
        // space any more; another thread has.
        let shares = |tid| info::share_memory(tid, self.puppet.pid()) != Some(false);
        shares(self.pid) || info::living_thread(self.pid).is_none_or(shares)
    }

    /// Readable when it has ended (pidfd_open(2)).
    #[must_use]
    pub fn alarm(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Lets go of a process that is not alive any more. One that runs another program now is rid of its dead helper.
    pub fn bury(self) -> Fate {
        let tid = info::living_thread(self.pid).unwrap_or(self.pid);
        // While it is ending it has no memory, and no executable.
        let program = fs::read_link(format!("/proc/{tid}/exe"));
        let Some(program) = program.ok().filter(|_| !self.has_ended()) else { return Fate::Ended };
        let Self { pid, puppet, .. } = self;
        let of_the_new_program = || {
            let memory = Memory::open(pid)?;
            let gadgets = Gadgets::find(&Maps::of(pid)?, &memory).map_err(io::Error::other)?;
            io::Result::Ok((memory, gadgets))
        };
        if let Ok((memory, gadgets)) = of_the_new_program()
            && let Err(error) = puppet.dismiss(&memory, gadgets)
        {
            tracing::warn!(pid, %error, "a dead helper could not be reaped");
        }
        Fate::RunsOther(program.to_string_lossy().into_owned())
    }

    fn has_ended(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        // Readable when the process has ended (pidfd_open(2)).
        let mut ended = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        !matches!(poll(&mut ended, PollTimeout::ZERO), Ok(0))
    }

    /// Its mappings now; those of a process in the sandbox as if it were not, and pages with probes as those of their files.
    ///
    /// # Errors
    /// It is gone.
    pub fn maps(&self) -> Result<Maps, Failure> {
        let maps = self.listed_maps()?;
        let maps = match &self.book.ledger.sandbox {
            Some(record) => sandbox::as_native(maps, record),
            None => maps,
        };
        Ok(redirect::as_files(maps, &self.book.ledger.pages))
    }

    /// Its mappings now, as the kernel lists them.
    ///
    /// # Errors
    /// It is gone.
    pub fn listed_maps(&self) -> Result<Maps, Failure> {
        Maps::of(self.pid).map_err(|error| gone(self.pid, error))
    }

    /// Looks again for the instructions that it lends us, after mappings of ours have gone. All its text must be open.
    ///
    /// # Errors
    /// It is gone.
    pub fn refresh_gadgets(&mut self) -> Result<(), Failure> {
        self.gadgets = Gadgets::find(&self.maps()?, &self.memory).map_err(|error| refused(self.pid, error))?;
        Ok(())
    }

    /// Where the file's own mapping of a text page is: there, but for a page behind a curtain of the sandbox.
    ///
    /// # Errors
    /// It is gone.
    pub fn file_page(&self, page: TargetAddr) -> Result<TargetAddr, Failure> {
        let text = self.book.ledger.sandbox.as_ref().and_then(|record| record.text_at(page));
        let Some((text, spare)) = text.and_then(|text| Some((text, text.spare?))) else { return Ok(page) };
        let is_behind = self.listed_maps()?.at(page).is_some_and(sandbox::is_curtain);
        Ok(if is_behind { spare.offset(page.wrapping_distance(text.start)) } else { page })
    }

    /// Whether `address` lies in one of our copies of text pages.
    #[must_use]
    pub fn is_ours(&self, address: TargetAddr) -> bool {
        self.book.ledger.pages.iter().any(|page| page.spare == address)
    }

    /// Maps a region of `length` bytes (whole pages) within reach of `near` and gives its start. Nothing is mapped yet: the
    /// caller maps its parts with `map`, and calls again if one is taken (EEXIST).
    ///
    /// # Errors
    /// There is no room, or memory is short.
    pub fn reserve(
        &mut self,
        near: &Range<TargetAddr>,
        length: u64,
        protections: &[(u64, i32)],
    ) -> Result<TargetAddr, Failure> {
        for _ in 0..8 {
            let Some(start) = self.listed_maps()?.gap(near, length, REACH) else {
                return Err(Failure::refused(
                    format!(
                        "process {} has no {} KiB of free address space within 2 GiB of the module at {}",
                        self.pid,
                        length / 1024,
                        near.start
                    ),
                    "use a smaller patch, or restart the process with the repaired binary",
                ));
            };
            let mut at = start;
            let parts: Vec<(Span, i32)> = protections
                .iter()
                .filter(|(size, _)| *size > 0)
                .map(|&(size, protection)| {
                    let span = Span { start: at, end: at.offset(size as i64) };
                    at = span.end;
                    (span, protection)
                })
                .collect();
            // Should we die between this line and the patch's entry in the ledger, the next agent knows what to unmap.
            super::exchange::record(self, |ledger| ledger.staging = parts.iter().map(|(span, _)| *span).collect())?;
            crate::fault::point("stage.recorded");
            let mut mapped: Vec<Span> = Vec::new();
            let mut taken = false;
            for &(span, protection) in &parts {
                match pages::map_at(&mut self.puppet, span.start, span.len(), protection) {
                    Ok(()) => mapped.push(span),
                    Err(error) => {
                        for span in mapped.drain(..) {
                            self.release(span);
                        }
                        super::exchange::record(self, |ledger| ledger.staging.clear())?;
                        match &error {
                            PuppetError::Call { error, .. } if error.raw_os_error() == Some(libc::EEXIST) => {
                                taken = true
                            }
                            _ => return Err(explain(self.pid, error)),
                        }
                        break;
                    }
                }
            }
            if !taken {
                return Ok(start);
            }
        }
        Err(refused(self.pid, "its address space changes too fast to find room for the patch"))
    }

    /// Unmaps one of our regions; what remains of a dead process needs none.
    pub fn release(&mut self, span: Span) {
        if !span.is_empty() {
            let _ = pages::unmap(&mut self.puppet, span.start, span.len().next_multiple_of(PAGE_SIZE));
        }
    }

    /// For status reports.
    #[must_use]
    pub fn report(&self) -> ProcessReport {
        ProcessReport {
            pid: self.pid,
            threads: crate::process::info::threads(self.pid).map_or(0, |threads| threads.len()),
            patches: self.patches(),
        }
    }

    /// Numbers of the applied patches, oldest first.
    #[must_use]
    pub fn patches(&self) -> Vec<PatchId> {
        self.book.ledger.patches.iter().map(|patch| patch.id).collect()
    }

    /// Leaves the process. With no patch left in it, nothing of us remains; the answer then is whether its text and its
    /// executable mappings are what they were.
    ///
    /// # Errors
    /// No thread could be borrowed to reap the puppet, which then stays as a zombie until the process ends.
    pub fn leave(mut self) -> Result<Option<bool>, Failure> {
        let pid = self.pid;
        let ledger = &self.book.ledger;
        let keep = !ledger.patches.is_empty() || !ledger.pages.is_empty() || ledger.sandbox.is_some();
        self.sandbox = None;
        self.gates = Err("leaving".into());
        crate::fault::point("leave.begin");
        if !keep {
            for span in std::mem::take(&mut self.book.ledger.lingering) {
                self.release(span);
            }
            // The puppet's own code goes with it: its last call.
            let _ = pages::unmap(&mut self.puppet, self.book.home(), HOME_LENGTH);
            crate::fault::point("leave.unmapped");
        }
        let Self { puppet, memory, gadgets, baseline, .. } = self;
        puppet.dismiss(&memory, gadgets).map_err(|error| explain(pid, error))?;
        crate::fault::point("leave.reaped");
        if keep {
            return Ok(None);
        }
        let Ok(maps) = Maps::of(pid) else { return Ok(None) };
        // What the target itself has mapped or unmapped meanwhile (dlopen, dlclose) is its own affair: else ours must all be there.
        let now = executable_mappings(&maps);
        let is_as_before = |mapping: &FileMapping| {
            let (range, _, inode) = mapping;
            let overlaps =
                |other: &FileMapping| other.0.start < range.end && range.start < other.0.end && other.2 == *inode;
            now.contains(mapping) || !now.iter().any(overlaps)
        };
        let before = baseline.mappings.as_deref().unwrap_or_default();
        let same_maps = before.iter().all(is_as_before);
        let went = |page| before.iter().any(|mapping| mapping.0.contains(&page) && !now.contains(mapping));
        let is_there = |page| now.iter().any(|mapping| mapping.0.contains(&page)) && !went(page);
        let has_its_bytes = |(&page, bytes): (&TargetAddr, &Vec<u8>)| {
            !is_there(page) || pages::content(&memory, page).is_ok_and(|now| now == *bytes)
        };
        let same_bytes = baseline.pages.iter().all(has_its_bytes);
        Ok(Some(same_bytes && same_maps))
    }

    /// The target has unmapped this page: what it held is of no more interest.
    pub fn forget_page(&mut self, page: TargetAddr) {
        self.baseline.pages.remove(&page);
    }

    /// Notes what a text page held before it was exchanged for the first time.
    pub fn note_clean_page(&mut self, page: TargetAddr, clean: &[u8]) {
        self.baseline.pages.entry(page).or_insert_with(|| clean.to_vec());
    }
}

/// The process ended under our hands.
#[must_use]
pub fn gone(pid: i32, error: impl std::fmt::Display) -> Failure {
    Failure {
        state: crate::report::TargetState::Gone,
        ..Failure::refused(format!("process {pid} ended: {error}"), "attach to the process that took its place")
    }
}

/// Words for what the process layer could not do.
#[must_use]
pub fn explain(pid: i32, error: PuppetError) -> Failure {
    use crate::process::{inject::InjectError, ptrace::TraceError};
    match error {
        PuppetError::Trace(TraceError::Gone(_)) | PuppetError::Inject(InjectError::Trace(TraceError::Gone(_))) => {
            gone(pid, "it exited")
        }
        PuppetError::Trace(ref traced @ TraceError::TracedByOther { tracer, .. }) => Failure::refused(
            format!("process {pid} can't be attached: {traced}"),
            format!("end the debugger or tracer {tracer} first, then try again"),
        ),
        other => refused(pid, other),
    }
}
