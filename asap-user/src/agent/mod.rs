//! The long-lived half: a root-only socket in front of one engine thread, an audit log and a watchdog. Knows how requests
//! come in and replies go out; knows nothing of functions and patches, which are the engine's, or of tables and help, which
//! are the command line's.
//!
//! Three kinds of flow meet here. Sessions (one per client) and signals live on a tokio runtime of one thread, which never
//! blocks. The engine lives on a thread of its own, since `ptrace` belongs to the thread that attached; it takes one request
//! after the other. The watchdog is a process, so that it also sees an agent that is stopped as a whole.

pub mod audit;
mod bell;
pub mod confine;
mod engine_thread;
mod error;
pub mod journal;
pub mod launch;
pub mod protocol;
mod server;
mod session;
pub mod socket;
#[cfg(test)]
mod tests;
mod trust;

pub use error::AgentError;
pub use server::run;

pub use crate::watchdog;

use crate::report::Operations;
use std::{path::PathBuf, time::Duration};

/// Where the agent listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/asap/agent.sock";
/// Where the audit log is unless told otherwise.
pub const DEFAULT_LOG: &str = "/var/log/asap/audit.jsonl";
/// Where the trusted keys are unless told otherwise.
pub const DEFAULT_KEYS: &str = "/etc/asap/keys";
/// How long a background agent stays without a target unless told otherwise.
pub const DEFAULT_IDLE_EXIT: Duration = Duration::from_secs(10);

/// Makes the engine, on the thread that it will live on.
pub type OperationsFactory = Box<dyn FnOnce() -> Box<dyn Operations> + Send>;

/// How an agent runs.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Where it listens.
    pub socket: PathBuf,
    /// Its audit log.
    pub log: PathBuf,
    /// The journal's socket, for a copy of the audit log; none: no copy.
    pub journal: Option<PathBuf>,
    /// Folder of the public keys whose signatures are trusted.
    pub keys: PathBuf,
    /// Accept signed patches only.
    pub require_signature: bool,
    /// End after so long without a target and without a client; none: stay.
    pub idle_exit: Option<Duration>,
}
