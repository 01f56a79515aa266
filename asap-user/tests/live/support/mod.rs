//! What the tests of this crate work with: a laboratory with an agent of its own, fixtures to talk to, and snapshots of what a
//! process looks like from outside. No test here trusts what asap says of itself where it can be seen otherwise.

mod fixture;
mod lab;
#[allow(dead_code)]
#[path = "../../../src/random.rs"]
mod random;
mod snapshot;

pub use fixture::{Fixture, Source};
pub use lab::{Answer, Lab, answer as lab_answer, program};
pub use random::Random;
pub use snapshot::{Snapshot, WatchedMaps, maps, memory_at, thread_count};

use std::{
    fs,
    time::{Duration, Instant},
};

/// How long anything may take before a test calls it stuck. Nothing is measured: machines may be slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until something holds.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "still not: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// State and further fields of /proc/PID/stat.
fn stat_fields(pid: i32) -> Vec<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').map(str::to_owned).collect()).unwrap_or_default()
}

/// Whether a process is there and has not ended (zombies have). One whose main thread has ended before the others still holds
/// its files, sockets among them.
pub fn runs(pid: i32) -> bool {
    stat_fields(pid).first().is_some_and(|state| state != "Z" && state != "X") || thread_count(pid) > 1
}

/// Whether a process is stopped (SIGSTOP).
pub fn is_stopped(pid: i32) -> bool {
    stat_fields(pid).first().is_some_and(|state| state == "T")
}

/// Kills the process `pid`, which a test started directly or through its agent.
pub fn kill(pid: i32) {
    assert!(pid > 1, "a pid of a process that was started here");
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
}
