//! Options that say what is checked in the sandbox, for `asap sandbox enter` and `asap run`.

use crate::{
    cli::context::shown,
    report::{Failure, FailureKind},
    sandbox::policy::{Action, Guard, Policy},
};
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// Longest policy file that is read, bytes.
const MAX_FILE: u64 = 2 << 20;

/// What is checked.
#[derive(Debug, Default, clap::Args)]
pub struct GuardOptions {
    /// What is checked, and what is done about it, is said by this file (TOML; see docs/policy.md).
    #[arg(long, value_name = "FILE", conflicts_with_all = ["guards", "action"])]
    policy: Option<PathBuf>,
    /// What is checked, without a file: several with commas between them. Nothing if left out.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "GUARD")]
    guards: Vec<Guard>,
    /// What the guards of --guards do when they meet something; kill if left out. It is reported in any case.
    #[arg(long, value_enum, requires = "guards", value_name = "ACTION")]
    action: Option<Action>,
}

impl GuardOptions {
    /// The policy that these options say.
    ///
    /// # Errors
    /// The file can't be read, or is no policy.
    pub fn read(&self) -> Result<Policy, Failure> {
        match &self.policy {
            Some(path) => read_file(path),
            None => Ok(Policy::of(&self.guards, self.action.unwrap_or_default())),
        }
    }
}

fn read_file(path: &Path) -> Result<Policy, Failure> {
    let wrong = |what: String| Failure {
        kind: FailureKind::Usage,
        ..Failure::refused(format!("the policy {} {what}", shown(path)), "see docs/policy.md for what can be written")
    };
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text));
    read.map_err(|error| wrong(format!("can't be read: {error}")))?;
    Policy::read(&text).map_err(|error| wrong(format!("can't be used: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: GuardOptions,
    }

    fn parse(line: &str) -> Result<GuardOptions, clap::Error> {
        Line::try_parse_from(line.split(' ')).map(|line| line.options)
    }

    #[test]
    fn guards_come_from_the_command_line_or_a_file() {
        let policy = |line: &str| parse(line).expect(line).read();
        assert_eq!(policy("x").expect("nothing is a policy"), Policy::default());
        let some = policy("x --guards nx,shadow-stack --action log").expect("it is one");
        assert_eq!(some.guards, [Guard::ShadowStack, Guard::Nx]);
        assert_eq!((some.action(Guard::Nx), some.check().is_ok()), (Action::Log, true));
        let all = policy("x --guards shadow-stack,cfi,nx,syscalls").expect("it is one");
        assert_eq!((all.guards.len(), all.action(Guard::Cfi), all.check().is_ok()), (4, Action::Kill, true));

        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("web.toml");
        std::fs::write(&file, "guards = [\"cfi\"]\n[actions]\ncfi = \"stop\"\n").expect("written");
        let read = policy(&format!("x --policy {}", file.display())).expect("it is one");
        assert_eq!(read.action(Guard::Cfi), Action::Stop);
        std::fs::write(&file, "guards = [\"cfi\"]\nfail = \"never\"\n").expect("written");
        let failure = policy(&format!("x --policy {}", file.display())).expect_err("it is none");
        assert_eq!(failure.kind, FailureKind::Usage);
        assert!(failure.message.contains("line 2") && failure.message.contains("web.toml"), "{failure:?}");
        policy("x --policy /nonexistent/web.toml").expect_err("there is none");
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        for line in ["x --policy a --guards cfi", "x --action log", "x --guards shadow", "x --policy a --action kill"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
