//! The thread that owns the engine: takes one request after the other, writes the audit log around each, and looks after the
//! targets in between, when something happens to them. It waits for nobody: progress that a client does not read is dropped.

use super::{
    OperationsFactory,
    audit::{AuditLog, Client, Record},
    bell::{Bell, Waited},
    trust::Trust,
    watchdog::Watchdog,
};
use crate::{
    cancel::{self, Cancel},
    report::{
        Failure, FailureKind, Operations, Progress, Reply, Request, ScopedWork, StatusReport, StatusRequest,
        TargetState,
    },
};
use nix::sys::signal::{SigSet, Signal};
use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Instant,
};
use tokio::sync::{mpsc as async_mpsc, oneshot, watch};

/// A request on its way through the engine.
pub(super) struct Job {
    pub request: Request,
    pub client: Client,
    /// Steps of the work; may be full.
    pub progress: async_mpsc::Sender<Progress>,
    /// The answer.
    pub reply: oneshot::Sender<Reply>,
    /// Tells that nobody waits for the answer any more.
    pub cancel: Cancel,
}

/// What the rest of the agent sees of the engine thread.
#[derive(Clone)]
pub(super) struct EngineQueue {
    jobs: mpsc::Sender<Box<Job>>,
    shared: Arc<Shared>,
}

struct Shared {
    /// Rung when there is a job, or the end has come.
    bell: Bell,
    busy_with: Mutex<Option<String>>,
    /// Ends what the engine is at.
    cancel: Mutex<Option<Cancel>>,
    /// The last census.
    status: Mutex<Option<StatusReport>>,
    ending: AtomicBool,
}

/// What the server waits for.
pub(super) struct EngineEvents {
    /// Is anything attached?
    pub attached: watch::Receiver<bool>,
    /// The thread ended; the reason where that was not asked for.
    pub ended: oneshot::Receiver<Result<(), String>>,
}

impl EngineQueue {
    /// Queues a job. If the engine is gone the job is dropped, and with it the sender of its reply.
    pub fn send(&self, job: Job) {
        let _ = self.jobs.send(Box::new(job));
        self.shared.bell.ring();
    }

    /// Has the engine end after the job that it is at, which is cancelled if it still can be; queued ones are dropped.
    pub fn end(&self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        if let Some(cancel) = &*lock(&self.shared.cancel) {
            cancel.ask("the agent was told to end");
        }
        self.shared.bell.ring();
    }

    /// What the engine is at now, for a person.
    pub fn busy_with(&self) -> Option<String> {
        lock(&self.shared.busy_with).clone()
    }

    /// If the engine is busy: what was attached before it began, with a note of what it is at. A patch may have to wait for
    /// long, and who asks for the status then wants to know just that.
    pub fn status_while_busy(&self, request: &StatusRequest) -> Option<StatusReport> {
        let busy_with = self.busy_with()?;
        let mut report = lock(&self.shared.status).clone()?;
        if let Some(pid) = request.pid {
            report.targets.retain(|target| target.pid == pid);
        }
        for target in &mut report.targets {
            target.notes.push(format!("as it was before the agent began to work at: {busy_with}"));
        }
        // Without a target the note has no place; the engine's own answer is worth waiting for then.
        (!report.targets.is_empty()).then_some(report)
    }
}

/// Starts the thread. The engine is made on it and dropped on it.
pub(super) fn start(
    factory: OperationsFactory,
    watchdog: Watchdog,
    audit: AuditLog,
    trust: Trust,
) -> io::Result<(EngineQueue, EngineEvents)> {
    let (jobs, queue) = mpsc::channel();
    let (attached_sender, attached) = watch::channel(false);
    let (ended_sender, ended) = oneshot::channel();
    let shared = Arc::new(Shared {
        bell: Bell::new()?,
        busy_with: Mutex::default(),
        cancel: Mutex::default(),
        status: Mutex::default(),
        ending: AtomicBool::new(false),
    });
    let ours = Arc::clone(&shared);
    thread::Builder::new().name("engine".to_owned()).spawn(move || {
        leave_signals_to_the_runtime();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let mut worker = Worker {
                operations: factory(),
                _watchdog: watchdog,
                audit,
                trust,
                attached: attached_sender,
                shared: ours,
                look_again_at: None,
            };
            worker.work(&queue)
        }));
        let outcome = outcome.unwrap_or_else(|panic| Err(words_of(&*panic)));
        let _ = ended_sender.send(outcome);
    })?;
    Ok((EngineQueue { jobs, shared }, EngineEvents { attached, ended }))
}

/// A signal to the agent must not interrupt a `waitpid` in the middle of a patch.
fn leave_signals_to_the_runtime() {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
    let _ = signals.thread_block();
}

/// Plain values, complete at any time: a panic elsewhere does not spoil them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Worker {
    operations: Box<dyn Operations>,
    /// Lives as long as the engine, which opens sections by `watchdog::section`.
    _watchdog: Watchdog,
    audit: AuditLog,
    trust: Trust,
    attached: watch::Sender<bool>,
    shared: Arc<Shared>,
    look_again_at: Option<Instant>,
}

impl Worker {
    fn work(&mut self, queue: &mpsc::Receiver<Box<Job>>) -> Result<(), String> {
        loop {
            self.look_after_targets();
            loop {
                if self.shared.ending.load(Ordering::Relaxed) {
                    return Ok(());
                }
                match queue.try_recv() {
                    Ok(job) => {
                        self.do_job(*job)?;
                        self.take_census();
                        break;
                    }
                    Err(mpsc::TryRecvError::Disconnected) => return Ok(()),
                    Err(mpsc::TryRecvError::Empty) => {}
                }
                // With nothing to look after this lasts until somebody asks for something.
                if self.shared.bell.wait(self.operations.alarms(), self.look_again_at) == Waited::ForOthers {
                    break;
                }
            }
        }
    }

    fn look_after_targets(&mut self) {
        self.look_again_at = self.operations.housekeeping().map(|time| Instant::now() + time);
        self.take_census();
    }

    fn take_census(&mut self) {
        for news in self.operations.news() {
            let record = self.audit.event(&news);
            tracing::info!(pid = news.pid, target = news.target, result = record.result, "gone out of care");
            self.append(&record);
        }
        let report = self.operations.known();
        let now = !report.targets.is_empty();
        *lock(&self.shared.status) = Some(report);
        self.attached.send_if_modified(|attached| std::mem::replace(attached, now) != now);
    }

    fn do_job(&mut self, job: Job) -> Result<(), String> {
        let Job { request, client, progress, reply, cancel } = job;
        let intent = self.audit.intent(client, &request);
        if let Some(Err(error)) = intent.as_ref().map(|intent| self.audit.append(intent)) {
            // What can't be accounted for is not done.
            let _ = reply.send(Reply::Failed(Failure::refused(
                format!("the request can't be logged: {error}"),
                "make room for the log, or start the agent with another --log",
            )));
            return Ok(());
        }
        let what = describe(&request);
        tracing::info!(uid = client.uid, pid = client.pid, "{what}");
        self.note(Some(what));
        let started = Instant::now();
        let mut tell = |step| drop(progress.try_send(step));
        *lock(&self.shared.cancel) = Some(cancel.clone());
        let mut signed_by = None;
        let outcome = catch_unwind(AssertUnwindSafe(|| match cancel.reason() {
            // While it waited for its turn.
            Some(reason) => Reply::Failed(Failure::cancelled(reason)),
            None => match self.trust.admit(&request) {
                Ok(admitted) => {
                    let answer = cancel::during(&cancel, || perform(&mut *self.operations, &request, &mut tell));
                    signed_by = admitted.signer.clone();
                    admitted.tell(answer)
                }
                Err(failure) => Reply::Failed(failure),
            },
        }));
        *lock(&self.shared.cancel) = None;
        let (answer, end) = match outcome {
            Ok(answer) => (answer, Ok(())),
            Err(panic) => {
                let words = words_of(&*panic);
                (Reply::Failed(bug(&words)), Err(words))
            }
        };
        self.note(None);
        if let Some(intent) = intent {
            self.append(&Record { signed_by, ..intent.result(&answer, started.elapsed()) });
        }
        let _ = reply.send(answer);
        // After a panic the engine's picture of the targets can't be trusted; a new agent reads it from the targets.
        end
    }

    /// For what has happened already.
    fn append(&self, record: &Record) {
        if let Err(error) = self.audit.append(record) {
            tracing::error!(%error, "what has happened could not be logged");
        }
    }

    fn note(&self, what: Option<String>) {
        *lock(&self.shared.busy_with) = what;
    }
}

fn perform(operations: &mut dyn Operations, request: &Request, tell: &mut dyn FnMut(Progress)) -> Reply {
    let result = match request {
        Request::Attach(request) => operations.attach(request, tell).map(Reply::Attached),
        Request::Patch(request) => operations.patch(request, tell).map(Reply::Patched),
        Request::Revert(request) => operations.revert(request, tell).map(Reply::Reverted),
        Request::Detach(request) => operations.detach(request, tell).map(Reply::Detached),
        Request::Sandbox(request) => operations.sandbox(request, tell).map(Reply::Sandbox),
        Request::Scoped(request) => operations.scoped(request, tell).map(Reply::Scoped),
        Request::Status(request) | Request::List(request) => operations.status(request).map(Reply::Status),
        // The session stops the agent once this is answered.
        Request::Shutdown => Ok(Reply::Bye),
    };
    result.unwrap_or_else(Reply::Failed)
}

fn describe(request: &Request) -> String {
    let of = |command: &str, pid: Option<i32>| match pid {
        Some(pid) => format!("{command} of process {pid}"),
        None => command.to_owned(),
    };
    match request {
        Request::Attach(request) => of("attach", Some(request.pid)),
        Request::Patch(request) => of(if request.dry_run { "check" } else { "patch" }, request.pid),
        Request::Revert(request) => of("revert", request.pid),
        Request::Detach(request) => of("detach", request.pid),
        Request::Sandbox(request) => of(super::audit::sandbox_command(request.action), request.pid),
        Request::Scoped(request) => {
            let command = match &request.work {
                ScopedWork::Attach { .. } => "attach",
                ScopedWork::Patch(patch) => {
                    if patch.dry_run {
                        "check"
                    } else {
                        "patch"
                    }
                }
            };
            format!("{command} of {} processes", request.members.len())
        }
        Request::Status(request) | Request::List(request) => of("status", request.pid),
        Request::Shutdown => "stop".to_owned(),
    }
}

fn bug(words: &str) -> Failure {
    Failure {
        kind: FailureKind::Failed,
        message: format!("the agent met an error of its own and ends: {words}"),
        state: TargetState::Unknown,
        way_out:
            "look at the target with `asap attach --pid N`: a new agent takes over what it finds; please report this"
                .to_owned(),
        busy: Vec::new(),
    }
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().map(|words| (*words).to_owned());
    words.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "unknown panic".to_owned())
}
