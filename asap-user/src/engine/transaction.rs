//! From "ready" to "active" in one process: wait for the moment at which no thread is inside the code that changes, with the
//! gates closed only while it is checked, then exchange the pages.

use super::{
    check::{Checker, Verdict},
    exchange::{Closed, Exchange, GateTime},
    hooks,
    process::{TargetProcess, gone},
};
use crate::address::TargetAddr;
use crate::cancel;
use crate::process::ptrace::{Stopped, release_latecomers};
use crate::report::{BusyThread, Consistency, Failure, FailureKind, ProcessPatchReport, TargetState};
use std::time::{Duration, Instant};

/// How long gates stay closed for threads that are inside to come out, before they are opened and all is tried again later.
const DRAIN: Duration = Duration::from_millis(2);
/// First and longest pause between two attempts that closed the gates: each keeps those out who come by meanwhile.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
/// Shortest pause between two looks with open gates, while somebody rests inside. Nobody notices them: how often they are
/// repeated is a matter of what they cost us.
const REST: Duration = Duration::from_millis(1);
/// How many times as long as a look the pause after it is, up to the longest of the others.
const REST_PER_LOOK: u32 = 10;

/// What a transaction may do, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// When to give up.
    pub deadline: Instant,
    /// The whole time limit, for the message.
    pub limit: Duration,
    /// Whether old activations must have ended.
    pub consistency: Consistency,
}

/// What keeps threads out while the pages are exchanged.
enum Held {
    /// Nothing needs to.
    Free,
    /// Closed gates.
    Gates(Closed),
    /// All threads are stopped.
    Stopped(Vec<Stopped>, Instant),
}

/// Makes the exchange active when `checker` finds nobody inside. `at_quiescence` are hooks of the patch, run before that. They may
/// call any code of the target, on the pages with closed gates as well: where there are hooks, all threads are stopped and the
/// gates opened again before they run.
///
/// # Errors
/// The time is up, or the kernel refused; the process is as it was, and the exchange is taken apart.
pub fn run(
    process: &mut TargetProcess,
    exchange: Exchange,
    checker: &mut Checker<'_>,
    terms: Terms,
    at_quiescence: &[TargetAddr],
) -> Result<ProcessPatchReport, Failure> {
    let mut report = ProcessPatchReport { pid: process.pid, ..ProcessPatchReport::default() };
    report.threads = crate::process::info::threads(process.pid).map_or(0, |threads| threads.len());
    match attempt_until_quiet(process, &exchange, checker, terms, at_quiescence, &mut report) {
        Ok(Held::Free) => {
            exchange.commit(process, None)?;
        }
        Ok(Held::Gates(closed)) => {
            let time = exchange.commit(process, Some(closed))?;
            note(&mut report, &time);
        }
        Ok(Held::Stopped(threads, since)) => {
            let committed = exchange.commit(process, None);
            drop(threads);
            report.longest_stop_us = report.longest_stop_us.max(micros(since.elapsed()));
            committed?;
        }
        Err(failure) => {
            exchange.abandon(process);
            return Err(failure);
        }
    }
    Ok(report)
}

fn note(report: &mut ProcessPatchReport, time: &GateTime) {
    report.threads_parked += time.waited;
    report.longest_gate_us = report.longest_gate_us.max(micros(time.closed));
}

fn note_check(report: &mut ProcessPatchReport, verdict: &Verdict) {
    report.threads = verdict.threads;
    report.threads_stopped += verdict.stopped;
    report.longest_stop_us = report.longest_stop_us.max(micros(verdict.longest_stop));
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Ends with the gates closed and nobody inside (or no gates, where none are needed).
fn attempt_until_quiet(
    process: &mut TargetProcess,
    exchange: &Exchange,
    checker: &mut Checker<'_>,
    terms: Terms,
    at_quiescence: &[TargetAddr],
    report: &mut ProcessPatchReport,
) -> Result<Held, Failure> {
    if terms.consistency == Consistency::Lazy {
        report.quiescence = "lazy: old activations finish in old code".into();
        report.attempts = 1;
        hooks::run(process, at_quiescence)?;
        return Ok(Held::Free);
    }
    let by_gate = process.gates.is_ok();
    if exchange.is_empty() {
        // Nothing that is executed changes place, but code may go away: nobody may be inside it.
        report.quiescence = "stack walks".into();
    } else if by_gate {
        report.quiescence = "gate and stack walks".into();
    } else {
        report.quiescence = "all threads stopped for the check (no userfaultfd)".into();
    }
    let mut pause = PAUSE.0;
    loop {
        if !process.is_alive() {
            return Err(gone(process.pid, "it has exited or runs another program now"));
        }
        // Threads that did not stop in time may have stopped since.
        release_latecomers();
        // Everything is in its place while it waits.
        if let Some(reason) = cancel::reason() {
            return Err(Failure::cancelled(reason));
        }
        // With the gates open: most threads don't run, and what is found of them holds until they do.
        let begin = Instant::now();
        let verdict = checker.look(process)?;
        note_check(report, &verdict);
        let (busy, wait) = if verdict.busy.is_empty() || verdict.may_drain {
            report.attempts += 1;
            match try_closed(process, exchange, checker, at_quiescence, report)? {
                Ok(held) => return Ok(held),
                Err(busy) => {
                    let wait = pause;
                    pause = (pause * 2).min(PAUSE.1);
                    (busy, wait)
                }
            }
        } else {
            (verdict.busy, (begin.elapsed() * REST_PER_LOOK).clamp(REST, PAUSE.1))
        };
        if Instant::now() + wait > terms.deadline {
            return Err(timed_out(process, busy, terms, checker));
        }
        std::thread::sleep(wait);
    }
}

/// One attempt with closed gates: those who are inside get a moment to come out, nobody gets in.
fn try_closed(
    process: &mut TargetProcess,
    exchange: &Exchange,
    checker: &mut Checker<'_>,
    at_quiescence: &[TargetAddr],
    report: &mut ProcessPatchReport,
) -> Result<Result<Held, Vec<BusyThread>>, Failure> {
    if exchange.is_empty() {
        let verdict = checker.look_again(process)?;
        note_check(report, &verdict);
        if verdict.busy.is_empty() {
            hooks::run(process, at_quiescence)?;
            return Ok(Ok(Held::Free));
        }
        return Ok(Err(verdict.busy));
    }
    if process.gates.is_err() {
        let since = Instant::now();
        let (threads, verdict) = checker.stop_all(process)?;
        report.threads = verdict.threads;
        report.threads_stopped += verdict.stopped;
        if verdict.busy.is_empty() {
            hooks::run(process, at_quiescence)?;
            return Ok(Ok(Held::Stopped(threads, since)));
        }
        drop(threads);
        report.longest_stop_us = report.longest_stop_us.max(micros(since.elapsed()));
        return Ok(Err(verdict.busy));
    }
    let laid = exchange.lay_gates(process)?;
    // That took a while, and who has run meanwhile must be looked at again: better before the gates are closed.
    let verdict = match checker.look(process) {
        Ok(verdict) => verdict,
        Err(failure) => {
            exchange.remove_gates(process, laid);
            return Err(failure);
        }
    };
    note_check(report, &verdict);
    if !verdict.busy.is_empty() && !verdict.may_drain {
        exchange.remove_gates(process, laid);
        return Ok(Err(verdict.busy));
    }
    let closed = exchange.close_gates(process, laid)?;
    let begin = Instant::now();
    let found: Result<Result<Option<Vec<Stopped>>, Vec<BusyThread>>, Failure> = loop {
        let verdict = match checker.look_again(process) {
            Ok(verdict) => verdict,
            Err(failure) => break Err(failure),
        };
        note_check(report, &verdict);
        if verdict.busy.is_empty() {
            if at_quiescence.is_empty() {
                break hooks::run(process, at_quiescence).map(|()| Ok(None));
            }
            break checker.stop_all(process).map(|(threads, verdict)| {
                report.threads_stopped += verdict.stopped;
                if verdict.busy.is_empty() { Ok(Some(threads)) } else { Err(verdict.busy) }
            });
        }
        if begin.elapsed() > DRAIN || !verdict.may_drain {
            break Ok(Err(verdict.busy));
        }
        std::thread::yield_now();
    };
    match found {
        Ok(Ok(None)) => Ok(Ok(Held::Gates(closed))),
        Ok(Ok(Some(threads))) => {
            let since = Instant::now();
            note(report, &exchange.reopen(process, closed));
            hooks::run(process, at_quiescence)?;
            Ok(Ok(Held::Stopped(threads, since)))
        }
        Ok(Err(busy)) => {
            note(report, &exchange.reopen(process, closed));
            Ok(Err(busy))
        }
        Err(failure) => {
            note(report, &exchange.reopen(process, closed));
            Err(failure)
        }
    }
}

fn timed_out(process: &TargetProcess, busy: Vec<BusyThread>, terms: Terms, checker: &Checker<'_>) -> Failure {
    let names: Vec<_> = {
        let mut names: Vec<_> = busy.iter().map(|thread| thread.inside.clone()).collect();
        names.sort();
        names.dedup();
        names
    };
    let what = if names.is_empty() { checker.labels().join(", ") } else { names.join(", ") };
    Failure {
        kind: FailureKind::Timeout,
        message: format!(
            "within {:.1} s there was no moment at which no thread of process {} was inside {what} ({} at the last look)",
            terms.limit.as_secs_f64(),
            process.pid,
            if busy.len() == 1 { "1 thread".to_owned() } else { format!("{} threads", busy.len()) },
        ),
        state: TargetState::Untouched,
        way_out: "wait longer (--timeout), or let old activations finish in the old code (--consistency lazy)".into(),
        busy,
    }
}
