//! A conversation with a booted guest: tests are run one by one, and what they want compiled meanwhile is.

use crate::{
    compile,
    protocol::{self, End, Ended, Run, ToGuest, ToHost},
};
use anyhow::{Context, Result, bail};
use std::{
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    time::{Duration, Instant},
};

/// How long a guest may be silent beyond a test's limit.
const GRACE: Duration = Duration::from_secs(60);

/// A guest that has booted.
#[derive(Debug)]
pub struct Session {
    stream: UnixStream,
    scratch: PathBuf,
    compiled: usize,
    /// What `uname -r` says in there.
    pub release: String,
}

/// What a test said, and how it ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Both its outputs.
    pub output: Vec<u8>,
    /// Its end.
    pub ended: Ended,
}

impl Session {
    /// Waits until the guest has booted. `lives` tells whether the emulator still runs. Files that are compiled are put below
    /// `scratch`.
    pub fn begin(
        listener: &UnixListener,
        limit: Duration,
        scratch: PathBuf,
        lives: &mut dyn FnMut() -> Result<bool>,
    ) -> Result<Self> {
        let begun = Instant::now();
        listener.set_nonblocking(true)?;
        let mut stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => (),
                Err(error) => return Err(error.into()),
            }
            if !lives()? || begun.elapsed() > limit {
                bail!("the emulator did not come up");
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(limit))?;
        let (hello, _) = protocol::receive(&mut stream)
            .context("the guest did not boot in time")?
            .context("the guest ended before it had booted")?;
        let ToHost::Ready { release } = hello else { bail!("the guest began with {hello:?}") };
        Ok(Self { stream, scratch, compiled: 0, release })
    }

    /// Runs a test. An error means that the guest is lost.
    pub fn run(&mut self, run: &Run) -> Result<Outcome> {
        self.stream.set_read_timeout(Some(Duration::from_secs(run.limit) + GRACE))?;
        protocol::send(&mut self.stream, &ToGuest::Run(run.clone()), b"")?;
        let mut output = Vec::new();
        loop {
            let frame = protocol::receive(&mut self.stream).context("the guest hangs, or does not make sense");
            match frame?.context("the guest ended")? {
                (ToHost::Output, said) => output.extend(said),
                (ToHost::Ended(ended), _) => return Ok(Outcome { output, ended }),
                (ToHost::Compile(request), heap) => self.compile(&request, &heap)?,
                (ToHost::Ready { .. }, _) => bail!("the guest has booted again"),
            }
        }
    }

    fn compile(&mut self, request: &protocol::Compile, heap: &[u8]) -> Result<()> {
        self.compiled += 1;
        let scratch = self.scratch.join(format!("compile-{}", self.compiled));
        std::fs::create_dir_all(&scratch)?;
        let result = compile::compile(request, heap, &scratch);
        let removed = std::fs::remove_dir_all(&scratch);
        let (answer, heap) = result.with_context(|| format!("{} {:?}", request.program, request.arguments))?;
        removed?;
        protocol::send(&mut self.stream, &ToGuest::Compiled(answer), &heap)
    }

    /// Ends the guest.
    pub fn power_off(mut self) -> Result<()> {
        protocol::send(&mut self.stream, &ToGuest::PowerOff, b"")
    }
}

/// Whether a test may be called passed, failed or skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It did what it should.
    Passed,
    /// It said that it did not run, or not in full.
    Skipped(String),
    /// It did not; why.
    Failed(String),
}

impl Outcome {
    /// What libtest's words and the end of the process say together.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let text = String::from_utf8_lossy(&self.output);
        let mut wrong = Vec::new();
        match &self.ended.end {
            // One test was asked for: one has to have run. Else its name is not known in there.
            End::Code(0) if text.contains("test result: ok. 1 passed") => (),
            End::Code(0) if text.contains("; 1 ignored;") => return Verdict::Skipped("ignored".to_owned()),
            End::Code(0) => wrong.push("it ended without a result".to_owned()),
            End::Code(code) => wrong.push(format!("exit code {code}")),
            End::Signal(signal) => wrong.push(format!("ended by signal {signal}")),
            End::TimeLimit => wrong.push("did not end in time".to_owned()),
            End::NotStarted(why) => wrong.push(format!("could not be started: {why}")),
        }
        if !self.ended.left.is_empty() {
            wrong.push(format!("left processes behind: {}", self.ended.left.join(", ")));
        }
        if !self.ended.complaints.is_empty() {
            wrong.push(format!("the kernel complained: {}", self.ended.complaints.join(" / ")));
        }
        if !wrong.is_empty() {
            return Verdict::Failed(wrong.join("; "));
        }
        let skipped = text.lines().find_map(|line| line.split_once("SKIPPED"));
        skipped.map_or(Verdict::Passed, |(_, why)| Verdict::Skipped(why.trim_matches([' ', ':']).to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(output: &str, end: End) -> Outcome {
        let ended = Ended { end, left: vec![], complaints: vec![], took: 1 };
        Outcome { output: output.as_bytes().to_vec(), ended }
    }

    #[test]
    fn only_one_test_that_ran_is_a_pass() {
        let passed = "test a ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored\n";
        assert_eq!(outcome(passed, End::Code(0)).verdict(), Verdict::Passed);
        let none = "test result: ok. 0 passed; 0 failed; 0 ignored\n";
        for bad in [outcome(none, End::Code(0)), outcome(passed, End::Code(101)), outcome(passed, End::TimeLimit)] {
            assert!(matches!(bad.verdict(), Verdict::Failed(_)), "{bad:?}");
        }
        let mut messy = outcome(passed, End::Code(0));
        messy.ended.left.push("17 sleep".to_owned());
        assert_eq!(messy.verdict(), Verdict::Failed("left processes behind: 17 sleep".to_owned()));
    }

    #[test]
    fn a_skipped_test_says_why() {
        let text = "SKIPPED: no gdb here\ntest a ... ok\ntest result: ok. 1 passed; 0 failed\n";
        assert_eq!(outcome(text, End::Code(0)).verdict(), Verdict::Skipped("no gdb here".to_owned()));
    }

    #[test]
    fn a_guest_that_ends_is_an_error() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let mut session = Session { stream: ours, scratch: PathBuf::new(), compiled: 0, release: String::new() };
        drop(theirs);
        let run = Run { program: String::new(), arguments: vec![], limit: 1, setting: Default::default() };
        assert!(session.run(&run).is_err());
    }
}
