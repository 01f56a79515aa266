//! `asap sandbox`.

use super::{
    client::{ask, ask_or_start, unexpected},
    context::{Global, require_root},
    text::{count, microseconds, point_in_time, printable, table},
};
use crate::{
    agent::DEFAULT_IDLE_EXIT,
    report::{Failure, Reply, Request, SandboxAction, SandboxReport, SandboxRequest},
    sandbox::NativeCode,
};
use std::collections::BTreeMap;

/// Run a live process in the sandbox, and take it out again.
///
/// In the sandbox, code runs out of pages that asap holds, one page after the other as threads first come to it. The file's own text
/// is kept aside and comes back when the process leaves. Children are in with their parent; a program that is started by
/// execve(2) is not. Patches go in and out as ever, and stay when the sandbox is left.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap sandbox enter --pid 1234
  asap sandbox status
  asap sandbox leave")]
#[command(arg_required_else_help = true, subcommand_required = true, disable_help_subcommand = true)]
pub struct Sandbox {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Take a process in, with its descendants that run the same executable. It is attached first if it is not yet.
    #[command(after_help = "Examples:\n  asap sandbox enter --pid 1234")]
    Enter(Target),
    /// Take it out again; text and memory map are then what they were.
    #[command(after_help = "Examples:\n  asap sandbox leave --pid 1234")]
    Leave(Target),
    /// Show what runs in the sandbox, what runs natively, and why.
    #[command(after_help = "Examples:\n  asap sandbox status --pid 1234 --json")]
    Status(Target),
}

#[derive(Debug, clap::Args)]
struct Target {
    /// The target; may be left out when there is one only.
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
}

impl Sandbox {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let (action, target, what) = match self.action {
            Action::Enter(target) => (SandboxAction::Enter, target, "sandbox enter"),
            Action::Leave(target) => (SandboxAction::Leave, target, "sandbox leave"),
            Action::Status(target) => (SandboxAction::Status, target, "sandbox status"),
        };
        require_root(what)?;
        let request = Request::Sandbox(SandboxRequest { pid: target.pid, action });
        let reply = match action {
            SandboxAction::Enter => ask_or_start(&global.agent_options(Some(DEFAULT_IDLE_EXIT)), &request)?,
            SandboxAction::Leave | SandboxAction::Status => ask(&global.socket, &request)?,
        };
        let Reply::Sandbox(report) = &reply else { return Err(unexpected(&reply)) };
        global.show(&reply, || shown(report, action))
    }
}

fn shown(report: &SandboxReport, action: SandboxAction) -> String {
    let processes = count(report.processes.len(), "process", "processes");
    let took = microseconds(report.total_us);
    let mut text = match action {
        SandboxAction::Enter => format!("{}: {processes} in the sandbox in {took}\n", report.pid),
        SandboxAction::Leave => format!("{}: {processes} out of the sandbox in {took}\n", report.pid),
        SandboxAction::Status => format!("{}: {processes}\n", report.pid),
    };
    if action != SandboxAction::Leave {
        let rows = report.processes.iter().map(|process| {
            vec![
                process.pid.to_string(),
                process.since.filter(|_| process.inside).map_or_else(|| "native".to_owned(), point_in_time),
                process.texts.to_string(),
                process.pages.to_string(),
                process.traps.to_string(),
            ]
        });
        text.push_str(&table("  ", &["PROCESS", "INSIDE SINCE", "TEXTS", "PAGES", "TRAPS"], rows));
        text.push_str(&native(report));
    }
    text + &report.notes.iter().map(|note| format!("  note: {}\n", printable(note))).collect::<String>()
}

/// What runs natively, once for all processes that say the same.
fn native(report: &SandboxReport) -> String {
    let mut found: BTreeMap<(&str, &str), (u64, usize)> = BTreeMap::new();
    for process in &report.processes {
        for NativeCode { length, name, reason, .. } in &process.native {
            let entry = found.entry((name, reason)).or_default();
            *entry = (*length.max(&entry.0), entry.1 + 1);
        }
    }
    let line = |((name, reason), (length, times)): ((&str, &str), (u64, usize))| {
        let name = if name.is_empty() { "anonymous memory" } else { name };
        let times = if times == 1 { String::new() } else { format!(", {times} times") };
        format!("  native: {} ({} KiB{times}): {}\n", printable(name), length / 1024, printable(reason))
    };
    found.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{address::TargetAddr, report::SandboxProcess};

    #[test]
    fn status_tells_what_is_in_and_what_is_not() {
        let native = NativeCode {
            start: TargetAddr(0x1000),
            length: 8192,
            name: "[vdso]".to_owned(),
            reason: "it belongs to the kernel".to_owned(),
        };
        let inside = SandboxProcess {
            pid: 7,
            inside: true,
            since: Some(1_700_000_000),
            texts: 3,
            pages: 500,
            traps: 41,
            native: vec![native.clone()],
        };
        let outside =
            SandboxProcess { pid: 8, inside: false, since: None, texts: 0, pages: 0, traps: 0, ..inside.clone() };
        let notes = vec!["a note".to_owned()];
        let report = SandboxReport { pid: 7, processes: vec![inside, outside], total_us: 1500, notes };
        assert_eq!(
            shown(&report, SandboxAction::Status),
            "\
7: 2 processes
  PROCESS  INSIDE SINCE          TEXTS  PAGES  TRAPS
  7        2023-11-14T22:13:20Z  3      500    41
  8        native                0      0      0
  native: [vdso] (8 KiB, 2 times): it belongs to the kernel
  note: a note
"
        );
        assert_eq!(
            shown(&report, SandboxAction::Leave),
            "7: 2 processes out of the sandbox in 1.5 ms\n  note: a note\n"
        );
    }
}
