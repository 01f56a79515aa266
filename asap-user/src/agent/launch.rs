//! Starting an agent that stays behind. The client runs this same program again as `asap agent --background`; that process
//! detaches itself from terminal and session, and reports over a pipe when clients can connect, or why they can't. Its control
//! group is left as it is: what limits and accounts for the caller does so for the agent.

use super::AgentOptions;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{ForkResult, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe2, setsid},
};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::AsFd,
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// How long a new agent may take to open its socket. It waits for one that is just ending, so this is more than that.
const START_PATIENCE_MS: u16 = 15_000;

/// No agent could be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The program could not be run again.
    #[error("the agent can't be started: {0}")]
    Run(#[source] io::Error),
    /// It ran and said why it can't stay.
    #[error("{0}")]
    Refused(String),
}

/// Starts an agent in the background and waits until clients can connect. If another client is faster, its agent is used.
///
/// # Errors
/// The agent could not be run, or said why it can't stay.
pub fn start(options: &AgentOptions) -> Result<(), LaunchError> {
    let output = Command::new("/proc/self/exe")
        .arg0("asap")
        .arg("agent")
        .arg("--background")
        .arg("--socket")
        .arg(&options.socket)
        .arg("--log")
        .arg(&options.log)
        .arg("--idle-exit")
        .arg(options.idle_exit.map_or_else(|| "0".to_owned(), |limit| format!("{}ms", limit.as_millis())))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(LaunchError::Run)?;
    // Two clients that start an agent at the same time end with one: the loser's client talks to the winner's agent.
    if output.status.success() || std::os::unix::net::UnixStream::connect(&options.socket).is_ok() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LaunchError::Refused(if said.is_empty() {
        format!("the agent ended at once ({})", output.status)
    } else {
        said
    }))
}

/// Where a background agent's standard error goes: beside its audit log.
#[must_use]
pub fn message_log(audit: &Path) -> PathBuf {
    audit.with_file_name("agent.log")
}

/// The way by which a detached agent tells the process that was started whether it got going.
#[derive(Debug)]
pub struct Herald {
    pipe: File,
}

/// Detaches this process: returns in a new process of a new session, with nothing on its standard streams. The process that was
/// started waits for [`Herald::ready`] or [`Herald::failed`], passes the news on, and ends.
///
/// To be called while this is the only thread.
///
/// # Errors
/// No pipe or process was to be had.
pub fn detach(message_log: &Path) -> io::Result<Herald> {
    let (reader, writer) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // SAFETY: there is one thread, so the child may do what it likes.
    if let ForkResult::Parent { .. } = unsafe { fork() }? {
        drop(writer);
        std::process::exit(pass_on(File::from(reader)));
    }
    drop(reader);
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
    Ok(Herald { pipe: File::from(writer) })
}

impl Herald {
    /// Clients can connect.
    pub fn ready(mut self) {
        let _ = self.pipe.write_all(b"+");
    }

    /// The agent can't stay, because of `why`.
    pub fn failed(mut self, why: &str) {
        let _ = self.pipe.write_all(format!("-{why}\n").as_bytes());
    }
}

/// Waits for news of the agent; the exit status to end with.
fn pass_on(mut news: File) -> i32 {
    let mut text = String::new();
    let waited = loop {
        match poll(&mut [PollFd::new(news.as_fd(), PollFlags::POLLIN)], PollTimeout::from(START_PATIENCE_MS)) {
            Err(Errno::EINTR) => {}
            other => break other,
        }
    };
    if waited == Ok(0) {
        eprintln!("the agent did not open its socket within {} s", START_PATIENCE_MS / 1000);
        return 1;
    }
    let _ = news.read_to_string(&mut text);
    match text.strip_prefix('-') {
        _ if text == "+" => 0,
        Some(why) => {
            eprint!("{why}");
            1
        }
        None => {
            eprintln!("the agent ended before it opened its socket");
            1
        }
    }
}
