//! Named fault points: places at which a test ends the agent, to prove that the target outlives it (P1). Compiled in with the
//! feature `fault-points` only; otherwise a call is nothing.
//!
//! `ASAP_FAULT=name` or `name:N` kills the agent with SIGKILL when it passes `name` the first (or N-th) time.
//! `ASAP_FAULT_STOP=1` stops it there (SIGSTOP) instead, as a hung agent would.
//! `ASAP_FAULT_LIST=path` appends the name of every point passed to that file.
//! `ASAP_FAULT_PATIENCE=ms` shortens the watchdog's limits, so that tests of hangs take no longer than they must.

use std::time::Duration;

/// A place where the agent may be made to die.
#[cfg(not(feature = "fault-points"))]
#[inline]
pub fn point(_name: &'static str) {}

/// The limit of a critical section.
#[cfg(not(feature = "fault-points"))]
#[must_use]
pub const fn patience(limit: Duration) -> Duration {
    limit
}

/// The limit of a critical section, or a shorter one that a test wants.
#[cfg(feature = "fault-points")]
#[must_use]
pub fn patience(limit: Duration) -> Duration {
    let wanted = std::env::var("ASAP_FAULT_PATIENCE").ok().and_then(|text| text.parse().ok());
    wanted.map_or(limit, |wanted| limit.min(Duration::from_millis(wanted)))
}

/// A place where the agent may be made to die.
#[cfg(feature = "fault-points")]
pub fn point(name: &'static str) {
    use std::{
        io::Write,
        sync::{
            OnceLock,
            atomic::{AtomicU32, Ordering},
        },
    };
    static FAULT: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static PASSED: AtomicU32 = AtomicU32::new(0);
    static LIST: OnceLock<Option<std::path::PathBuf>> = OnceLock::new();
    let fault = FAULT.get_or_init(|| {
        let text = std::env::var("ASAP_FAULT").ok()?;
        Some(match text.split_once(':') {
            Some((name, count)) => (name.to_owned(), count.parse().unwrap_or(1)),
            None => (text, 1),
        })
    });
    if let Some(path) = LIST.get_or_init(|| std::env::var_os("ASAP_FAULT_LIST").map(Into::into))
        && let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = writeln!(file, "{name}");
    }
    if let Some((wanted, count)) = fault
        && wanted == name
        && PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *count
    {
        let signal = if std::env::var_os("ASAP_FAULT_STOP").is_some() { libc::SIGSTOP } else { libc::SIGKILL };
        // To this thread: sent to the process, another thread may take it, and this one goes on for a while.
        // SAFETY: no memory is involved; the process ends or stops here.
        unsafe { libc::raise(signal) };
    }
}
