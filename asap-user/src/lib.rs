//! Repairs running programs: replaces functions of a live x86-64 Linux process with repaired ones.
//!
//! Modules depend downwards in this order only: `cli` on `agent` on `engine` on `sandbox`, `quiesce` on `patch`, `image`, `process`,
//! `kernel`. `image`, `patch` and `dbt` are pure: bytes in, plain data out.

pub mod address;
pub mod agent;
pub mod build;
pub mod cancel;
pub mod cli;
pub mod dbt;
pub mod engine;
pub mod fault;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod hex;
pub mod image;
pub mod kernel;
pub mod patch;
pub mod process;
pub mod quiesce;
#[cfg(test)]
mod random;
pub mod report;
pub mod sandbox;
pub mod scope;
pub mod signature;
pub mod watchdog;
