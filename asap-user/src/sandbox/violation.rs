//! What a guard has met.

use super::policy::Guard;
use serde::{Deserialize, Serialize};

/// A guard has stopped a thread that was about to do what it must not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// When, milliseconds since the epoch.
    pub time_ms: u64,
    /// Process.
    pub pid: i32,
    /// Thread.
    pub tid: i32,
    /// Which guard.
    pub guard: Guard,
    /// Where: address, and symbol where one is known.
    pub at: String,
    /// What was attempted.
    pub attempted: String,
    /// What was done about it.
    pub action: String,
    /// The stack, innermost first.
    pub stack: Vec<String>,
}
