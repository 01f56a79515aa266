//! The patch transaction: plan, stage, quiesce, commit, revert. Knows nothing of sockets and command lines.

mod apply;
mod call_stack;
mod check;
mod dump;
mod ended;
mod exchange;
mod hooks;
pub mod ledger;
mod modules;
mod patch_file;
mod patching;
mod plan;
mod process;
mod redirect;
mod refuse;
mod resolve;
mod revert;
mod sandbox;
mod scope;
mod settle;
mod stage;
mod target;
mod text;
mod transaction;
mod undo;
mod unloaded;
mod watch;

use crate::{
    cancel,
    process::ptrace::release_latecomers,
    report::{
        AttachReport, AttachRequest, DetachReport, DetachRequest, Failure, InstalledPatch, News, Operations,
        PatchReport, PatchRequest, Progress, RevertRequest, SandboxReport, SandboxRequest, ScopedReport, ScopedRequest,
        StatusReport, StatusRequest, TargetState,
    },
};
use modules::ImageCache;
use process::TargetProcess;
use std::{
    collections::BTreeMap,
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};
use target::Target;
use watch::LifeWatch;

/// How soon to look again for threads that are to be let go.
const LATECOMERS: Duration = Duration::from_millis(20);

/// The engine: all targets of an agent. Lives on one thread, the one that traces.
pub struct Engine {
    targets: BTreeMap<i32, Target>,
    images: ImageCache,
    observers: check::Observers,
    watch: LifeWatch,
    /// What became of processes of targets that are no more.
    news: Vec<News>,
    /// What guards met in targets that are no more.
    ended: ended::Ended,
}

impl Default for Engine {
    fn default() -> Self {
        Self::new()
    }
}

impl Engine {
    /// An engine with nothing attached. Loads what the kernel offers for looking at threads.
    #[must_use]
    pub fn new() -> Self {
        // Threads of the target wait at gates while this thread works: it goes first.
        // SAFETY: no memory is involved. Without the right to raise it the priority stays.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
        raise_descriptor_limit();
        redirect::sweep();
        Self {
            targets: BTreeMap::new(),
            images: ImageCache::default(),
            observers: check::Observers::load(),
            watch: LifeWatch::default(),
            news: Vec::new(),
            ended: ended::Ended::default(),
        }
    }

    /// The pid of the target that a request means.
    fn meant(&self, pid: Option<i32>) -> Result<i32, Failure> {
        let attached = || self.targets.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match (pid, self.targets.len()) {
            (Some(pid), _) if self.targets.contains_key(&pid) => Ok(pid),
            (Some(pid), _) => {
                let root = self.targets.values().find(|target| target.processes.contains_key(&pid));
                let (message, way_out) = match root {
                    Some(target) => (
                        format!("process {pid} belongs to the target {}", target.root),
                        format!("name the target: --pid {}", target.root),
                    ),
                    None => {
                        (format!("process {pid} is not attached"), format!("attach first: asap attach --pid {pid}"))
                    }
                };
                Err(Failure::refused(message, way_out))
            }
            (None, 0) => Err(Failure::refused("nothing is attached", "attach first: asap attach --pid PID")),
            (None, 1) => Ok(*self.targets.keys().next().unwrap_or(&0)),
            (None, _) => Err(Failure {
                kind: crate::report::FailureKind::Usage,
                ..Failure::refused(format!("several targets are attached: {}", attached()), "say which one with --pid")
            }),
        }
    }

    /// The helpers of processes that have ended go with them.
    fn bury_dead(&mut self) {
        let (news, ended) = (&mut self.news, &mut self.ended);
        let mut has_buried = false;
        self.targets.retain(|pid, target| {
            let living = target.processes.len();
            target.bury_dead();
            has_buried |= target.processes.len() < living;
            let is_empty = target.processes.is_empty();
            if is_empty {
                tracing::info!(pid, "the target has ended");
                news.append(&mut target.news);
                ended.note(*pid, std::mem::take(&mut target.past));
            }
            !is_empty
        });
        if has_buried {
            redirect::sweep();
        }
    }

    /// Takes children into care that were forked since the last look. They carry the patches that their parents had.
    fn discover(&mut self) {
        for target in self.targets.values_mut() {
            if let Err(failure) = target.discover(&self.observers) {
                tracing::warn!(pid = target.root, %failure, "a child process could not be taken into care");
            }
        }
    }
}

/// Two descriptors are kept open per thread while a process is checked.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

fn micros_since(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Operations for Engine {
    fn attach(&mut self, request: &AttachRequest, progress: &mut dyn FnMut(Progress)) -> Result<AttachReport, Failure> {
        let begin = Instant::now();
        let pid = request.pid;
        self.watch.was_disturbed();
        self.bury_dead();
        if self.targets.contains_key(&pid) {
            return Err(Failure::refused(format!("process {pid} is attached already"), "go on with asap patch"));
        }
        if let Some(target) = self.targets.values().find(|target| target.processes.contains_key(&pid)) {
            return Err(Failure::refused(
                format!("process {pid} is attached already, as part of the target {}", target.root),
                format!("go on with asap patch --pid {}", target.root),
            ));
        }
        progress(Progress { step: format!("attaching to {pid}"), fraction: None });
        let mut target = Target::attach(pid, request.only, &self.observers)?;
        let _to_the_end = cancel::hold_off();
        settle::after_adoption(&mut target, &mut self.images, &self.observers);
        if let Some(process) = target.processes.get(&pid) {
            let modules = self.images.modules(pid, &process.maps()?, &process.memory, |at| process.is_ours(at));
            self.images.clear();
            target.set_build_id(modules.first().and_then(|module| module.image.build_id_hex()));
            if let Some(module) = modules.first().filter(|module| module.is_deleted) {
                target.notes.push(format!("{} was replaced on disk since the process started", module.path));
            }
        }
        let report = AttachReport {
            adopted: target.was_adopted(),
            target: target.report(),
            total_us: micros_since(begin),
            longest_stop_us: u64::try_from(target.longest_stop().as_micros()).unwrap_or(u64::MAX),
        };
        self.targets.insert(pid, target);
        Ok(report)
    }

    fn patch(&mut self, request: &PatchRequest, progress: &mut dyn FnMut(Progress)) -> Result<PatchReport, Failure> {
        let report = self.patch_all(request, progress);
        redirect::sweep();
        self.watch.was_disturbed();
        self.images.clear();
        report
    }

    fn revert(&mut self, request: &RevertRequest, progress: &mut dyn FnMut(Progress)) -> Result<PatchReport, Failure> {
        let pid = self.meant(request.pid)?;
        let target = self.targets.get_mut(&pid).ok_or_else(|| process::gone(pid, "it is not there"))?;
        let report = revert::revert(target, &mut self.images, &self.observers, request, progress);
        redirect::sweep();
        self.watch.was_disturbed();
        self.images.clear();
        report
    }

    fn detach(&mut self, request: &DetachRequest, progress: &mut dyn FnMut(Progress)) -> Result<DetachReport, Failure> {
        let pid = self.meant(request.pid)?;
        let mut reverted = Vec::new();
        let target = self.targets.get_mut(&pid).ok_or_else(|| process::gone(pid, "it is not there"))?;
        if request.revert {
            while let Some(newest) = target.patches().pop() {
                let revert = RevertRequest {
                    pid: Some(pid),
                    patch: Some(newest.id.0.to_string()),
                    timeout_ms: request.timeout_ms,
                    consistency: crate::report::Consistency::Quiescent,
                };
                let report = revert::revert(target, &mut self.images, &self.observers, &revert, progress)
                    .map_err(|failure| with_those_out(failure, &reverted))?;
                reverted.push(report.patch);
            }
        }
        // Children that were forked a moment ago carry a home of ours as well. Without an agent there is no sandbox.
        sandbox::leave_all(target, &self.observers)?;
        let remaining = target.patches();
        let clean = target.leave_all();
        self.targets.remove(&pid);
        redirect::sweep();
        self.images.clear();
        Ok(DetachReport { pid, reverted, remaining, clean })
    }

    fn status(&mut self, request: &StatusRequest) -> Result<StatusReport, Failure> {
        self.bury_dead();
        self.discover();
        let Some(pid) = request.pid else { return Ok(self.known()) };
        let pid = self.meant(Some(pid))?;
        let targets = self.targets.get(&pid).map(Target::report).into_iter().collect();
        Ok(StatusReport { targets, ..nothing_known() })
    }

    fn known(&self) -> StatusReport {
        StatusReport { targets: self.targets.values().map(Target::report).collect(), ..nothing_known() }
    }

    fn sandbox(
        &mut self,
        request: &SandboxRequest,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<SandboxReport, Failure> {
        let report = self.sandbox_request(request, progress);
        self.watch.was_disturbed();
        self.images.clear();
        report
    }

    fn scoped(&mut self, request: &ScopedRequest, progress: &mut dyn FnMut(Progress)) -> Result<ScopedReport, Failure> {
        let report = self.scoped_request(request, progress);
        self.watch.was_disturbed();
        self.images.clear();
        report
    }

    fn housekeeping(&mut self) -> Option<Duration> {
        self.watch.hear(&self.targets);
        self.bury_dead();
        self.watch.follow(&self.targets, &self.observers);
        if self.watch.wants_discovery() {
            self.discover();
            self.watch.discovered(&self.targets);
            self.watch.follow(&self.targets, &self.observers);
        }
        let observers = &self.observers;
        let sandboxed = self.targets.values_mut().filter_map(|target| sandbox::look_after(target, observers)).min();
        // Nobody else would let them go: they would stay stopped.
        let latecomers = (release_latecomers() > 0).then_some(LATECOMERS);
        self.watch.next_look(&self.targets).into_iter().chain(latecomers).chain(sandboxed).min()
    }

    fn alarms(&self) -> Vec<BorrowedFd<'_>> {
        let processes = || self.targets.values().flat_map(|target| target.processes.values());
        let sandboxed =
            processes().filter_map(|process| process.sandbox.as_ref()).flat_map(crate::sandbox::Session::families);
        let mapped = sandboxed.map(|family| family.shared.news.alarm());
        processes().map(TargetProcess::alarm).chain(mapped).chain(self.watch.alarm()).collect()
    }

    fn news(&mut self) -> Vec<News> {
        let of_targets = self.targets.values_mut().flat_map(|target| std::mem::take(&mut target.news));
        std::mem::take(&mut self.news).into_iter().chain(of_targets).collect()
    }
}

fn nothing_known() -> StatusReport {
    let agent = std::process::id() as i32;
    StatusReport { agent, version: env!("CARGO_PKG_VERSION").into(), targets: Vec::new() }
}

/// The failure of one revert of several, of which others are done.
fn with_those_out(failure: Failure, reverted: &[InstalledPatch]) -> Failure {
    if reverted.is_empty() {
        return failure;
    }
    let names: Vec<_> = reverted.iter().map(|patch| format!("{} ({})", patch.id.0, patch.name)).collect();
    let message = format!("{}; taken out already: {}", failure.message, names.join(", "));
    Failure { message, state: TargetState::PartlyDone, ..failure }
}

/// Time limit of a request as an instant.
fn deadline(timeout_ms: u64) -> (Instant, Duration) {
    let limit = Duration::from_millis(timeout_ms).min(Duration::from_secs(7 * 24 * 3600));
    (Instant::now() + limit, limit)
}
