//! Curtains: the text of a whole mapping, shown to its threads one page at a time. Memory with the same bytes lies over the text;
//! the first thread that comes to a page waits in the kernel until the reader of this module opens that page, which it does
//! at once and for good. Nobody else waits.
//!
//! What lies behind a page may be made when it is opened ([`Pages`]): nobody has run it before. There may be pages that are never
//! opened; who comes there waits for somebody who is told ([`Caught`]).
//!
//! userfaultfd(2) in MINOR mode, with all content in place from the beginning: when the agent dies, every page is open (P1). That
//! it does not hang is the watchdog's business, to which the readers of all curtains say once a second that they live. A child
//! that is forked has the same memory; where pages are made when they are opened it has the same curtain, too, else none.
//! Not for deciding which text, or what its pages hold.

use super::{
    memory::Memory,
    pages,
    puppet::{Puppet, PuppetError},
    userfault::{self, Forks, GateError},
};
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    kernel::uffd::{Event, Uffd},
    watchdog,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    io,
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How the kernel names the memory in the memory map of the target.
pub const NAME: &str = "/memfd:asap-text";
const NAME_IN_CALL: &[u8] = b"asap-text\0";
/// The same for code beside the text.
pub const CACHE_NAME: &str = "/memfd:asap-cache";
const CACHE_NAME_IN_CALL: &[u8] = b"asap-cache\0";

/// How often readers say that they live, and how long they may fail to.
const HEARTBEAT: Duration = Duration::from_secs(1);
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// How soon a page is tried again that the kernel could not open at that moment, milliseconds.
const AGAIN: u8 = 1;

/// Gives new memory its length and content.
type Fill<'a> = &'a dyn Fn(&File) -> io::Result<()>;

/// What is behind the pages of a curtain.
pub trait Pages: Send {
    /// Sees to it that what lies behind the page at `page` is what threads are to run. Called before each opening; the thread
    /// that waits for it was about to fetch the byte at `at`, or the instruction that holds it.
    fn prepare(&mut self, page: TargetAddr, at: TargetAddr);
    /// Who comes to this page is not to pass.
    fn catches(&self, page: TargetAddr) -> bool;
}

/// What `pages` holds while it is used by one.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The curtains of one process, and of those that it forks.
pub struct Curtain {
    pid: i32,
    uffd: Arc<Uffd>,
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
    /// System calls that read text behind the curtain wait, too; otherwise they fail with EFAULT.
    pub covers_kernel_faults: bool,
}

impl fmt::Debug for Curtain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Curtain").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// What the reader and its owner share.
struct Shared {
    traps: AtomicU64,
    /// No page is opened.
    is_held: AtomicBool,
    stop: AtomicBool,
    /// Rung when one of the two above has changed.
    bell: EventFd,
    /// Those of children that were forked.
    children: Mutex<Vec<Arc<Uffd>>>,
    pages: Option<Arc<Mutex<dyn Pages>>>,
    /// Threads that came to where nobody passes.
    caught: Mutex<Vec<i32>>,
    /// Readable when there are such.
    alarm: EventFd,
}

impl Curtain {
    /// For one process, by its puppet. Without `pages` what is behind the curtain is what it was made with.
    ///
    /// # Errors
    /// The kernel has no userfaultfd for this process, or not its MINOR mode.
    pub fn new(puppet: &mut Puppet, pid: i32, pages: Option<Arc<Mutex<dyn Pages>>>) -> Result<Self, GateError> {
        let fail = |step| GateError::at(pid, step);
        let forks = if pages.is_some() { Forks::Follow } else { Forks::Ignore };
        let (uffd, covers_kernel_faults) = userfault::open(puppet, pid, forks)?;
        let uffd = Arc::new(uffd);
        let event = || {
            let made = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
            made.map_err(|errno| fail("eventfd")(errno.into()))
        };
        let shared = Arc::new(Shared {
            traps: AtomicU64::new(0),
            is_held: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            bell: event()?,
            children: Mutex::default(),
            pages,
            caught: Mutex::default(),
            alarm: event()?,
        });
        let reader = std::thread::Builder::new()
            .name(format!("curtain-{pid}"))
            .stack_size(512 * 1024)
            .spawn({
                let (uffd, shared) = (Arc::clone(&uffd), Arc::clone(&shared));
                move || {
                    // Threads of the target wait for it: it goes first.
                    // SAFETY: no memory is involved. Without the right to raise it the priority stays.
                    unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::gettid() as libc::id_t, -20) };
                    let heart = Heart::begin();
                    Reader { uffds: vec![uffd], shared: &shared, late: BTreeSet::new(), opened: None }.work(&heart);
                }
            })
            .map_err(fail("starting the reader"))?;
        Ok(Self { pid, uffd, shared, reader: Some(reader), covers_kernel_faults })
    }

    /// Lays memory with these bytes (whole pages) ready, somewhere. Moved over a text, it is the curtain. Also gives the memory.
    ///
    /// # Errors
    /// The kernel refuses the memory, the mapping, or its registration; nothing is left.
    pub fn prepare(
        &self,
        puppet: &mut Puppet,
        memory: &Memory,
        scratch: TargetAddr,
        content: &[u8],
    ) -> Result<(TargetAddr, File), GateError> {
        let length = content.len() as u64;
        let fill = |file: &File| file.write_all_at(content, 0);
        let (at, file) = self.map(puppet, memory, scratch, (NAME_IN_CALL, &fill), length, None)?;
        let range = at..at.offset(content.len() as i64);
        let ready = self.hide(puppet, &range).and_then(|()| self.register(&range));
        if let Err(error) = ready {
            let _ = pages::unmap(puppet, at, length);
            return Err(error);
        }
        Ok((at, file))
    }

    /// Maps `length` bytes of memory at `place`, which must be free, and gives it: for code that is written piece by piece. Its
    /// content must be there before a thread comes.
    ///
    /// # Errors
    /// The kernel refuses the memory or the mapping; nothing is left.
    pub fn prepare_at(
        &self,
        puppet: &mut Puppet,
        memory: &Memory,
        place: TargetAddr,
        length: u64,
    ) -> Result<File, GateError> {
        let scratch = puppet.scratch();
        let fill = |file: &File| file.set_len(length);
        let (_, file) = self.map(puppet, memory, scratch, (CACHE_NAME_IN_CALL, &fill), length, Some(place))?;
        Ok(file)
    }

    fn map(
        &self,
        puppet: &mut Puppet,
        memory: &Memory,
        scratch: TargetAddr,
        (name, fill): (&[u8], Fill<'_>),
        length: u64,
        place: Option<TargetAddr>,
    ) -> Result<(TargetAddr, File), GateError> {
        let (in_puppet, file) = userfault::make_memory(puppet, memory, scratch, name)?;
        let mapped = match fill(&file) {
            Ok(()) => userfault::map_text(puppet, in_puppet, 0, length, place).map_err(GateError::from),
            Err(error) => Err(GateError::at(self.pid, "filling the memory")(error)),
        };
        puppet.syscall("close", libc::SYS_close, [in_puppet, 0, 0, 0, 0, 0])?;
        Ok((mapped?, file))
    }

    /// A process that locks all its memory (mlockall(2)) has the pages of a new mapping at once: nobody would wait for them.
    /// Who comes to a page of `range` from now on waits there, if it is registered.
    ///
    /// # Errors
    /// The puppet is gone.
    pub fn hide(&self, puppet: &mut Puppet, range: &Range<TargetAddr>) -> Result<(), GateError> {
        super::locked::unlock_range(puppet, range)?;
        let arguments = [range.start.0, length(range) as u64, libc::MADV_DONTNEED as u64, 0, 0, 0];
        puppet.syscall("madvise", libc::SYS_madvise, arguments)?;
        Ok(())
    }

    /// From now on threads wait at the pages of `range` that are not open; for memory that an earlier agent, or the agent of
    /// the process that this one was forked from, has laid over a text.
    ///
    /// # Errors
    /// It is not such memory, or another userfaultfd has it.
    pub fn register(&self, range: &Range<TargetAddr>) -> Result<(), GateError> {
        let registered = self.uffd.register(&numbers(range));
        registered.map_err(|errno| GateError::at(self.pid, "registering text")(errno.into()))
    }

    /// Everybody who waits goes on, and nobody waits any more in `range`.
    pub fn unregister(&self, range: &Range<TargetAddr>) {
        if let Err(error) = self.uffd.unregister(&numbers(range)) {
            tracing::debug!(pid = self.pid, %error, "unregistering text");
        }
        // Who waits for a page that the target itself has unmapped.
        self.wake(range);
    }

    /// Those who wait in `range` look again; what lies there now decides.
    pub fn wake(&self, range: &Range<TargetAddr>) {
        for uffd in lock(&self.shared.children).iter().chain([&self.uffd]) {
            let _ = uffd.wake(&numbers(range));
        }
    }

    /// From now on no page is opened, until [`Self::release`]. Short: threads wait. The caller has a section of the watchdog open.
    pub fn hold(&self) {
        self.shared.is_held.store(true, Ordering::SeqCst);
    }

    /// Pages are opened again.
    pub fn release(&self) {
        self.shared.is_held.store(false, Ordering::SeqCst);
        let _ = self.shared.bell.write(1);
    }

    /// How often a thread had to wait for a page.
    #[must_use]
    pub fn traps(&self) -> u64 {
        self.shared.traps.load(Ordering::Relaxed)
    }

    /// For whoever looks after threads that are caught.
    #[must_use]
    pub fn caught(&self) -> Caught {
        Caught(Arc::clone(&self.shared))
    }

    /// Nobody answers at it any more: the address space is gone, and those of children too.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.reader.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

/// Threads that came to where nobody passes.
#[derive(Clone)]
pub struct Caught(Arc<Shared>);

impl Caught {
    /// Readable when there are some.
    #[must_use]
    pub fn alarm(&self) -> BorrowedFd<'_> {
        self.0.alarm.as_fd()
    }

    /// Those that came since the last call, as their process numbers them.
    #[must_use]
    pub fn take(&self) -> Vec<i32> {
        let _ = self.0.alarm.read();
        std::mem::take(&mut *lock(&self.0.caught))
    }
}

impl Drop for Curtain {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let _ = self.shared.bell.write(1);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn length(range: &Range<TargetAddr>) -> usize {
    range.end.0.saturating_sub(range.start.0) as usize
}

fn numbers(range: &Range<TargetAddr>) -> Range<u64> {
    range.start.0..range.end.0
}

/// Opens one page and lets those go on who wait for it.
fn open(uffd: &Uffd, page: u64) -> Result<(), Errno> {
    uffd.fill(&(page..page + PAGE_SIZE)).map(drop)
}

/// Answers faults. Never blocks elsewhere and never touches the target's memory: while it runs, mremap(2) in the target can
/// proceed.
struct Reader<'a> {
    /// The process's own, then those of its children.
    uffds: Vec<Arc<Uffd>>,
    shared: &'a Shared,
    /// Addresses that could not be let through yet: of which, and where.
    late: BTreeSet<(usize, u64)>,
    /// The page that was opened last.
    opened: Option<u64>,
}

impl Reader<'_> {
    fn work(&mut self, heart: &Heart) {
        let mut looked = Instant::now();
        loop {
            let is_held = self.shared.is_held.load(Ordering::SeqCst);
            let mut ready = vec![PollFd::new(self.shared.bell.as_fd(), PollFlags::POLLIN)];
            ready.extend(self.uffds.iter().map(|uffd| PollFd::new(uffd.as_fd(), PollFlags::POLLIN)));
            let beat = PollTimeout::try_from(HEARTBEAT).unwrap_or(PollTimeout::NONE);
            let limit = if self.late.is_empty() || is_held { beat } else { PollTimeout::from(AGAIN) };
            let polled = poll(&mut ready, limit);
            heart.beat();
            let rung = ready[0].any().unwrap_or(true);
            let told: Vec<usize> =
                (0..self.uffds.len()).filter(|&index| ready[index + 1].any().unwrap_or(true)).collect();
            if polled.is_err() {
                continue;
            }
            if rung {
                let _ = self.shared.bell.read();
            }
            if self.shared.stop.load(Ordering::SeqCst) {
                return;
            }
            let mut gone: Vec<usize> = told.into_iter().filter(|&index| self.read_all(index).is_err()).collect();
            if gone.contains(&0) {
                // The address space is gone; those of children may live on.
                if self.uffds.len() == 1 {
                    return;
                }
                gone.retain(|&index| index > 0);
                std::thread::sleep(Duration::from_millis(u64::from(AGAIN)));
            }
            if !self.shared.is_held.load(Ordering::SeqCst) {
                for (index, at) in std::mem::take(&mut self.late) {
                    self.answer(index, at);
                }
            }
            if looked.elapsed() >= HEARTBEAT && self.uffds.len() > 1 {
                looked = Instant::now();
                gone.extend((1..self.uffds.len()).filter(|&index| self.has_ended(index)));
            }
            self.forget(gone);
        }
    }

    /// The kernel does not tell when an address space is gone; trying to open a page in it does.
    fn has_ended(&self, index: usize) -> bool {
        self.opened.is_some_and(|page| open(&self.uffds[index], page) == Err(Errno::ESRCH))
    }

    fn forget(&mut self, mut gone: Vec<usize>) {
        gone.sort_unstable();
        gone.dedup();
        for index in gone.into_iter().rev() {
            self.uffds.remove(index);
            let late = std::mem::take(&mut self.late);
            let moved = late.into_iter().filter(|(of, _)| *of != index);
            self.late = moved.map(|(of, at)| (if of > index { of - 1 } else { of }, at)).collect();
        }
        *lock(&self.shared.children) = self.uffds[1..].to_vec();
    }

    fn read_all(&mut self, index: usize) -> Result<(), Errno> {
        while let Some(event) = self.uffds[index].read_event()? {
            match event {
                Event::Fault { address, thread } => {
                    let at = TargetAddr(address);
                    let page = at.page();
                    let pages = self.shared.pages.as_ref();
                    if pages.is_some_and(|pages| lock(pages).catches(page)) {
                        lock(&self.shared.caught).push(thread);
                        let _ = self.shared.alarm.write(1);
                        continue;
                    }
                    self.shared.traps.fetch_add(1, Ordering::Relaxed);
                    if self.shared.is_held.load(Ordering::SeqCst) {
                        self.late.insert((index, at.0));
                    } else {
                        self.answer(index, at.0);
                    }
                }
                Event::Fork(uffd) => {
                    self.uffds.push(Arc::new(uffd));
                    *lock(&self.shared.children) = self.uffds[1..].to_vec();
                }
                Event::Other => {}
            }
        }
        Ok(())
    }

    fn answer(&mut self, index: usize, at: u64) {
        let page = TargetAddr(at).page().0;
        if let Some(pages) = &self.shared.pages {
            lock(pages).prepare(TargetAddr(page), TargetAddr(at));
        }
        match open(&self.uffds[index], page) {
            Ok(()) => self.opened = Some(page),
            // While the memory map is being changed (mremap(2) of a registered range): an event about it is waiting.
            Err(Errno::EAGAIN) => {
                self.late.insert((index, at));
            }
            // Open already, or something else lies there: the thread looks again.
            Err(_) => {
                let _ = self.uffds[index].wake(&(page..page + PAGE_SIZE));
            }
        }
    }
}

/// Number of readers, and the section of the watchdog that one of them has renewed last.
static HEART: Mutex<(usize, Option<(Instant, watchdog::Guard)>)> = Mutex::new((0, None));

/// A reader lives.
struct Heart;

impl Heart {
    fn begin() -> Self {
        HEART.lock().unwrap_or_else(PoisonError::into_inner).0 += 1;
        let heart = Self;
        heart.beat();
        heart
    }

    fn beat(&self) {
        let mut heart = HEART.lock().unwrap_or_else(PoisonError::into_inner);
        if heart.1.as_ref().is_none_or(|(since, _)| since.elapsed() >= HEARTBEAT / 2) {
            // The new section begins before the old one ends.
            let section = watchdog::section("answering at curtains", SILENCE_LIMIT);
            heart.1 = section.map(|guard| (Instant::now(), guard));
        }
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        let mut heart = HEART.lock().unwrap_or_else(PoisonError::into_inner);
        heart.0 -= 1;
        if heart.0 == 0 {
            heart.1 = None;
        }
    }
}

/// Makes a second mapping of `range`, which must be one mapping of unchanged file content, and gives its start.
///
/// # Errors
/// It is no such mapping any more; nothing has changed.
pub fn second_mapping(puppet: &mut Puppet, range: &Range<TargetAddr>) -> Result<TargetAddr, PuppetError> {
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP) as u64;
    let length = length(range) as u64;
    let arguments = [range.start.0, length, length, flags, 0, 0];
    puppet.syscall("mremap (second mapping of a text)", libc::SYS_mremap, arguments).map(TargetAddr)
}

/// Moves the pages at `from` over `onto`, atomically for every thread: from one moment to the next they find the other bytes.
///
/// # Errors
/// The kernel refuses.
pub fn move_over(puppet: &mut Puppet, from: TargetAddr, onto: &Range<TargetAddr>) -> Result<(), PuppetError> {
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    let length = length(onto) as u64;
    let arguments = [from.0, length, length, flags, onto.start.0, 0];
    puppet.syscall("mremap of a text", libc::SYS_mremap, arguments).map(drop)
}
