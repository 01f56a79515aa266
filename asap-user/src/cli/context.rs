//! What every subcommand needs: where the agent is, and how results and refusals are shown. One JSON document on standard
//! output with `--json`; else text, refusals on standard error.

use super::text::printable;
use crate::{
    agent::{self, AgentOptions},
    report::{Failure, FailureKind, TargetState},
};
use serde::Serialize;
use std::{
    cell::Cell,
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

/// Options that all subcommands have.
#[derive(Clone, Debug, clap::Args)]
pub struct Global {
    /// Print one JSON document instead of text, also for errors.
    #[arg(long, global = true)]
    pub json: bool,
    /// Socket of the agent. Its directory must be closed to others.
    #[arg(long, global = true, value_name = "PATH", env = "ASAP_SOCKET", default_value = agent::DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Audit log: every change that was asked for, and what came of it.
    #[arg(long, global = true, value_name = "PATH", env = "ASAP_LOG", default_value = agent::DEFAULT_LOG)]
    pub log: PathBuf,
    /// The one document was printed already, and says what failed, too.
    #[arg(skip)]
    pub is_said: Cell<bool>,
}

impl Global {
    /// How an agent for these options runs.
    pub fn agent_options(&self, idle_exit: Option<Duration>) -> AgentOptions {
        // A background agent changes its directory, and other commands may be run from elsewhere.
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        AgentOptions {
            socket: absolute(&self.socket),
            log: absolute(&self.log),
            journal: None,
            keys: std::env::var_os("ASAP_KEYS")
                .map_or_else(|| agent::DEFAULT_KEYS.into(), |keys| absolute(&keys.into())),
            require_signature: false,
            idle_exit,
        }
    }

    /// Shows a result.
    pub fn show(&self, result: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), Failure> {
        let shown = if self.json {
            let mut json = serde_json::to_string_pretty(result).map_err(|error| Failure {
                kind: FailureKind::Failed,
                ..Failure::refused(error.to_string(), "please report this")
            })?;
            json.push('\n');
            json
        } else {
            text()
        };
        print(&shown)
    }

    /// Shows a refusal or failure.
    pub fn show_failure(&self, failure: &Failure) {
        if self.json && self.is_said.get() {
            return;
        }
        if self.json {
            let _ = self.show(&Failed { failed: failure }, String::new);
        } else {
            let _ = io::stderr().write_all(failure_text(failure).as_bytes());
        }
    }
}

#[derive(Serialize)]
struct Failed<'a> {
    failed: &'a Failure,
}

/// Writes to standard output. That nobody reads on is no failure.
pub fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure {
            kind: FailureKind::Failed,
            ..Failure::refused(format!("the result can't be written: {error}"), "see `asap status` for what was done")
        }),
        _ => Ok(()),
    }
}

/// What was refused and why, in which state the target is, what to do, and who is in the way.
fn failure_text(failure: &Failure) -> String {
    let class = match failure.kind {
        FailureKind::Usage => "usage",
        FailureKind::Refused => "refused",
        FailureKind::Failed => "failed",
        FailureKind::Timeout => "timed out",
        FailureKind::Cancelled => "cancelled",
        FailureKind::Partial => "partly done",
    };
    let state = match failure.state {
        TargetState::Untouched => "nothing was changed",
        TargetState::RolledBack => "changes were taken back, the target is as before",
        TargetState::Gone => "the target no longer exists",
        TargetState::PartlyDone => "some processes carry the change, others don't",
        TargetState::Unknown => "not known",
    };
    let mut text = format!("asap: {class}: {}\n", lines(&failure.message));
    text.push_str(&format!("  state: {state}\n"));
    if !failure.way_out.is_empty() {
        text.push_str(&format!("  next:  {}\n", lines(&failure.way_out)));
    }
    for thread in &failure.busy {
        let name = printable(&thread.name);
        text.push_str(&format!("  thread {} \"{name}\" of process {}: ", thread.tid, thread.pid));
        text.push_str(&format!("inside {}\n", printable(&thread.inside)));
        for (depth, frame) in thread.stack.iter().enumerate() {
            text.push_str(&format!("    #{depth:<2} {}\n", printable(frame)));
        }
    }
    text
}

/// Messages may have several lines (candidates of a name); each is made printable, and indented after the first.
fn lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n         ")
}

/// Only root can repair processes; said before anything else is.
pub fn require_root(what: &str) -> Result<(), Failure> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::refused(
        format!("`asap {what}` must be run as root: it reads and changes the memory of other processes"),
        format!("sudo asap {what} ..."),
    ))
}

/// The path or text of something as it is shown.
pub fn shown(path: &std::path::Path) -> String {
    printable(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::BusyThread;

    #[test]
    fn a_failure_says_what_why_state_and_next() {
        let mut failure = Failure {
            kind: FailureKind::Timeout,
            ..Failure::refused("no quiescent moment within 30 s:\n`f` is busy", "wait longer with --timeout")
        };
        failure.busy.push(BusyThread {
            pid: 10,
            tid: 12,
            name: "worker\u{1b}".to_owned(),
            inside: "f".to_owned(),
            stack: vec!["f+0x12".to_owned(), "main".to_owned()],
        });
        assert_eq!(
            failure_text(&failure),
            "asap: timed out: no quiescent moment within 30 s:\n         `f` is busy\n\
             \x20 state: nothing was changed\n\
             \x20 next:  wait longer with --timeout\n\
             \x20 thread 12 \"worker\\u{1b}\" of process 10: inside f\n\
             \x20   #0  f+0x12\n\
             \x20   #1  main\n"
        );
    }
}
