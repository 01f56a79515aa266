//! A private agent of asap's for one run: own socket, own log.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A running agent; ends with this value.
pub struct Agent {
    asap: PathBuf,
    directory: PathBuf,
    process: Child,
}

impl Agent {
    /// Starts it with its socket in `directory`.
    pub fn start(asap: &Path, directory: &Path) -> Result<Self> {
        let run = directory.join("run");
        std::fs::create_dir(&run)?;
        std::os::unix::fs::chown(&run, Some(0), Some(0))?;
        std::fs::set_permissions(&run, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        let process = Command::new(asap)
            .args(["--socket".as_ref(), run.join("agent.sock").as_os_str()])
            .args(["--log".as_ref(), run.join("audit.jsonl").as_os_str()])
            .arg("agent")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("the agent can't be started")?;
        let agent = Self { asap: asap.to_owned(), directory: run, process };
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(agent.directory.join("agent.sock")).is_err() {
            if Instant::now() > deadline {
                bail!("the agent does not answer");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(agent)
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.process.id() as i32
    }

    /// Runs `asap` with `arguments`; gives its answer, or its words.
    pub fn ask(&self, arguments: &[&str]) -> Result<Value> {
        let output = Command::new(&self.asap)
            .args(["--socket".as_ref(), self.directory.join("agent.sock").as_os_str()])
            .args(["--log".as_ref(), self.directory.join("audit.jsonl").as_os_str()])
            .arg("--json")
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("asap can't be started")?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!("asap {}: {}{text}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        serde_json::from_str(&text).with_context(|| format!("asap {} answered {text}", arguments.join(" ")))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // SAFETY: no memory is involved; the child has not been waited for, so the pid is its own.
        unsafe { libc::kill(self.pid(), libc::SIGTERM) };
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if matches!(self.process.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
