//! `cargo xtask test`: all tests, and how many were skipped.

use crate::{command, setup};
use anyhow::{Result, bail};
use std::{
    io::{BufRead, BufReader},
    process::Stdio,
};

/// How a test says that it did not run.
const SKIPPED: &str = "SKIPPED (needs root): ";

/// Runs the tests whose name contains `filter`.
pub fn run(filter: Option<&str>) -> Result<()> {
    setup::run()?;
    let mut cargo = command::cargo();
    // The feature compiles the fault points in; one thread, since tests attach to processes and measure nothing.
    cargo.args(["test", "--workspace", "--features", "asap-user/fault-points", "--no-fail-fast"]);
    cargo.args(filter).args(["--", "--test-threads=1", "--nocapture"]);
    cargo.stdout(Stdio::piped());
    let mut child = cargo.spawn()?;
    let mut skipped = Vec::new();
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            let line = line?;
            if let Some(at) = line.find(SKIPPED) {
                skipped.push(line[at + SKIPPED.len()..].to_owned());
            }
            println!("{line}");
        }
    }
    let status = child.wait()?;
    if !skipped.is_empty() {
        println!("\n{} tests were SKIPPED because they need root:", skipped.len());
        for name in &skipped {
            println!("  {name}");
        }
    }
    if !status.success() {
        bail!("tests failed");
    }
    Ok(())
}
