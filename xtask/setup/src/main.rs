//! What `cargo xtask` runs first: it installs what building the tasks needs, then builds and becomes them. Itself it needs Rust
//! and a linker, nothing else.

use anyhow::{Context, Result};
use std::{
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

fn main() -> ExitCode {
    match tasks() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tasks() -> Result<()> {
    xtask_setup::run()?;
    if std::env::args_os().skip(1).eq(["setup"]) {
        return Ok(());
    }
    let mut tasks = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    tasks.args(["run", "--quiet", "--package", "xtask", "--"]).args(std::env::args_os().skip(1));
    // Set for this program by the cargo that runs it.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME"] {
        tasks.env_remove(name);
    }
    // It takes our place: signals and exit code are its own.
    Err(tasks.exec()).context("cargo can't be started")
}
