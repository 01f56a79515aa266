//! Who is inside a set of functions: uprobes on the functions' entries and exits keep a count per thread, and tell when
//! nobody is inside any more. No uretprobes: they rewrite return addresses, and exceptions that unwind meanwhile kill the target.
//!
//! The counts begin with the probes. Activations from before are told by [`ProbeSet::set_baseline`]. A function that is left by
//! neither a `ret` nor a jump that is probed (longjmp, exceptions) leaves its count up, until a look at that thread's stack
//! settles it: a count may be too high, and then nothing is patched; it is never too low.
//!
//! P5: a probe on an instruction that the kernel can't emulate is stepped in a page that the kernel maps into the target,
//! `[uprobes]`, and leaves there after the probes are gone.

use super::{
    Ebpf, KernelError,
    attach::{Attached, Method, Places, attach, attach_by},
    object::{self, map_error},
};
use asap_common::{ProbeRecord, probe_kind, total};
use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, RingBuf};
use std::{
    collections::{BTreeMap, HashMap},
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What is to be probed.
#[derive(Clone, Debug, Default)]
pub struct ProbePlan {
    /// The only process that is affected, all its threads. A child that it forks is not.
    pub pid: i32,
    /// A path that leads to the mapped file itself, such as one of `/proc/PID/map_files`. No function in it that is
    /// already patched may be probed: the kernel would run the file's instruction and later write it back over the patch.
    pub file: PathBuf,
    /// Offsets in the file of the functions' first instructions.
    pub entries: Vec<u64>,
    /// Offsets of all instructions that leave the functions for good: `ret`s, and jumps to elsewhere that are always taken.
    /// A conditional jump out of a function can't be counted: don't count such a function.
    pub exits: Vec<u64>,
    /// Offsets of return addresses that were seen on stacks: each hit is told.
    pub returns: Vec<u64>,
}

/// What the probes tell. These are hints when to look: the counts are what to believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeEvent {
    /// The sum fell to zero.
    Quiet,
    /// A thread came to one of the return addresses.
    Returned {
        /// The thread, in the agent's pid namespace.
        tid: i32,
        /// The address, in the target.
        ip: u64,
    },
}

/// Armed probes of one process. Dropping it detaches them all, and so does the end of the agent.
pub struct ProbeSet {
    attached: Attached,
    counts: BpfHashMap<MapData, i32, i64>,
    totals: Array<MapData, i64>,
    /// The same map: aya writes through exclusive references only.
    totals_writer: OwnedFd,
    hits: Mutex<RingBuf<MapData>>,
    /// What is added to the counts of threads.
    baselines: Mutex<HashMap<i32, i64>>,
}

impl std::fmt::Debug for ProbeSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProbeSet").field("attached", &self.attached).finish_non_exhaustive()
    }
}

impl Ebpf {
    /// Arms probes.
    ///
    /// # Errors
    /// The process or the file is gone, an offset is no instruction's, or the kernel refuses uprobes. Nothing is left behind.
    pub fn arm(&self, plan: &ProbePlan) -> Result<ProbeSet, KernelError> {
        self.arm_with(plan, None)
    }

    /// As [`Ebpf::arm`], in one given way.
    pub(super) fn arm_with(&self, plan: &ProbePlan, method: Option<Method>) -> Result<ProbeSet, KernelError> {
        let counts = object::create_map("COUNTS")?;
        let totals = object::create_map("TOTALS")?;
        let hits = object::create_map("HITS")?;
        object::store(totals.fd().as_fd(), "TOTALS", total::WANTED, &1_i64)?;
        // A function may begin with its `ret`.
        let mut places = BTreeMap::<u64, u64>::new();
        let kinds =
            [(&plan.entries, probe_kind::ENTRY), (&plan.exits, probe_kind::EXIT), (&plan.returns, probe_kind::RETURN)];
        for (offsets, kind) in kinds {
            for &offset in offsets {
                *places.entry(offset).or_default() |= kind;
            }
        }
        let (offsets, cookies): (Vec<u64>, Vec<u64>) = places.into_iter().unzip();
        let maps = [("LAYOUT", &self.layout), ("COUNTS", &counts), ("TOTALS", &totals), ("HITS", &hits)];
        let places = Places { pid: plan.pid, file: &plan.file, offsets: &offsets, cookies: &cookies };
        let attached = match method {
            None => attach("count", &maps, &places)?,
            Some(method) => attach_by(method, "count", &maps, &places)?,
        };
        let totals_writer = totals.fd().as_fd().try_clone_to_owned().map_err(|error| map_error("TOTALS", error))?;
        Ok(ProbeSet {
            attached,
            totals_writer,
            counts: BpfHashMap::try_from(Map::HashMap(counts)).map_err(|error| map_error("COUNTS", error))?,
            totals: Array::try_from(Map::Array(totals)).map_err(|error| map_error("TOTALS", error))?,
            hits: Mutex::new(RingBuf::try_from(Map::RingBuf(hits)).map_err(|error| map_error("HITS", error))?),
            baselines: Mutex::default(),
        })
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProbeSet {
    /// Entries less exits of each thread that came by or has a baseline.
    ///
    /// # Errors
    /// The map can't be read, or hits were lost.
    pub fn counts(&self) -> Result<HashMap<i32, i64>, KernelError> {
        let mut counts = HashMap::new();
        for entry in self.counts.iter() {
            let (tid, count) = entry.map_err(|error| map_error("COUNTS", error))?;
            counts.insert(tid, count);
        }
        for (&tid, &baseline) in &*locked(&self.baselines) {
            *counts.entry(tid).or_default() += baseline;
        }
        self.complete()?;
        Ok(counts)
    }

    /// Entries less exits of all threads.
    ///
    /// # Errors
    /// The map can't be read, or hits were lost.
    pub fn sum(&self) -> Result<i64, KernelError> {
        self.complete()?;
        Ok(self.total(total::SUM)?.wrapping_add(self.total(total::BASE)?))
    }

    /// Nobody is inside as far as the probes can tell: the sum is zero, and so is every thread's count. This is the one to ask
    /// before a commit: a sum can be zero by two errors.
    ///
    /// # Errors
    /// A map can't be read, or hits were lost.
    pub fn is_quiet(&self) -> Result<bool, KernelError> {
        Ok(self.sum()? == 0 && self.counts()?.values().all(|&count| count == 0) && self.sum()? == 0)
    }

    /// What the probes alone have counted for a thread so far: to be asked while its stack is walked, for
    /// [`ProbeSet::set_baseline`].
    ///
    /// # Errors
    /// The map can't be read.
    pub fn counted(&self, tid: i32) -> Result<i64, KernelError> {
        match self.counts.get(&tid, 0) {
            Ok(count) => Ok(count),
            Err(MapError::KeyNotFound) => Ok(0),
            Err(error) => Err(map_error("COUNTS", error)),
        }
    }

    /// A look at the thread's stack found `activations`, at a time when the probes had `counted` so much for it. Both must be
    /// of the same moment: the thread was stopped, or two snapshots prove that it did not run. For a thread that has ended:
    /// no activations.
    ///
    /// A thread that was caught in the trap of a probe has `ip` one byte behind a probed instruction, or in the mapping
    /// `[uprobes]`: it is counted or is about to be, and which can't be told. Look again later.
    ///
    /// No event comes if this brings the sum to zero: ask [`ProbeSet::is_quiet`] afterwards.
    ///
    /// # Errors
    /// The map can't be written.
    pub fn set_baseline(&self, tid: i32, activations: i64, counted: i64) -> Result<(), KernelError> {
        let mut baselines = locked(&self.baselines);
        let before = baselines.get(&tid).copied().unwrap_or_default();
        let baseline = activations.wrapping_sub(counted);
        // Only the agent writes this slot, and only here.
        let base = self.total(total::BASE)?.wrapping_add(baseline).wrapping_sub(before);
        object::store(self.totals_writer.as_fd(), "TOTALS", total::BASE, &base)?;
        baselines.insert(tid, baseline);
        Ok(())
    }

    /// Readable while events wait; for epoll.
    #[must_use]
    pub fn event_fd(&self) -> RawFd {
        locked(&self.hits).as_raw_fd()
    }

    /// Takes the events that wait, and asks to be told again when the sum falls to zero. Look at the counts after this, not
    /// before: what happens in between is told by neither otherwise.
    ///
    /// # Errors
    /// The map can't be written.
    pub fn events(&self) -> Result<Vec<ProbeEvent>, KernelError> {
        let mut hits = locked(&self.hits);
        let mut events = Vec::new();
        while let Some(item) = hits.next() {
            let Some(record) = object::plain::<ProbeRecord>(&item) else { continue };
            events.push(match record.kind {
                0 => ProbeEvent::Quiet,
                _ => ProbeEvent::Returned { tid: record.tid, ip: record.ip },
            });
        }
        object::store(self.totals_writer.as_fd(), "TOTALS", total::WANTED, &1_i64)?;
        Ok(events)
    }

    /// All probes are one link, which detaches at once; else each takes about 100 ms.
    #[must_use]
    pub fn is_one_link(&self) -> bool {
        self.attached.method == Method::Multi
    }

    fn total(&self, slot: u32) -> Result<i64, KernelError> {
        self.totals.get(&slot, 0).map_err(|error| map_error("TOTALS", error))
    }

    fn complete(&self) -> Result<(), KernelError> {
        match self.total(total::LOST)? {
            0 => Ok(()),
            lost => Err(KernelError::Map {
                map: "COUNTS".to_owned(),
                message: format!(
                    "{lost} hits were not counted, since more threads came by than it holds; walk the stacks instead"
                ),
            }),
        }
    }
}
