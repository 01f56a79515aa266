//! Debian's own Apache with a private configuration: event MPM, three children of 25 threads as www-data, a loopback port.

use crate::{http, owned::Owned};
use anyhow::{Context, Result, ensure};
use asap::process::info;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

/// The program.
const PROGRAM: &str = "/usr/sbin/apache2";
/// Length of the file that is served, bytes.
pub const FILE_LENGTH: usize = 287_000;
/// Its path.
pub const FILE: &str = "/file.bin";
/// Child processes.
pub const CHILDREN: usize = 3;
/// Threads that serve, in each of them; a few more listen and manage.
pub const THREADS: usize = 25;

/// A running Apache; ends with this value.
pub struct Apache {
    parent: Owned,
    log: PathBuf,
    /// One line for each request for ranges: the process that answered.
    ranges_log: PathBuf,
    configuration: PathBuf,
    /// Where it listens.
    pub address: SocketAddr,
}

/// What is served: bytes that depend on where they are.
pub fn contents() -> Vec<u8> {
    (0..FILE_LENGTH).map(|n| b'a' + (n * 7 % 26) as u8).collect()
}

impl Apache {
    /// Starts it in `directory`, which must be new, and waits until all children serve.
    pub fn start(directory: &Path) -> Result<Self> {
        // www-data must get at what it serves.
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
        let root = directory.join("htdocs");
        fs::create_dir(&root)?;
        fs::write(root.join(FILE.trim_start_matches('/')), contents())?;
        // Free at this moment; should somebody take it before Apache does, Apache says so and we fail.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let modules = "/usr/lib/apache2/modules";
        let (at, log) = (directory.display(), directory.join("error.log"));
        let ranges_log = directory.join("ranges.log");
        let (root, most) = (root.display(), CHILDREN * THREADS);
        let configuration = format!(
            "ServerRoot {at}\nServerName localhost\nListen {address}\nPidFile {at}/pid\nErrorLog {log}\n\
             Mutex file:{at} default\n\
             LoadModule mpm_event_module {modules}/mod_mpm_event.so\n\
             LoadModule authz_core_module {modules}/mod_authz_core.so\n\
             User www-data\nGroup www-data\nDocumentRoot {root}\n\
             <Directory {root}>\nRequire all granted\n</Directory>\n\
             StartServers {CHILDREN}\nServerLimit {CHILDREN}\nThreadsPerChild {THREADS}\nThreadLimit {THREADS}\n\
             MaxRequestWorkers {most}\nMinSpareThreads {most}\nMaxSpareThreads {most}\n\
             KeepAlive On\nMaxKeepAliveRequests 0\nKeepAliveTimeout 30\n\
             CustomLog {ranges_log} %P \"expr=-n %{{HTTP:Range}}\"\n\
             MaxRanges unlimited\nMaxRangeOverlaps unlimited\nMaxRangeReversals unlimited\n",
            log = log.display(),
            ranges_log = ranges_log.display(),
        );
        let file = directory.join("apache.conf");
        fs::write(&file, configuration)?;
        let parent = spawn(&file)?;
        let mut apache = Self { parent, log, ranges_log, configuration: file, address };
        apache.wait_until_it_serves()?;
        Ok(apache)
    }

    fn wait_until_it_serves(&mut self) -> Result<()> {
        let address = self.address;
        self.wait_until("serves with all children", |parent| {
            workers(parent).len() == CHILDREN && http::get(address, FILE, &[]).is_ok_and(|a| a.status == 200)
        })
    }

    /// Stops it as Debian's unit does, when what is being answered has been, and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        kill(Pid::from_raw(self.pid()), Signal::SIGWINCH).context("apache2 can't be signalled")?;
        self.parent.wait()?;
        self.parent = spawn(&self.configuration)?;
        self.wait_until_it_serves()
    }

    fn wait_until(&mut self, what: &str, holds: impl Fn(i32) -> bool) -> Result<()> {
        let (pid, log) = (self.pid(), self.log.clone());
        let words = || fs::read_to_string(&log).unwrap_or_default();
        self.parent.until(what, || holds(pid), words).context("apache2")
    }

    /// Process id of the parent.
    pub fn pid(&self) -> i32 {
        self.parent.pid()
    }

    /// Its worker processes with all their threads.
    pub fn children(&self) -> Vec<i32> {
        workers(self.pid())
    }

    /// The parent and its workers.
    pub fn processes(&self) -> Vec<i32> {
        self.children().into_iter().chain([self.pid()]).collect()
    }

    /// The processes that have answered requests for ranges, since the last [`Self::forget_ranges`].
    pub fn answered_ranges(&self) -> Result<BTreeSet<i32>> {
        let text = fs::read_to_string(&self.ranges_log).context("Apache's log of range requests")?;
        Ok(text.lines().filter_map(|line| line.trim().parse().ok()).collect())
    }

    /// Forgets which processes have answered requests for ranges.
    pub fn forget_ranges(&self) -> Result<()> {
        // A request is logged after its answer: what was answered just now is still to come.
        std::thread::sleep(Duration::from_millis(200));
        // Apache appends: an emptied log is filled from its beginning.
        fs::write(&self.ranges_log, "").context("Apache's log of range requests")
    }

    /// Tells it to replace all children, and waits until it has.
    pub fn restart_gracefully(&mut self) -> Result<()> {
        let old = self.children();
        kill(Pid::from_raw(self.pid()), Signal::SIGUSR1).context("apache2 can't be signalled")?;
        self.wait_until("has replaced its children", |parent| {
            let new = workers(parent);
            new.len() == CHILDREN
                && new.iter().all(|pid| !old.contains(pid))
                && old.iter().all(|&pid| threads(pid) == 0)
        })
    }
}

fn spawn(configuration: &Path) -> Result<Owned> {
    let mut apache = Command::new(PROGRAM);
    Owned::spawn(apache.args(["-DFOREGROUND", "-f"]).arg(configuration).stdin(Stdio::null()).stdout(Stdio::null()))
}

fn workers(parent: i32) -> Vec<i32> {
    // A helper of asap's is a child, too, but not a worker: it has one thread.
    info::children(parent).into_iter().filter(|&child| threads(child) > THREADS).collect()
}

/// Number of threads of a process.
fn threads(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// The user whom a process runs as.
pub fn user(pid: i32) -> Result<String> {
    let id = fs::metadata(format!("/proc/{pid}"))?.uid();
    let user = nix::unistd::User::from_uid(id.into())?;
    Ok(user.with_context(|| format!("user {id} has no name"))?.name)
}

/// The program's version, and that it is Debian's own file.
pub fn version() -> Result<String> {
    let output = Command::new(PROGRAM).arg("-v").output().context("apache2 can't be started")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_ascii_whitespace().find_map(|word| word.strip_prefix("Apache/"));
    let version = version.with_context(|| format!("apache2 -v said {text}"))?.to_owned();
    let verify = Command::new("dpkg").args(["--verify", "apache2-bin"]).output().context("dpkg can't be started")?;
    let differences = String::from_utf8_lossy(&verify.stdout);
    ensure!(!differences.contains(PROGRAM), "{PROGRAM} is not the file of its package: {differences}");
    Ok(version)
}
