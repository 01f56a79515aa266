//! Why an agent could not start or had to end.

use super::audit::AuditError;
use std::{io, path::PathBuf};

/// Why an agent could not start or had to end. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The socket's directory can't be trusted or made.
    #[error("the directory {path} can't hold the agent's socket: {why}; {way_out}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What to do.
        way_out: String,
    },
    /// Another agent holds the lock.
    #[error("an agent is running already (pid {pid}, socket {socket}); use it, or end it with `asap stop`")]
    AlreadyRunning {
        /// What it wrote into the lock file.
        pid: String,
        /// Where it listens.
        socket: PathBuf,
    },
    /// The socket could not be made.
    #[error("the socket {path} can't be opened: {source}; choose another with --socket")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The audit log can't be written.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The watchdog could not be started.
    #[error("the watchdog could not be started: {0}; without it a hung agent could hold up its targets")]
    Watchdog(#[source] io::Error),
    /// Threads, timers or signals could not be set up.
    #[error("the agent could not be set up: {0}")]
    Setup(#[source] io::Error),
    /// The engine met a bug of its own.
    #[error("the engine ended unexpectedly: {0}; targets run on as they were, a new agent can adopt them")]
    EngineEnded(String),
}
