//! Running other programs, with words when they fail.

use anyhow::{Context, Result, bail};
use std::{path::PathBuf, process::Command};

/// Runs a command to its end; its output goes where ours goes.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?} can't be started"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// The top folder of the project.
pub fn top() -> PathBuf {
    // Set by cargo for `cargo run`; the crate lies one level below the top.
    let own = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    own.parent().map_or_else(|| own.clone(), Into::into)
}

/// `cargo`, the one that runs us.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(top());
    hear_signals(&mut cargo);
    cargo
}

/// Signals that this process waits for on a thread of its own are held back in all others, and a child would inherit that: tests
/// that interrupt programs would wait for ever.
pub fn hear_signals(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: between fork and exec one system call is made; nothing is allocated.
    unsafe {
        command.pre_exec(|| nix::sys::signal::SigSet::empty().thread_set_mask().map_err(Into::into));
    }
}

/// Builds `asap` and gives its path.
pub fn build_asap(release: bool, features: &[&str]) -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--package", "asap-user", "--bin", "asap", "--message-format=json-render-diagnostics"]);
    if release {
        build.arg("--release");
    }
    if !features.is_empty() {
        build.args(["--features", &features.join(",")]);
    }
    build.stderr(std::process::Stdio::inherit());
    let output = build.output().context("cargo can't be started")?;
    if !output.status.success() {
        bail!("asap does not build");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let executable = messages.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(message.get("executable")?.as_str()?.to_owned())
    });
    Ok(executable.context("cargo did not say where the binary is")?.into())
}

/// Whether we are root.
pub fn is_root() -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::geteuid() == 0 }
}
