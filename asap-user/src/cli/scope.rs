//! Selectors: which processes of the whole machine a command means. The list is shown, and a person says yes, before anything is
//! asked of the agent.

use super::{
    context::Global,
    text::{count, printable, table},
};
use crate::{
    report::{Failure, FailureKind, Member, ScopedOutcome, ScopedReport},
    scope::{Candidate, Selector, SelectorError, find},
};
use std::{
    io::{BufRead, IsTerminal, Write, stderr, stdin},
    path::PathBuf,
};

/// Options that select processes of the whole machine.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Selectors {
    /// All processes that run this file, also those that ran it before it was replaced.
    #[arg(long, value_name = "PATH", group = "selector", conflicts_with = "pid")]
    exe: Option<PathBuf>,
    /// All processes that map this library, also as it was before it was replaced. A name without `/` means any file of that name.
    #[arg(long, value_name = "PATH", group = "selector", conflicts_with = "pid")]
    lib: Option<PathBuf>,
    /// All processes of this service (systemd), slice or other control group.
    #[arg(long, value_name = "NAME", group = "selector", conflicts_with = "pid")]
    unit: Option<String>,
    /// All processes that map code of the build with this build-id, or one that begins so (8 digits or more).
    #[arg(long, value_name = "ID", group = "selector", conflicts_with = "pid")]
    all_with_build_id: Option<String>,
    /// With one of the selectors: don't ask.
    #[arg(long, short, requires = "selector")]
    yes: bool,
    /// With one of the selectors: what can't be done to all of them is done to none. Else each target stands for itself, and exit
    /// code 3 says that some are left.
    #[arg(long, requires = "selector")]
    all_or_none: bool,
}

impl Selectors {
    /// What is selected; none: nothing is.
    fn selector(&self) -> Option<Selector> {
        let Self { exe, lib, unit, all_with_build_id, .. } = self.clone();
        exe.map(Selector::Executable)
            .or(lib.map(Selector::Library))
            .or(unit.map(Selector::Unit))
            .or(all_with_build_id.map(Selector::BuildId))
    }

    /// Whether one was given.
    pub fn is_given(&self) -> bool {
        self.selector().is_some()
    }

    /// Whether what can't be done to all is to be done to none.
    pub const fn all_or_none(&self) -> bool {
        self.all_or_none
    }

    /// Finds the processes, shows them, and asks whether to `act`; none: no selector was given.
    pub fn choose(&self, global: &Global, act: &str) -> Result<Option<Vec<Member>>, Failure> {
        let Some(selector) = self.selector() else { return Ok(None) };
        let found = find(&selector).map_err(|error| {
            let kind = match error {
                SelectorError::Senseless(_) => FailureKind::Usage,
                SelectorError::Unlisted(_) => FailureKind::Refused,
            };
            Failure {
                kind,
                ..Failure::refused(error.to_string(), "see `asap attach --help` for what selects processes")
            }
        })?;
        let members: Vec<Member> = found.iter().filter(|one| one.skipped.is_none()).map(|one| one.member).collect();
        if !global.json || !self.yes {
            let _ = stderr().write_all(listed(&found).as_bytes());
        }
        if members.is_empty() {
            let why = match found.len() {
                0 => "there is no such process".to_owned(),
                some => format!("of {} that it means none may be touched", count(some, "process", "processes")),
            };
            return Err(Failure::refused(
                format!("the selector leaves nothing to do: {why}"),
                "look with ps, or /proc/PID/maps",
            ));
        }
        if !self.yes {
            confirm(act, members.len())?;
        }
        Ok(Some(members))
    }
}

fn confirm(act: &str, number: usize) -> Result<(), Failure> {
    if !stdin().is_terminal() {
        return Err(Failure {
            kind: FailureKind::Usage,
            ..Failure::refused(
                format!("`{act}` means {}, and nobody is there to be asked", count(number, "process", "processes")),
                "look at the list, then say --yes",
            )
        });
    }
    let _ = write!(stderr(), "{act} {}? [y/N] ", count(number, "process", "processes"));
    let mut answer = String::new();
    let _ = stdin().lock().read_line(&mut answer);
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(Failure::cancelled("the answer was not yes"))
}

/// The list of processes that a selector means.
fn listed(found: &[Candidate]) -> String {
    let row = |one: &Candidate| {
        let place = if one.is_elsewhere { "other mounts" } else { "" };
        vec![
            one.member.pid.to_string(),
            one.user.to_string(),
            one.name.clone(),
            one.executable.clone(),
            place.to_owned(),
            one.skipped.as_ref().map_or_else(String::new, |why| format!("left out: {why}")),
        ]
    };
    if found.is_empty() {
        return String::new();
    }
    table("  ", &["PROCESS", "USER", "NAME", "EXECUTABLE", "PLACE", ""], found.iter().map(row))
}

/// What became of the targets, and the failure that it amounts to.
pub fn finish(global: &Global, reply: &crate::report::Reply, report: &ScopedReport) -> Result<(), Failure> {
    global.show(reply, || results(report))?;
    global.is_said.set(true);
    report.failure().map_or(Ok(()), Err)
}

fn results(report: &ScopedReport) -> String {
    let rows = report.targets.iter().map(|target| {
        let (what, processes, notes) = match &target.outcome {
            ScopedOutcome::Attached(report) => ("attached", report.processes.len(), report.notes.join("; ")),
            ScopedOutcome::Patched(report) if report.dry_run => {
                ("would fit", report.processes.len(), report.notes.join("; "))
            }
            ScopedOutcome::Patched(report) if report.already => ("has it already", 0, report.notes.join("; ")),
            ScopedOutcome::Patched(report) => ("patched", report.processes.len(), report.notes.join("; ")),
            ScopedOutcome::Failed(failure) => ("FAILED", 0, printable(&failure.message)),
        };
        let processes = if processes == 0 { String::new() } else { processes.to_string() };
        vec![target.pid.to_string(), what.to_owned(), processes, notes]
    });
    let mut text = table("", &["TARGET", "RESULT", "PROCESSES", ""], rows);
    text.push_str(&format!(
        "{}, {}\n",
        count(report.targets.len(), "target", "targets"),
        super::text::microseconds(report.total_us)
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::TargetState;

    fn candidate(pid: i32, skipped: Option<&str>) -> Candidate {
        Candidate {
            member: Member { pid, start_time: 1 },
            name: "ng\u{1b}inx".to_owned(),
            executable: "/usr/sbin/nginx (deleted)".to_owned(),
            user: 33,
            is_elsewhere: pid == 7,
            skipped: skipped.map(str::to_owned),
        }
    }

    #[test]
    fn the_list_tells_who_is_meant_and_who_is_left_out() {
        assert_eq!(
            listed(&[candidate(1, Some("it is the system's first process")), candidate(7, None)]),
            "\x20 PROCESS  USER  NAME         EXECUTABLE                 PLACE
  1        33    ng\\u{1b}inx  /usr/sbin/nginx (deleted)                left out: it is the system's first process
  7        33    ng\\u{1b}inx  /usr/sbin/nginx (deleted)  other mounts
"
        );
    }

    #[test]
    fn results_add_up_to_one_exit_code() {
        let failed = |pid, kind| crate::report::ScopedResult {
            pid,
            members: vec![pid],
            outcome: ScopedOutcome::Failed(Failure { kind, ..Failure::refused("busy\u{1b}", "wait") }),
        };
        let done = crate::report::ScopedResult {
            pid: 5,
            members: vec![5, 6],
            outcome: ScopedOutcome::Patched(super::super::report::tests::patch_report()),
        };
        let report = |targets| ScopedReport { targets, total_us: 1500 };
        let code = |report: &ScopedReport| report.failure().map_or(0, |failure| failure.kind.exit_code());
        assert_eq!(code(&report(vec![done.clone()])), 0);
        let partly = report(vec![done, failed(9, FailureKind::Timeout)]);
        let failure = partly.failure().expect("one failed");
        assert_eq!((code(&partly), failure.state), (3, TargetState::PartlyDone));
        assert!(failure.message.contains("1 of 2 targets") && failure.message.contains("9: busy"), "{failure}");
        assert_eq!(code(&report(vec![failed(8, FailureKind::Timeout), failed(9, FailureKind::Timeout)])), 4);
        assert_eq!(code(&report(vec![failed(8, FailureKind::Refused), failed(9, FailureKind::Timeout)])), 1);
        assert_eq!(
            results(&partly),
            "\
TARGET  RESULT   PROCESSES
5       patched  1          a note
9       FAILED              busy\\u{1b}
2 targets, 1.5 ms
"
        );
    }
}
