//! Sends calls of functions elsewhere without a write of ours to the target's text: a uprobe program writes the instruction
//! pointer. Many kernels refuse such a program (6.1 and 6.18 do, 7.2 does not): ask first.
//!
//! Not for saying when it is safe to do so; but the table that is in force can be changed on the condition that no call has
//! come by since.

use super::{
    Ebpf, KernelError,
    attach::{Places, attach},
    object,
    syscall::{self, ATTACH_UPROBE_MULTI, PROGRAM_UPROBE, ProgramType},
};
use asap_common::{REDIRECTS, Redirects, SECOND_TABLE};
use aya::maps::MapData;
use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

const PROGRAM: &str = "redirect";
const TARGETS: &str = "TARGETS";

/// Where calls of the redirected functions of one process go, by slot: two tables, one of which is in force. Programs hold it,
/// too: it exists as long as there is a probe, or a pin.
#[derive(Debug)]
pub struct RedirectTable {
    map: MapData,
    shared: NonNull<Redirects>,
}

// SAFETY: the mapping belongs to this value and is accessed by atomic operations only.
unsafe impl Send for RedirectTable {}

/// Probes on entries of functions. Dropping it detaches them, unless it has been pinned.
#[derive(Debug)]
pub struct RedirectLink(OwnedFd);

/// What a table's word said at some moment: which of the two was in force, and how many calls had come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment(u64);

impl Ebpf {
    /// Whether the kernel takes the program.
    ///
    /// # Errors
    /// It does not, with the verifier's reason.
    pub fn redirect_available(&self) -> Result<(), KernelError> {
        available()
    }

    /// Puts probes on function entries of one process, each given as offset in the file and slot in the table. What the table
    /// says, holds at once; a slot that it says nothing for leaves the function alone.
    ///
    /// # Errors
    /// The kernel refuses the program; process or file are gone. Nothing is left behind.
    pub fn redirect(
        &self,
        table: &RedirectTable,
        pid: i32,
        file: &Path,
        functions: &[(u64, u32)],
    ) -> Result<RedirectLink, KernelError> {
        let (offsets, cookies): (Vec<u64>, Vec<u64>) =
            functions.iter().map(|&(offset, slot)| (offset, u64::from(slot))).unzip();
        let places = Places { pid: Some(pid), file, offsets: &offsets, cookies: &cookies };
        let maps = [("LAYOUT", &self.layout), (TARGETS, &table.map)];
        attach(PROGRAM, &maps, &places).map(RedirectLink)
    }

    /// Sends calls elsewhere, for good: places in a file that nobody maps but the process `pid` and those that it forks, with the
    /// addresses that threads are sent to. Holds from now on in all of them, as long as they run the program that they run now.
    ///
    /// # Errors
    /// The kernel refuses the program; process or file are gone; there are more than [`REDIRECTS`] places. Nothing is left behind.
    pub fn redirect_file(&self, pid: i32, file: &Path, places: &[(u64, u64)]) -> Result<RedirectLink, KernelError> {
        let unusable = |reason: &str| KernelError::File { file: file.to_owned(), reason: reason.to_owned() };
        if places.len() > REDIRECTS {
            return Err(unusable("it has too many places"));
        }
        let exec_id = self.snapshot(pid, 0, None)?.tasks.first().map(|task| task.exec_id);
        let table = RedirectTable::create(exec_id.ok_or_else(|| unusable("the process is gone"))?)?;
        let slots: Vec<(u32, u64)> = (0..).zip(places.iter().map(|&(_, to)| to)).collect();
        table.prepare(&slots);
        table.turn();
        let offsets: Vec<u64> = places.iter().map(|&(offset, _)| offset).collect();
        let cookies: Vec<u64> = slots.iter().map(|&(slot, _)| slot.into()).collect();
        let places = Places { pid: None, file, offsets: &offsets, cookies: &cookies };
        attach(PROGRAM, &[("LAYOUT", &self.layout), (TARGETS, &table.map)], &places).map(RedirectLink)
    }
}

/// As [`Ebpf::redirect_available`], for those who have nothing loaded.
pub fn available() -> Result<(), KernelError> {
    let (layout, targets) = (object::create_map("LAYOUT")?, object::create_map(TARGETS)?);
    let what = ProgramType { kind: PROGRAM_UPROBE, attach: ATTACH_UPROBE_MULTI, ..ProgramType::default() };
    object::load_program(PROGRAM, &[("LAYOUT", &layout), (TARGETS, &targets)], what).map(drop)
}

fn pin_error(path: &Path) -> impl FnOnce(std::io::Error) -> KernelError + '_ {
    move |source| KernelError::Pin { path: path.to_owned(), source }
}

impl RedirectTable {
    /// An empty one, for the program that a process executes now ([`super::TaskSnapshot::exec_id`]).
    ///
    /// # Errors
    /// The kernel refuses the map.
    pub fn create(exec_id: u64) -> Result<Self, KernelError> {
        let table = Self::over(object::create_map(TARGETS)?)?;
        table.cell(std::mem::offset_of!(Redirects, exec_id)).store(exec_id, Ordering::SeqCst);
        Ok(table)
    }

    /// The one that was pinned at `path`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let fd = syscall::open_pinned(path).map_err(pin_error(path))?;
        Self::over(MapData::from_fd(fd).map_err(|error| object::map_error(TARGETS, error))?)
    }

    /// Makes it outlive the agent.
    ///
    /// # Errors
    /// The path is taken, or not on a BPF file system.
    pub fn pin(&self, path: &Path) -> Result<(), KernelError> {
        syscall::pin(self.map.fd().as_fd(), path).map_err(pin_error(path))
    }

    fn over(map: MapData) -> Result<Self, KernelError> {
        let fd = map.fd().as_fd().as_raw_fd();
        let size = size_of::<Redirects>();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, fd, 0) };
        let shared = NonNull::new(at.cast::<Redirects>()).filter(|_| at != libc::MAP_FAILED);
        let shared = shared.ok_or_else(|| KernelError::Map {
            map: TARGETS.to_owned(),
            message: format!("it can't be mapped: {}", std::io::Error::last_os_error()),
        })?;
        Ok(Self { map, shared })
    }

    fn cell(&self, offset: usize) -> &AtomicU64 {
        assert!(offset < size_of::<Redirects>() && offset.is_multiple_of(8), "a word of the table");
        // SAFETY: inside the mapping, aligned, and accessed by atomic operations only, here and by the programs.
        unsafe { &*self.shared.as_ptr().cast::<u8>().add(offset).cast::<AtomicU64>() }
    }

    fn slot(&self, second: bool, slot: u32) -> &AtomicU64 {
        let index = slot as usize % REDIRECTS + if second { REDIRECTS } else { 0 };
        self.cell(std::mem::offset_of!(Redirects, tables) + index * 8)
    }

    /// What the word says now.
    #[must_use]
    pub fn moment(&self) -> Moment {
        Moment(self.cell(std::mem::offset_of!(Redirects, word)).load(Ordering::SeqCst))
    }

    /// Where calls go now: slots and addresses.
    #[must_use]
    pub fn in_force(&self) -> Vec<(u32, u64)> {
        let second = self.moment().second();
        let all = (0..REDIRECTS as u32).map(|slot| (slot, self.slot(second, slot).load(Ordering::SeqCst)));
        all.filter(|&(_, to)| to != 0).collect()
    }

    /// Writes the table that is not in force.
    pub fn prepare(&self, goal: &[(u32, u64)]) {
        let second = !self.moment().second();
        for slot in 0..REDIRECTS as u32 {
            let to = goal.iter().find(|(wanted, _)| *wanted == slot).map_or(0, |&(_, to)| to);
            self.slot(second, slot).store(to, Ordering::SeqCst);
        }
    }

    /// Puts the other table in force, for all slots at once, if no call has come by since `moment`. Whether that was so.
    #[must_use]
    pub fn turn_if_quiet(&self, moment: Moment) -> bool {
        let word = self.cell(std::mem::offset_of!(Redirects, word));
        word.compare_exchange(moment.0, moment.0 ^ SECOND_TABLE, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Puts the other table in force, whoever is where.
    pub fn turn(&self) {
        self.cell(std::mem::offset_of!(Redirects, word)).fetch_xor(SECOND_TABLE, Ordering::SeqCst);
    }
}

impl Drop for RedirectTable {
    fn drop(&mut self) {
        // SAFETY: mapped by `over`, and nobody borrows from it any more.
        unsafe { libc::munmap(self.shared.as_ptr().cast(), size_of::<Redirects>()) };
    }
}

impl Moment {
    const fn second(self) -> bool {
        self.0 & SECOND_TABLE != 0
    }
}

impl RedirectLink {
    /// Makes it outlive the agent.
    ///
    /// # Errors
    /// The path is taken, or not on a BPF file system.
    pub fn pin(&self, path: &Path) -> Result<(), KernelError> {
        syscall::pin(self.0.as_fd(), path).map_err(pin_error(path))
    }

    /// The one that was pinned at `path`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        syscall::open_pinned(path).map(Self).map_err(pin_error(path))
    }
}
