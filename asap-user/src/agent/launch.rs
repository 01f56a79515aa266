//! Starting an agent that stays behind. The client runs this same program again as `asap agent --background`; that process
//! detaches itself from terminal and session, and reports over a pipe when clients can connect, or why they can't. Its control
//! group is left as it is: what limits and accounts for the caller does so for the agent.

use super::AgentOptions;
use crate::report::Failure;
use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{SigSet, SigmaskHow, sigprocmask},
    unistd::{ForkResult, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe2, setsid},
};
use serde::Deserialize;
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::AsFd,
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            fs::OpenOptionsExt,
            net::{SocketAddr, UnixDatagram, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What comes over the pipe when all is well; else a failure as JSON.
const READY: &[u8] = b"+";
/// How long a new agent may take to open its socket. It waits for one that is just ending, so this is more than that.
const START_PATIENCE_MS: u16 = 15_000;

/// Starts an agent in the background and waits until clients can connect. If another client is faster, its agent is used.
///
/// # Errors
/// The agent could not be run, or said why it can't stay.
pub fn start(options: &AgentOptions) -> Result<(), Failure> {
    let failed = |why: String| Failure::refused(why, "run `asap agent --verbose` to see what happens");
    let output = Command::new("/proc/self/exe")
        .arg0("asap")
        .args(["agent", "--background", "--json", "--socket"])
        .arg(&options.socket)
        .arg("--log")
        .arg(&options.log)
        .arg("--keys")
        .arg(&options.keys)
        .args(options.require_signature.then_some("--require-signature"))
        .arg("--idle-exit")
        .arg(options.idle_exit.map_or_else(|| "0".to_owned(), |limit| format!("{}ms", limit.as_millis())))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(format!("the agent can't be started: {error}")))?;
    // Two clients that start an agent at the same time end with one: the loser's client talks to the winner's agent.
    if output.status.success() || UnixStream::connect(&options.socket).is_ok() {
        return Ok(());
    }
    let refusal = serde_json::from_slice::<Refusal>(&output.stdout).map(|refusal| refusal.failed);
    Err(refusal.unwrap_or_else(|_| {
        let said = String::from_utf8_lossy(&output.stderr);
        failed(format!("the agent ended at once ({}) {}", output.status, said.trim()))
    }))
}

/// How a command that fails says so with `--json`.
#[derive(Deserialize)]
struct Refusal {
    failed: Failure,
}

/// Where a background agent's standard error goes: beside its audit log.
#[must_use]
pub fn message_log(audit: &Path) -> PathBuf {
    audit.with_file_name("agent.log")
}

/// Which process this is, after [`detach`].
#[derive(Debug)]
pub enum Detached {
    /// The one that was started; the agent has reported.
    Starter(Result<(), Failure>),
    /// The agent to be.
    Agent(Herald),
}

/// The way by which a detached agent tells the process that was started whether it got going.
#[derive(Debug)]
pub struct Herald {
    pipe: File,
}

/// Detaches: returns as [`Detached::Agent`] in a new process of a new session with nothing on its standard streams, and as
/// [`Detached::Starter`] in the process that was started, once the agent has said whether it got going.
///
/// To be called while this is the only thread and has no files open.
///
/// # Errors
/// No pipe or process was to be had.
pub fn detach(message_log: &Path) -> io::Result<Detached> {
    // What the caller left open (a lock, a pipe) must not live as long as the agent.
    // SAFETY: no descriptor of this program is open yet, says the contract.
    unsafe { libc::close_range(3, u32::MAX, 0) };
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    // SAFETY: there is one thread, so the child may do what it likes.
    if let ForkResult::Parent { .. } = unsafe { fork() }? {
        drop(writer);
        return Ok(Detached::Starter(wait_for_news(File::from(reader))));
    }
    drop(reader);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    setsid()?;
    // Once more, so that the agent leads no session and can't be given a terminal.
    // SAFETY: as above.
    if let ForkResult::Parent { .. } = unsafe { fork() }? {
        std::process::exit(0);
    }
    chdir("/")?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    // Nothing of the caller's is held from here on, by the watchdog neither: the caller may be waiting for its pipes to close.
    let messages = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(message_log);
    dup2_stderr(messages.as_ref().unwrap_or(&null))?;
    Ok(Detached::Agent(Herald { pipe: File::from(writer) }))
}

impl Herald {
    /// Clients can connect.
    pub fn ready(mut self) {
        let _ = self.pipe.write_all(READY);
    }

    /// The agent can't stay.
    pub fn failed(mut self, failure: &Failure) {
        let _ = serde_json::to_writer(&mut self.pipe, failure);
    }
}

fn wait_for_news(mut news: File) -> Result<(), Failure> {
    let failed = |why: String| Err(Failure::refused(why, "run `asap agent --verbose` to see what happens"));
    let waited = loop {
        match poll(&mut [PollFd::new(news.as_fd(), PollFlags::POLLIN)], PollTimeout::from(START_PATIENCE_MS)) {
            Err(Errno::EINTR) => {}
            other => break other,
        }
    };
    if waited == Ok(0) {
        return failed(format!("the agent did not open its socket within {} s", START_PATIENCE_MS / 1000));
    }
    let mut text = Vec::new();
    let _ = news.read_to_end(&mut text);
    if text == READY {
        return Ok(());
    }
    match serde_json::from_slice(&text) {
        Ok(failure) => Err(failure),
        Err(_) => failed("the agent ended before it opened its socket".to_owned()),
    }
}

/// Tells a service manager that clients can connect (sd_notify(3)), if there is one that wants to know.
pub fn notify_service_manager() {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager could not be told that the agent is ready");
    }
}
