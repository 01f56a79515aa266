//! The command line's side of the agent's socket.

use super::{context::shown, interrupt, progress::Progress};
use crate::{
    agent::{launch, socket},
    report::{Failure, FailureKind, Reply, Request, SandboxAction, TargetState},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
};
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

/// A living agent says at once that it has received a request.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);
/// Longest reply.
const MAX_REPLY: u64 = 64 << 20;
/// How long an agent may take to end.
const END_PATIENCE_MS: u16 = 10_000;

/// A connection to the agent.
pub struct Client {
    stream: BufReader<UnixStream>,
    agent: i32,
}

impl Client {
    /// Connects; none: no agent is running.
    pub fn connect(path: &Path) -> Result<Option<Self>, Failure> {
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                    io::ErrorKind::PermissionDenied => Err(Failure::refused(
                        format!("you may not talk to the agent at {}", shown(path)),
                        "run asap as root (sudo)",
                    )),
                    _ => Err(Failure::refused(
                        format!("the agent's socket {} can't be used: {error}", shown(path)),
                        "name the agent's socket with --socket",
                    )),
                };
            }
        };
        let peer = getsockopt(&stream, PeerCredentials).map_err(|error| broken(&error.into()))?;
        if !socket::admits(peer.uid()) {
            return Err(Failure::refused(
                format!("{} belongs to user {}, who is neither root nor you", shown(path), peer.uid()),
                "name the agent's socket with --socket",
            ));
        }
        Ok(Some(Self { stream: BufReader::new(stream), agent: peer.pid() }))
    }

    /// The agent's pid.
    pub const fn agent(&self) -> i32 {
        self.agent
    }

    /// Sends a request and waits for its answer, showing steps meanwhile. A failure that the agent reports is an error here.
    pub fn ask(&mut self, request: &Request) -> Result<Reply, Failure> {
        let mut line = serde_json::to_vec(request).map_err(|error| broken(&error.into()))?;
        line.push(b'\n');
        let connection = self.stream.get_ref().try_clone().map_err(|error| broken(&error))?;
        let looks = match request {
            Request::Status(_) | Request::List(_) => true,
            Request::Sandbox(request) => matches!(request.action, SandboxAction::Status | SandboxAction::Dump),
            _ => false,
        };
        let _armed = (!looks).then(|| interrupt::cancels(connection.as_fd()));
        let progress = Progress::start();
        // An agent that refuses a request while it is being sent has said why; so read on.
        let sent = self.stream.get_mut().write_all(&line);
        let _ = self.stream.get_mut().set_read_timeout(Some(SIGN_OF_LIFE));
        loop {
            let mut line = Vec::new();
            let read = (&mut self.stream).take(MAX_REPLY).read_until(b'\n', &mut line);
            if let Err(error) = read.and(Ok(())) {
                return Err(match error.kind() {
                    io::ErrorKind::WouldBlock => self.hung(),
                    _ => broken(sent.as_ref().err().unwrap_or(&error)),
                });
            }
            if line.last() != Some(&b'\n') {
                return Err(broken(&sent.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into())));
            }
            match serde_json::from_slice(&line).map_err(|error| broken(&error.into()))? {
                Reply::Progress(step) => {
                    let _ = self.stream.get_mut().set_read_timeout(None);
                    progress.step(&step);
                }
                Reply::Failed(failure) => return Err(failure),
                reply => return Ok(reply),
            }
        }
    }

    /// Waits until the agent's process has ended.
    pub fn wait_for_end(self) -> Result<(), Failure> {
        // SAFETY: a plain system call; the result is checked.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.agent, 0) };
        if pidfd < 0 {
            return Ok(()); // Gone already.
        }
        // SAFETY: a new descriptor that nobody else owns.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(END_PATIENCE_MS)) {
            Ok(0) => Err(self.hung()),
            _ => Ok(()),
        }
    }

    fn hung(&self) -> Failure {
        Failure {
            kind: FailureKind::Failed,
            state: TargetState::Unknown,
            ..Failure::refused(
                format!("the agent (pid {}) does not answer", self.agent),
                format!("kill -9 {}: its targets run on; then attach again", self.agent),
            )
        }
    }
}

/// The word for a request that needs an agent.
fn no_agent() -> Failure {
    Failure::refused("no agent is running, so nothing is attached", "attach first: asap attach --pid N")
}

/// Asks an agent that must be running.
pub fn ask(path: &Path, request: &Request) -> Result<Reply, Failure> {
    Client::connect(path)?.ok_or_else(no_agent)?.ask(request)
}

/// Asks the agent; starts one if none runs.
pub fn ask_or_start(options: &crate::agent::AgentOptions, request: &Request) -> Result<Reply, Failure> {
    connect_or_start(options)?.ask(request)
}

/// A connection to the agent, which is started if none runs.
pub fn connect_or_start(options: &crate::agent::AgentOptions) -> Result<Client, Failure> {
    let mut client = Client::connect(&options.socket)?;
    if client.is_none() {
        launch::start(options).map_err(|failure| Failure {
            message: format!("no agent is running, and none could be started: {}", failure.message),
            ..failure
        })?;
        client = Client::connect(&options.socket)?;
    }
    client.ok_or_else(no_agent)
}

/// An answer of the wrong kind.
pub fn unexpected(reply: &Reply) -> Failure {
    let kind = serde_json::to_value(reply).ok().and_then(|value| Some(value.get("reply")?.as_str()?.to_owned()));
    Failure {
        kind: FailureKind::Failed,
        state: TargetState::Unknown,
        ..Failure::refused(
            format!("the agent answered with \"{}\"", kind.unwrap_or_default()),
            "use the `asap` program that belongs to the agent, or `asap stop` the agent first",
        )
    }
}

fn broken(error: &io::Error) -> Failure {
    Failure {
        kind: FailureKind::Failed,
        state: TargetState::Unknown,
        ..Failure::refused(
            format!("the connection to the agent broke: {error}"),
            "the target runs on; `asap attach --pid N` shows its state; `asap log` what was asked",
        )
    }
}
