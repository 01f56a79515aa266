//! The ledger: what is applied in a process, written into the process itself, so that an agent that comes later knows as
//! much as the one that applied it, and so that fork(2) copies knowledge and patch together.
//!
//! It lies in the home, a private R-X region. Two slots are written in turn; a slot counts when its checksum fits, and of
//! two that count the one with the higher sequence number: an agent that dies in the middle of writing loses nothing.

use crate::{
    address::TargetAddr,
    process::{maps::Maps, memory::Memory, puppet::Puppet},
    report::{FunctionReport, InstalledPatch, Mechanism, PatchId},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{io, ops::Range};

/// Length of the home region, bytes: the puppet's own page, then the two slots. An odd number of pages: whoever finds an
/// empty region of just this length and protection has found a home whose agent died before it could move in.
pub const HOME_LENGTH: u64 = 65 * 4096;
const SLOT_LENGTH: u64 = (HOME_LENGTH - Puppet::OWN_LENGTH) / 2;
/// Sequence number, length, checksum.
const SLOT_HEADER: usize = 24;
/// Where the mark of a home lies, in bytes from its start.
const MARK_AT: i64 = 16;
const MARK: &[u8; 8] = b"asaphome";
/// Changes when an older agent could misread what a newer one wrote. 2: the sandbox. 3: redirection.
const FORMAT: u32 = 3;

/// A half-open range of addresses in the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// First address.
    pub start: TargetAddr,
    /// First address behind it.
    pub end: TargetAddr,
}

impl Span {
    /// As a range.
    #[must_use]
    pub fn range(self) -> Range<TargetAddr> {
        self.start..self.end
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Holds no byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Holds `address`.
    #[must_use]
    pub fn contains(self, address: TargetAddr) -> bool {
        self.range().contains(&address)
    }
}

impl From<Range<TargetAddr>> for Span {
    fn from(range: Range<TargetAddr>) -> Self {
        Self { start: range.start, end: range.end }
    }
}

/// One replaced function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedFunction {
    /// Name for people.
    pub name: String,
    /// Path of its module, as the target sees it.
    pub module: String,
    /// Where calls arrive.
    pub entry: TargetAddr,
    /// The function's own code: entry to end, then cold parts.
    pub body: Vec<Span>,
    /// The code that replaces it.
    pub replacement: Span,
    /// Where the original can be called, if the patch does so.
    pub original: Option<TargetAddr>,
}

/// Functions of the patch to be run around its installation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedHooks {
    /// Before it is taken out.
    pub pre_revert: Vec<TargetAddr>,
    /// After it was taken out.
    pub post_revert: Vec<TargetAddr>,
}

/// A patch in a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedPatch {
    /// Number within the target.
    pub id: PatchId,
    /// Name.
    pub name: String,
    /// SHA-256 of its object files, hex.
    pub sha256: String,
    /// Seconds since the epoch.
    pub installed_at: u64,
    /// New code, stubs and trampolines (R-X).
    pub code: Span,
    /// Constants (R).
    pub rodata: Span,
    /// Variables (RW).
    pub data: Span,
    /// Its unwind table within `rodata`.
    pub eh_frame: Option<Span>,
    /// The table is registered with the target's libgcc; the object that it gave us for that.
    pub registered: Option<TargetAddr>,
    /// What it replaces.
    pub functions: Vec<AppliedFunction>,
    /// How calls reach it.
    #[serde(default)]
    pub mechanism: Mechanism,
    /// What it wants run.
    pub hooks: AppliedHooks,
}

impl AppliedPatch {
    /// For reports.
    #[must_use]
    pub fn report(&self) -> InstalledPatch {
        InstalledPatch {
            id: self.id,
            name: self.name.clone(),
            sha256: self.sha256.clone(),
            installed_at: self.installed_at,
            mechanism: match self.mechanism {
                Mechanism::Auto => Mechanism::Page,
                told => told,
            },
            functions: self
                .functions
                .iter()
                .map(|function| FunctionReport {
                    name: function.name.clone(),
                    module: function.module.clone(),
                    old: function.entry,
                    new: function.replacement.start,
                })
                .collect(),
        }
    }
}

/// A text page that differs from its file, and the clean copy that will take its place again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedPage {
    /// The text page.
    pub page: TargetAddr,
    /// A second mapping of the same file content, unchanged.
    pub spare: TargetAddr,
}

impl ChangedPage {
    /// The memory of the spare.
    #[must_use]
    pub fn spare_span(&self) -> Span {
        Span { start: self.spare, end: self.spare.offset(crate::address::PAGE_SIZE as i64) }
    }
}

/// A transaction that is under way. An agent that finds one finishes it: forward if all its pages carry the new content,
/// else back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The patches as they will be, oldest first.
    pub goal: Vec<AppliedPatch>,
    /// Text pages that it touches.
    pub pages: Vec<TargetAddr>,
}

/// An unwind table that the target's libgcc is being told of, or told to forget. Who finds one sets it right: libgcc must never
/// know a table whose memory is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// The table.
    pub table: Span,
    /// libgcc's object for it, and our word behind it that says what libgcc was told.
    pub object: TargetAddr,
    /// `__register_frame_info`.
    pub register: TargetAddr,
    /// `__deregister_frame_info`.
    pub deregister: TargetAddr,
}

/// Everything that is known about a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Format of this text.
    pub format: u32,
    /// The process it was written for; a forked child finds its parent's number.
    pub process: i32,
    /// The last puppet.
    pub puppet: i32,
    /// Number for the next patch.
    pub next_patch: u32,
    /// Applied patches, oldest first.
    pub patches: Vec<AppliedPatch>,
    /// Changed text pages.
    pub pages: Vec<ChangedPage>,
    /// Where memory for a patch is about to be mapped: code, constants, variables.
    #[serde(default)]
    pub staging: Vec<Span>,
    /// What is no longer used and about to be unmapped.
    #[serde(default)]
    pub leftover: Vec<Span>,
    /// Memory of reverted patches that old activations may still use (`--consistency lazy`).
    pub lingering: Vec<Span>,
    /// The transaction under way.
    pub pending: Option<Pending>,
    /// Patches that are being put into all processes of the target, or taken out of all of them: it is not said yet that every
    /// one has them.
    #[serde(default)]
    pub unsettled: Vec<PatchId>,
    /// Patches that go out for an unsettled one. Their memory is kept, so that they can come back.
    #[serde(default)]
    pub replaced: Vec<AppliedPatch>,
    /// The unwind table that libgcc is being told of.
    #[serde(default)]
    pub registering: Option<Registration>,
    /// A stack for calls of functions of the target, which is mapped, or about to be.
    #[serde(default)]
    pub call_stack: Option<Span>,
    /// The process is in the sandbox, on its way in, or on its way out.
    #[serde(default)]
    pub sandbox: Option<crate::sandbox::Record>,
}

/// Why a ledger can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Memory can't be read or written.
    #[error("the record of patches in process {pid} can't be accessed: {error}")]
    Memory {
        /// The process.
        pid: i32,
        /// The kernel's reason.
        error: io::Error,
    },
    /// Neither slot makes sense.
    #[error("the record of patches in process {0} is damaged")]
    Damaged(i32),
    /// A newer agent wrote it.
    #[error("the record of patches in process {pid} was written by a newer asap (format {format})")]
    Newer {
        /// The process.
        pid: i32,
        /// Its format.
        format: u32,
    },
    /// Too many patches.
    #[error("the record of patches in process {0} is full: revert patches that are no longer needed")]
    Full(i32),
}

/// A ledger and where it is kept.
#[derive(Debug)]
pub struct LedgerBook {
    home: TargetAddr,
    sequence: u64,
    /// What the target's copy says.
    pub ledger: Ledger,
}

fn checksum(sequence: u64, text: &[u8]) -> [u8; 8] {
    let digest = Sha256::new().chain_update(sequence.to_le_bytes()).chain_update(text).finalize();
    let mut short = [0; 8];
    short.copy_from_slice(&digest[..8]);
    short
}

impl LedgerBook {
    /// Starts a ledger in a home that has just been mapped.
    ///
    /// # Errors
    /// The target is gone.
    pub fn create(home: TargetAddr, memory: &Memory, puppet: i32) -> Result<Self, LedgerError> {
        let ledger = Ledger { format: FORMAT, process: memory.pid(), puppet, next_patch: 1, ..Ledger::default() };
        let mut book = Self { home, sequence: 0, ledger };
        book.write(memory)?;
        let failed = |error| LedgerError::Memory { pid: memory.pid(), error };
        memory.write(home.offset(MARK_AT), MARK).map_err(failed)?;
        Ok(book)
    }

    /// Finds the home that an earlier agent left in a process.
    #[must_use]
    pub fn find_home(maps: &Maps, memory: &Memory) -> Option<TargetAddr> {
        let candidates =
            maps.0.iter().filter(|m| m.inode == 0 && m.executable && !m.writable && m.len() == HOME_LENGTH);
        let mut marked = candidates.map(|m| m.range.start).filter(|start| {
            let mut mark = [0; MARK.len()];
            memory.read(start.offset(MARK_AT), &mut mark).is_ok() && &mark == MARK
        });
        marked.next()
    }

    /// Finds a home without a mark: its agent died while it moved in.
    #[must_use]
    pub fn find_abandoned_home(maps: &Maps, memory: &Memory) -> Option<TargetAddr> {
        let candidates =
            maps.0.iter().filter(|m| m.inode == 0 && m.executable && !m.writable && m.len() == HOME_LENGTH);
        let mut abandoned = candidates.map(|m| m.range.start).filter(|&start| {
            memory.bytes(start, HOME_LENGTH as usize).is_ok_and(|bytes| {
                let (own, slots) = bytes.split_at(Puppet::OWN_LENGTH as usize);
                let unmarked = own[MARK_AT as usize..MARK_AT as usize + MARK.len()] == [0; MARK.len()];
                let begun = Puppet::is_home_code(own) || own.iter().all(|&byte| byte == 0);
                // The first ledger may have been written, the mark not.
                unmarked && begun && slots[SLOT_LENGTH as usize * 2..].iter().all(|&byte| byte == 0)
            })
        });
        abandoned.next()
    }

    /// Opens the ledger in `home`.
    ///
    /// # Errors
    /// It is damaged, or written by a newer agent.
    pub fn open(home: TargetAddr, memory: &Memory) -> Result<Self, LedgerError> {
        let pid = memory.pid();
        let mut best: Option<(u64, Ledger)> = None;
        for slot in 0..2 {
            let Ok(Some((sequence, ledger))) = read_slot(home, slot, memory) else { continue };
            if best.as_ref().is_none_or(|(newest, _)| sequence > *newest) {
                best = Some((sequence, ledger));
            }
        }
        let (sequence, ledger) = best.ok_or(LedgerError::Damaged(pid))?;
        if ledger.format > FORMAT {
            return Err(LedgerError::Newer { pid, format: ledger.format });
        }
        Ok(Self { home, sequence, ledger })
    }

    /// Start of the region that holds it.
    #[must_use]
    pub fn home(&self) -> TargetAddr {
        self.home
    }

    /// Changes the ledger and writes it; on failure both stay as they were.
    ///
    /// # Errors
    /// The target is gone, or there is no room.
    pub fn update(&mut self, memory: &Memory, change: impl FnOnce(&mut Ledger)) -> Result<(), LedgerError> {
        let before = self.ledger.clone();
        self.ledger.format = FORMAT;
        change(&mut self.ledger);
        let written = self.write(memory);
        if written.is_err() {
            self.ledger = before;
        }
        written
    }

    fn write(&mut self, memory: &Memory) -> Result<(), LedgerError> {
        let pid = memory.pid();
        let text = serde_json::to_vec(&self.ledger).map_err(|_| LedgerError::Damaged(pid))?;
        if text.len() + SLOT_HEADER > SLOT_LENGTH as usize {
            return Err(LedgerError::Full(pid));
        }
        let sequence = self.sequence + 1;
        let at = slot_address(self.home, sequence % 2);
        let mut header = Vec::with_capacity(SLOT_HEADER);
        header.extend_from_slice(&sequence.to_le_bytes());
        header.extend_from_slice(&(text.len() as u64).to_le_bytes());
        header.extend_from_slice(&checksum(sequence, &text));
        let failed = |error| LedgerError::Memory { pid, error };
        memory.write(at.offset(SLOT_HEADER as i64), &text).map_err(failed)?;
        memory.write(at, &header).map_err(failed)?;
        self.sequence = sequence;
        Ok(())
    }
}

fn slot_address(home: TargetAddr, slot: u64) -> TargetAddr {
    TargetAddr(home.0 + Puppet::OWN_LENGTH + slot * SLOT_LENGTH)
}

fn read_slot(home: TargetAddr, slot: u64, memory: &Memory) -> io::Result<Option<(u64, Ledger)>> {
    let at = slot_address(home, slot);
    let header = memory.bytes(at, SLOT_HEADER)?;
    let word = |index: usize| header[index * 8..index * 8 + 8].try_into().map_or(0, u64::from_le_bytes);
    let (sequence, length) = (word(0), word(1));
    if length > SLOT_LENGTH - SLOT_HEADER as u64 {
        return Ok(None);
    }
    let text = memory.bytes(at.offset(SLOT_HEADER as i64), length as usize)?;
    if checksum(sequence, &text) != header[16..24] {
        return Ok(None);
    }
    Ok(serde_json::from_slice(&text).ok().map(|ledger| (sequence, ledger)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A home in this very process: the ledger only needs memory.
    fn home() -> (Vec<u8>, TargetAddr, Memory) {
        let mut region = vec![0_u8; HOME_LENGTH as usize];
        let at = TargetAddr(region.as_mut_ptr() as u64);
        (region, at, Memory::open(i32::try_from(std::process::id()).expect("pids fit i32")).expect("own memory"))
    }

    #[test]
    fn the_newest_undamaged_slot_counts() {
        let (_region, home, memory) = home();
        let mut book = LedgerBook::create(home, &memory, 7).expect("room");
        for patch in 2..5 {
            book.update(&memory, |ledger| ledger.next_patch = patch).expect("room");
        }
        assert_eq!(LedgerBook::open(home, &memory).expect("fine").ledger.next_patch, 4);
        // As if the agent had died in the middle of writing the newest slot.
        let newest = slot_address(home, book.sequence % 2);
        memory.write(newest.offset(SLOT_HEADER as i64 + 3), b"####").expect("own memory");
        assert_eq!(LedgerBook::open(home, &memory).expect("the other slot").ledger.next_patch, 3);
        let older = slot_address(home, (book.sequence + 1) % 2);
        memory.write(older.offset(8), &u64::MAX.to_le_bytes()).expect("own memory");
        assert!(matches!(LedgerBook::open(home, &memory), Err(LedgerError::Damaged(_))));
    }

    #[test]
    fn a_full_ledger_is_refused_and_stays_as_it_was() {
        let (_region, home, memory) = home();
        let mut book = LedgerBook::create(home, &memory, 7).expect("room");
        let page = ChangedPage { page: TargetAddr(1), spare: TargetAddr(2) };
        let full = book.update(&memory, |ledger| ledger.pages = vec![page; 100_000]);
        assert!(matches!(full, Err(LedgerError::Full(_))));
        assert!(book.ledger.pages.is_empty());
        assert_eq!(LedgerBook::open(home, &memory).expect("fine").ledger, book.ledger);
    }
}
