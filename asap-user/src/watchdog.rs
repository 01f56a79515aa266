//! Ends the agent when a critical section takes too long, so that promise P1 frees the targets: a gate stays closed, and a
//! thread stays stopped, no longer than the section allows, even if the agent hangs or is stopped. The agent starts the
//! watchdog; what holds up threads of a target opens the sections.
//!
//! The watchdog is a process, a child of the agent, because a thread would be stopped together with the agent. The two share
//! one page; the agent writes deadlines there, the watchdog sleeps on a futex in it until the nearest one. At rest neither
//! does anything. A guard costs two stores, and a wake-up only where the watchdog would otherwise sleep too long.

use nix::{
    sys::{
        mman::{MapFlags, ProtFlags, mmap_anonymous, munmap},
        signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask},
        wait::waitpid,
    },
    unistd::{ForkResult, Pid, fork, getpid, getppid},
};
use std::{
    io,
    mem::size_of,
    num::NonZeroUsize,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

/// Critical sections that can be open at a time, over all threads and nesting levels.
const SLOTS: usize = 32;
/// No deadline.
const NEVER: u64 = u64::MAX;
/// Bytes of a section's name that are kept for the message.
const NAME: usize = 32;

/// What agent and watchdog share.
#[repr(C)]
struct Page {
    /// Grows with every deadline; the futex.
    changes: AtomicU32,
    /// Until when the watchdog sleeps unless woken.
    asleep_until: AtomicU64,
    slots: [Slot; SLOTS],
}

#[repr(C)]
struct Slot {
    /// When the section must have ended, in nanoseconds of CLOCK_MONOTONIC; NEVER: free.
    deadline: AtomicU64,
    name: [AtomicU64; NAME / 8],
}

/// Watches the critical sections of this process.
#[derive(Clone, Debug)]
pub struct Watchdog(Arc<Kennel>);

/// The watchdog of this process, for [`section`].
static CURRENT: Mutex<Weak<Kennel>> = Mutex::new(Weak::new());

/// Opens a critical section under the watchdog that was started last; none: there is no watchdog (in tests of the engine).
pub fn section(name: &str, limit: Duration) -> Option<Guard> {
    let current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner).upgrade()?;
    Some(Watchdog(current).guard(name, crate::fault::patience(limit)))
}

#[derive(Debug)]
struct Kennel {
    page: NonNull<Page>,
    watcher: Pid,
}

// SAFETY: the page consists of atomics and stays mapped until the last handle is gone.
unsafe impl Send for Kennel {}
// SAFETY: as above.
unsafe impl Sync for Kennel {}

/// A critical section; it ends when this is dropped.
#[derive(Debug)]
#[must_use = "the section ends where the guard is dropped"]
pub struct Guard {
    watchdog: Watchdog,
    slot: Option<usize>,
}

impl Watchdog {
    /// Starts the watchdog. To be called on a thread that lives as long as the process does: its end is taken for the
    /// agent's (prctl(2), PR_SET_PDEATHSIG), and best before other threads exist.
    ///
    /// # Errors
    /// No memory or process was to be had.
    pub fn start() -> io::Result<Self> {
        let length = NonZeroUsize::new(size_of::<Page>()).expect("a page has a size");
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED)
        }?;
        let page = memory.cast::<Page>();
        {
            // SAFETY: the mapping is large enough, page-aligned, zeroed, and nobody else knows it; atomics may be zero.
            let page = unsafe { page.as_ref() };
            page.asleep_until.store(NEVER, SeqCst);
            page.slots.iter().for_each(|slot| slot.deadline.store(NEVER, SeqCst));
        }
        let agent = getpid();
        // SAFETY: the child makes system calls on memory that it has, allocates nothing, and never returns.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                // SAFETY: as above; the copy of the shared mapping is this child's own.
                let page = unsafe { page.as_ref() };
                let _ = watch(page, agent);
                // SAFETY: ends this process at once, without the agent's exit handlers.
                unsafe { libc::_exit(0) }
            }
            Ok(ForkResult::Parent { child }) => {
                let kennel = Arc::new(Kennel { page, watcher: child });
                *CURRENT.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&kennel);
                Ok(Self(kennel))
            }
            Err(error) => {
                // SAFETY: nobody else knows the mapping.
                let _ = unsafe { munmap(memory, length.get()) };
                Err(error.into())
            }
        }
    }

    /// Opens a critical section: if the guard is not dropped within `limit`, this process is killed.
    pub fn guard(&self, name: &str, limit: Duration) -> Guard {
        let page = self.0.page();
        let deadline = now().saturating_add(u64::try_from(limit.as_nanos()).unwrap_or(NEVER)).min(NEVER - 1);
        let slot = page.slots.iter().position(|slot| slot.claim(name, deadline));
        if slot.is_none() {
            tracing::warn!(name, "more critical sections at a time than the watchdog can watch");
        }
        page.changes.fetch_add(1, SeqCst);
        if page.asleep_until.load(SeqCst) > deadline {
            wake(&page.changes);
        }
        Guard { watchdog: self.clone(), slot }
    }

    /// The watchdog's process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.0.watcher.as_raw()
    }
}

impl Slot {
    /// Takes this slot unless it is in use.
    fn claim(&self, name: &str, deadline: u64) -> bool {
        // Claimed with a deadline that can't pass, so that no half-written name is ever reported.
        if self.deadline.compare_exchange(NEVER, NEVER - 1, SeqCst, SeqCst).is_err() {
            return false;
        }
        let mut bytes = [0; NAME];
        let length = name.len().min(NAME);
        bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
        for (word, bytes) in self.name.iter().zip(bytes.chunks_exact(8)) {
            word.store(u64::from_ne_bytes(bytes.try_into().expect("chunks of eight")), SeqCst);
        }
        self.deadline.store(deadline, SeqCst);
        true
    }
}

impl Kennel {
    fn page(&self) -> &Page {
        // SAFETY: mapped and initialised by `start`, unmapped by `drop` only.
        unsafe { self.page.as_ref() }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            // The watchdog need not know: when its sleep ends it finds nothing to do.
            self.watchdog.0.page().slots[slot].deadline.store(NEVER, SeqCst);
        }
    }
}

impl Drop for Kennel {
    fn drop(&mut self) {
        let _ = kill(self.watcher, Signal::SIGKILL);
        let _ = waitpid(self.watcher, None);
        // SAFETY: this was the last handle in this process.
        let _ = unsafe { munmap(self.page.cast(), size_of::<Page>()) };
    }
}

/// The life of the watchdog process.
fn watch(page: &Page, agent: Pid) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != agent {
        return Ok(());
    }
    nix::sys::prctl::set_name(c"asap-watchdog")?;
    // Signals to the agent's terminal or control group are not meant for this process.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    // SAFETY: nothing in this process uses a descriptor of the agent any more; locks must not outlive the agent here.
    unsafe { libc::close_range(3, u32::MAX, 0) };
    // SAFETY: a plain system call; the result is checked.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, agent.as_raw(), 0) };
    if pidfd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
    loop {
        let seen = page.changes.load(SeqCst);
        let nearest = page.slots.iter().map(|slot| slot.deadline.load(SeqCst)).min().unwrap_or(NEVER);
        let time = now();
        if nearest <= time {
            return end_agent(page, nearest, &pidfd);
        }
        page.asleep_until.store(nearest, SeqCst);
        sleep_until(&page.changes, seen, (nearest < NEVER - 1).then(|| nearest - time));
    }
}

/// Kills the agent and says so on its standard error.
fn end_agent(page: &Page, deadline: u64, pidfd: &OwnedFd) -> io::Result<()> {
    // Not to end together with the agent, before the message is out.
    // SAFETY: a plain system call.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, 0) };
    // SAFETY: a plain system call on a descriptor of ours. SIGKILL also ends a stopped process.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, 0, 0) };
    let mut name = [0; NAME];
    if let Some(slot) = page.slots.iter().find(|slot| slot.deadline.load(SeqCst) == deadline) {
        for (bytes, word) in name.chunks_exact_mut(8).zip(&slot.name) {
            bytes.copy_from_slice(&word.load(SeqCst).to_ne_bytes());
        }
    }
    let length = name.iter().position(|&byte| byte == 0).unwrap_or(NAME);
    for part in [&b"asap watchdog: ended the agent, it was too long in its section \""[..], &name[..length], b"\"\n"] {
        let _ = nix::unistd::write(io::stderr(), part);
    }
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Nanoseconds of CLOCK_MONOTONIC, which is the same for all processes.
fn now() -> u64 {
    let time =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap_or(nix::sys::time::TimeSpec::new(0, 0));
    (time.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec() as u64)
}

/// Sleeps until woken, unless `changes` is no longer `seen`, and not longer than `nanoseconds`.
fn sleep_until(changes: &AtomicU32, seen: u32, nanoseconds: Option<u64>) {
    let limit = nanoseconds.map(|n| libc::timespec {
        tv_sec: i64::try_from(n / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: (n % 1_000_000_000) as i64,
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word and the time outlive the call; a shared futex, since two processes use it (futex(2)).
    unsafe { libc::syscall(libc::SYS_futex, changes.as_ptr(), libc::FUTEX_WAIT, seen, limit, 0, 0) };
}

fn wake(changes: &AtomicU32) {
    // SAFETY: the word outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, changes.as_ptr(), libc::FUTEX_WAKE, 1, 0, 0, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        os::unix::process::ExitStatusExt,
        process::{Command, Output},
        time::Instant,
    };

    /// Runs `scene` of this very test program as a process of its own, since that process is to be killed.
    fn play(scene: &str) -> (Output, Duration) {
        let started = Instant::now();
        let output = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "watchdog::tests::scene", "--nocapture"])
            .env("ASAP_TEST_SCENE", scene)
            .output()
            .expect("a second test process");
        (output, started.elapsed())
    }

    #[test]
    fn scene() {
        let Ok(scene) = std::env::var("ASAP_TEST_SCENE") else { return };
        let watchdog = Watchdog::start().expect("a watchdog");
        match scene.as_str() {
            "stopped" => {
                let _guard = section("gate", Duration::from_millis(300)).expect("a watchdog was started");
                nix::sys::signal::raise(Signal::SIGSTOP).expect("stop");
                unreachable!("nobody continues this process");
            }
            "hung" => {
                // The nearer of two deadlines counts, also when the watchdog already sleeps towards the other.
                let _outer = watchdog.guard("patch", Duration::from_secs(100));
                std::thread::sleep(Duration::from_millis(100));
                let _inner = watchdog.guard("stack check", Duration::from_millis(200));
                std::thread::sleep(Duration::from_secs(100));
            }
            "in time" => {
                for _ in 0..50 {
                    drop(watchdog.guard("gate", Duration::from_millis(200)));
                }
                std::thread::sleep(Duration::from_millis(500));
                println!("alive");
            }
            other => panic!("no scene {other}"),
        }
    }

    #[test]
    fn a_stopped_agent_is_killed_within_the_limit() {
        let (output, took) = play("stopped");
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{output:?}");
        assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(10), "{took:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("too long in its section \"gate\""), "{said}");
    }

    #[test]
    fn a_hung_agent_is_killed_at_the_nearest_deadline() {
        let (output, took) = play("hung");
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{output:?}");
        assert!(took < Duration::from_secs(20), "{took:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("\"stack check\""), "{output:?}");
    }

    #[test]
    fn sections_that_end_in_time_are_left_alone() {
        let (output, _) = play("in time");
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("alive"));
    }

    #[test]
    fn the_watchdog_ends_with_its_last_handle() {
        let watchdog = Watchdog::start().expect("a watchdog");
        let pid = watchdog.pid();
        let second = watchdog.clone();
        drop(watchdog);
        kill(Pid::from_raw(pid), None).expect("still there");
        drop(second);
        assert_eq!(kill(Pid::from_raw(pid), None), Err(nix::errno::Errno::ESRCH));
    }
}
