//! `cargo xtask test`: all tests, and how many did not run.

use crate::{command, setup};
use anyhow::{Context, Result, bail, ensure};
use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read, Write},
    process::{Command, Stdio},
    sync::Mutex,
};

/// How a test says that it did not run, and why.
const SKIPPED: &str = "SKIPPED";

/// What was seen in the output of the test programs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    programs: usize,
    passed: usize,
    failed: usize,
    ignored: usize,
    /// What tests said who did not run, or not in full.
    skipped: BTreeSet<String>,
}

impl Tally {
    fn take(&mut self, line: &str) {
        if let Some(at) = line.find(SKIPPED) {
            // With the name of the test that was running, where the line has one: "test name ... SKIPPED (needs root)".
            let test = line[..at].strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")).map(|(name, _)| name);
            let said = line[at + SKIPPED.len()..].trim_matches([' ', ':']);
            self.skipped.insert(test.map_or_else(|| said.to_owned(), |test| format!("{test}: {said}")));
        }
        // "test result: ok. 12 passed; 0 failed; 1 ignored; ..."
        let Some(result) = line.strip_prefix("test result: ") else { return };
        self.programs += 1;
        for count in result.split(['.', ';']) {
            let mut words = count.split_ascii_whitespace();
            let Some(number) = words.next().and_then(|word| word.parse::<usize>().ok()) else { continue };
            match words.next() {
                Some("passed") => self.passed += number,
                Some("failed") => self.failed += number,
                Some("ignored") => self.ignored += number,
                _ => (),
            }
        }
    }

    fn print(&self) {
        if !self.skipped.is_empty() {
            println!("\n{} SKIPPED, in full or in part:", self.skipped.len());
            for name in &self.skipped {
                println!("  {name}");
            }
        }
        let Self { programs, passed, failed, ignored, skipped } = self;
        println!(
            "\nall test programs ({programs}): {passed} passed; {failed} failed; {ignored} ignored; {} skipped",
            skipped.len()
        );
    }
}

/// Runs the tests whose name contains `filter`.
pub fn run(filter: Option<&str>) -> Result<()> {
    setup::run()?;
    let mut cargo = command::cargo();
    // The feature compiles the fault points in; one thread, since tests attach to processes and stop their threads.
    cargo.args(["test", "--workspace", "--all-features", "--no-fail-fast"]);
    cargo.args(filter).args(["--", "--test-threads=1", "--nocapture"]);
    let tally = Mutex::new(Tally::default());
    let success = watch(&mut cargo, &tally, &mut std::io::stdout(), &mut std::io::stderr())?;
    let tally = tally.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    tally.print();
    if !success || tally.failed > 0 {
        bail!("tests failed");
    }
    match filter {
        Some(filter) => ensure!(tally.passed > 0, "no test has {filter} in its name"),
        None => ensure!(tally.passed > 0, "no test ran"),
    }
    Ok(())
}

/// Runs a command, passes on what it says, and counts; gives whether it succeeded.
fn watch(
    command: &mut Command,
    tally: &Mutex<Tally>,
    to_output: &mut impl Write,
    to_errors: &mut (impl Write + Send),
) -> Result<bool> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("cargo can't be started")?;
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let (output, errors) = (output.context("a pipe")?, errors.context("a pipe")?);
    std::thread::scope(|scope| {
        // Tests speak on both; both are ours to read.
        let other = scope.spawn(|| pass(errors, to_errors, tally));
        let own = pass(output, to_output, tally);
        own.and(other.join().unwrap_or_else(|_| bail!("the reader of test output failed")))
    })?;
    Ok(child.wait()?.success())
}

fn pass(from: impl Read, to: &mut impl Write, tally: &Mutex<Tally>) -> Result<()> {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    // What tests print need not be text.
    while from.read_until(b'\n', &mut line)? > 0 {
        to.write_all(&line)?;
        to.flush()?;
        let text = String::from_utf8_lossy(&line);
        tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take(text.trim_end());
        line.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_skipped_tests_are_counted() {
        let mut tally = Tally::default();
        for line in [
            "test a::b ... SKIPPED (needs root): b",
            "ok",
            "SKIPPED (needs root): c",
            "SKIPPED: clang is not installed",
            "SKIPPED: clang is not installed",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.01s",
            "test result: FAILED. 2 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.53s",
        ] {
            tally.take(line);
        }
        let skipped = ["(needs root): c", "a::b: (needs root): b", "clang is not installed"].map(str::to_owned).into();
        assert_eq!(tally, Tally { programs: 2, passed: 14, failed: 4, ignored: 1, skipped });
    }

    #[test]
    fn both_outputs_and_the_end_are_seen() {
        let tally = Mutex::new(Tally::default());
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo SKIPPED: one; echo SKIPPED: two >&2; printf '\\377\\n'; exit 1"]);
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        assert!(!watch(&mut shell, &tally, &mut output, &mut errors).expect("a shell"));
        assert_eq!((output.as_slice(), errors.as_slice()), (&b"SKIPPED: one\n\xff\n"[..], &b"SKIPPED: two\n"[..]));
        assert_eq!(tally.into_inner().expect("no panic").skipped.len(), 2);
    }
}
