//! Processes and folders of a run: they end with it, whichever way it ends. Signals are sent by pid, to processes that were
//! started here and have not been waited for yet: such a pid can't have been given to anybody else.

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{SigSet, Signal, kill, killpg},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};
use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long a process is given to end by itself.
const GRACE: Duration = Duration::from_secs(5);

/// What must not outlive us.
#[derive(Default)]
struct Registry {
    children: Vec<Pid>,
    folders: Vec<PathBuf>,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry { children: Vec::new(), folders: Vec::new() });

fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on SIGINT, SIGTERM and SIGHUP end what this run has started before they end the run. To be called before any
/// thread is made.
pub fn clean_up_on_signals() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    // Children inherit this, unless they are told to hear signals.
    signals.thread_block().context("signals can't be blocked")?;
    std::thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        // Held until the end: nobody else waits for a child, or starts one, any more.
        let registry = registry();
        for &child in registry.children.iter().rev() {
            end(child);
        }
        for folder in &registry.folders {
            let _ = std::fs::remove_dir_all(folder);
        }
        std::process::exit(128 + signal as i32);
    });
    Ok(())
}

/// Ends a child that has not been waited for, and does not wait for it: the pid stays its own.
fn end(child: Pid) {
    let ended = || {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        !matches!(waitid(Id::Pid(child), flags), Ok(WaitStatus::StillAlive))
    };
    let _ = kill(child, Signal::SIGTERM);
    let deadline = Instant::now() + GRACE;
    while !ended() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    if !ended() {
        let _ = kill(child, Signal::SIGKILL);
    }
    // Whoever it has left behind. The group is its own (see `spawn`), and keeps its number as long as the child is not waited for.
    let _ = killpg(child, Signal::SIGKILL);
}

/// A process that ends with this value, and with us.
pub struct Owned(Child);

impl Owned {
    /// Starts it, in a process group of its own: servers signal their whole group when they end, and that is not to be ours.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let us = nix::unistd::getpid();
        command.process_group(0);
        crate::command::hear_signals(command);
        // SAFETY: between fork and exec only system calls are made; nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                // Even if we are killed outright, it gets its signal.
                prctl::set_pdeathsig(Signal::SIGTERM)?;
                if nix::unistd::getppid() == us { Ok(()) } else { Err(Errno::ESRCH.into()) }
            });
        }
        let mut registry = registry();
        let child = command.spawn().with_context(|| format!("{program} can't be started"))?;
        let owned = Self(child);
        registry.children.push(owned.id());
        Ok(owned)
    }

    fn id(&self) -> Pid {
        Pid::from_raw(self.pid())
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// Its standard input, once.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.0.stdin.take()
    }

    /// Its standard output, once.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.0.stdout.take()
    }

    /// Waits until something holds, 20 s at most. `words` are what the process has said of itself, for the error when it ends or
    /// does not come to it.
    pub fn until(&mut self, what: &str, mut holds: impl FnMut() -> bool, words: impl Fn() -> String) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            if let Some(status) = self.ended()? {
                bail!("it ended with {status} before it {what}: {}", words());
            }
            ensure!(Instant::now() < deadline, "still not: it {what}: {}", words());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let mut registry = registry();
        let status = self.0.try_wait()?;
        if status.is_some() {
            let id = self.id();
            registry.children.retain(|&child| child != id);
        }
        Ok(status)
    }

    /// Waits for its own end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let mut registry = registry();
        let id = self.id();
        if let Some(at) = registry.children.iter().position(|&child| child == id) {
            end(id);
            let _ = self.0.wait();
            registry.children.swap_remove(at);
        }
    }
}

/// A folder for files of this run.
pub struct Folder {
    directory: Option<tempfile::TempDir>,
    path: PathBuf,
}

impl Folder {
    /// Makes it.
    pub fn new(prefix: &str) -> Result<Self> {
        let mut registry = registry();
        let directory = tempfile::Builder::new().prefix(prefix).tempdir().context("a temporary folder")?;
        let path = directory.path().to_owned();
        registry.folders.push(path.clone());
        Ok(Self { directory: Some(directory), path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves it to the user.
    pub fn keep(&mut self) {
        registry().folders.retain(|folder| *folder != self.path);
        if let Some(directory) = self.directory.take() {
            let _ = directory.keep();
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Removed while the registry is locked: a signal finds it either whole or gone.
        let mut registry = registry();
        self.directory = None;
        registry.folders.retain(|folder| *folder != self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;

    #[test]
    fn a_process_and_its_group_end_with_the_value() {
        // The shell ends when told to, and leaves a child behind.
        let mut shell = Command::new("sh");
        shell.args(["-c", "sleep 100 & echo $!; trap 'exit 0' TERM; wait"]).stdout(Stdio::piped());
        let mut owned = Owned::spawn(&mut shell).expect("a shell");
        let mut line = String::new();
        let output = owned.stdout().expect("a pipe");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).expect("a line");
        let grandchild: i32 = line.trim().parse().expect("a pid");
        assert!(Path::new(&format!("/proc/{grandchild}")).exists());
        drop(owned);
        let state = || std::fs::read_to_string(format!("/proc/{grandchild}/stat")).unwrap_or_default();
        let deadline = Instant::now() + GRACE;
        // It may stay as a zombie where nobody reaps orphans.
        while !state().is_empty() && !state().contains(") Z ") {
            assert!(Instant::now() < deadline, "still there: {}", state());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn an_end_is_seen_once_and_told() {
        let mut owned = Owned::spawn(Command::new("sh").args(["-c", "exit 3"])).expect("a shell");
        assert_eq!(owned.wait().expect("an end").code(), Some(3));
        assert!(owned.wait().is_ok_and(|status| status.code() == Some(3)), "told again");
    }

    #[test]
    fn a_folder_goes_unless_it_is_kept() {
        let folder = Folder::new("asap-xtask-test-").expect("a folder");
        let path = folder.path().to_owned();
        drop(folder);
        assert!(!path.exists());
        let mut kept = Folder::new("asap-xtask-test-").expect("a folder");
        kept.keep();
        let path = kept.path().to_owned();
        drop(kept);
        assert!(path.exists());
        std::fs::remove_dir(path).expect("an empty folder");
    }
}
