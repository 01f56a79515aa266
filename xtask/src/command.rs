//! Running other programs, with words when they fail.

use anyhow::{Context, Result, bail};
use std::{path::PathBuf, process::Command};

pub use xtask_setup::is_root;

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

/// A command of the nightly tool chain. What the surrounding cargo has set would lead back to the stable one.
pub fn nightly(program: &str) -> Command {
    let mut command = Command::new(program);
    command.arg("+nightly");
    for name in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "RUSTDOC", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        command.env_remove(name);
    }
    command
}

/// Builds `asap` and gives its path.
pub fn build_asap(release: bool, features: &[&str]) -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--package", "asap-user", "--bin", "asap"]);
    if release {
        build.arg("--release");
    }
    if !features.is_empty() {
        build.args(["--features", &features.join(",")]);
    }
    let built = executables(build)?.pop();
    Ok(built.context("cargo did not say where the binary is")?.path)
}

/// A program that cargo has built.
pub struct Executable {
    /// Where it is.
    pub path: PathBuf,
    /// Its target's name.
    pub name: String,
    /// Its target's kind: bin, lib, test.
    pub kind: String,
    /// It is a test program.
    pub is_test: bool,
}

/// Runs `cargo build`, or `cargo test --no-run`, and gives the programs that come of it.
pub fn executables(mut cargo: Command) -> Result<Vec<Executable>> {
    cargo.arg("--message-format=json-render-diagnostics").stderr(std::process::Stdio::inherit());
    let output = cargo.output().context("cargo can't be started")?;
    if !output.status.success() {
        bail!("{cargo:?} ended with {}", output.status);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let executable = |message: serde_json::Value| {
        Some(Executable {
            path: message["executable"].as_str()?.into(),
            name: word(&message["target"]["name"]),
            kind: word(&message["target"]["kind"][0]),
            is_test: message["profile"]["test"].as_bool() == Some(true),
        })
    };
    Ok(messages.filter_map(executable).collect())
}
