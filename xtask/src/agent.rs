//! A private agent of asap's for one run: own socket, own log.

use crate::owned::Owned;
use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    fs,
    os::unix::{fs::DirBuilderExt, net::UnixStream, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// A running agent; ends with this value.
pub struct Agent {
    asap: PathBuf,
    directory: PathBuf,
    process: Owned,
}

/// `asap` with the options that lead to the agent of `directory`.
fn asap(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["--socket".as_ref(), directory.join("agent.sock").as_os_str()]);
    command.args(["--log".as_ref(), directory.join("audit.jsonl").as_os_str()]);
    command.stdin(Stdio::null());
    command
}

impl Agent {
    /// Starts it with its socket below `directory`; where one has been before, it takes its place.
    pub fn start(program: &Path, directory: &Path) -> Result<Self> {
        let directory = directory.join("run");
        fs::DirBuilder::new().mode(0o700).recursive(true).create(&directory)?;
        let process = Owned::spawn(asap(program, &directory).arg("agent").stdout(Stdio::null()))?;
        let mut agent = Self { asap: program.to_owned(), directory, process };
        let deadline = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(agent.directory.join("agent.sock")).is_err() {
            if let Some(status) = agent.process.ended()? {
                bail!("the agent ended with {status}");
            }
            if Instant::now() > deadline {
                bail!("the agent does not answer");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(agent)
    }

    /// The words that ask this agent, for a shell.
    pub fn command_line(&self) -> String {
        let words = asap(&self.asap, &self.directory);
        let words = std::iter::once(words.get_program()).chain(words.get_args());
        words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Runs `asap` with `arguments`; gives its answer, or its words.
    pub fn ask(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = asap(&self.asap, &self.directory);
        let output = command.arg("--json").args(arguments).output().context("asap can't be started")?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!("asap {}: {}{text}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        serde_json::from_str(&text).with_context(|| format!("asap {} answered {text}", arguments.join(" ")))
    }

    /// Starts `asap` with `arguments`, for a request that nobody waits for.
    pub fn begin(&self, arguments: &[&str]) -> Result<Owned> {
        let mut command = asap(&self.asap, &self.directory);
        Owned::spawn(command.arg("--json").args(arguments).stdout(Stdio::null()).stderr(Stdio::null()))
    }

    /// Kills it, without a word.
    pub fn kill(&mut self) -> Result<()> {
        kill(Pid::from_raw(self.pid()), Signal::SIGKILL).context("the agent can't be killed")?;
        let status = self.process.wait()?;
        ensure!(status.signal() == Some(libc::SIGKILL), "the agent ended with {status} before it was killed");
        Ok(())
    }
}
