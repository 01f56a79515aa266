//! Named fault points: places at which a test ends the agent, stops it, has a call fail, or does something to the target meanwhile,
//! to prove that the target outlives it all (P1). Compiled in with the feature `fault-points` only; otherwise a call is nothing.
//!
//! A [`point`] lies between two steps of the agent. A [`touch`] is a call by which the agent touches a target, a file or a socket;
//! it can fail as well. `ASAP_FAULT=name` or `name:N` means the first (or N-th) pass of `name`; `ASAP_FAULT_DO` says what happens
//! there: `kill` (SIGKILL, also if nothing is said), `stop` (SIGSTOP, as a hung agent would), `error N` (a touch fails with that
//! error number; beside the file that `ASAP_FAULT_MEET` names one with the ending `failed` is made), or `meet` (the file that
//! `ASAP_FAULT_MEET` names is made, and all waits until it is gone). `ASAP_FAULT_STOP=1` is
//! `stop`, too.
//!
//! `ASAP_FAULT_LIST=path` appends the name of every point passed to that file, `ASAP_FAULT_TOUCHES=path` that of every touch.
//! `ASAP_FAULT_PATIENCE=ms` shortens the watchdog's limits, so that tests of hangs take no longer than they must.

use std::time::Duration;

/// A place where the agent may be made to die.
#[cfg(not(feature = "fault-points"))]
#[inline]
pub fn point(_name: &'static str) {}

/// A place where the agent may be made to die, and a call may be made to fail.
///
/// # Errors
/// A test wants one.
#[cfg(not(feature = "fault-points"))]
#[inline]
pub fn touch(_name: &'static str) -> std::io::Result<()> {
    Ok(())
}

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

#[cfg(feature = "fault-points")]
pub use wanted::{point, touch};

#[cfg(feature = "fault-points")]
mod wanted {
    use std::{
        fs, io,
        io::Write,
        path::PathBuf,
        sync::{
            OnceLock,
            atomic::{AtomicU32, Ordering},
        },
        time::{Duration, Instant},
    };

    /// What happens at a point.
    #[derive(Debug)]
    enum Deed {
        Kill,
        Stop,
        Error(i32),
        Meet(PathBuf),
    }

    /// What the environment asks for.
    #[derive(Debug)]
    struct Wanted {
        name: String,
        pass: u32,
        deed: Deed,
    }

    impl Wanted {
        fn of_environment() -> Option<Self> {
            let text = std::env::var("ASAP_FAULT").ok()?;
            let (name, pass) = match text.split_once(':') {
                Some((name, pass)) => (name.to_owned(), pass.parse().unwrap_or(1)),
                None => (text, 1),
            };
            let said = std::env::var("ASAP_FAULT_DO").unwrap_or_default();
            let deed = match said.split_once(' ') {
                Some(("error", number)) => Deed::Error(number.parse().unwrap_or(libc::EIO)),
                _ if said == "meet" => Deed::Meet(std::env::var_os("ASAP_FAULT_MEET")?.into()),
                _ if said == "stop" || std::env::var_os("ASAP_FAULT_STOP").is_some() => Deed::Stop,
                _ => Deed::Kill,
            };
            Some(Self { name, pass, deed })
        }
    }

    static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
    static PASSED: AtomicU32 = AtomicU32::new(0);

    /// A place where the agent may be made to die.
    pub fn point(name: &'static str) {
        static LIST: OnceLock<Option<PathBuf>> = OnceLock::new();
        list(&LIST, "ASAP_FAULT_LIST", name);
        let _ = pass(name);
    }

    /// A place where the agent may be made to die, and a call may be made to fail.
    ///
    /// # Errors
    /// A test wants one.
    pub fn touch(name: &'static str) -> io::Result<()> {
        static TOUCHES: OnceLock<Option<PathBuf>> = OnceLock::new();
        list(&TOUCHES, "ASAP_FAULT_TOUCHES", name);
        pass(name)
    }

    fn list(place: &OnceLock<Option<PathBuf>>, variable: &str, name: &str) {
        if let Some(path) = place.get_or_init(|| std::env::var_os(variable).map(Into::into))
            && let Ok(mut file) = fs::OpenOptions::new().append(true).create(true).open(path)
        {
            let _ = file.write_all(format!("{name}\n").as_bytes());
        }
    }

    fn pass(name: &str) -> io::Result<()> {
        let Some(wanted) = WANTED.get_or_init(Wanted::of_environment) else { return Ok(()) };
        if wanted.name != name || PASSED.fetch_add(1, Ordering::Relaxed) + 1 != wanted.pass {
            return Ok(());
        }
        // To this thread: sent to the process, another thread may take it, and this one goes on for a while.
        let raise = |signal| {
            // SAFETY: no memory is involved; the process ends or stops here.
            unsafe { libc::raise(signal) };
        };
        match &wanted.deed {
            Deed::Kill => raise(libc::SIGKILL),
            Deed::Stop => raise(libc::SIGSTOP),
            Deed::Error(number) => {
                if let Some(place) = std::env::var_os("ASAP_FAULT_MEET") {
                    let _ = fs::write(PathBuf::from(place).with_extension("failed"), name);
                }
                return Err(io::Error::from_raw_os_error(*number));
            }
            Deed::Meet(place) => {
                let began = Instant::now();
                let _ = fs::write(place, name);
                while place.exists() && began.elapsed() < Duration::from_secs(30) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        Ok(())
    }
}
