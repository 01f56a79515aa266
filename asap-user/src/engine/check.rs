//! Asking who is inside: builds what a stack walk needs from modules and patches, and turns observations into a verdict with
//! names.

use super::{
    modules::Module,
    process::{TargetProcess, gone},
};
use crate::{
    address::{LoadBias, TargetAddr},
    image::Image,
    kernel::{self, Ebpf, KernelError, LifeCycles, Series},
    process::{
        info::{self, ProcessInfo},
        memory::Memory,
        ptrace::{Stopped, Stopping, TraceError},
    },
    quiesce::{
        OpenThreads,
        observe::{How, Observation, Observer, Place, Region},
        snapshot::{Snapshot, SnapshotSource, TaskSnapshot},
        unwind::{Unwinder, WalkRegisters},
    },
    report::{BusyThread, Failure},
    sandbox::ThreadStack,
    watchdog,
};
use std::{
    collections::HashMap,
    io,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

/// What this kernel offers for looking at threads; loaded once per agent.
pub struct Observers {
    ebpf: Result<Arc<Ebpf>, String>,
}

impl Observers {
    /// Loads what there is: some 30 ms.
    pub fn load() -> Self {
        let ebpf = Ebpf::load().map(Arc::new).map_err(|error| {
            tracing::info!(%error, "no eBPF: threads are looked at through /proc and ptrace");
            error.to_string()
        });
        Self { ebpf }
    }

    /// The eBPF programs, if this kernel takes them.
    fn ebpf(&self) -> Result<&Ebpf, String> {
        self.ebpf.as_deref().map_err(Clone::clone)
    }

    /// As `ebpf`, to be kept.
    pub fn shared(&self) -> Option<Arc<Ebpf>> {
        self.ebpf.as_ref().ok().map(Arc::clone)
    }

    /// Where the threads of a process are: each with its stack, innermost first, as far as `unwinder` knows the way.
    ///
    /// # Errors
    /// The process is gone.
    pub fn frames(&self, pid: i32, memory: &Memory, unwinder: &mut Unwinder) -> io::Result<Vec<ThreadStack>> {
        let mut open = OpenThreads::default();
        let mut snapshots = self.ebpf().ok().map(|ebpf| Snapshots(ebpf, ebpf.series()));
        let _watched = watchdog::section("a look at all threads", CHECK_LIMIT);
        let mut observer = Observer::new(pid, memory, unwinder, &[], &mut open);
        if let Some(snapshots) = &mut snapshots {
            observer = observer.with_snapshots(snapshots);
        }
        let seen = observer.observe(HashMap::new())?;
        let stack = |found: Observation| ThreadStack {
            tid: found.tid,
            is_whole: found.place == Place::Outside,
            frames: found.frames,
            slots: found.slots,
        };
        Ok(seen.into_values().map(stack).collect())
    }

    /// Children of all threads of `pid`. Without eBPF that takes a file for each thread.
    pub fn children(&self, pid: i32) -> Vec<i32> {
        let parents = |ebpf: &Ebpf| {
            let before = info::thread_count(pid).ok()?;
            let (parents, visited) = ebpf.parents(pid).ok()?;
            // More may have been made meanwhile, at the end of the list; if it is shorter, one ended while it was looked at.
            (visited >= before).then_some(parents)
        };
        match self.ebpf().ok().and_then(parents) {
            Some(parents) => info::children_of(pid, &parents),
            None => info::children(pid),
        }
    }

    /// What tells of forks and execs; `None`: no eBPF here.
    pub fn life_cycles(&self) -> Option<Result<LifeCycles, KernelError>> {
        self.ebpf().ok().map(Ebpf::life_cycles)
    }

    /// Whether a uprobe program may write registers here.
    ///
    /// # Errors
    /// It may not.
    pub fn redirect_available(&self) -> Result<(), Failure> {
        let reason = match self.ebpf() {
            Ok(ebpf) => match ebpf.redirect_available() {
                Ok(()) => return Ok(()),
                Err(error) => error.to_string(),
            },
            Err(reason) => reason,
        };
        Err(Failure::refused(
            format!("calls can't be redirected by a uprobe program: {reason}"),
            "use --mechanism auto; see `asap doctor`",
        ))
    }
}

/// Snapshots of all threads by the eBPF task iterator.
struct Snapshots<'a>(&'a Ebpf, Series);

impl SnapshotSource for Snapshots<'_> {
    fn snapshot(&mut self, pid: i32, stack_bytes: usize) -> io::Result<Snapshot> {
        let told = self.0.snapshot(pid, stack_bytes, Some(self.1)).map_err(io::Error::other)?;
        let convert = |task: kernel::TaskSnapshot| {
            let regs = task.regs;
            let preserved = [regs.bx, regs.bp, regs.r12, regs.r13, regs.r14, regs.r15];
            TaskSnapshot {
                tid: task.tid,
                registers: WalkRegisters::bare(regs.ip, regs.sp).with_preserved(preserved),
                settled: task.settled,
                runnable: task.state == 0,
                epoch: task.epoch,
                stack: task.stack,
            }
        };
        Ok(Snapshot { tasks: told.tasks.into_iter().map(convert).collect(), same: told.same, visited: told.visited })
    }
}

/// Most looks with open gates.
const LOOKS: usize = 8;

/// How long one look may take before the agent is taken for hung: thousands of threads on a slow machine take seconds.
const CHECK_LIMIT: Duration = Duration::from_secs(60);

/// Who is inside.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Threads that are inside, or of which it is not known.
    pub busy: Vec<BusyThread>,
    /// All of those were running: they may be out in a moment.
    pub may_drain: bool,
    /// Threads of the process.
    pub threads: usize,
    /// Threads that were stopped for their stack walk.
    pub stopped: usize,
    /// Longest of those stops.
    pub longest_stop: Duration,
}

/// Checks one process for one transaction.
pub struct Checker<'o> {
    observers: &'o Observers,
    unwinder: Unwinder,
    regions: Vec<Region>,
    names: Vec<(Range<TargetAddr>, LoadBias, Arc<Image>, String)>,
    seen: HashMap<i32, Observation>,
    open: OpenThreads,
    /// Of snapshots; begun when it is needed.
    series: Option<Series>,
}

impl<'o> Checker<'o> {
    /// For the threads of `process`, which must not be inside `regions`.
    pub fn new(process: &TargetProcess, modules: &[Module], observers: &'o Observers, regions: Vec<Region>) -> Self {
        let mut unwinder = Unwinder::new();
        let mut names = Vec::new();
        for module in modules {
            unwinder.add_image(&module.image, module.text.clone(), module.bias);
            let name = module.file_name().to_owned();
            names.push((module.text.clone(), module.bias, Arc::clone(&module.image), name));
        }
        for patch in &process.book.ledger.patches {
            if let Some(table) = patch.eh_frame
                && let Ok(bytes) = process.memory.bytes(table.start, table.len() as usize)
            {
                unwinder.add_code(patch.code.range(), bytes, table.start);
            }
        }
        Self { observers, unwinder, regions, names, seen: HashMap::new(), open: OpenThreads::default(), series: None }
    }

    /// Names of what nobody may be inside.
    #[must_use]
    pub fn labels(&self) -> Vec<String> {
        self.regions.iter().map(|region| region.label.clone()).collect()
    }

    /// Looks at the threads that don't run, and disturbs none. What is found holds until they run.
    ///
    /// # Errors
    /// The process is gone.
    pub fn look(&mut self, process: &TargetProcess) -> Result<Verdict, Failure> {
        let begin = Instant::now();
        let mut verdict = self.observe(process, true)?;
        let mut took = begin.elapsed();
        // The fewer have run since, the shorter the look, and the fewer will have run until the next: what is left for the
        // look with closed gates is then short.
        for _ in 1..LOOKS {
            if !verdict.busy.is_empty() {
                break;
            }
            let begin = Instant::now();
            verdict = self.observe(process, true)?;
            if begin.elapsed() * 2 > std::mem::replace(&mut took, begin.elapsed()) {
                break;
            }
        }
        Ok(verdict)
    }

    /// Looks at those threads again that have run since the last look, and at new ones; stops those that run.
    ///
    /// # Errors
    /// The process is gone.
    pub fn look_again(&mut self, process: &TargetProcess) -> Result<Verdict, Failure> {
        self.observe(process, false)
    }

    fn observe(&mut self, process: &TargetProcess, in_passing: bool) -> Result<Verdict, Failure> {
        let known = std::mem::take(&mut self.seen);
        let looked_at: HashMap<i32, How> = known.iter().map(|(&tid, old)| (tid, old.how)).collect();
        let series = &mut self.series;
        let mut snapshots =
            self.observers.ebpf().ok().map(|ebpf| Snapshots(ebpf, *series.get_or_insert_with(|| ebpf.series())));
        let _watched = watchdog::section("a look at all threads", CHECK_LIMIT);
        crate::fault::point("check.begin");
        let mut observer =
            Observer::new(process.pid, &process.memory, &mut self.unwinder, &self.regions, &mut self.open);
        if let Some(snapshots) = &mut snapshots {
            observer = observer.with_snapshots(snapshots);
        }
        if in_passing {
            observer = observer.in_passing();
        }
        self.seen = observer.observe(known).map_err(|error| gone(process.pid, error))?;
        if self.seen.is_empty() && !in_passing {
            return Err(gone(process.pid, "no thread is left"));
        }
        let mut verdict = Verdict { threads: self.seen.len(), may_drain: true, ..Verdict::default() };
        for observation in self.seen.values() {
            if let How::Stopped(time) = observation.how
                && looked_at.get(&observation.tid) != Some(&observation.how)
            {
                verdict.stopped += 1;
                verdict.longest_stop = verdict.longest_stop.max(time);
            }
            if observation.place != Place::Outside {
                verdict.may_drain &= matches!(observation.how, How::Stopped(_) | How::Preempted);
                verdict.busy.push(self.name(process.pid, observation.tid, &observation.place, &observation.frames));
            }
        }
        verdict.busy.sort_by_key(|thread| thread.tid);
        Ok(verdict)
    }

    /// Stops all threads and looks at them: the way of systems without userfaultfd.
    ///
    /// # Errors
    /// A thread does not stop.
    pub fn stop_all(&mut self, process: &TargetProcess) -> Result<(Vec<Stopped>, Verdict), Failure> {
        let pid = process.pid;
        let mut stopped: HashMap<i32, Stopped> = HashMap::new();
        loop {
            let threads = info::threads(pid).map_err(|error| gone(pid, error))?;
            let new: Vec<i32> = threads.into_iter().filter(|tid| !stopped.contains_key(tid)).collect();
            if new.is_empty() {
                break;
            }
            // All at once: each is then on its way to its stop while we wait for the first.
            let stopping: Vec<_> = new.into_iter().map(Stopping::begin).collect();
            for thread in stopping {
                match thread.and_then(Stopping::stopped) {
                    Ok(thread) => {
                        stopped.insert(thread.tid(), thread);
                    }
                    Err(TraceError::Gone(_)) => {}
                    Err(error) => {
                        return Err(Failure::refused(
                            format!("the threads of process {pid} can't all be stopped: {error}"),
                            "try again; see which thread hangs in the kernel: /proc/PID/task/TID/stack",
                        ));
                    }
                }
            }
        }
        let mut verdict = Verdict { threads: stopped.len(), stopped: stopped.len(), ..Verdict::default() };
        let mut observer = Observer::new(pid, &process.memory, &mut self.unwinder, &self.regions, &mut self.open);
        let places: Vec<_> =
            stopped.values().filter_map(|thread| Some((thread.tid(), observer.walk_stopped(thread)?))).collect();
        for (tid, (place, frames)) in places {
            if place != Place::Outside {
                verdict.busy.push(self.name(pid, tid, &place, &frames));
            }
        }
        Ok((stopped.into_values().collect(), verdict))
    }

    fn name(&self, pid: i32, tid: i32, place: &Place, frames: &[TargetAddr]) -> BusyThread {
        let inside = match place {
            Place::Inside(region) => self.regions.get(*region).map(|region| region.label.clone()).unwrap_or_default(),
            Place::Unknown(reason) => format!("an unknown place ({reason})"),
            Place::Outside => String::new(),
        };
        let name = ProcessInfo::of(tid).map(|info| info.name).unwrap_or_default();
        BusyThread { pid, tid, name, inside, stack: frames.iter().take(64).map(|&at| self.symbolise(at)).collect() }
    }

    fn symbolise(&self, at: TargetAddr) -> String {
        let found = self.names.iter().find(|(text, ..)| text.contains(&at));
        let Some((_, bias, image, module)) = found else { return at.to_string() };
        match image.symbolise(at.in_image(*bias)) {
            Some((name, offset)) => format!("{name}+{offset:#x} ({module})"),
            None => format!("{module}+{:#x}", at.in_image(*bias).0),
        }
    }
}
