//! `asap sandbox learned`: what was seen of a target's system calls, as a policy.

use super::{Target, status};
use crate::{
    cli::context::{Global, print, require_root, shown},
    report::{Failure, FailureKind, SandboxReport},
    sandbox::policy::{self, Action, Verdict},
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// See the module.
#[derive(Debug, clap::Args)]
pub struct Learned {
    #[command(flatten)]
    target: Target,
    /// What becomes of a call that was not seen: allow, log, kill, stop, or "errno NAME".
    #[arg(long, value_name = "ACTION", default_value = "kill")]
    default: Verdict,
    /// Write it to this file instead of standard output.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Learned {
    pub fn run(&self, global: &Global) -> Result<(), Failure> {
        require_root("sandbox learned")?;
        let report = status(&global.socket, self.target.pid)?;
        let policy = policy(&report, self.default)?;
        match &self.output {
            Some(path) => write_policy(path, &policy),
            None if global.json => global.show(&policy, String::new),
            None => print(&text(&policy)?),
        }
    }
}

/// Writes what was learned of a target to a file.
pub fn write(path: &Path, report: &SandboxReport) -> Result<(), Failure> {
    write_policy(path, &policy(report, Verdict::Do(Action::Kill))?)
}

/// Writes a policy to a file.
fn write_policy(path: &Path, policy: &policy::Policy) -> Result<(), Failure> {
    fs::write(path, text(policy)?).map_err(|error| Failure {
        kind: FailureKind::Failed,
        ..Failure::refused(format!("{} can't be written: {error}", shown(path)), "name another file")
    })
}

/// The policy of all processes of a target.
fn policy(report: &SandboxReport, default: Verdict) -> Result<policy::Policy, Failure> {
    let mut seen = report.families.iter().filter_map(|family| family.learned.as_ref());
    let Some(mut all) = seen.next().cloned() else {
        return Err(Failure::refused(
            format!("nothing is learned of the system calls of {}", report.pid),
            format!("asap sandbox enter --pid {} --learn", report.pid),
        ));
    };
    seen.for_each(|other| all.merge(other));
    Ok(all.policy(default))
}

fn text(policy: &policy::Policy) -> Result<String, Failure> {
    let written = policy.write().map_err(|error| Failure::refused(error.to_string(), "please report this"))?;
    Ok(format!(
        "# System calls that were seen, and what becomes of others. Look it through before it is used: what a program\n\
         # does once a month was hardly seen. Arguments are named where they choose what a call does.\n\n{written}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{report::SandboxFamily, sandbox::policy::Learned as Seen};

    #[test]
    fn what_all_processes_did_is_one_policy() {
        let mut report = super::super::show::tests::example();
        let nothing = policy(&report, Verdict::Allow).expect_err("nothing was learned");
        assert!(nothing.way_out.contains("--learn"), "{nothing:?}");
        let of = |number| {
            let mut seen = Seen::default();
            seen.observe(number, &[0; 6]);
            SandboxFamily { learned: Some(seen), ..SandboxFamily::default() }
        };
        report.families = vec![of(0), of(1)];
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("web.toml");
        write(&file, &report).expect("it can be written");
        let read = policy::Policy::read(&fs::read_to_string(&file).expect("it is there")).expect("a policy");
        let calls = read.syscalls.expect("they are there");
        assert_eq!(calls.default, Verdict::Do(Action::Kill));
        assert_eq!(calls.rules[0].calls.iter().map(ToString::to_string).collect::<Vec<_>>(), ["read", "write"]);
        write(&directory.path().join("none/web.toml"), &report).expect_err("no such directory");
    }
}
