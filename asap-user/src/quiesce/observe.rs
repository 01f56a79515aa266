//! Where the threads of a process are, found out while stopping as few of them as possible.
//!
//! A thread that sleeps in the kernel tells its stack and instruction pointer in `/proc/TID/syscall`; its stack can be read
//! while it sleeps, and counts if it has not run meanwhile. Where there is a [`SnapshotSource`], it says the same of all
//! threads at once, rbp included, also of those that wait for a processor. What runs, or can't be unwound without more
//! registers, is stopped for its own stack walk only.

use super::{
    asleep::{Epoch, OpenThreads, TaskFolder},
    snapshot::{self, SnapshotSource, TaskSnapshot},
    stack::StackReader,
    unwind::{StackWalk, Unwinder, WalkEnd, WalkRegisters},
};
use crate::{
    address::TargetAddr,
    process::{
        info,
        memory::Memory,
        ptrace::{Stopped, TraceError},
    },
};
use std::{
    collections::{HashMap, HashSet},
    io,
    ops::Range,
    time::{Duration, Instant},
};

/// Code that nobody may be inside.
#[derive(Clone, Debug)]
pub struct Region {
    /// Its ranges; the first begins with the entry. To stand at the entry is to be outside: what comes next decides.
    pub ranges: Vec<Range<TargetAddr>>,
    /// Name for people.
    pub label: String,
}

impl Region {
    /// Whether a frame lies inside; `innermost`: it is where the thread is, not a return address.
    #[must_use]
    pub fn holds(&self, frame: TargetAddr, innermost: bool) -> bool {
        let at_entry = innermost && self.ranges.first().is_some_and(|range| range.start == frame);
        // A return address may be the first byte behind a function that ends with a call.
        let at = if innermost { frame } else { frame.offset(-1) };
        !at_entry && self.ranges.iter().any(|range| range.contains(&at))
    }
}

/// Where a thread is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In none of the regions.
    Outside,
    /// Inside a region, by index.
    Inside(usize),
    /// Not known: counts as inside.
    Unknown(String),
}

/// How that was found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It slept, and slept on.
    Asleep,
    /// It was off its processor, and stayed so.
    Snapshot,
    /// The same, and it waits for nothing but a processor: it will go on by itself.
    Preempted,
    /// It was stopped for so long.
    Stopped(Duration),
}

/// What is known of a thread.
#[derive(Clone, Debug)]
pub struct Observation {
    /// The thread.
    pub tid: i32,
    /// Where it is.
    pub place: Place,
    /// Its stack, innermost first.
    pub frames: Vec<TargetAddr>,
    /// Where the return addresses lie: see [`StackWalk::slots`].
    pub slots: Vec<u64>,
    /// How that was found out.
    pub how: How,
    /// As long as this holds, the thread has not run since.
    held_by: Option<HeldBy>,
    /// It was found, or found to hold, by the look that is under way.
    fresh: bool,
}

/// What shows that a thread has not run since it was observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HeldBy {
    /// Its schedule statistics in `/proc`.
    Proc(Epoch),
    /// Its epoch in snapshots.
    Snapshot(u64),
}

impl Observation {
    /// The first frame that lies inside one of `regions`: its index among the frames, 0 being where the thread is.
    #[must_use]
    pub fn frame_inside(&self, regions: &[Region]) -> Option<usize> {
        let inside =
            |(index, &frame): (usize, &TargetAddr)| regions.iter().any(|region| region.holds(frame, index == 0));
        self.frames.iter().enumerate().position(inside)
    }

    fn unknown(tid: i32, reason: String) -> Self {
        let (place, how) = (Place::Unknown(reason), How::Stopped(Duration::ZERO));
        Self { tid, place, frames: Vec::new(), slots: Vec::new(), how, held_by: None, fresh: true }
    }
}

/// How long threads that run are given to go to sleep before they are stopped, and how long each nap of ours is meanwhile.
const PATIENCE: Duration = Duration::from_millis(1);
const NAP: Duration = Duration::from_micros(50);
/// How many times the list of threads is read again for newcomers.
const RELISTS: usize = 3;

fn judge(walk: StackWalk, regions: &[Region]) -> Judged {
    let inside = regions
        .iter()
        .position(|region| walk.frames.iter().enumerate().any(|(index, &frame)| region.holds(frame, index == 0)));
    let place = match (inside, &walk.end) {
        (Some(region), _) => Place::Inside(region),
        (None, WalkEnd::Complete) => Place::Outside,
        (None, WalkEnd::Truncated(reason)) => {
            let last = walk.frames.last().copied().unwrap_or_default();
            Place::Unknown(format!("its stack can't be walked beyond {last}: {reason}"))
        }
    };
    (place, walk.frames, walk.slots)
}

/// Where a thread is, its stack, and where the return addresses lie.
type Judged = (Place, Vec<TargetAddr>, Vec<u64>);

/// Whether a thread has not executed anything yet: it comes out of the call that made it, which returns 0 to the new one.
fn is_newborn(registers: &libc::user_regs_struct) -> bool {
    registers.rax == 0 && [libc::SYS_clone, libc::SYS_clone3].contains(&(registers.orig_rax as i64))
}

/// Observes threads of one process.
pub struct Observer<'a> {
    pid: i32,
    stack: StackReader<'a>,
    unwinder: &'a mut Unwinder,
    regions: &'a [Region],
    snapshots: Option<&'a mut dyn SnapshotSource>,
    open: &'a mut OpenThreads,
    in_passing: bool,
}

impl<'a> Observer<'a> {
    /// For the threads of `pid`.
    pub fn new(
        pid: i32,
        memory: &'a Memory,
        unwinder: &'a mut Unwinder,
        regions: &'a [Region],
        open: &'a mut OpenThreads,
    ) -> Self {
        Self { pid, stack: StackReader::new(memory), unwinder, regions, snapshots: None, open, in_passing: false }
    }

    /// Looks at all threads at once first.
    #[must_use]
    pub fn with_snapshots(mut self, source: &'a mut dyn SnapshotSource) -> Self {
        self.snapshots = Some(source);
        self
    }

    /// Leaves out the threads that run, instead of waiting for them and stopping them.
    #[must_use]
    pub fn in_passing(mut self) -> Self {
        self.in_passing = true;
        self
    }

    /// All threads. `known` are earlier observations: they hold for threads that have not run since.
    ///
    /// # Errors
    /// The process is gone.
    pub fn observe(&mut self, known: HashMap<i32, Observation>) -> io::Result<HashMap<i32, Observation>> {
        let mut seen = known;
        seen.values_mut().for_each(|old| old.fresh = false);
        let rest = self.by_snapshots(&mut seen);
        if rest.as_ref().is_some_and(|rest| rest.is_empty() || self.in_passing) {
            seen.retain(|_, found| found.fresh);
            return Ok(seen);
        }
        let mut folder = TaskFolder::open(self.pid)?;
        let (mut seen, mut known): (HashMap<_, _>, HashMap<_, _>) = seen.into_iter().partition(|(_, old)| old.fresh);
        match rest {
            // What snapshots can't tell has had its time.
            Some(rest) => self.look_at(rest, Duration::ZERO, &mut known, &mut seen, &mut folder),
            None => self.by_list(&mut known, &mut seen, &mut folder)?,
        }
        self.open.retain(|tid| seen.contains_key(&tid));
        Ok(seen)
    }

    /// By way of the list of threads.
    fn by_list(
        &mut self,
        known: &mut HashMap<i32, Observation>,
        seen: &mut HashMap<i32, Observation>,
        folder: &mut TaskFolder,
    ) -> io::Result<()> {
        let threads = info::threads(self.pid)?;
        seen.retain(|tid, _| threads.binary_search(tid).is_ok());
        self.look_at(threads, PATIENCE, known, seen, folder);
        // A thread that is made meanwhile can't get inside when the gates are closed, but it may have been born there; and the
        // kernel may leave some out of a list that changes while it is read. Those who are made still later are made by
        // threads that were seen.
        for _ in 0..RELISTS {
            let newcomers: Vec<i32> =
                info::threads(self.pid)?.into_iter().filter(|tid| !seen.contains_key(tid)).collect();
            if newcomers.is_empty() {
                break;
            }
            self.look_at(newcomers, PATIENCE, known, seen, folder);
        }
        Ok(())
    }

    /// Looks at the threads `awake`; those that have ended are left out.
    fn look_at(
        &mut self,
        mut awake: Vec<i32>,
        patience: Duration,
        known: &mut HashMap<i32, Observation>,
        seen: &mut HashMap<i32, Observation>,
        folder: &mut TaskFolder,
    ) {
        awake.retain(|tid| !seen.contains_key(tid));
        let patient_until = Instant::now() + if self.in_passing { Duration::ZERO } else { patience };
        let mut dead_are_out = false;
        while !awake.is_empty() {
            awake.retain(|&tid| {
                let held = known.remove(&tid).filter(|old| self.holds(old, folder));
                let observed = held.or_else(|| self.asleep(tid, folder));
                observed.map(|observed| seen.insert(tid, observed)).is_none()
            });
            if !std::mem::replace(&mut dead_are_out, true) {
                // The first thread of a process stays in the list when it has ended before the others.
                awake.retain(|&tid| !folder.is_dead(tid));
            }
            if awake.is_empty() || Instant::now() >= patient_until {
                break;
            }
            // Most threads that run are about to sleep again, or to wait at a gate: cheaper for all than stopping them.
            std::thread::sleep(NAP);
        }
        if self.in_passing {
            return;
        }
        for tid in awake {
            if let Some(observed) = self.stopped(tid) {
                seen.insert(tid, observed);
            }
        }
    }

    /// Whether an earlier observation is still true.
    fn holds(&mut self, old: &Observation, folder: &mut TaskFolder) -> bool {
        let Some(HeldBy::Proc(epoch @ Epoch::Ran(_))) = old.held_by else { return false };
        let Some(files) = self.open.get(old.tid, folder) else { return false };
        old.place == Place::Outside && folder.epoch(&files.clock) == Some(epoch)
    }

    /// Brings `seen` up to date by snapshots, and gives the threads of which they tell nothing. None if there are no snapshots,
    /// or if they don't show all threads: then only what is fresh in `seen` counts.
    fn by_snapshots(&mut self, seen: &mut HashMap<i32, Observation>) -> Option<Vec<i32>> {
        let mut source = self.snapshots.take()?;
        let told = self.take_snapshots(&mut source, seen);
        self.snapshots = Some(source);
        // A snapshot that fails is no loss: the other ways remain.
        told.unwrap_or_else(|error| {
            tracing::debug!(pid = self.pid, %error, "no snapshot of the threads");
            None
        })
    }

    fn take_snapshots(
        &mut self,
        source: &mut &'a mut dyn SnapshotSource,
        seen: &mut HashMap<i32, Observation>,
    ) -> io::Result<Option<Vec<i32>>> {
        let patient_until = Instant::now() + PATIENCE;
        let mut is_first = true;
        loop {
            // Those who are made later are at the end of the kernel's list: whoever comes by as many as there were before, has
            // seen all that were there then. And those who are made later still, by threads that were seen already, can't be
            // inside when the gates are closed.
            let before = info::thread_count(self.pid)?;
            crate::fault::touch("touch.snapshot")?;
            let now = source.snapshot(self.pid, snapshot::STACK_BYTES)?;
            let whole = now.visited >= before;
            let mut rest = Vec::new();
            let (mut again, mut doubtful) = (false, false);
            for &(tid, epoch) in &now.same {
                match seen.get_mut(&tid) {
                    Some(old) if old.fresh || old.held_by == Some(HeldBy::Snapshot(epoch)) => old.fresh = true,
                    _ => rest.push(tid),
                }
            }
            for task in &now.tasks {
                // What was found a moment ago still counts, and is replaced by what the next snapshot will refer to.
                let is_new = !seen.get(&task.tid).is_some_and(|old| old.fresh);
                if !task.settled {
                    again |= is_new;
                } else {
                    let found = self.told(task);
                    // What is read after the snapshot counts when the next one finds that the thread has not run since.
                    let counts = !self.stack.went_beyond();
                    // What can't be walked may do better with all registers.
                    if !matches!(found.place, Place::Unknown(_)) && (counts || is_new) {
                        doubtful |= !counts;
                        seen.insert(task.tid, Observation { fresh: counts, ..found });
                        if counts {
                            continue;
                        }
                    }
                }
                if is_new {
                    rest.push(task.tid);
                }
            }
            let patient = !self.in_passing && Instant::now() < patient_until;
            if (doubtful && std::mem::take(&mut is_first)) || ((again || doubtful || !whole) && patient) {
                if !doubtful {
                    // Most threads that run are about to sleep again, or to wait at a gate.
                    std::thread::sleep(NAP);
                }
                continue;
            }
            if !whole {
                return Ok(None);
            }
            // Without those that have ended.
            if seen.len() > now.same.len() + now.tasks.len() || !rest.is_empty() {
                let alive: HashSet<i32> =
                    now.same.iter().map(|&(tid, _)| tid).chain(now.tasks.iter().map(|task| task.tid)).collect();
                seen.retain(|tid, _| alive.contains(tid));
            }
            return Ok(Some(rest));
        }
    }

    /// What a settled thread's snapshot says.
    fn told(&mut self, task: &TaskSnapshot) -> Observation {
        let (place, frames, slots) = self.walk(&task.registers, &task.stack);
        let how = if task.runnable { How::Preempted } else { How::Snapshot };
        let held_by = Some(HeldBy::Snapshot(task.epoch));
        Observation { tid: task.tid, place, frames, slots, how, held_by, fresh: true }
    }

    fn walk(&mut self, registers: &WalkRegisters, copied: &[u8]) -> Judged {
        self.stack.start_at(registers.sp(), copied);
        let stack = &mut self.stack;
        judge(self.unwinder.walk(registers, &mut |at| stack.word(at)), self.regions)
    }

    fn asleep(&mut self, tid: i32, folder: &mut TaskFolder) -> Option<Observation> {
        let files = self.open.get(tid, folder)?;
        let Some(before) = folder.epoch(&files.clock) else {
            self.open.close(tid);
            return None;
        };
        let (ip, sp) = folder.sleeping_at(&files.syscall)?;
        let (place, frames, slots) = self.walk(&WalkRegisters::bare(ip, sp), &[]);
        // More registers may help.
        if matches!(place, Place::Unknown(_)) {
            return None;
        }
        let files = self.open.get(tid, folder)?;
        let sleeps_on = matches!(before, Epoch::Ran(_)) || folder.sleeping_at(&files.syscall) == Some((ip, sp));
        let slept = sleeps_on && folder.epoch(&files.clock) == Some(before);
        slept.then_some(Observation {
            tid,
            place,
            frames,
            slots,
            how: How::Asleep,
            held_by: Some(HeldBy::Proc(before)),
            fresh: true,
        })
    }

    /// `None`: the thread has ended.
    fn stopped(&mut self, tid: i32) -> Option<Observation> {
        let begin = Instant::now();
        let thread = match Stopped::stop(tid) {
            Ok(thread) => thread,
            Err(TraceError::Gone(_)) => return None,
            Err(error) => return Some(Observation::unknown(tid, error.to_string())),
        };
        let observed = self.judge_stopped(&thread);
        let released = thread.release();
        let how = How::Stopped(begin.elapsed());
        match (observed, released) {
            (Some((place, frames, slots)), Ok(())) => {
                Some(Observation { tid, place, frames, slots, how, held_by: None, fresh: true })
            }
            _ => None,
        }
    }

    /// The stack of a thread that is stopped already.
    pub fn walk_stopped(&mut self, thread: &Stopped) -> Option<(Place, Vec<TargetAddr>)> {
        self.judge_stopped(thread).map(|(place, frames, _)| (place, frames))
    }

    fn judge_stopped(&mut self, thread: &Stopped) -> Option<Judged> {
        let registers = thread.registers().ok()?;
        let (place, frames, slots) = self.walk(&WalkRegisters::of(&registers), &[]);
        // The C library's clone has no unwind table behind the system call, for there is nothing to unwind to.
        if matches!(place, Place::Unknown(_)) && frames.len() == 1 && is_newborn(&registers) {
            return Some((Place::Outside, frames, slots));
        }
        Some((place, frames, slots))
    }
}
