//! The benchmarks' worker program: compiled, started, talked to.

use crate::{command, owned::Owned};
use anyhow::{Context, Result, bail};
use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
};

/// A running worker program; ends with this value.
pub struct Workers {
    child: Owned,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// What the workers saw since the last mark.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Longest pause of a worker, ns.
    pub longest: u64,
    /// Workers that have run the new function.
    pub fresh: usize,
    /// When the last of them first did, CLOCK_MONOTONIC ns.
    pub last_new: u64,
    /// Wrong results.
    pub wrong: u64,
}

/// Compiles a fixture into `directory`.
pub fn compile(directory: &Path, source: &str, arguments: &[&str], output: &str) -> Result<PathBuf> {
    let output = directory.join(output);
    let source = command::top().join("xtask/fixtures").join(source);
    command::run(Command::new("gcc").args(["-O2", "-Wall"]).args(arguments).arg("-o").arg(&output).arg(source))?;
    Ok(output)
}

impl Workers {
    /// Starts `threads` workers.
    pub fn start(program: &Path, threads: usize, hot: bool) -> Result<Self> {
        let mut command = Command::new(program);
        command.args([threads.to_string().as_str(), if hot { "hot" } else { "paced" }]);
        let mut child = Owned::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let input = child.stdin().context("a pipe")?;
        let output = BufReader::new(child.stdout().context("a pipe")?);
        Ok(Self { child, input, output })
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.child.pid()
    }

    /// How they ended, if they have.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.ended()
    }

    fn ask(&mut self, word: &str) -> Result<String> {
        self.input.write_all(word.as_bytes())?;
        self.input.write_all(b"\n")?;
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the workers ended");
        }
        Ok(line)
    }

    /// Forgets what was measured.
    pub fn mark(&mut self) -> Result<()> {
        self.ask("mark").map(drop)
    }

    /// What was measured.
    pub fn report(&mut self) -> Result<Seen> {
        let line = self.ask("report")?;
        let numbers: Vec<u64> = line.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
        let &[longest, fresh, last_new, wrong] = numbers.as_slice() else { bail!("the workers said {line}") };
        Ok(Seen { longest, fresh: fresh as usize, last_new, wrong })
    }

    /// Nanoseconds per call of the function.
    pub fn calls(&mut self) -> Result<f64> {
        self.ask("calls")?.trim().parse().context("a number")
    }
}
