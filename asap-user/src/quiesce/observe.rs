//! Where the threads of a process are, found out while stopping as few of them as possible.
//!
//! A thread that sleeps in the kernel tells its stack and instruction pointer in `/proc/TID/syscall`; its stack can be read
//! while it sleeps, and counts if it has not run meanwhile (`/proc/TID/schedstat`). What runs, or can't be unwound without
//! more registers, is stopped for its own stack walk only.

use super::unwind::{StackWalk, Unwinder, WalkEnd, WalkRegisters};
use crate::{
    address::TargetAddr,
    process::{
        info,
        memory::Memory,
        ptrace::{Stopped, TraceError},
    },
};
use std::{
    collections::HashMap,
    fs::File,
    io::Read,
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
    /// How that was found out.
    pub how: How,
    /// As long as the thread's schedule statistics read so, it has not run since.
    epoch: Option<Box<str>>,
}

/// Words of stack that are read at once.
const CHUNK: usize = 4096;

/// A stack, read in pieces.
struct StackReader<'a> {
    memory: &'a Memory,
    start: u64,
    bytes: Vec<u8>,
}

impl<'a> StackReader<'a> {
    fn new(memory: &'a Memory, sp: u64) -> Self {
        let mut reader = Self { memory, start: 0, bytes: Vec::new() };
        reader.fill(sp);
        reader
    }

    fn fill(&mut self, at: u64) {
        // To the end of a page: the next one may not be mapped.
        let start = at & !7;
        let length = CHUNK - (start as usize & (CHUNK - 1));
        self.bytes.resize(length, 0);
        self.start = start;
        if self.memory.read(TargetAddr(start), &mut self.bytes).is_err() {
            self.bytes.clear();
        }
    }

    fn word(&mut self, at: u64) -> Option<u64> {
        for attempt in 0..2 {
            let offset = at.wrapping_sub(self.start);
            if let Some(bytes) = usize::try_from(offset).ok().and_then(|o| self.bytes.get(o..o.checked_add(8)?)) {
                return bytes.try_into().ok().map(u64::from_le_bytes);
            }
            if attempt == 0 {
                self.fill(at);
            }
        }
        self.memory.word(TargetAddr(at)).ok()
    }
}

/// Reads a small file of `/proc` into `buffer`.
fn read_proc<'b>(path: &str, buffer: &'b mut [u8; 512]) -> Option<&'b str> {
    let mut file = File::open(path).ok()?;
    let length = file.read(buffer).ok()?;
    std::str::from_utf8(&buffer[..length]).ok()
}

fn epoch(pid: i32, tid: i32) -> Option<Box<str>> {
    let mut buffer = [0; 512];
    read_proc(&format!("/proc/{pid}/task/{tid}/schedstat"), &mut buffer).map(Into::into)
}

/// Instruction and stack pointer of a thread that sleeps in the kernel.
fn sleeping_at(pid: i32, tid: i32) -> Option<(u64, u64)> {
    let mut buffer = [0; 512];
    let text = read_proc(&format!("/proc/{pid}/task/{tid}/syscall"), &mut buffer)?;
    // "running", or a call's number and arguments, stack pointer, instruction pointer (proc_pid_syscall(5)).
    let mut words = text.split_ascii_whitespace().rev();
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let ip = hex(words.next()?)?;
    let sp = hex(words.next()?)?;
    Some((ip, sp))
}

fn judge(walk: StackWalk, regions: &[Region]) -> (Place, Vec<TargetAddr>) {
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
    (place, walk.frames)
}

/// Observes threads of one process.
pub struct Observer<'a> {
    pid: i32,
    memory: &'a Memory,
    unwinder: &'a mut Unwinder,
    regions: &'a [Region],
}

impl<'a> Observer<'a> {
    /// For the threads of `pid`.
    pub fn new(pid: i32, memory: &'a Memory, unwinder: &'a mut Unwinder, regions: &'a [Region]) -> Self {
        Self { pid, memory, unwinder, regions }
    }

    /// All threads, among them those that are created meanwhile. `known` are earlier observations: they hold for threads
    /// that have not run since.
    pub fn observe(&mut self, known: HashMap<i32, Observation>) -> std::io::Result<HashMap<i32, Observation>> {
        let mut seen: HashMap<i32, Observation> = HashMap::new();
        let mut known = known;
        loop {
            let mut news = false;
            for tid in info::threads(self.pid)? {
                if seen.contains_key(&tid) {
                    continue;
                }
                news = true;
                let held = known.remove(&tid).filter(|old| {
                    matches!(old.place, Place::Outside) && old.epoch.is_some() && old.epoch == epoch(self.pid, tid)
                });
                let observed = held.or_else(|| self.asleep(tid)).or_else(|| self.stopped(tid));
                if let Some(observed) = observed {
                    seen.insert(tid, observed);
                }
            }
            // A thread that was not there is made by one that was seen before: look until nobody is new.
            if !news {
                return Ok(seen);
            }
            if seen.is_empty() {
                return Ok(seen);
            }
        }
    }

    fn asleep(&mut self, tid: i32) -> Option<Observation> {
        let before = epoch(self.pid, tid)?;
        let (ip, sp) = sleeping_at(self.pid, tid)?;
        let mut stack = StackReader::new(self.memory, sp);
        let walk = self.unwinder.walk(&WalkRegisters::bare(ip, sp), &mut |at| stack.word(at));
        let (place, frames) = judge(walk, self.regions);
        // More registers may help.
        if matches!(place, Place::Unknown(_)) {
            return None;
        }
        (sleeping_at(self.pid, tid) == Some((ip, sp)) && epoch(self.pid, tid).as_ref() == Some(&before))
            .then_some(Observation { tid, place, frames, how: How::Asleep, epoch: Some(before) })
    }

    /// `None`: the thread has ended.
    fn stopped(&mut self, tid: i32) -> Option<Observation> {
        let begin = Instant::now();
        let unknown = |reason: String| Observation {
            tid,
            place: Place::Unknown(reason),
            frames: Vec::new(),
            how: How::Stopped(Duration::ZERO),
            epoch: None,
        };
        let thread = match Stopped::stop(tid) {
            Ok(thread) => thread,
            Err(TraceError::Gone(_)) => return None,
            Err(error) => return Some(unknown(error.to_string())),
        };
        let observed = self.walk_stopped(&thread);
        let released = thread.release();
        let how = How::Stopped(begin.elapsed());
        match (observed, released) {
            (Some((place, frames)), Ok(())) => Some(Observation { tid, place, frames, how, epoch: None }),
            _ => None,
        }
    }

    /// The stack of a thread that is stopped already.
    pub fn walk_stopped(&mut self, thread: &Stopped) -> Option<(Place, Vec<TargetAddr>)> {
        let registers = thread.registers().ok()?;
        let mut stack = StackReader::new(self.memory, registers.rsp);
        let walk = self.unwinder.walk(&WalkRegisters::of(&registers), &mut |at| stack.word(at));
        Some(judge(walk, self.regions))
    }
}
