//! Why an agent could not start or had to end.

use super::audit::AuditError;
use crate::report::{Failure, FailureKind};
use std::{io, path::PathBuf};

/// Why an agent could not start or had to end; [`AgentError::way_out`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The socket's directory can't be trusted or made.
    #[error("the directory {path} can't hold the agent's socket: {why}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What to do.
        way_out: &'static str,
    },
    /// Another agent holds the lock.
    #[error("an agent is running already (pid {pid}, socket {socket})")]
    AlreadyRunning {
        /// What it wrote into the lock file.
        pid: String,
        /// Where it listens.
        socket: PathBuf,
    },
    /// The socket could not be made.
    #[error("{path} can't be opened: {source}")]
    Socket {
        /// The socket, or the lock beside it.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The audit log can't be written.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The watchdog could not be started.
    #[error("the watchdog can't be started, and without it a hung agent could hold up its targets: {0}")]
    Watchdog(#[source] io::Error),
    /// Threads, timers or signals could not be set up.
    #[error("the agent could not be set up: {0}")]
    Setup(#[source] io::Error),
    /// The engine met a bug of its own.
    #[error("the engine ended unexpectedly: {0}")]
    EngineEnded(String),
}

impl AgentError {
    /// What to do.
    #[must_use]
    pub const fn way_out(&self) -> &'static str {
        match self {
            Self::Directory { way_out, .. } => way_out,
            Self::AlreadyRunning { .. } => "use the running agent, or end it with `asap stop`",
            Self::Socket { .. } => "choose another socket with --socket",
            Self::Audit(_) => "choose another log with --log",
            Self::Watchdog(_) | Self::Setup(_) => "look at the limits for processes and open files (ulimit -a)",
            Self::EngineEnded(_) => "targets run on as they were; `asap attach --pid N` has a new agent take them over",
        }
    }

    /// The same as a failure of a command.
    #[must_use]
    pub fn to_failure(&self) -> Failure {
        let kind = match self {
            Self::EngineEnded(_) => FailureKind::Failed,
            _ => FailureKind::Refused,
        };
        Failure { kind, ..Failure::refused(self.to_string(), self.way_out()) }
    }
}
